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
# # What the formats hold
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mpjax/mpjax/blob/main/notebooks/01_formats.ipynb)
#
# A float format is a promise about two things: how far its numbers reach, and how close together they lie. Sixteen bits
# cannot keep both promises at once. float16 spends its bits on closeness and gives up reach; bfloat16 keeps float32's
# reach and gives up closeness. Everything that mixed-precision training does (a loss scale here, float32 weights there,
# a norm left alone) answers one of these two losses. This notebook shows each of them happen, and ends with one
# picture: the windows of the formats, and the gradients of a real network that must fit in. A CPU is enough for it.
#
# The next cell installs mpjax from a checkout if it is not there yet, as on Colab, and does nothing otherwise. On a GPU
# or a TPU, write the line that its comment names before you run it.

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
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import mpjax
from mpjax.core.dtypes import facts

FORMATS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
print("here:", mpjax.recommend())
print("T4:  ", mpjax.recommend("Tesla T4"))
print("H100:", mpjax.recommend("NVIDIA H100 80GB HBM3"))

# %% [markdown]
# That was mpjax's advice for this machine, and for two others. By the end you will know where it comes from: a chip is
# asked which formats its matrix unit multiplies natively, and of those the one with the longest reach is taken. (The
# command `mpjax hardware` prints the table behind it, with its sources.)
#
# ## Reach and closeness, in numbers
#
# `facts` reads off what each format can hold. *Largest* is where overflow begins. *Smallest normal* is where full
# precision ends at the other side, and between it and *smallest* lie the subnormal numbers, which lose one bit with
# each halving. *eps* is the gap between one and the next larger number: the closeness. The last column counts
# the doublings between smallest and largest, which is the reach.

# %%
print(f"{'format':<15}{'bits':>5}{'largest':>12}{'smallest normal':>17}{'smallest':>11}{'eps':>10}{'doublings':>11}")
for f in map(facts, FORMATS):
    reach = np.log2(f.max) - np.log2(f.smallest_subnormal)
    ends = f"{f.max:>12.4g}{f.tiny:>17.3g}{f.smallest_subnormal:>11.2g}"
    print(f"{f.name:<15}{f.bits:>5}{ends}{f.eps:>10.2g}{reach:>11.0f}")

# %% [markdown]
# Read bfloat16 against float32: the largest numbers are nearly equal, and so is the smallest normal one, since both
# spend the same number of bits on the exponent. What bfloat16 gave up is eps. Read float16 against bfloat16 and it is
# the other way round: finer steps, and a window that is several times narrower. The two float8 formats repeat the same
# quarrel with half the bits: e4m3 is the finer one, used for weights and activations, and e5m2 has as many exponent bits as
# float16, and is used for gradients, which spread more widely.
#
# ## Spacing: what is lost beside a large number
#
# Floats are spaced relatively. Within one doubling, say from one to two, the gap is eps; in the next doubling it is
# twice that. So each format has a number from which the gap exceeds one, and there a sum of ones stops growing: the
# next one is rounded away, again and again. Nothing warns, for each single addition is correctly rounded. Here five
# thousand ones are added up, one after the other.


# %%
def sum_of_ones(dtype, n=5000):
    one = jnp.ones((), dtype)
    return jax.jit(lambda: jax.lax.fori_loop(0, n, lambda _, total: total + one, one - one))()


for name in ("float32", "bfloat16", "float16"):
    print(f"{name:<10} gap at 256: {256 * facts(name).eps:<9.3g} five thousand ones make {float(sum_of_ones(name)):g}")

# %% [markdown]
# In bfloat16 the sum stops at 256, and in float16 at 2048. A mean over a batch, the statistics of a norm, the
# denominator of a softmax and a running average are such sums. This is why mpjax leaves norms, softmax and losses in
# float32 whatever the policy says about the layers around them; it calls them *islands*. The products of matrices are
# another matter: their inputs are rounded, but the hardware adds the terms up in float32.
#
# ## Spacing again: an update that never arrives
#
# Training adds small updates to larger weights, so the same rounding strikes there. Below, a weight of one receives
# a thousand updates of a thousandth each. In float32 it arrives at zero, give or take its rounding. In bfloat16 not one
# of them survives. The remedy is older than bfloat16: keep *master weights* in float32, and round a copy of them for the
# products. A policy of mpjax says so in its name. `mixed_bfloat16` keeps params in float32 and computes in bfloat16,
# while `bfloat16` alone would keep the params in bfloat16 too.

# %%
for name in ("float32", "bfloat16", "float16"):
    weight = jnp.ones((), name)
    for _ in range(1000):
        weight = weight - jnp.asarray(1e-3, name)
    print(f"{name:<10} after a thousand updates: {float(weight):.4f}")

policy = mpjax.get_policy("mixed_bfloat16")
master = {"kernel": jnp.full((2, 2), 1 / 3), "steps": jnp.int32(7)}
print(policy, {name: str(x.dtype) for name, x in policy.cast_to_compute(master).items()})

# %% [markdown]
# `policy.cast_to_compute` is `mpjax.cast_floating` with the dtype filled in: float leaves are converted, and the counter
# stays an integer. `mpjax.wrap`, the subject of the next notebook, does the same at the place where each layer reads its
# weights. (Note the float16 line: it moved, but rounding left it at the wrong place.)
#
# ## Overflow and underflow
#
# Now the reach. The next cell takes eight numbers across the range of float32 and casts them to each format. Three
# different things happen at the ends. What is too large becomes infinite in float16 and e5m2. e4m3 has no infinity, so
# it turns to NaN there (a float8 product therefore clips before it casts). What is too small becomes zero in all
# three narrow ones, and in silence: zero is a perfectly legal number.

# %%
numbers = jnp.float32([1e6, 1e5, 300, 1, 1e-3, 1e-6, 1e-8, 1e-30])
print(f"{'float32':<15}" + "".join(f"{float(x):>10.3g}" for x in numbers))
for name in FORMATS[1:]:
    print(f"{name:<15}" + "".join(f"{float(x):>10.3g}" for x in mpjax.cast_floating(numbers, name)))

# %% [markdown]
# The two ends are not equally bad. An overflow is loud: one infinity reaches the loss or the gradients, and a train step
# can see it and skip the update. An underflow is quiet. A gradient that became zero looks like a weight that needs no
# change, the loss may even go on falling, and the layer simply learns less than it should.
#
# ## The gradients of a real network
#
# Do gradients get that small? Take a plain network of sigmoid layers on scikit-learn's digits. The slope of a sigmoid is at
# most a quarter, so each layer on the way back multiplies the gradient by a fraction, and the layers near the input
# receive the least. First in float32, as the reference; then in both half formats, with weights that are
# the same to the bit in all three.
#
# `mpjax.scaled_value_and_grad` is `jax.value_and_grad` with a loss scale: the loss is multiplied by the scale before the
# backward pass, so that every gradient on the way is larger by that factor, and the result is divided by it in float32
# at the end, where there is room. With `NoOpLossScale` it does nothing.

# %%
digits = load_digits()
image, label = jnp.float32(digits.data[:128] / 16), jnp.int32(digits.target[:128])
random, sizes = np.random.default_rng(0), [64] * 9 + [10]
weights = [random.normal(0, a**-0.5, (a, b)) for a, b in itertools.pairwise(sizes)]
shared = mpjax.cast_floating(mpjax.cast_floating([jnp.float32(w) for w in weights], "bfloat16"), "float32")


def loss_fn(params, x):
    for w in params[:-1]:
        x = jax.nn.sigmoid(x @ w)
    return mpjax.losses.softmax_cross_entropy(x @ params[-1], label).mean()


def gradients(dtype, loss_scale):
    grads = mpjax.scaled_value_and_grad(loss_fn, loss_scale)(*mpjax.cast_floating((shared, image), dtype))[1]
    return np.concatenate([np.abs(np.float64(g)).ravel() for g in grads])


# %% [markdown]
# The table counts which of the gradient's elements became zero although they are not zero in float32, and how far the
# whole gradient of the network is from the reference, relative to the reference's length. The last row uses a static
# loss scale.

# %%
none, scale = mpjax.NoOpLossScale(), mpjax.static_loss_scale(2.0**15)
reference = gradients("float32", none)
runs = {"bfloat16": ("bfloat16", none), "float16": ("float16", none), "float16, scaled": ("float16", scale)}
first = slice(0, shared[0].size)  # the layer next to the input
print(f"{'':<17}{'vanished':>9}{'in the first layer':>20}{'error of the first layer':>26}")
for name, (dtype, loss_scale) in runs.items():
    found = gradients(dtype, loss_scale)
    lost = (found == 0) & (reference != 0)
    share, share_first = lost.sum() / (reference != 0).sum(), lost[first].sum() / (reference[first] != 0).sum()
    error = np.linalg.norm((found - reference)[first]) / np.linalg.norm(reference[first])
    print(f"{name:<17}{share:>9.1%}{share_first:>20.1%}{error:>26.3g}")

# %% [markdown]
# In float16 without a scale the first layer's gradient is gone: it would never learn anything. With the scale it is back,
# and float16 is then the *more accurate* of the two half formats, for it has the finer steps. bfloat16 loses nothing to
# zero and needs no scale: its smallest normal number is that of float32, so a gradient that float32 can hold in full, bfloat16 can
# hold too, if roughly. That is the whole reason why `mixed_bfloat16` comes without a loss scale and
# `mixed_float16` with one, and why a chip that has both is told to use bfloat16.
#
# ## Which scale?
#
# Too small a scale loses gradients, too large a one overflows, and the right one changes as training goes on. So it is
# searched for by overflowing: `DynamicLossScale` halves itself when a gradient is not finite, and the step is skipped; it
# doubles after a number of good steps in a row. `adjust` is that rule, a pure function from one scale to the next. Below it
# starts much too high and comes down until the gradients fit; then it is told of six good steps, with growth on every third.

# %%
scale, overflows = mpjax.dynamic_loss_scale(2.0**32, growth_interval=3), 0
while not np.isfinite(gradients("float16", scale)).all():
    scale, overflows = scale.adjust(jnp.array(False)), overflows + 1
fitting = scale.loss_scale
print(f"after {overflows} overflows the scale is {float(fitting):g} = 2**{np.log2(fitting):g}")
for good in range(1, 7):
    scale = scale.adjust(jnp.array(True))
    print(f"good step {good}: 2**{np.log2(scale.loss_scale):g}")

# %% [markdown]
# A skipped step now and then is therefore no fault of a float16 run. It is how the scale finds out where the ceiling is.
#
# ## The picture
#
# Above, the window of each format from its smallest number to its largest, the subnormal part paler. Below, a closer look:
# the gradients of the sigmoid network, as they are and multiplied by the scale that was just found. The edge of float16
# is drawn through. What lies to the left of it becomes zero; the scale moves the whole histogram to the
# right, where all of it fits. In bfloat16 both edges are far outside of the lower panel.

# %%
blue, orange, grey = "#0072B2", "#D55E00", "#666666"
figure, (windows, close) = plt.subplots(2, 1, figsize=(9, 6.4), height_ratios=(1, 1.25), layout="constrained")
for row, f in enumerate(map(facts, FORMATS)):
    colour = orange if f.name == "float16" else blue
    windows.barh(row, np.log10(f.max / f.tiny), left=np.log10(f.tiny), height=0.6, color=colour)
    windows.barh(row, np.log10(f.tiny / f.smallest_subnormal), left=np.log10(f.smallest_subnormal), height=0.6,
                 color=colour, alpha=0.35)  # fmt: skip
windows.set_yticks(range(len(FORMATS)), [f"{f.name}\neps {f.eps:.2g}" for f in map(facts, FORMATS)], fontsize=8.5)
windows.invert_yaxis()
windows.set_title("from the smallest number to the largest (pale: subnormal)", fontsize=10.5)

magnitudes = np.log10(reference[reference > 0])
shift, f16 = float(np.log10(fitting)), facts("float16")
low, high = magnitudes.min() - 0.5, np.log10(f16.max) + 1
bins = np.linspace(low, high, 120)
close.hist(magnitudes, bins, color=grey, alpha=0.75, label="gradients as they are")
close.hist(magnitudes + shift, bins, color=orange, alpha=0.75, label=f"times the scale, 2**{np.log2(fitting):g}")
for edge, name in ((f16.smallest_subnormal, "smallest"), (f16.tiny, "smallest normal"), (f16.max, "largest")):
    close.axvline(np.log10(edge), color="black", linewidth=1, linestyle="-" if name != "smallest normal" else ":")
    close.annotate(name, (np.log10(edge), 1.0), xycoords=("data", "axes fraction"), xytext=(-3, -4), rotation=90,
                   textcoords="offset points", ha="right", va="top", fontsize=8)  # fmt: skip
close.axvspan(low, np.log10(f16.smallest_subnormal), color=orange, alpha=0.1, linewidth=0)
close.set(xlim=(low, high), xlabel="magnitude, as a power of ten", ylabel="gradient elements")
close.set_ylim(top=1.45 * close.get_ylim()[1])  # room for the names of the edges
close.set_title("gradients of the sigmoid network in the window of float16 (shaded: becomes zero)", fontsize=10.5)
close.legend(frameon=False, fontsize=8.5, loc="upper right", bbox_to_anchor=(0.9, 1.0))
for axes in (windows, close):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
