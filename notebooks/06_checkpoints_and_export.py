# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Checkpoints and export
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mpjax/mpjax/blob/main/notebooks/06_checkpoints_and_export.ipynb)
#
# Two things happen to a training run sooner or later: the machine goes away in the middle, and somebody wants to use the
# result. For the first you need checkpoints that can be believed, and a run that goes on as if nothing had been. For the
# second you need the weights in a file that is small and is read by others, and better still the model itself, without
# its code. This notebook does both with one tiny model: it stops a run, tears a file apart, goes on, compares every bit,
# and then writes the weights in five formats and asks each of them what was lost.
#
# How a model is wrapped and trained is told in `02_first_mixed_step`. The next cell installs mpjax from a checkout if it
# is not there yet, as on Colab, and does nothing otherwise. On a GPU or a TPU, write the line that its comment names
# before you run it.

# %%
import importlib.util
import subprocess
import sys

EXTRAS = "experiments"  # NVIDIA GPU: "experiments,cuda12" (or cuda13); TPU: "experiments,tpu"
if importlib.util.find_spec("mpjax") is None:
    subprocess.run(["git", "clone", "--depth=1", "https://github.com/mpjax/mpjax", "mpjax-checkout"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f"mpjax-checkout[{EXTRAS}]"], check=True)
    sys.path.insert(0, "mpjax-checkout")  # a running interpreter does not see a new editable install by itself

# %%
import dataclasses
import logging
import tempfile
import warnings
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn

import mpjax

random = np.random.default_rng(0)
label = random.integers(10, size=1200)
image = random.normal(0, 0.6, (10, 64))[label] + random.normal(0, 1, (1200, 64))  # ten patterns under noise
data = {"image": image.astype(np.float32), "label": label.astype(np.int32)}
train, test = ({key: value[part] for key, value in data.items()} for part in (slice(400, None), slice(400)))
temporary = tempfile.TemporaryDirectory()  # for all files of this notebook; it goes when the notebook ends
folder = Path(temporary.name)

# %% [markdown]
# ## A job
#
# Nothing new in this cell: a small network for ten noisy patterns, a loss, an optimizer. It trains in float16, so its
# state holds more than weights and moments: there is a loss scale that moves, its counter, and counts of skipped steps. A
# checkpoint that forgets one of them gives another run afterwards.
#
# One line deserves attention. `mpjax.epoch_batches` is a function from *attempt* to batch: which data comes when depends
# on the seed and the number of the attempt, and on nothing that Python remembers. So there is no iterator to save.


# %%
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, name="head")(nn.relu(nn.Dense(128, name="hidden")(x)))


model = mpjax.wrap(Net(), "mixed_float16")
apply = jax.jit(lambda params, x: model.apply(params, {}, x)[0])
optimizer = optax.adam(3e-3)
batches = mpjax.epoch_batches(train, 64, mpjax.seeds(0))


def loss_fn(params, mstate, batch, rng):
    logits, mstate = model.apply(params, mstate, batch["image"])
    return mpjax.losses.softmax_cross_entropy(logits, batch["label"]).mean(), mpjax.Aux(mstate)


step = mpjax.make_train_step(loss_fn, optimizer)


def fresh():
    scale = mpjax.dynamic_loss_scale(2.0**20, growth_interval=7)  # moves within a short run
    return mpjax.TrainState.create(model, optimizer, jax.random.key(0), test["image"][:2], loss_scale=scale)


# %% [markdown]
# ## The run that nobody disturbs
#
# First the run as it should be, in one go, to compare with. Its scale begins too high, so the first steps are skipped;
# that too has to come out the same later on.


# %%
def says(result):
    last = result.history[-1]
    return f"loss {last['loss']:.6f}, scale {last['loss_scale']:g}, skipped {last['skipped']:.0f}"


straight = mpjax.fit(step, fresh(), batches, attempts=30)
print(f"attempts {straight.history[0]['attempt']} to {straight.history[-1]['attempt']}: {says(straight)}")

# %% [markdown]
# ## The run that is cut short
#
# A `Checkpointer` owns a folder: it keeps the newest few states and gives back the newest that is whole. A
# `CheckpointHook` saves for it while `fit` trains, after every so many attempts and at the end; also when SIGTERM or
# Ctrl-C ends the run. Here the run just stops after twenty attempts.
#
# What is saved is the whole state: params, the optimizer's moments, the loss scale and its counter, how many steps were
# applied and how many skipped, and the random key. Beside it stand the policy in words and the evaluations so far, so
# that patience counts on where it was. Where the state was made does not matter: it may be restored under another policy,
# on another number of devices, and from a Linen model into an NNX one of the same names. What does not fit is refused
# with the path of the leaf.
#
# Orbax writes the arrays. When it is done, mpjax computes the SHA-256 of each file and writes the list last, then renames
# the whole folder into place. So a step is there at one stroke, or not at all.

# %%
checkpointer = mpjax.Checkpointer(folder / "checkpoints", keep=3, every=10)
hook = mpjax.CheckpointHook(checkpointer, policy=model.policy)
first_part = mpjax.fit(step, fresh(), batches, attempts=20, hooks=[hook])
print("steps on disk:", checkpointer.steps())
print("the newest was made under", checkpointer.info().policy["default"])

# %% [markdown]
# ## A torn file
#
# A damaged checkpoint is worse than none if nobody notices. Disks fill up, and machines die while they copy. So we take
# the largest file of the newest step and cut it in half, as a copy that was broken off would leave it. A naive reader
# would now crash; or, worse, read *something*.
#
# `restore` compares every file with the list before it reads a number. The damaged step is refused and named in a
# warning, and the older one is taken. (The warning is caught here, to show its text without the folder's name.) Had all
# of them been damaged, it would be an error. Other numbers than were saved never come back.

# %%
newest = checkpointer.directory / "20"
victim = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
whole = victim.read_bytes()
victim.write_bytes(whole[: len(whole) // 2])

hook = mpjax.CheckpointHook(mpjax.Checkpointer(folder / "checkpoints", keep=3, every=10), policy=model.policy)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    earlier = hook.resume(fresh())
for warning in caught:
    print(f"{warning.category.__name__}: {str(warning.message).replace(str(folder), '…')}")
print("going on from attempt", int(earlier.state.attempt))

# %% [markdown]
# ## Going on, bit for bit
#
# `hook.resume` was given a fresh state, which it only uses as a pattern, and gave back what the earlier part of the run
# left. `fit` takes it from there: ten attempts are made once more, and ten that are new. Then each array of the final
# state is compared with the straight run, as bytes. "Close" would not do: if a resumed run is only nearly the same, you
# cannot tell a bug from a difference in rounding. Here everything goes into the comparison: weights, moments, scale,
# counters, the random key. The damaged step is saved anew on the way, so the folder is sound again.


# %%
def as_bytes(state):
    state = dataclasses.replace(state, rng=jax.random.key_data(state.rng))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


logging.getLogger("mpjax").setLevel("ERROR")  # the log would say that the damaged step is replaced
resumed = mpjax.fit(step, earlier.state, batches, attempts=30, hooks=[hook], earlier=earlier)
print(f"attempts {resumed.history[0]['attempt']} to {resumed.history[-1]['attempt']}: {says(resumed)}")
ours, theirs = as_bytes(resumed.state), as_bytes(straight.state)
print(f"{sum(a == b for a, b in zip(ours, theirs, strict=True))} of {len(theirs)} arrays are the same to the bit")
print("steps on disk:", hook.checkpointer.steps())

# %% [markdown]
# ## Weights for serving
#
# A checkpoint is for going on, with all that training needs. Whoever serves the model wants the weights alone, and in
# fewer bytes. `mpjax.export_weights` writes them as one safetensors file that any safetensors reader can open. With
# `metric` it also measures what the smaller format costs you where it matters: on held-out data, before and after.
#
# Params are in float32 here, since every `mixed_` policy keeps its master weights so. Training needs those digits: an
# update is small beside its weight. Once the last update is made, nobody needs most of them, and the file may be smaller
# than what was trained.
#
# bfloat16 halves the bytes. Each number is rounded to nearest, by eight significant bits. The report tells for each
# tensor how far the signal is above the noise (SQNR, in decibels; twenty more is an error ten times smaller), and the
# largest error.


# %%
def accuracy(params):
    return {"accuracy": float(np.mean(apply(params, test["image"]).argmax(-1) == test["label"]))}


params = resumed.state.params
report = mpjax.export_weights(params, folder / "bfloat16.safetensors", "bfloat16", policy=model.policy, metric=accuracy)
print(report)

# %% [markdown]
# ## int8, with scales
#
# int8 has no exponent: it is a ruler with equally spaced marks. So each output channel of a kernel gets a scale of its
# own, which lays the ruler along the largest weight of that channel; the scales are counted in the bytes. Biases keep
# float32, since they are few and their errors reach every output. And a layer that you worry about may be left alone by a
# rule, in the language of a policy map: the last call below keeps the head.

# %%
print(mpjax.export_weights(params, folder / "int8.safetensors", "int8", policy=model.policy, metric=accuracy))
careful = mpjax.export_weights(
    params, folder / "careful.safetensors", {"head": "float32", "**": "int8"}, metric=accuracy
)
print(f"\nwith the head in float32: {careful.bytes_after:,} bytes, accuracy {careful.metric_after['accuracy']:.4f}")

# %% [markdown]
# ## The model itself
#
# Weights need a model, and a model is code, in a version. `mpjax.export_forward` lowers the forward function, policy
# included, to StableHLO and writes it to a file. On the server `mpjax.load_forward` reads it and runs it: neither Flax
# nor the class `Net` is needed there. The batch axis stays free. Weights remain arguments, so one program serves for any
# file of them.
#
# Weights in int8 are only *stored* so: the products run in the policy's float16 all the same. What you gain is the size
# of the file and of the download, not the time of a product. (Products themselves in int8 are what the rule `dot=int8` is
# for.)
#
# `forward.like` tells `load_export` which structure and dtypes the program wants, and int8 is multiplied out on the way.

# %%
mpjax.export_forward(model, params, {}, test["image"][:2], path=folder / "net.forward", platforms=("cpu", "cuda"))
forward = mpjax.load_forward(folder / "net.forward")
print("runs on", forward.platforms, "and takes", forward.inputs[0].shape)
weights = mpjax.load_export(folder / "int8.safetensors", like=forward.like)
logits = forward(weights.params, weights.mstate, test["image"])
print(f"accuracy of the program with the weights in int8: {np.mean(logits.argmax(-1) == test['label']):.4f}")
exact = np.array_equal(forward(params, {}, test["image"]), apply(params, test["image"]))
print("with the trained weights, the same logits as the model to the bit:", exact)

# %% [markdown]
# ## The picture
#
# At last the five formats side by side. On the left, what a file of each holds; on the right, what it costs in the
# logits: the root mean square of their change, as a share of their own spread, on an axis of powers of ten. To see the
# weights' rounding alone, the model computes in float32 here. float32 costs nothing.
#
# float16 is closer than bfloat16 at the same size: weights are numbers of moderate size, so its finer steps count and its
# narrow window does not hurt. Of the two small formats int8 is the closer one here, with its scale for each channel;
# float8's steps widen towards the large weights, which carry most of a sum. But do not choose by this picture alone. What
# is lost matters only by what it does to your metric, and `metric=` measures that.
#
# Things to try: cut the file of *every* step, and see `resume` refuse; change `Net` to another width, and read what
# `restore` says; give `per="tensor"` to `export_weights`, one scale for each whole kernel, and look how int8 takes it.

# %%
in_full = jax.jit(mpjax.wrap(Net(), "float32").apply)
exact = np.float64(in_full(params, {}, test["image"])[0])
sizes, losses = {}, {}
for form in ("float32", "bfloat16", "float16", "float8_e4m3", "int8"):
    file = folder / f"picture_{form}.safetensors"
    sizes[form] = mpjax.export_weights(params, file, form).bytes_after
    change = np.float64(in_full(mpjax.load_export(file, like=forward.like).params, {}, test["image"])[0]) - exact
    losses[form] = np.sqrt(np.mean(change**2)) / exact.std()
    print(f"{form:<12}{sizes[form]:>7,} bytes, logits change by {losses[form]:.4%}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
colours = ["#444444", "#0072B2", "#D55E00", "#CC79A7", "#009E73"]
left.bar_label(left.barh(list(sizes), list(sizes.values()), 0.6, color=colours), fmt="{:,.0f}", padding=4)
left.set(xlabel="bytes in the file", title="size", xlim=(0, 1.2 * sizes["float32"]))
left.invert_yaxis()
for n, (form, loss) in enumerate(losses.items()):
    if loss:
        right.plot(loss, form, "o", color=colours[n], markersize=10)
        right.annotate(f"{loss:.2%}", (loss, n), xytext=(10, 0), textcoords="offset points", va="center")
right.annotate("exact", (0.03, 0), xycoords=right.get_yaxis_transform(), va="center")
right.grid(axis="x", color="#dddddd", linewidth=0.6)
right.set(xscale="log", xlabel="change of the logits (log scale)", title="error", xlim=(5e-5, 1e-1))
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
