"""A checkpoint: the whole of a state, written by Orbax, sealed by a manifest, verified before it is given back."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from mpjax.core.processes import WAIT, several
from mpjax.policy.patterns import governs
from mpjax.store import folders, saving
from mpjax.store.finite import refuse_nonfinite
from mpjax.store.leaves import Leaf, leaves_of
from mpjax.store.manifest import CheckpointError, CheckpointWarning, DamagedError, check
from mpjax.store.matching import cast_leaf, read_leaves, refuse_misfits
from mpjax.store.meta import CheckpointInfo, meta_text, read_meta
from mpjax.store.together import Together, alike
from mpjax.train.state import TrainState, attempts_made

S = TypeVar("S")

logger = logging.getLogger("mpjax")


class Checkpointer:
    """Saves the states of a run into a directory, and gives back the newest that is whole.

        save:     Orbax writes the arrays → SHA-256 of every file → manifest, last → on the disk → renamed into place
        restore:  newest step first: every file against the manifest; the first that is whole is compared with `like`,
                  leaf by leaf, and read; one that is damaged is passed over with a warning

    A step appears at one stroke or not at all: a run that is killed at any moment finds every completed save whole.

    Several processes (`jax.distributed`) call `save` and `restore` alike, on a directory that all of them see. Each writes
    and reads its own parts; process 0 alone locks, verifies, seals and renames; an error of one is raised on all.

    Args:
      directory: a folder of its own; made by the first save. It must be of this machine, or mounted.
      keep: how many of the newest steps stay; None: all.
      every: attempts between saves of a `CheckpointHook`; `save` itself saves whenever it is called.
      asynchronous: `save` returns once the arrays are copied; the rest goes on beside training. What goes wrong there is
        raised by the next call of any method, and by `wait`. Let that be the last: a program that ends before a save does
        loses it, since Python starts no more threads then, and Orbax needs them.
      timeout: of several processes: seconds for which one waits for the others where they meet in a save or a restore; the
        longest that process 0 may take to seal a step is among it.

    Raises:
      ValueError: settings that make no sense.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpointer = Checkpointer(folder)
    ...     _ = checkpointer.save({"w": jnp.arange(3)}, step=10)
    ...     checkpointer.latest(), checkpointer.restore({"w": jnp.zeros(3, jnp.int32)})
    (10, {'w': Array([0, 1, 2], dtype=int32)})
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int | None = 3,
        every: int = 1000,
        *,
        asynchronous: bool = False,
        timeout: float = WAIT,
    ):
        for name, number in (("keep", keep), ("every", every)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                none = ", or None to keep all" if name == "keep" else ""
                raise ValueError(f"got {name}={number!r}; legal is an int from 1{none}")
        if not timeout > 0:
            raise ValueError(f"got timeout={timeout!r}; legal are seconds above 0")
        self.directory = folders.local_folder(directory)
        self._processes = Together(str(self.directory), timeout)
        self.keep, self.every, self.asynchronous, self.timeout = keep, every, asynchronous, timeout
        self.restored: CheckpointInfo | None = None
        """What the step says of itself that `restore` gave back last."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        state: Any,
        step: int | None = None,
        *,
        policy: Any = None,
        extra: Mapping[str, Any] | None = None,
        allow_nonfinite: bool | Sequence[str] = False,
    ) -> Path:
        """Save a state; it is on the disk for good when this returns (asynchronous: when `wait` does).

        Args:
          state: a `TrainState`, or any pytree of arrays, keys and Python numbers.
          step: its number; of a `TrainState` its `attempt`, so that two states never share one.
          policy: the policy or map that the model computes by, to stand beside the state: `model.policy`.
          extra: more to stand beside it, as JSON can say it: where a data iterator is, say.
          allow_nonfinite: save NaN and infinities too: True, or globs over the paths where they belong.

        Returns:
          The step's folder.

        Raises:
          CheckpointError: the state is not finite (the paths are named), or another save to the directory is in progress.
          FileExistsError: the step is there already, and whole.
          OSError: the disk is full, read-only or broken; what was saved before is untouched.
          TypeError: a leaf that cannot be stored, or an `extra` that is not JSON.
          TimeoutError: another process did not come in time, or did not do its part.
          ValueError: no step, or one that is no int from 0.
        """
        self.wait()

        def describe() -> tuple[int, dict[str, tuple[Leaf, Any]], str]:
            number, leaves = _position(state, step), leaves_of(state)
            return number, leaves, meta_text(number, (leaf for leaf, _ in leaves.values()), policy, extra)

        about = f"a save into {self.directory}"  # before anything is computed, for which all are needed
        number, leaves, words = self._processes.all(about, describe, lambda found: alike(found[2], found[1]))
        self._processes.all("the search for what is not finite", lambda: refuse_nonfinite(leaves, allow_nonfinite))
        finish = saving.begin(self.directory, number, leaves, words, self.keep, self._processes)
        if self.asynchronous:
            self._thread = threading.Thread(target=self._finish_beside, args=(finish,))
            self._thread.start()
        else:
            finish()
        return self.directory / str(number)

    def _finish_beside(self, finish: Callable[[], None]) -> None:
        try:
            finish()
        except BaseException as error:
            logger.error("a save failed: %s", error)
            self._error = error

    def wait(self) -> None:
        """Until the save in progress is done.

        Raises:
          Exception: whatever went wrong in it.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def steps(self) -> list[int]:
        """The steps that are there, in order. Foreign files, and what a killed save left, are none."""
        self.wait()
        return folders.steps(self.directory)

    def latest(self) -> int | None:
        """The newest step whose files are there in the right sizes, or None. `restore` looks closer."""
        for step in reversed(self.steps()):
            try:
                check(self.directory / str(step), deep=False)
            except DamagedError:
                continue
            return step
        return None

    def restore(self, like: S, step: int | None = None, *, cast: bool = False) -> S:
        """The state of a step: verified, exact, in the structure of `like` and where its arrays lie.

        Which policy, how many devices and which sharding it was saved under does not matter; nor does whether its
        params were Linen's or NNX's, where the modules have the same names. A `TrainState` keeps the loss scale of `like` if
        the checkpoint has none or another kind: it follows from the policy.

        Args:
          like: a state made as the saved one was: arrays, or `ShapeDtypeStruct`s (of `jax.eval_shape`). Only read.
          step: which; None: the newest that is whole.
          cast: let float leaves come back in the dtypes of `like`, rounded to nearest; each is listed in the log.

        Raises:
          FileNotFoundError: there is no such step, or none at all.
          CheckpointError: the step is damaged (None: all are); a leaf is missing, too many, or of another dtype or shape.
          TimeoutError: another process did not come in time.

        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpointer = Checkpointer(folder)
        ...     _ = checkpointer.save({"w": jnp.ones(2)}, step=1)
        ...     checkpointer.restore({"w": jnp.zeros(2, jnp.bfloat16)}, cast=True)
        {'w': Array([1, 1], dtype=bfloat16)}
        """
        found = self._whole_for_all(step) if several() else self._whole(step)
        if later := [n for n in self.steps() if n > found.step and step is not None]:
            logger.warning("step %d is not the newest; a run that goes on from it cannot save %s again", step, later)
        here = leaves_of(like)
        there = found.leaves
        kept = _own_scale(like, there, {path: leaf for path, (leaf, _) in here.items()})
        wanted = {path: leaf for path, (leaf, _) in here.items() if path not in kept}
        there = {path: leaf for path, leaf in there.items() if path not in kept}
        fits = f"the fitting of step {found.step}"
        casts = self._processes.all(fits, lambda: refuse_misfits(found.step, there, wanted, cast))
        read = partial(read_leaves, self._arrays(found.step), there, {path: here[path][1] for path in wanted})
        got = self._processes.all(f"the reading of step {found.step}", read)
        if casts:
            logger.warning("step %d: %d leaves were cast: %s", found.step, len(casts), "; ".join(casts))
            got = {path: cast_leaf(path, x, here[path][1]) if wanted[path].dtype != there[path].dtype else x
                   for path, x in got.items()}  # fmt: skip
        self.restored = found
        structure: Any = jax.tree.structure(like)
        return structure.unflatten([got[path] if path in got else x for path, (_, x) in here.items()])

    def load(self, step: int | None = None, under: str | Sequence[str] = ("params", "mstate")) -> dict[str, np.ndarray]:
        """Arrays of a step without a `like`: from canonical path to numpy array, in the dtypes that they were saved in.

        Args:
          step: as for `restore`.
          under: globs over paths, in the language of a `PolicyMap`: each means what is below it too.

        Raises:
          FileNotFoundError, CheckpointError: as `restore` does; also if nothing is there. Keys are left out.
        """
        found = self._whole(step)
        globs = [under] if isinstance(under, str) else list(under)
        chosen = {
            path: np.empty(0)
            for path, leaf in found.leaves.items()
            if any(governs(glob, path, {}) for glob in globs) and not leaf.is_key and not leaf.is_number
        }
        if not chosen:
            raise CheckpointError(f"step {found.step} has nothing under {globs}; it has {', '.join(found.leaves)}")
        return read_leaves(self._arrays(found.step), found.leaves, chosen)

    def info(self, step: int | None = None) -> CheckpointInfo:
        """What a step says of itself, once it is verified; arguments and errors are those of `restore`."""
        return self._whole(step)

    def _whole_for_all(self, step: int | None) -> CheckpointInfo:
        """As `_whole`, found by process 0: two that looked might choose two steps, and each would read every byte."""
        self.wait()
        about = f"a restore from {self.directory}"
        chosen = self._processes.first(about, lambda: str(self._whole(step).step))
        return read_meta(self.directory / chosen)

    def _arrays(self, step: int) -> Path:
        return self.directory / str(step) / saving.ARRAYS

    def _whole(self, step: int | None) -> CheckpointInfo:
        """The metadata of a step that was verified: of the newest that is whole, or of this one."""
        there = self.steps()
        asked = there[::-1] if step is None else [folders.step_number(step)]
        if not asked or asked[0] not in there:
            what = "no step" if step is None else f"no step {step}"
            raise FileNotFoundError(
                f"{what} in {self.directory}; there {f'are {there}' if there else 'is none'}: look whether it is the right folder"
            )
        passed_over = []
        for candidate in asked:
            try:
                check(self.directory / str(candidate))
                found = read_meta(self.directory / str(candidate))
            except DamagedError as error:
                passed_over.append(str(error))
                continue
            if passed_over:
                warnings.warn(
                    CheckpointWarning(f"damaged: {'; '.join(passed_over)}; using step {candidate}"), stacklevel=3
                )
            return found
        raise CheckpointError(f"damaged: {'; '.join(passed_over)}; there is no other step to use")


def _position(state: Any, step: int | None) -> int:
    if step is not None:
        return folders.step_number(step)
    if not isinstance(state, TrainState):
        raise ValueError(f"got a {type(state).__name__} and no step; only a TrainState has one of its own: give step=")
    return attempts_made(state)


def _own_scale(like: Any, there: Mapping[str, Leaf], here: Mapping[str, Leaf]) -> set[str]:
    """The leaves of the loss scale if the two sides have scales of different kinds: then neither is the other's."""
    if not isinstance(like, TrainState):
        return set()
    sides = [
        {path: str(leaf) for path, leaf in side.items() if path.startswith("loss_scale")} for side in (there, here)
    ]
    if sides[0] == sides[1] or any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(like.loss_scale)):
        return set()
    logger.warning("the loss scale of the checkpoint is of another kind; the one of the state that came is kept")
    return {*sides[0], *sides[1]}
