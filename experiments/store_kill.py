"""kill -9 in every phase of a save, and whether anything that was saved is lost.

Question   a run may be killed at any moment. Is every save that returned whole, is nothing else taken for a step, and does
           the next process go on from there?
Method     a process saves state after state and announces each phase when it begins: data (Orbax writes), manifest
           (digests, and all on the disk), rename (the folder becomes the step), prune (older steps go). It is sent SIGKILL
           at a random moment of a chosen phase, spread over the length which that phase was measured to have. Where the
           kill hit is told by the last announcement; kills go on until each phase was hit its share of them.
Checked    after each kill: every step there is restored and compared bit for bit with what its number says; each save that
           was announced is among them, but for those that `keep` takes away; nothing else has a step's name; a new
           Checkpointer saves the next step, and no debris stays.
Broken     `--broken=copies` puts a step into place file by file, `--broken=hasty` announces a save before it is on the disk:
           the same checks must fail then, or they show nothing.
Limits     the kernel lives on: this says nothing about a power cut, against which a save only has its fsyncs.
Time       6 minutes on 2 CPU cores that other work shares.
Run        python -m experiments.store_kill --kills=200 --asynchronous=True
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import logging
import multiprocessing
import multiprocessing.connection
import shutil
import signal
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import _run
from mpjax.measure.table import policy_table, to_markdown
from mpjax.store import arrays, checkpoint, folders, saving
from mpjax.store.manifest import CheckpointWarning

PHASES = {"data": (arrays, "write"), "manifest": (saving, "seal"), "rename": (folders, "publish"),
          "prune": (folders, "remove")}  # fmt: skip
"""From each phase to the function that the Checkpointer begins it by."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit."""

    kills: int = 200
    """Processes to kill, at least: the same share of them in each phase."""
    phases: tuple[Literal["data", "manifest", "rename", "prune"], ...] = ("data", "manifest", "rename", "prune")
    """Where."""
    leaves: int = 6
    """Float32 arrays in the state."""
    size: int = 20_000
    """Elements of each."""
    keep: int = 3
    """Newest steps that stay."""
    asynchronous: bool = False
    """Whether the saves are; a save is then announced when `wait` returns."""
    broken: Literal["no", "copies", "hasty"] = "no"
    """A fault put into the saving process, which the checks must see."""
    seed: int = 0
    """Of the states and the moments."""
    workdir: str | None = None
    """The run's own folder, new or empty. Default: runs/store_kill-date-time."""


def state_of(config: Config, step: int) -> dict[str, Any]:
    """The state at a step, of which every bit follows from the seed and the step."""
    random = np.random.default_rng([config.seed, step])
    params = [random.standard_normal(config.size, np.float32) for _ in range(config.leaves)]
    return {
        "params": {f"layer_{n}": w for n, w in enumerate(params)},
        "ema": params[0].astype(jnp.bfloat16),
        "count": np.int32(2**24 + 1 + step),  # no float32 holds each of these
        "rng": jax.random.wrap_key_data(jnp.array(random.integers(2**32, size=2, dtype=np.uint32))),
    }


def bits(state: dict[str, Any]) -> list[tuple[str, tuple[int, ...], bytes]]:
    """What two equal states have in common: dtypes, shapes and bytes, NaNs and signs of zero included."""
    leaves = jax.tree.leaves({**state, "rng": jax.random.key_data(state["rng"])})
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in leaves]


def save_on_and_on(config: Config, directory: Path, first: int, pipe: multiprocessing.connection.Connection) -> None:
    """The life of a process that saves until it is killed. It tells of each phase as (moment, phase, step)."""
    step = first

    def announced(phase: str, function: Any) -> Any:
        def announce_and_do(*args: Any) -> Any:
            pipe.send((time.monotonic(), phase, step))
            return function(*args)

        return announce_and_do

    if config.broken == "copies":
        folders.publish = lambda folder, directory, step: shutil.copytree(folder, directory / str(step))
    for phase, (room, name) in PHASES.items():
        setattr(room, name, announced(phase, getattr(room, name)))
    checkpointer = checkpoint.Checkpointer(
        directory, config.keep, asynchronous=config.asynchronous or config.broken == "hasty"
    )
    for step in itertools.count(first):
        # Whether a state is finite is found by a compiled function, which would take longer than the save.
        checkpointer.save(jax.device_put(state_of(config, step)), step, allow_nonfinite=True)
        if config.broken != "hasty":
            checkpointer.wait()
        pipe.send((time.monotonic(), "saved", step))


Announcement = tuple[float, str, int]


def kill(config: Config, directory: Path, first: int, phase: str, nth: int, delay: float) -> list[Announcement]:
    """Let a process save, kill it so long after the nth beginning of a phase, and return all that it announced.

    Processes are forked from one that has imported everything and started no jax backend: a fresh one would take seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments._run", "mpjax.store.checkpoint", "orbax.checkpoint"])
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=save_on_and_on, args=(config, directory, first, its))
    process.start()
    its.close()
    heard: list[Announcement] = []
    try:
        while sum(name == phase for _, name, _ in heard) < nth:
            heard.append(ours.recv())
        time.sleep(max(0.0, heard[-1][0] + delay - time.monotonic()))
        process.kill()
        while True:  # until the pipe is empty
            heard.append(ours.recv())
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"the saving process ended by itself, with exit code {process.exitcode}") from None
        return heard
    finally:
        process.kill()


def debris(directory: Path) -> list[str]:
    """The names in a directory of steps that are neither a step's nor the lock's."""
    return [path.name for path in directory.iterdir() if not path.name.isdecimal() and path.name != ".lock"]


def failures(config: Config, directory: Path, saved: set[int], begun: int) -> list[str]:
    """What is wrong in a directory whose process was killed, and with the save of the next step, which is made here.

    Args:
      saved: the steps that were announced as saved.
      begun: the last step that was begun.
    """
    checkpointer = checkpoint.Checkpointer(directory, config.keep)
    there = checkpointer.steps()
    wrong = [
        f"step {step} was saved and is gone" for step in sorted({*saved, *there})[-config.keep :] if step not in there
    ]
    wrong += [f"step {step} is there and was never begun" for step in there if step > begun]
    names = {int(path.name) for path in directory.iterdir() if path.name.isdecimal()}
    wrong += [f"{step} has the name of a step and is none" for step in sorted(names.difference(there))]
    asked: list[tuple[int, int | None]] = [*((step, step) for step in there), *((step, None) for step in there[-1:])]
    with warnings.catch_warnings(action="error", category=CheckpointWarning):
        for step, argument in [*asked, (begun + 1, None)]:
            try:
                if step == begun + 1:
                    checkpointer.save(state_of(config, step), step)
                if bits(checkpointer.restore(state_of(config, 0), argument)) != bits(state_of(config, step)):
                    wrong.append(f"step {step} has other bits")
            except (ValueError, OSError, Warning) as error:
                wrong.append(f"step {step}: {type(error).__name__}: {error}")
    return wrong + [f"{name} stays" for name in debris(directory)]


def run(config: Config, folder: Path) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Kill until each phase was hit often enough, or thrice what was asked is spent: a row a kill, and how long phases were."""
    random = np.random.default_rng(config.seed)
    lengths: dict[str, list[float]] = {phase: [] for phase in PHASES}
    rows: list[dict[str, Any]] = []
    saved: set[int] = set()
    directory, first = folder / "checkpoints-0", 0
    while len(rows) < 3 * config.kills:
        hits = {phase: sum(row["hit"] == phase for row in rows) for phase in config.phases}
        aim = min(config.phases, key=hits.__getitem__)
        if hits[aim] * len(config.phases) >= config.kills:
            break
        delay = random.random() * statistics.median(lengths[aim] or [0])
        heard = kill(config, directory, first, aim, int(random.integers(1, 4)), delay)
        for (begin, name, _), (end, _, _) in itertools.pairwise(heard):
            if name in lengths:
                lengths[name].append(end - begin)
        saved |= {step for _, name, step in heard if name == "saved"}
        _, hit, begun = heard[-1]
        left, there = debris(directory), folders.steps(directory)
        wrong = failures(config, directory, saved, begun)
        saved.add(begun + 1)
        rows.append({"aim": aim, "delay (s)": delay, "hit": hit, "step": begun, "published": begun in there,
                     "debris": left, "failures": wrong})  # fmt: skip
        first = begun + 2
        if wrong:  # what failed stays to be looked at
            directory, saved = folder / f"checkpoints-{len(rows)}", set()
    shutil.rmtree(directory, ignore_errors=True)
    return rows, lengths


def main(config: Config) -> list[dict[str, Any]]:
    """Kill, check, show and write; returns a row a kill.

    Raises:
      SystemExit: something that was saved was lost, or something else was wrong.
    """
    opened = _run.open_folder(config, "store_kill", goes_on=False)
    logging.disable(logging.WARNING)  # Orbax says two dozen lines a save, and each restore of an older step warns
    with opened.begin() as folder:
        rows, lengths = run(config, folder)
    table = []
    for phase in (*PHASES, "saved"):
        hits = [row for row in rows if row["hit"] == phase]
        length = 1e3 * statistics.median(lengths[phase]) if lengths.get(phase) else None
        table.append({
            "killed in": "outside of these" if phase == "saved" else phase, "median length (ms)": length, "kills": len(hits),
            "the step was there": sum(row["published"] for row in hits),
            "debris was there": sum(bool(row["debris"]) for row in hits),
            "failed": sum(bool(row["failures"]) for row in hits),
        })  # fmt: skip
    Console().print(policy_table(table, title=f"{len(rows)} kills"))
    (folder / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "table.md").write_text(to_markdown(table) + "\n")
    Console(soft_wrap=True).print(f"written to {folder}: config.json, table.json, table.md", highlight=False)
    failed = [row for row in rows if row["failures"]]
    if failed:
        sys.exit(f"{len(failed)} of {len(rows)} kills lost something, the first: {failed[0]['failures']}; see {folder}")
    counts = collections.Counter(row["hit"] for row in rows)
    if missed := [phase for phase in config.phases if counts[phase] * len(config.phases) < config.kills]:
        sys.exit(f"of {len(rows)} kills too few hit {' and '.join(missed)}; see {folder}")
    return rows


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
