"""Safetensors files: named arrays and a few lines of text, written whole or not at all, read back with their checksum.

No file is ever unpickled: what is not safetensors is refused.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax.store.disk import sync

CHECKSUM = "sha256"
"""The line of metadata that holds the SHA-256 over all other lines and all tensors."""

# safetensors' own reader for numpy knows none of these (0.8.0), though its writer and its header do.
_FLOAT8 = {
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip

HOLDS = frozenset(
    {
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bfloat16", "float16", "float32",
        "float64", "complex64", *_FLOAT8.values(),
    }
)  # fmt: skip
"""The dtypes that came back bit for bit when each was tried."""


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], overwrite: bool) -> None:
    """Write arrays and metadata, with a checksum, under a temporary name, and give them the name when they are on disk.

    Raises:
      ValueError: the file exists and `overwrite` is False.
      OSError: it could not be written; nothing stands under the name that did not stand there before.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if path.is_dir() or (path.exists() and not overwrite):
        raise ValueError(
            f"got the path {path}, which exists; legal is a new file: choose another, or pass overwrite=True"
        )
    # In this machine's order of bytes, as they will be read: the checksum is over bytes.
    native = {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in native.items()}
    metadata = {**metadata, CHECKSUM: _checksum(metadata, arrays)}
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode  # what the umask allows; safetensors would let only its owner read the file
        save_file(arrays, partial, metadata=metadata)
        partial.chmod(mode)
        sync(partial)
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{path} could not be written ({error}); what stood there before is as it was; look at the folder and the disk"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All arrays and the metadata of a file that `write` wrote.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no safetensors file, or not one of ours, or not as it was written.
    """
    with opened(path) as file:
        metadata = file.metadata
        arrays = {name: file.array(name) for name in file.names}
    expected = metadata.pop(CHECKSUM, None)
    if expected is None:
        raise ValueError(
            f"got {path}, a safetensors file without mpjax's checksum; legal is one that mpjax exported; "
            "mpjax.load_safetensors reads those of others"
        )
    if expected != _checksum(metadata, arrays):
        raise ValueError(
            f"got {path}, whose content differs from its SHA-256: it was damaged or edited; legal is the file as it was "
            "exported; copy it again, or export it again"
        )
    return arrays, metadata


def check_kind(path: Path, metadata: Mapping[str, str], kind: str, version: int) -> None:
    """Refuse a file that holds something else, or that a newer mpjax wrote.

    Raises:
      ValueError: it is such a file.
    """
    found, number = metadata.get("kind"), metadata.get("version", "")
    if found != kind or not number.isdigit():
        raise ValueError(
            f"got {path}, which holds {found or 'something unknown'}; legal here is {kind}; name such a file"
        )
    if int(number) > version:
        raise ValueError(
            f"got {path} of version {number}; this mpjax reads {kind} up to version {version}; install a newer one"
        )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Tensors]:
    """A safetensors file of anyone's, its header checked.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise ValueError(f"got the folder {path}; legal is one safetensors file; name the file in it")
    with path.open("rb") as raw:
        start = raw.read(9)
    # One header in thirty-two has a length whose first byte is that of a pickle; what follows it tells them apart.
    has_header = start[4:] == b"\0\0\0\0{"
    if not has_header and (start[:1] == b"\x80" or start[:4] == b"PK\x03\x04"):
        raise ValueError(
            f"got {path}, a pickle or a zip of pickles; mpjax never unpickles, since that runs code; legal is a "
            "safetensors file; convert it where you trust it (safetensors.torch.save_file)"
        )
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"got {path}, which is no whole safetensors file ({error}); legal is one as it was written; copy it again"
        ) from error
    with file as handle:
        yield Tensors(path, handle, int.from_bytes(start[:8], "little"))


class Tensors:
    """The tensors of an open safetensors file, each read when asked for."""

    def __init__(self, path: Path, handle: Any, header: int):
        self.path, self._handle, self._header = path, handle, header

    @property
    def names(self) -> list[str]:
        return list(self._handle.keys())

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self._handle.metadata() or {})

    def array(self, name: str) -> np.ndarray:
        """One tensor, in its dtype.

        Raises:
          ValueError: neither numpy nor jax has its dtype.
        """
        from safetensors import SafetensorError

        view = self._handle.get_slice(name)
        code = view.get_dtype()
        try:
            return self._handle.get_tensor(name) if code not in _FLOAT8 else self._float8(name, view, _FLOAT8[code])
        except (AttributeError, TypeError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"got the tensor {name} of {self.path} in the format {code}; legal are formats that numpy or jax have; "
                "write it in another"
            ) from error

    def _float8(self, name: str, view: Any, dtype: str) -> np.ndarray:
        # By the format's own rule: eight bytes that say how long the header is, the header, the data.
        start, end = self._entries[name]["data_offsets"]
        with self.path.open("rb") as raw:
            raw.seek(8 + self._header + start)
            return np.frombuffer(raw.read(end - start), jnp.dtype(dtype)).reshape(view.get_shape())

    @functools.cached_property
    def _entries(self) -> dict[str, Any]:
        with self.path.open("rb") as raw:
            raw.seek(8)
            return json.loads(raw.read(self._header))


def _checksum(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    sha = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()
