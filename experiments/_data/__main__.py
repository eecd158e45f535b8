"""Fetch a data set from its public source: `python -m experiments._data fashion_mnist`."""

from __future__ import annotations

import gzip
import os
import sys
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
            from_network = "://" in file.source
            packed = download(file.source) if from_network else gzip.compress(packages.read(file.source), mtime=0)
            files.unpack(packed, file, file.source)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}.part")  # who reads meanwhile sees all of a file or none
            part.write_bytes(packed)
            part.replace(path)
        done.append(path)
    return done


def download(url: str) -> bytes:
    """What a URL gives."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return bytes(answer.read())


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
