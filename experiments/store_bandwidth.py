"""How long a checkpoint takes to save and to restore, against plain Orbax, and what of it is the manifest.

Question   mpjax has Orbax write, then reads every file once more for its SHA-256; and once before each restore. What does
           that cost on 1 GB of params? And does it help that Orbax is told to begin a new file every 64 MiB?
Model      10^9 bytes of float32 exactly, normal random numbers, in the shapes of a GPT: an embedding and ten layers, 101
           arrays, on the default device. Random numbers compress by 7 %; trained params hardly better.
Method     each way to save in a fresh folder, in turn; the order rotates, the first round warms up and is not counted. The
           disk's queue is emptied before each save (sync). Medians, and from the least to the largest.
Caches     a restore right after a save finds the files in the page cache. So the kernel is asked to drop them first
           (posix_fadvise; whether it does so is its own affair): that is `cold`. `cached` is the same restore once more.
Time       10 minutes on 2 CPU cores that other work shares, and a GB of disk at a time.
Run        python -m experiments.store_bandwidth
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console

from experiments import _run
from mpjax.measure.table import policy_table, to_markdown
from mpjax.store import arrays, checkpoint, saving

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit."""

    bytes: int = 10**9
    """Of the params; a multiple of 4, from 10^5."""
    layers: int = 10
    """Of ten arrays each, which take three quarters of the bytes; the embedding takes the rest."""
    repeats: int = 5
    """Rounds that count."""
    seed: int = 0
    """Of the params."""
    workdir: str | None = None
    """The run's own folder, new or empty; what is saved lies there until the end, and is measured on its disk. Default:
    runs/store_bandwidth-date-time."""


def params(config: Config) -> Tree:
    """Arrays of exactly so many bytes, on the default device."""
    left = config.bytes // 4
    if config.bytes % 4 or config.bytes < 10**5:
        raise _run.Refused(f"got --bytes={config.bytes}; legal is a multiple of 4 from 100000")
    width = int((0.75 * left / (12 * config.layers)) ** 0.5)
    kernels = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    biases: dict[str, tuple[int, ...]] = {f"{name}_bias": shape[1:] for name, shape in kernels.items()}
    layer: dict[str, tuple[int, ...]] = {**kernels, **biases, "scale_1": (width,), "scale_2": (width,)}
    shapes = {f"layers_{n}.{name}": shape for n in range(config.layers) for name, shape in layer.items()}
    left -= sum(int(np.prod(shape)) for shape in shapes.values())
    shapes |= {"embedding": (left // width, width)} | ({"rest": (left % width,)} if left % width else {})
    random = np.random.default_rng(config.seed)
    return {name: jax.device_put(random.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


class Way(NamedTuple):
    """A way to save: `begin` saves and returns what waits for the end; `restore` takes a tree like what is to come."""

    begin: Callable[[Path, Tree], Callable[[], Any]]
    restore: Callable[[Path, Tree], Tree]


def ours(asynchronous: bool = False, **settings: Any) -> Way:
    """The Checkpointer, if need be with other settings of `mpjax.store.arrays`."""

    def begin(folder: Path, tree: Tree) -> Callable[[], Any]:
        checkpointer = checkpoint.Checkpointer(folder, asynchronous=asynchronous)
        with mock.patch.multiple(arrays, **settings) if settings else contextlib.nullcontext():
            checkpointer.save(tree, 0)
        return checkpointer.wait

    return Way(begin, lambda folder, like: checkpoint.Checkpointer(folder).restore(like))


def standard() -> Way:
    """Orbax's StandardCheckpointer, which saves beside the program by itself."""

    def begin(folder: Path, tree: Tree) -> Callable[[], Any]:
        checkpointer = ocp.StandardCheckpointer()
        checkpointer.save(folder / "0", tree)
        return checkpointer.close  # waits first

    def restore(folder: Path, like: Tree) -> Tree:
        with ocp.StandardCheckpointer() as checkpointer:
            return dict(checkpointer.restore(folder / "0", like))

    return Way(begin, restore)


def pytree() -> Way:
    """Orbax's PyTreeCheckpointer, the older and still the usual one."""

    def begin(folder: Path, tree: Tree) -> Callable[[], Any]:
        checkpointer = ocp.PyTreeCheckpointer()
        checkpointer.save(folder / "0", tree)
        return checkpointer.close

    def restore(folder: Path, like: Tree) -> Tree:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restore_args = ocp.checkpoint_utils.construct_restore_args(like)
            return dict(checkpointer.restore(folder / "0", item=like, restore_args=restore_args))

    return Way(begin, restore)


WAYS = {
    "mpjax": ours(), "mpjax, asynchronous": ours(asynchronous=True), "mpjax, files as Orbax cuts them": ours(FILE_BYTES=None),
    "Orbax StandardCheckpointer": standard(), "Orbax PyTreeCheckpointer": pytree(),
}  # fmt: skip

PARTS = {
    (checkpoint, "refuse_nonfinite"): "save: is it finite?",
    (saving, "seal"): "save: digests, fsync, manifest",
    (checkpoint, "check"): "restore: digests",
}
"""From the function that does a part of the work, in the room that calls it, to the part in words."""


@contextlib.contextmanager
def parts_timed(seconds: dict[str, float]) -> Iterator[None]:
    """While this lasts, the last time that each part of a Checkpointer took is noted."""

    def timed(part: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] = time.perf_counter() - start

        return run

    with contextlib.ExitStack() as stack:
        for (room, name), part in PARTS.items():
            stack.enter_context(mock.patch.object(room, name, timed(part, getattr(room, name))))
        yield


def files(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def digests(folder: Path, threads: int | None) -> float:
    """The seconds that the SHA-256 of every file takes with so many threads; None: as many as Python thinks right."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(digest, files(folder)))
    return time.perf_counter() - start


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files below a folder from its cache."""
    for path in files(folder):
        with path.open("rb") as file, contextlib.suppress(OSError):  # a file system that has no such thing
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(way: Way, folder: Path, tree: Tree) -> dict[str, float]:
    """One save and two restores of a tree, in seconds; the folder is new, and is gone afterwards."""
    folder.mkdir(parents=True)
    os.sync()
    found: dict[str, float] = {}
    with parts_timed(found):
        start = time.perf_counter()
        wait = way.begin(folder, tree)
        found["save returns"] = time.perf_counter() - start
        wait()
        found["saved"] = time.perf_counter() - start
        for state in ("cold", "cached"):
            if state == "cold":
                forget(folder)
            start = time.perf_counter()
            got = jax.block_until_ready(way.restore(folder, tree))
            found[f"restored, {state}"] = time.perf_counter() - start
            assert all(np.array_equal(got[name], x) for name, x in tree.items()), (
                "it came back otherwise than it was saved"
            )
            del got
    found |= {"digests, 1 thread": digests(folder, 1), "digests, all threads": digests(folder, None)}
    found |= {"files": len(files(folder)), "bytes on disk": sum(path.stat().st_size for path in files(folder))}
    shutil.rmtree(folder)
    return found


def spread(numbers: list[float]) -> str:
    """Median, and from the least to the largest."""
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f}–{max(numbers):.2f})"


def main(config: Config) -> dict[str, list[dict[str, float]]]:
    """Measure, show and write; returns the rounds of each way."""
    opened = _run.open_folder(config, "store_bandwidth", goes_on=False)
    logging.disable(logging.WARNING)  # Orbax says two dozen lines a save
    tree = params(config)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    with opened.begin() as folder, tempfile.TemporaryDirectory(dir=folder.absolute()) as saved:
        for n in range(config.repeats + 1):
            names = list(WAYS)[n % len(WAYS) :] + list(WAYS)[: n % len(WAYS)]
            for name in names:
                found = measure(WAYS[name], Path(saved) / str(n), tree)
                rounds[name] += [found] if n else []

    def column(name: str, key: str) -> list[float]:
        return [found[key] for found in rounds[name]]

    times = [
        {"way": name} | {f"{key} (s)": spread(column(name, key)) for key in
         ("save returns", "saved", "restored, cached", "restored, cold")}
        | {"saved (GB/s)": config.bytes / 1e9 / statistics.median(column(name, "saved")),
           "files": column(name, "files")[-1], "bytes on disk (MB)": statistics.median(column(name, "bytes on disk")) / 1e6}
        for name in WAYS
    ]  # fmt: skip
    parts = [
        {"part": key}
        | {f"{name} (s)": spread(column(name, key)) for name in ("mpjax", "mpjax, files as Orbax cuts them")}
        for key in (*PARTS.values(), "digests, 1 thread", "digests, all threads")
    ]
    threads = f"{os.cpu_count()} CPU threads"
    for title, rows in ((f"{config.bytes} bytes, {len(tree)} arrays", times), (threads, parts)):
        Console().print(policy_table(rows, title=title))
    (folder / "table.json").write_text(json.dumps({"cpu threads": os.cpu_count(), "rounds": rounds}, indent=1) + "\n")
    (folder / "table.md").write_text(f"{to_markdown(times)}\n\n{threads}:\n\n{to_markdown(parts)}\n")
    Console(soft_wrap=True).print(f"written to {folder}: config.json, table.json, table.md", highlight=False)
    return rounds


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
