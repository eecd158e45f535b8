"""Batches ahead of the step: drawn and cast by threads of the host, and sent to the device, while a step runs."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mpjax.core.dtypes import canonical, is_float
from mpjax.core.tree import path_of
from mpjax.core.types import Batch, DTypeLike
from mpjax.policy.patterns import governs


@dataclasses.dataclass(frozen=True)
class Prefetch:
    """Batches that `fit` has drawn ahead; made by `prefetch`.

    It stands wherever the batches stood: called with an attempt it gives that batch, prepared in the same way, and where it
    was made from an iterable, it is one.

    >>> prefetch(lambda attempt: np.full(2, attempt, np.float32))(3)
    Array([3., 3.], dtype=float32)
    """

    batches: Callable[[int], Batch] | Iterable[Batch]
    depth: int
    workers: int
    cast: tuple[tuple[str, np.dtype], ...]
    place: Callable[[Batch], Batch]

    def __call__(self, attempt: int) -> Batch:
        if not callable(self.batches):
            raise TypeError(
                f"asked for the batch of attempt {attempt} of an iterable, which has an order alone; draw from it"
            )
        return self._prepared(self.batches(attempt))

    def __iter__(self) -> Iterator[Batch]:
        if callable(self.batches):
            raise TypeError(
                "asked for all batches of a function of the attempt, which has no end; legal is ahead(range(n))"
            )
        return (self._prepared(batch) for batch in self.batches)

    def ahead(self, attempts: Sequence[int]) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """The batches of these attempts, for a loop of one's own; the threads begin with the first and end with the block.

        >>> source = prefetch(lambda attempt: np.full(2, attempt, np.float32))
        >>> with source.ahead(range(2)) as batches:
        ...     [float(batch.sum()) for batch in batches]
        [0.0, 2.0]
        """
        if callable(self.batches):
            return _Ahead(self, attempts, self.depth, self.workers)
        return contextlib.nullcontext(batch for _, batch in zip(attempts, self, strict=False))

    def _prepared(self, batch: Batch) -> Batch:
        return self.place(_cast(batch, self.cast) if self.cast else batch)


def prefetch(
    batches: Callable[[int], Batch] | Iterable[Batch],
    *,
    depth: int = 2,
    workers: int = 1,
    cast: Mapping[str, DTypeLike] | None = None,
    place: Callable[[Batch], Batch] | None = None,
) -> Prefetch:
    """Have the next batches drawn, cast and sent to the device while the step of the one before runs.

        thread k of w:  for n in attempts[k::w]: wait for room; put place(cast(batches(n)))
        `fit`:          for n in attempts: take; make room; state, metrics = step(state, batch)

    Use it for batches that cost the host time; one that takes as long as w steps needs w workers. It changes when a batch is
    made, never which: the attempt is its index, so a run that goes on sees what it would have seen, and of a function of
    the attempt up to `depth` batches are drawn in vain when a run is stopped. An iterable is never drawn from ahead, since
    what was drawn would be lost to whoever draws on: its batches are cast and placed one by one.

    A thread runs the function as the caller of `fit` would (context variables, `jax.default_device` and `jax.enable_x64`
    are his), but for jax's other context managers, which hold in one thread. What the function raises is raised by `fit` at
    that attempt, with its traceback. Each batch must have memory of its own: one buffer that is filled anew for each is
    changed under a step that waits to read it.

    Args:
      batches: from attempt to batch, pure, or an iterable of batches.
      depth: how many batches may be ready beside the one in use; they take memory on the device.
      workers: threads that draw, at most `depth`. Of a function of the attempt alone, and with more than one it is called by
        several at once. Python runs one of them at a time, but for what lets others run: numpy's work on large arrays,
        reading files, most decoders.
      cast: from glob over the paths of a batch to a narrower float dtype, the first that matches: `{"image": "bfloat16"}`
        sends half the bytes, and gains where sending is slower than the host casts. A pattern means what is below it too.
        Where a model casts its input to that dtype anyway (the wrapped ones do, at their root) and nothing else reads it,
        not a bit of the training changes; a regression target, or a coordinate that a rule keeps by `input=keep`, would be
        rounded: leave it out.
      place: from a batch on the host to one on the device: `functools.partial(mpjax.shard_batch, mesh=mesh)` for several.
        By default numpy arrays go to jax's default device, and other leaves pass as they are, those that are on a device
        among them.

    Returns:
      A `Prefetch`: give it to `fit`, or as the `batches` of a `Job`, in place of `batches`.

    Raises:
      ValueError: no depth, more workers than that, several of an iterable, a dtype that is none; and at each batch: a pattern
        that matches no path, a leaf that is no float array of the host, or is no wider than what it is to be cast to.

    >>> source = prefetch(lambda attempt: {"image": np.ones((2, 3), np.float32), "label": np.arange(2)},
    ...                   cast={"image": "bfloat16"})
    >>> {name: str(x.dtype) for name, x in source(0).items()}
    {'image': 'bfloat16', 'label': 'int32'}
    """
    if isinstance(depth, bool) or depth < 1:
        raise ValueError(
            f"got depth={depth}; legal is an int ≥ 1; leave prefetch out to draw each batch when it is needed"
        )
    if isinstance(workers, bool) or not 1 <= workers <= depth:
        raise ValueError(
            f"got workers={workers} with depth={depth}; legal is 1 to {depth}, since each needs room for a batch; raise depth, too"
        )
    if workers > 1 and not callable(batches):
        raise ValueError(
            f"got workers={workers} for an iterable, which is drawn from in order; legal is 1; give a function of the attempt"
        )
    rules = tuple((pattern, canonical(dtype)) for pattern, dtype in (cast or {}).items())
    return Prefetch(batches, depth, workers, rules, _on_device if place is None else place)


def drawn(
    batches: Callable[[int], Batch] | Iterable[Batch], attempts: Sequence[int]
) -> contextlib.AbstractContextManager[Iterator[Batch]]:
    """The batches of these attempts: those of a `Prefetch` ahead, others when they are asked for.

    >>> with drawn(lambda attempt: attempt**2, range(2, 4)) as batches:
    ...     list(batches)
    [4, 9]
    """
    if isinstance(batches, Prefetch):
        return batches.ahead(attempts)
    feed = (batches(attempt) for attempt in attempts) if callable(batches) else iter(batches)
    return contextlib.nullcontext(feed)


class _Ahead:
    """The threads of one run: they begin when the first batch is asked for, and end with the block.

    Thread k of w draws the attempts k, k + w, … into a queue of its own, so that batches come in order.
    """

    def __init__(self, draw: Callable[[int], Batch], attempts: Sequence[int], depth: int, workers: int):
        self._draw, self._attempts, self._depth, self._over = draw, attempts, depth, threading.Event()
        self._ready: list[queue.SimpleQueue[tuple[Batch, BaseException | None]]]
        self._ready = [queue.SimpleQueue() for _ in range(workers)]
        self._room = [threading.Semaphore(len(range(k, depth, workers))) for k in range(workers)]
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Iterator[Batch]:
        return self._take()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._over.set()
        for room in self._room:
            room.release()
        # They end behind the draws that they are in. Who left by a second Ctrl-C may have left because one hangs.
        if not (kind is not None and issubclass(kind, KeyboardInterrupt)):
            for thread in self._threads:
                thread.join()

    def _take(self) -> Iterator[Batch]:
        config: Any = jax.config  # its attributes are made at run time
        settings, workers = (config.jax_default_device, config.jax_enable_x64), len(self._ready)
        for k in range(workers):
            run = contextvars.copy_context().run  # each its own: a context is entered by one thread at a time
            about = (self._work, k, *settings)
            self._threads.append(threading.Thread(target=run, args=about, name=f"mpjax prefetch {k}", daemon=True))
            self._threads[k].start()
        for n in range(len(self._attempts)):
            batch, error = self._ready[n % workers].get()
            if error is not None:
                raise error
            self._room[(n + self._depth) % workers].release()  # for batch n + depth, which may be made now
            yield batch
            del batch  # the loop may be done with it before the next is there

    def _work(self, k: int, device: Any, x64: bool) -> None:
        with jax.default_device(device), jax.enable_x64(x64):
            for attempt in self._attempts[k :: len(self._ready)]:
                self._room[k].acquire()
                if self._over.is_set():
                    return
                try:
                    self._ready[k].put((self._draw(attempt), None))
                except BaseException as error:  # whatever it is, it is the caller's
                    self._ready[k].put((None, error))
                    return


def _on_device(batch: Batch) -> Batch:
    """Dispatched, not waited for."""
    return jax.tree.map(lambda x: jax.device_put(x) if isinstance(x, (np.ndarray, np.generic)) else x, batch)


def _cast(batch: Batch, rules: tuple[tuple[str, np.dtype], ...]) -> Batch:
    """The batch with the leaves that rules name in narrower dtypes, by numpy: rounded to nearest even, as XLA does."""
    structure: Any
    keyed, structure = jax.tree_util.tree_flatten_with_path(batch)
    paths = [path_of(keys) for keys, _ in keyed]
    for pattern, _ in rules:
        if not any(governs(pattern, path, {}) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its paths are {', '.join(map(repr, paths))}"
            raise ValueError(f"cast={pattern!r} matches no path of the batch; {hint}")
    leaves = [x for _, x in keyed]
    for i, path in enumerate(paths):
        found = next((rule for rule in rules if governs(rule[0], path, {})), None)
        if found is not None:
            leaves[i] = _cast_leaf(leaves[i], path, *found)
    return structure.unflatten(leaves)


def _cast_leaf(x: Any, path: str, pattern: str, dtype: np.dtype) -> Any:
    what = f"cast={{{pattern!r}: {dtype.name!r}}} names batch[{path}], which is"
    if not (isinstance(x, (np.ndarray, np.generic)) and is_float(x)):
        kind = f"{x.dtype.name} of {type(x).__name__}" if hasattr(x, "dtype") else type(x).__name__
        raise ValueError(
            f"{what} {kind}; legal is a float array of numpy, on the host; name the model's float inputs alone, and shard by place="
        )
    if x.dtype == dtype:
        return x
    if x.dtype.itemsize <= dtype.itemsize:
        raise ValueError(f"{what} {x.dtype.name}: as many bytes, or fewer; legal is a narrower dtype; leave it out")
    with np.errstate(over="ignore"):  # beyond the largest number is infinity, as on the device
        return x.astype(dtype)
