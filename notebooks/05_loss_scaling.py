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
# # Loss scaling
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mpjax/mpjax/blob/main/notebooks/05_loss_scaling.ipynb)
#
# Train in float16 and one day a run will stand still without a word: no NaN, no warning, a loss that is fine and does not
# fall. The likely reason is that the gradients were too small for the format and became zero. The cure is old and almost
# comically simple: multiply the loss by a large number before you differentiate, and divide the gradients by it
# afterwards. The rest of this notebook is about *which* number, who looks for it, and what happens to a step that was
# tried with a wrong one.
#
# bfloat16 has float32's range and needs none of this. If your chip multiplies bfloat16, use that; if it is a V100 or a
# T4, or if you want float16's finer steps, read on. `01_formats` shows the windows of the formats. The next cell installs
# mpjax from a checkout if it is not there yet, as on Colab, and does nothing otherwise. On a GPU or a TPU, write the line
# that its comment names before you run it.

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
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from IPython.display import Image

import mpjax
from mpjax.measure import plots

random = np.random.default_rng(0)
x = random.normal(size=(256, 16)).astype(np.float32)
microvolts = 50 * np.tanh(x @ random.normal(0, 0.5, (16, 8)))
batch = {"x": x, "y": np.float32(1e-6 * microvolts)}  # in volts

# %% [markdown]
# ## Small for an honest reason
#
# Nothing about this task is contrived but the model's size. Eight signals are to be predicted, such as an electrode on
# the scalp might give them: some tens of microvolts. Somebody stored them in volts, as a physicist would. So the
# residuals are small; a mean over all samples and signals divides by their number; and the last layer's weights, small as
# its outputs, make what passes back through them smaller again. Three good reasons, and their product is a tiny gradient.
#
# Below is the network, and a function that gives its loss and gradients under any policy and any scale.
# `mpjax.scaled_value_and_grad` does the multiplying and the dividing; the scale is an argument here, so that one compiled
# function serves for all. Beside it stands a train step, for later. (numpy draws the weights: to compile an
# initialisation would take longer than to train so small a model.)


# %%
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in range(2):
            x = nn.tanh(nn.Dense(32, use_bias=False, name=f"hidden_{n}")(x))
        return nn.Dense(8, use_bias=False, name="out")(x)


optimizer = optax.adam(optax.linear_schedule(3e-4, 3e-6, 150), eps=1e-15)  # an eps below gradients that are so small


@functools.cache
def make(policy):
    model = mpjax.wrap(Net(), policy)

    def loss_fn(params, mstate, batch, rng=None):
        out, mstate = model.apply(params, mstate, batch["x"])
        return jnp.mean((out - batch["y"]) ** 2), mpjax.Aux(mstate)

    def gradients(params, scale):
        value_and_grad = mpjax.scaled_value_and_grad(loss_fn, mpjax.DynamicLossScale(scale), has_aux=True)
        return value_and_grad(params, {}, batch)[1]

    return model, mpjax.make_train_step(loss_fn, optimizer), jax.jit(gradients)


shapes, _ = jax.eval_shape(make("float32")[0].init, jax.random.key(0), x)
params = jax.tree.map(lambda s: np.float32(random.normal(0, s.shape[0] ** -0.5, s.shape)), shapes)
params["out"]["kernel"] *= np.float32(1e-3)  # so that outputs begin in the range of the signals

# %% [markdown]
# ## What float16 makes of it
#
# First without any scale, which is a scale of one. Each row compares a layer's gradient in float16 with that in float32.
# The numbers in the table are sizes of float32's gradient and the share that is zero in float16 but is not zero in
# float32.
#
# The last layer is fine. All layers before it lost nearly everything: what passed back through the small weights was
# below the smallest number that float16 has, so zero is what the earlier layers were told. They are told so at each step,
# and will never learn. This is why nothing warns you: the loss does fall, since the last layer alone can do something.


# %%
def vanished(gradient, reference):
    return np.mean((np.asarray(gradient) == 0) & (np.asarray(reference) != 0))


full, half = make("float32")[2], make("mixed_float16")[2]
reference, unscaled = full(params, jnp.float32(1)), half(params, jnp.float32(1))
for layer in reference:
    a, b = reference[layer]["kernel"], unscaled[layer]["kernel"]
    print(f"{layer:<10} gradient around {np.median(np.abs(a)):.0e}, zero in float16: {vanished(b, a):.0%}")

# %% [markdown]
# ## A scale, and which one
#
# Multiply the loss by `s` and, by the chain rule, every number in the backward pass is multiplied by it. With a power of
# two no digit of any of them changes, only the exponent does: the whole backward pass is shifted into the format's
# window, and is shifted back in float32. Here is the same gradient under one scale after the other.
#
# At first most is lost. Then comes a wide stretch in which all is well, and the error that is left is only rounding. It
# makes no difference where in that stretch you are. Then, within a few doublings, all is lost at the other end: numbers
# overflow to infinity. So you want to be high, but below the edge; and the edge moves as the model learns.

# %%
flat = {"float32": np.concatenate([np.ravel(g) for g in jax.tree.leaves(reference)])}
for exponent in range(0, 49, 6):
    found = np.concatenate([np.ravel(g) for g in jax.tree.leaves(half(params, jnp.float32(2.0**exponent)))])
    error = np.linalg.norm(found - flat["float32"]) / np.linalg.norm(flat["float32"])
    says = f"relative error {error:.4f}" if np.isfinite(found).all() else "not finite"
    print(f"scale 2**{exponent:<3} vanished {vanished(found, flat['float32']):>4.0%}   {says}")

# %% [markdown]
# ## Static, or dynamic
#
# `mpjax.static_loss_scale(s)` stays what it is. It is right if you know the stretch, and know that it will not move.
#
# `mpjax.dynamic_loss_scale()` looks for the edge by itself, and this is what a policy with float16 in it gets if you say
# nothing. The rule is short. After a step with an infinity in its gradients: halve (*backoff*). After so many good steps
# in a row (`growth_interval`): double (*growth*). One method does that, `adjust`, and you can watch it. Here growth comes
# after three good steps; in earnest it is two thousand, since each growth too many costs a step.
#
# A scale is a pytree, so it travels inside the train state, through `jit` and into checkpoints. It has a floor and a
# ceiling as well; ours is raised, because our signals are so small.

# %%
scale = mpjax.dynamic_loss_scale(2.0**10, growth_interval=3)
for finite in (True, True, True, True, False, True, True, True):
    before, scale = scale, scale.adjust(jnp.array(finite))
    print(
        f"{'finite' if finite else 'overflow':<9} scale {before.loss_scale:g} -> {scale.loss_scale:g}, "
        f"good steps in a row: {scale.counter}"
    )

# %% [markdown]
# ## Three runs
#
# Now train: in float32, in float16 with a static scale of one (that is, with none), and in float16 with a dynamic scale
# that starts much too high. `never moved` is the share of weights that are to the bit what they were at the start. In
# float16 without a scale these are nearly all; its loss came down by what the last layer could do alone. The dynamic
# scale comes close to float32, at the price of the steps that it skipped on its way down to the edge.

# %%
scales = {
    "float32": None,
    "float16, unscaled": mpjax.static_loss_scale(1.0),
    "float16, dynamic": mpjax.dynamic_loss_scale(2.0**40, growth_interval=8, ceiling=2.0**48),
}


def run(scale, policy="mixed_float16"):
    model, step, _ = make(policy)
    state = mpjax.TrainState.create(model, optimizer, jax.random.key(0), x, params=params, loss_scale=scale)
    return mpjax.fit(step, state, lambda n: batch, attempts=150)


runs = {}
for name, scale in scales.items():
    runs[name] = result = run(scale, "float32" if name == "float32" else "mixed_float16")
    still = [np.asarray(a) == b for a, b in zip(*map(jax.tree.leaves, (result.state.params, params)), strict=True)]
    last = result.history[-1]
    print(
        f"{name:<18} loss {result.history[0]['loss']:.1e} -> {last['loss']:.2e}, skipped {last['skipped']:.0f}, "
        f"never moved: {np.mean(np.concatenate([np.ravel(s) for s in still])):.0%}"
    )

# %% [markdown]
# ## A skip leaves every byte
#
# What does it mean that a step was skipped? Not that the gradients were set to zero: Adam would then still decay its
# moments, count a step, and move the weights by what it remembers. In mpjax a skipped step has not happened. Params,
# optimizer state, schedule and statistics keep every byte; only the scale and the counters of skips move.
#
# Here the trained state gets a scale far over the edge and the step is tried once. Each part is compared byte by byte.
# (The bytes are kept as numpy's, since a step takes over the memory of the state that it is given.) `step` counts what
# was applied, and `attempt` also what was tried: data goes by the second, so that the batch after a bad one is another.

# %%
state = runs["float16, dynamic"].state
state = dataclasses.replace(
    state, loss_scale=mpjax.dynamic_loss_scale(2.0**48, growth_interval=8, ceiling=2.0**48), skipped=jnp.int32(0)
)
parts = ("params", "opt_state", "mstate", "step", "attempt", "loss_scale")
before = {part: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(getattr(state, part))] for part in parts}
state, metrics = make("mixed_float16")[1](state, batch)
for part, old in before.items():
    now = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(getattr(state, part))]
    print(f"{part:<11}", "every byte as it was" if now == old else "changed")
print({name: float(metrics[name]) for name in ("grads_finite", "skipped", "skipped_in_a_row")})

# %% [markdown]
# ## What is looked at: `skip="gradients"`
#
# By default a step looks at loss, gradients, statistics, *and the new params*. The last is the careful part: an optimizer
# can make an infinity out of finite gradients. `skip="gradients"` leaves it out, as PyTorch's GradScaler does, and saves
# a pass over params and moments; on a large model that can be felt.
#
# Here is a case where it matters, with a bug that was surely written more than once: a schedule that divides by the step,
# which begins at zero. The gradient is finite and the learning rate is not. One setting refuses the update and says so by
# its counter; the other believes the optimizer, and the weight is gone. If your optimizer is a tried one, the faster
# setting is fine.

# %%
one_weight = mpjax.Model(
    lambda rng, x: ({"w": jnp.ones(())}, {}), lambda params, mstate, x, rng=None: (params["w"] * x, mstate)
)
for skip in ("nonfinite", "gradients"):
    careless = optax.sgd(lambda n: 0.1 / n)
    state = mpjax.TrainState.create(one_weight, careless, jax.random.key(0), jnp.ones(()))
    step = mpjax.make_train_step(
        lambda params, mstate, x, rng: one_weight.apply(params, mstate, x)[0] ** 2, careless, skip=skip
    )
    state, metrics = step(state, jnp.ones(()))
    print(f"skip={skip:<10} skipped {metrics['skipped']}, the weight is now {state.params['w']}")

# %% [markdown]
# ## The picture
#
# The history of a scale tells how a float16 run is doing. Two runs are drawn that differ only in where their scale began:
# one far too high, one rather low. The first comes down at once, a cross for each skipped step. The other climbs, a
# doubling at a time, and loses nothing on the way, until it meets the first. From there on both follow the edge, which
# climbs by itself: the model learns, so its residuals shrink, and their gradients take a larger scale. A cross now and
# then means that the edge was tried, and was still there. That is the sound of a healthy run. Crosses in an unbroken row
# are not; after fifty of them `mpjax.fit` stops and names the first leaf that is not finite. And a scale that keeps
# falling to its floor is no matter of scale at all: some layer makes infinities of its own, and `04_where_it_underflows`
# shows how to find it.
#
# Things to try: `growth_interval=2`, and count the crosses; multiply the signals by a million, so that they are in
# microvolts, and see how far the edge moves (that is a cure, too, and the best); train under `mixed_bfloat16`, which
# needs no scale here.

# %%
runs["began low"] = run(mpjax.dynamic_loss_scale(2.0**26, growth_interval=8, ceiling=2.0**48))
curves = {
    label: {key: [row[key] for row in runs[name].history] for key in runs[name].history[0]}
    for label, name in {"began too high": "float16, dynamic", "began low": "began low"}.items()
}
folder = tempfile.TemporaryDirectory()  # it goes when this notebook ends
Image(plots.loss_scale_history(curves, Path(folder.name, "scale.png")), width=900)
