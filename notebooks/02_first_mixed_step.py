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
# # The first mixed step, in Linen and in NNX
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mpjax/mpjax/blob/main/notebooks/02_first_mixed_step.ipynb)
#
# Here a small model for handwritten digits is written twice, once in Flax Linen and once in Flax NNX, and trained in
# float32, bfloat16 and float16. Neither version mentions a dtype. Precision is decided in one place, by a policy,
# and `mpjax.wrap` puts the model under it. On the way you will see what a rule does to which layer, what
# the train step hands back, in which dtype the products really ran, and how a bad batch is skipped whole. At the end the
# trained NNX module comes back as an ordinary one, and a picture holds the curves side by side.
#
# If you wonder why there are several formats at all, read `01_formats` first. The next cell installs mpjax from a checkout
# if it is not there yet, as on Colab, and does nothing otherwise. On a GPU or a TPU, write the line that its comment
# names before you run it.

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
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn, nnx
from sklearn.datasets import load_digits

import mpjax

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.images))
image, label = (digits.images[order, ..., None] / 8 - 1).astype(np.float32), digits.target[order].astype(np.int32)
train, test = ({"image": image[part], "label": label[part]} for part in (slice(360, None), slice(360)))
sample = train["image"][:2]

# %% [markdown]
# ## The same model, twice
#
# A convolution, a batch norm, a linear head. The layers carry the same names in both, so the two will have the same params
# under the same paths. The batch norm is there because it has a state of its own, the running averages, which is neither
# a param nor a constant: mpjax calls such things `mstate` and hands them through. Linen asks for `train` as an argument
# here; the NNX module has none, and is switched by its own `.train()` and `.eval()`.


# %%
class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, image, train=False):
        x = nn.Conv(16, (3, 3), name="conv")(image)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        return nn.Dense(10, name="head")(x.reshape(x.shape[0], -1))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(8 * 8 * 16, 10, rngs=rngs)

    def __call__(self, image):
        x = nnx.relu(self.norm(self.conv(image)))
        return self.head(x.reshape(x.shape[0], -1))


# %% [markdown]
# ## Wrapping
#
# `mpjax.wrap` takes a Linen *instance*, or a *function from rngs to an NNX module*, and gives back the same thing for both: a
# `Model`, which is a pair of pure functions. `init` makes `(params, mstate)` from a key and a sample; `apply` runs the
# model on them. Both trees are ordinary nested dictionaries, so everything that jax does with pytrees works.
#
# A policy map says what holds where. Here all is `mixed_bfloat16`, but for one rule: the head computes in float32.
# `explain` prints what came of it for each module. Look at the norm. No rule names it, and it is in float32 all the same:
# its statistics are sums over the batch, so mpjax makes an *island* of it, which only a rule that names it can sink.
# Look at the last column too: a layer hands its result back in the dtype of its caller, so that no float32 tensor
# travels between two bfloat16 layers because a norm stood between them.

# %%
rules = mpjax.PolicyMap({"head": "compute=float32"}, default="mixed_bfloat16")
for module in (LinenNet(), lambda rngs: NNXNet(rngs=rngs)):
    print(mpjax.wrap(module, rules).explain(sample), end="\n\n")

# %% [markdown]
# The tables differ in the names of the classes and in nothing else. From here on both models are used through the
# same few functions, and none of them asks which Flax is inside.
#
# Had the rule said `heads` instead of `head`, `explain` would have raised an error that names the near miss. A rule that
# can never act is a mistake, and one that would otherwise be noticed late, as a run that is slower than hoped.
#
# ## A loss and a step
#
# The loss function is yours. It gets `params` in float32, the `mstate`, a batch and a key, and returns the loss together with
# `mpjax.Aux`: the new `mstate`, and any metrics that you want to see. The weights are rounded inside `apply`, where
# each layer reads them, so the gradient passes through the rounding and arrives in float32. `mpjax.losses` reduces in
# float32 whatever the dtype of the logits is.
#
# `TrainState.create` makes everything that training changes, as one pytree. `make_train_step` compiles the step:
# gradients, clipping, the optimizer, and the decision whether the update is any good.

# %%
doors = {"Linen": LinenNet(), "NNX": lambda rngs: NNXNet(rngs=rngs)}
optimizer = optax.adamw(1e-3)


def make(door, policy):
    model = mpjax.wrap(doors[door], policy)

    def loss_fn(params, mstate, batch, rng):
        logits, mstate = model.apply(params, mstate, batch["image"], rng=rng, train=True)
        loss = mpjax.losses.softmax_cross_entropy(logits, batch["label"]).mean()
        return loss, mpjax.Aux(mstate, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()})

    return model, loss_fn


# %% [markdown]
# One step of each. The metrics have fixed names: `loss`, `grad_norm` (before clipping), `grads_finite`, `loss_scale` and
# the two counts of skipped steps; `accuracy` is ours. They are arrays on the device, on their way while Python goes on: print
# them every step and you wait every step. The two losses differ because Linen and NNX draw different random weights from
# the same key. The state that went into a step is gone afterwards, for its memory was given to the new one.

# %%
first = {key: x[:128] for key, x in train.items()}
for door in doors:
    model, loss_fn = make(door, rules)
    state = mpjax.TrainState.create(model, optimizer, jax.random.key(0), sample)
    step = mpjax.make_train_step(loss_fn, optimizer, clip_norm=1.0)
    state, metrics = step(state, first)
    print(door, {name: round(float(x), 4) for name, x in metrics.items()})
print(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", state.params))

# %% [markdown]
# The params are in float32, as `mixed_` promises: they are the master weights, and the optimizer works on them.
#
# ## What really ran
#
# A policy is an intention. `mpjax.audit` reads the program that jax traced and tells what became of it: each matrix
# product, convolution, exponential and reduction with the dtype of its operands. Here is the gradient of the loss, so the
# backward pass is counted too, under three policies. `share` is the part of all matrix work that runs in half precision.

# %%
for name, policy in {"float32": "float32", "mixed_bfloat16": "mixed_bfloat16", "the map": rules}.items():
    _, loss_fn = make("NNX", policy)
    found = mpjax.audit(jax.grad(loss_fn, has_aux=True), state.params, state.mstate, first, state.rng)
    print(f"{name:<15} dots {found.dtypes('dot')}, convs {found.dtypes('conv')}, half {found.share('bfloat16'):.0%}")
print(found)
print("reductions:", found.dtypes("reduce"))

# %% [markdown]
# The whole table is that of the policy map. Every reduction is in float32: the norm's statistics, the loss, and the
# gradients of the biases. Those are sums over all rows which jax itself writes when it differentiates an addition, and it
# would write them in the dtype in which the layer computes, bfloat16 for the convolution; `wrap` sees to it that they are not.
#
# In a model of your own this is the way to ask about a line that surprises you: `found.select("exp").ops`, say, lists
# the operations of one kind with their module paths. A softmax written out as a plain function is the usual find, for a
# policy reaches modules and their params, and no policy can reach a function.
#
# ## Training, four times
#
# Both doors in float32 and in bfloat16. To compare them fairly they get the same initial weights: the params of one Linen
# init are passed to all, and fit the NNX model as they are, because the paths are the same. The loop is plain Python. It keeps
# the metrics as arrays, and fetches them when all steps are on their way.


# %%
def batches(steps, size=128):
    random = np.random.default_rng(1)
    for _ in range(steps):
        rows = random.choice(len(train["label"]), size, replace=False)
        yield {key: x[rows] for key, x in train.items()}


def run(door, policy, data, **options):
    model, loss_fn = make(door, policy)
    state = mpjax.TrainState.create(model, optimizer, jax.random.key(0), sample, params=shared, **options)
    step = mpjax.make_train_step(loss_fn, optimizer, clip_norm=1.0)
    history = []
    for batch in data:
        state, metrics = step(state, batch)
        history.append(metrics)
    return model, state, step, {name: np.float64([m[name] for m in jax.device_get(history)]) for name in metrics}


shared, _ = mpjax.wrap(LinenNet(), "float32").init(jax.random.key(0), sample)
runs = {(door, policy): run(door, policy, batches(120)) for policy in ("float32", "mixed_bfloat16") for door in doors}
for (door, policy), (*_, curves) in runs.items():
    print(f"{door:<6} {policy:<15} loss {curves['loss'][0]:.4f} -> {curves['loss'][-1]:.4f}")

# %% [markdown]
# ## float16, and a batch that overflows
#
# float16 needs a loss scale, and gets a dynamic one by itself. Here it is given explicitly, to make it move within a short
# run: it starts too high, and grows after every twenty-five good steps instead of the usual two thousand. In the
# middle of the run one batch is spoiled: its images are multiplied by a million, which no float16 can hold.
#
# The step sees it in the gradients and leaves everything as it was: params, optimizer, running averages, all of it. Only
# the scale is halved and the skip is counted. After the run the step is given the spoiled batch once more, and each number
# of the state is compared with what it was.

# %%
bad, data = 60, list(batches(120))
data[bad] = data[bad] | {"image": data[bad]["image"] * 1e6}
scale = mpjax.dynamic_loss_scale(2.0**24, growth_interval=25)
_, state, step, float16 = run("NNX", "mixed_float16", data, loss_scale=scale)
print("attempts that were skipped:", np.flatnonzero(np.diff(float16["skipped"], prepend=0)))
print(f"loss {float16['loss'][0]:.4f} -> {float16['loss'][-1]:.4f}, last scale {float16['loss_scale'][-1]:g}")

parts = ("params", "mstate", "opt_state", "loss_scale")
before = {part: jax.tree.map(np.array, getattr(state, part)) for part in parts}
state, metrics = step(state, data[bad])
same = {part: jax.tree.all(jax.tree.map(np.array_equal, before[part], getattr(state, part))) for part in parts}
print("the spoiled batch once more: finite", bool(metrics["grads_finite"]), "and unchanged", same)

# %% [markdown]
# ## The module back
#
# Whoever trained an NNX module wants an NNX module in the end, to serve it or to go on with other tools. `model.merge(params,
# mstate)` gives one: of your own class, with float32 weights and the running averages, and with no trace of mpjax in it.
# It is called here without any policy, and compared with the wrapped model in bfloat16 on digits that neither has seen.

# %%
model, state, *_ = runs["NNX", "mixed_bfloat16"]
module = model.merge(state.params, state.mstate)
module.eval()
ours, _ = model.apply(state.params, state.mstate, test["image"], train=False)
print(type(module).__name__, type(module) is NNXNet, module.head.kernel[...].dtype)
for name, logits in {"wrapped, bfloat16": ours, "the module, float32": module(test["image"])}.items():
    print(f"{name:<20} {np.mean(logits.argmax(-1) == test['label']):.1%} of {len(test['label'])} held-out digits")

# %% [markdown]
# ## The picture
#
# Above, the four curves of the two doors, and float16 with its spoiled batch. Each precision has a colour; Linen is drawn
# as a wide pale band and NNX as dashes on it. That the four lie on each other is the result: the same data, the same
# weights and another arithmetic lead to the same place. The float16 run starts behind them, by the steps that it skipped
# while its scale came down, and closes up.
#
# Below, its loss scale, where a cross marks each skipped step. Those at the start brought it to where gradients fit, and
# one is the spoiled batch. Between them it climbs, until it finds the ceiling again: so a skipped step now and then is no
# fault of such a run, while a cross at every other step would be.
#
# On a CPU none of this is faster, since a CPU does not multiply half precision natively. What you have seen is that it is
# *right*; on a GPU or a TPU, the same code is where the speed and the memory come from.
#
# Things to try from here: put `"conv": "compute=float16"` into the rules, and see in `explain` and in the audit that the
# policy map now mixes two half formats, and in the metrics that it gets a loss scale because of the one layer. Or name the
# norm in a rule, `"norm": "compute=bfloat16"`, and see the island sink.

# %%
figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6.4), height_ratios=(1.6, 1), sharex=True, layout="constrained")
colours = {"float32": "#000000", "mixed_bfloat16": "#0072B2", "mixed_float16": "#D55E00"}
for (door, policy), (*_, curves) in runs.items():
    style = {"linewidth": 5, "alpha": 0.25} if door == "Linen" else {"dashes": (2, 4 if policy == "float32" else 2)}
    above.plot(curves["loss"], color=colours[policy], label=f"{door}, {policy}", **style)
skipped = np.diff(float16["skipped"], prepend=0) > 0
loss, scales, orange = np.where(skipped, np.nan, float16["loss"]), float16["loss_scale"], colours["mixed_float16"]
above.plot(loss, color=orange, linewidth=1.2, label="NNX, mixed_float16, one batch spoiled")
above.set(yscale="log", ylabel="training loss (log scale)", title="two doors in two precisions, and float16")
above.yaxis.set_major_formatter("{x:g}")
above.legend(frameon=False, fontsize=9)

below.step(np.arange(len(scales)), scales, where="post", color=orange)
below.plot(np.flatnonzero(skipped), scales[skipped], "x", color="#666666", markersize=7, label="skipped step")
below.set_yscale("log", base=2)
below.set(xlabel="attempt (applied and skipped steps)", ylabel="loss scale", title="loss scale of the float16 run")
below.legend(frameon=False, fontsize=9)
for axes in (above, below):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
plt.show()
