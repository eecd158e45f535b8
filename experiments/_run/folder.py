"""The folder of one run: whose it is, and that it is only ever gone on with as it was begun."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import mpjax
from experiments._run.command import Refused
from mpjax.store.disk import try_lock
from mpjax.train.writers import word

logger = logging.getLogger("mpjax")

FREE = ("progress", "devices", "workdir", "resume", "checkpoint_every")
"""Fields that may be other ones when a run goes on: they do not say what is trained."""

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder of a run, before anything is written: see `open_folder`.

    Args:
      path: where it is, or will be.
      experiment: the experiment's name.
      config: its resolved config.
    """

    path: Path
    experiment: str
    config: Any

    @contextlib.contextmanager
    def begin(self) -> Iterator[Path]:
        """Make the folder, with config and environment in it, and hold it for the length of the block.

        Raises:
          Refused: another process is at work in it, or it cannot be made.
        """
        made(self.path, "--workdir")
        lock = os.open(self.path, os.O_RDONLY)
        try:
            if try_lock(lock) is False:
                raise Refused(f"another process is at work in {self.path}; wait for it, or give another --workdir")
            self._write_config()
            yield self.path
        finally:
            os.close(lock)

    def _write_config(self) -> None:
        """Config and environment; for a run that goes on, when and where it did."""
        stored, now = read_config(self.path), _environment()
        if stored is None or (_differences(stored, self.config, self.experiment) and not _trained(self.path)):
            logger.info("%s: the run's folder", self.path)
            text: dict[str, Any] = {"experiment": self.experiment, "config": _plain(self.config), "environment": now}
        else:
            text = {**stored, "resumed": [*stored.get("resumed", []), now]}
            before = stored.get("environment", {})
            other = [f"{k} {before.get(k)} then, {v} now" for k, v in now.items() if k != "date" and before.get(k) != v]
            logger.info("%s: it goes on with the run that is there", self.path)
            if other:
                logger.warning("its numbers may differ from those of a run in one go: %s", "; ".join(other))
        write_json(self.path / CONFIG, text)


def open_folder(config: Any, experiment: str, *, goes_on: bool = True) -> RunFolder:
    """Where a run writes: `config.workdir`, or a new folder `runs/EXPERIMENT-date-time` where that is None.

    A folder that is missing or empty begins a run; one that holds a run of the same config goes on with it. A run that ended
    before its first step binds nobody: whoever mends a setting may do so in the same folder.

    Args:
      config: the experiment's; `workdir` and, where it goes on, `resume` are read, all is compared.
      experiment: its name.
      goes_on: whether the experiment can go on; else the folder must be new or empty.

    Raises:
      Refused: the folder holds something else; or a run and `config.resume` is False; or a run of another config, whose
        fields are named. Nothing was written.
    """
    if config.workdir is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        return RunFolder(Path("runs") / f"{experiment}-{stamp}", experiment, config)
    path = Path(config.workdir)
    stored = read_config(path)
    if stored is None:
        if path.exists() and (not path.is_dir() or _content(path)):
            raise Refused(
                f"got --workdir={path}, which is {'no folder' if not path.is_dir() else 'not empty and holds no run'}; legal is "
                "a new or empty folder, or that of a run to go on with: it is the run's own"
            )
    elif not goes_on:
        raise Refused(f"{path} holds a run already, which is not written over; give another --workdir")
    elif not config.resume:
        raise Refused(f"{path} holds a run, and --no-resume came; leave it out to go on, or give another --workdir")
    elif (differs := _differences(stored, config, experiment)) and (
        _trained(path) or stored.get("experiment") != experiment
    ):
        raise Refused(
            f"{path} holds a run of another config: {'; '.join(differs)}; give the same, or another --workdir"
        )
    return RunFolder(path, experiment, config)


def read_config(path: Path) -> dict[str, Any] | None:
    """What a run wrote into its `config.json`; None where there is no such file.

    Raises:
      Refused: it cannot be read.
    """
    try:
        stored = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise Refused(f"{path / CONFIG} cannot be read: {error}; mend it, or give another --workdir") from error
    if not isinstance(stored, dict) or not isinstance(stored.get("config"), dict):
        raise Refused(f"{path / CONFIG} is not that of a run; give another --workdir")
    return stored


def made(folder: Path, option: str) -> Path:
    """The folder that an option names, made where it is not there.

    Raises:
      Refused: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder} cannot be made: {error.strerror}; give another {option}") from error
    return folder


def _trained(path: Path) -> bool:
    """Whether a run made a step there."""
    told = ("*/metrics.jsonl", "*/row.json", "*/checkpoints/*/manifest.json")
    return any(file.stat().st_size for pattern in told for file in path.glob(pattern))


def write_json(path: Path, content: Any) -> None:
    """A file that is there whole or, whenever the process ends, as it was before. NaN and infinities are words in it."""
    half = path.with_name(f".{path.name}.half")
    half.write_text(json.dumps(_words(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(half, path)


def _words(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _words(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_words(value) for value in content]
    return word(content) if isinstance(content, float) else content


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Metrics by name as `write_json` was given them: their words as numbers again."""
    return {name: float(x) if isinstance(x, str) else x for name, x in found.items()}


def _content(path: Path) -> list[str]:
    """The names in a folder, but for hidden ones and what a file system itself puts into its root."""
    return [inner.name for inner in path.iterdir() if not inner.name.startswith(".") and inner.name != "lost+found"]


def _plain(config: Any) -> dict[str, Any]:
    """The config as it comes back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(_words(dataclasses.asdict(config)), default=str))
    return plain


def _differences(stored: dict[str, Any], config: Any, experiment: str) -> list[str]:
    """In words, where the stored run is another than this one."""
    if (other := stored.get("experiment", experiment)) != experiment:
        return [f"it is one of {other}, this is {experiment}"]
    here, there = _plain(config), stored["config"]
    names = [name for name in {**there, **here} if name not in FREE and there.get(name) != here.get(name)]
    return [f"{name} was {json.dumps(there.get(name))} and is {json.dumps(here.get(name))}" for name in names]


def _environment() -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "mpjax": mpjax.__version__,
        "device": f"{device.device_kind} ({device.platform}) x {jax.device_count()}",
    }
