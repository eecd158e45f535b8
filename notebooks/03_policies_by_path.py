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
# # Policies by path
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mpjax/mpjax/blob/main/notebooks/03_policies_by_path.ipynb)
#
# "Train it in bfloat16" is seldom the whole wish. The head should give full-precision logits, one block overflows and
# wants more room, a norm of your own must stay in float32. Without help such wishes end as `dtype=` arguments strewn over
# the model, and nobody can say any more what runs in what. In mpjax they are a *policy map*: a few lines beside the
# model, from path to precision. This notebook teaches the language of those lines, and what happens when one of them is
# wrong. Almost nothing is computed here; what a map means can be asked before the first step.
#
# What a format can hold is told in `01_formats`, and how a model is wrapped and trained in `02_first_mixed_step`. The
# next cell installs mpjax from a checkout if it is not there yet, as on Colab, and does nothing otherwise. On a GPU or a
# TPU, write the line that its comment names before you run it.

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
import collections
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from IPython.display import Image

import mpjax
from mpjax.measure import plots

sample = np.random.default_rng(0).integers(1000, size=(2, 16))  # two rows of tokens

# %% [markdown]
# ## A model with names
#
# A small language model: an embedding, two blocks, a norm, a head. Each block attends and then thinks, in the usual way.
# No dtype is mentioned anywhere. What matters for this notebook is the *names*, because a path is made of them: the
# second block's widening layer is `block_1/mlp/up`, and there its params lie, too. (mpjax spells it `block/1/mlp/up`, so
# that a numbered Linen module and an NNX list give the same path.)
#
# The norm is written by hand, and its class is called `Centre`, a name that tells nothing to anybody. Keep an eye on it.


# %%
class Centre(nn.Module):
    @nn.compact
    def __call__(self, x):
        gain = self.param("gain", nn.initializers.ones, x.shape[-1:])
        return gain * (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-6)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = jnp.split(nn.DenseGeneral((2, 3 * 16), name="qkv")(x), 3, axis=-1)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(mpjax.attention(q, k, v, is_causal=True))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="down")(nn.gelu(nn.Dense(4 * x.shape[-1], name="up")(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + Attention(name="attention")(nn.LayerNorm(name="norm")(x))
        return x + MLP(name="mlp")(x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(1000, 32, name="embed")(tokens)
        for n in range(2):
            x = Block(name=f"block_{n}")(x)
        return nn.Dense(1000, name="head")(Centre(name="last")(x))


# %% [markdown]
# ## What a plain policy makes of it
#
# `mpjax.wrap` puts a model under a policy, and `explain` prints what that means for each module: which rule holds, in
# which dtype its params are kept and its products computed, and in which dtype the result leaves. `full` is float32.
#
# Two rows of the table are worth a second look. `block/0/norm` and its twin are in float32 although nobody said so: a
# class whose name is that of a norm is a *float32 island*. And `last`, the norm by hand, is not, since no name gives it
# away.

# %%
print(mpjax.wrap(Net(), "mixed_bfloat16").explain(sample))

# %% [markdown]
# ## A rule means a subtree
#
# A map is a dictionary from pattern to policy. A policy may be a preset, or `key=value` pairs; a key that is left out
# comes from the default. So `compute=float32` changes the dtype of the products and nothing else.
#
# The rule below names `block/1/mlp`, and holds for the two layers in it, too. From here on only the rows are printed that
# are no longer what the default says. The params stay in float32: those are the master weights, and a `mixed_` default
# keeps them.


# %%
def rows_of(rules, default="mixed_bfloat16", **options):
    return mpjax.wrap(Net(), mpjax.PolicyMap(rules, default, **options)).table(sample).rows


def show(rules, **options):
    for row in rows_of(rules, **options):
        if row.rule != "default":
            print(f"{row.path:<23}{row.rule:<20}{row.compute.name:<10}hands back {row.hands_back}")


show({"block/1/mlp": "compute=float32"})

# %% [markdown]
# (The islands show because they are not the default's either.)
#
# ## Patterns
#
# A path may be a *glob*. One star stands for exactly one segment of a path, two stars for any number of them, or none at
# all. So `**/up` finds every `up` at whatever depth, while `*/up` would want it at the second place and find none. What
# is matched brings its subtree along: `block` alone means both blocks with all in them. Where globs are not enough, a
# regex may be marked by `re:`, and a class of modules may stand instead of a path.

# %%
for pattern in ("block", "block/*/mlp", "**/up", "**/mlp/*", "re:block/[01]/attention", nn.Dense):
    name = pattern if isinstance(pattern, str) else pattern.__name__
    hit = [row.path for row in rows_of({pattern: "compute=float32"}) if row.rule in (name, repr(name))]
    print(f"{name:<24}{len(hit):>3} modules: {', '.join(hit[:3])}{', …' if len(hit) > 3 else ''}")

# %% [markdown]
# ## The first rule that matches wins
#
# Order is the only precedence there is; no pattern is "more specific" than another. So put the exception before the rule.
# Here the MLPs go to float16, which has finer steps than bfloat16, but the last of their layers stays out of it.

# %%
exception_first = {"block/1/mlp/down": "compute=bfloat16", "**/mlp": "compute=float16"}
show(exception_first)

# %% [markdown]
# ## Islands, and how one sinks
#
# Norms compute means and variances, which are long sums, and long sums go wrong in half precision. That is why a sweeping
# rule does not touch them. `**` below means everything, and yet the two norms stay in float32.
#
# An island sinks only if it is *meant*: if the rule spells out the end of its path, or names its class. The second map
# does. It is your model; mpjax only asks that you say it.

# %%
for rules in ({"**": "compute=float16"}, {"**/norm": "compute=float16"}, {nn.LayerNorm: "compute=float16"}):
    norms = [row for row in rows_of(rules) if row.cls == "LayerNorm"]
    print(f"{norms[-1].rule:<15}", *(f"{row.path} computes in {row.compute.name};" for row in norms))

# %% [markdown]
# ## An island of your own
#
# `Centre` is a norm in all but name. Its variance runs in bfloat16, and nobody would notice for a long time. Declare the
# class, and each of its instances is an island, now and in every model that uses it.
#
# (A function has no path. A softmax that is written out in a `__call__` cannot be reached by any rule; the auditor in
# `04_where_it_underflows` finds such things.)

# %%
show({}, islands=(Centre,))

# %% [markdown]
# ## What leaves a subtree: `output=`
#
# The last column of the table said *caller's* nearly everywhere. A module computes in its own dtype and hands its result
# back in that of the module that called it. Otherwise one float32 layer would turn everything behind it into float32,
# silently.
#
# For the head that is sometimes not what is wanted. A head that computes in float32 and hands back bfloat16 has had its
# logits rounded after all, and the float32 that the whole model returns then holds rounded numbers. So a rule may say
# `output=` as well. Count the logits that bfloat16 could hold exactly: all of them in the first case, hardly any in the
# second.

# %%
shapes, _ = jax.eval_shape(mpjax.wrap(Net(), "float32").init, jax.random.key(0), sample)
random = np.random.default_rng(1)  # numpy draws the weights: to compile an initialisation would take longer
params = jax.tree.map(lambda x: np.float32(random.normal(0, 0.2, x.shape)), shapes)
for rule in ("compute=float32", "compute=float32,output=float32"):
    model = mpjax.wrap(Net(), {"head": rule})
    logits = jax.jit(model.apply)(params, {}, sample)[0]
    rounded = np.mean(logits == logits.astype(jnp.bfloat16))
    print(f"{rule:<31} logits in {logits.dtype}, of which bfloat16 holds {rounded:.1%}")

# %% [markdown]
# ## A rule that never acts
#
# A typo in a map is dangerous in a quiet way. The run works, it is only less precise than you believe, or slower. So a
# rule that can never act is an error, raised when the map meets the model, with the nearest names. There are several ways
# to be useless: nothing has that path; an earlier rule has taken it all; all that it matches are islands; the class does
# not occur. Read the four messages: each says what to do.

# %%
useless = (
    {"haed": "compute=float32"},
    {"**/mlp": "compute=float16", "block/1/mlp/down": "compute=bfloat16"},
    {"**/no*": "compute=float16"},
    {nn.Conv: "compute=float16"},
)
for rules in useless:
    try:
        show(rules)
    except ValueError as error:
        print(f"- {error}")

# %% [markdown]
# ## All of it, and what really ran
#
# Now a map as one might write it for this model. Attention in bfloat16 as by default; the MLPs in float16 but for one
# layer; the head in full precision up to the logits; our own norm an island. The auditor counts the matrix products of
# the gradient by dtype, so that the intention is checked against the program that jax traced. Since a rule computes in
# float16, a train state made from this model gets a dynamic loss scale by itself.

# %%
rules = mpjax.PolicyMap(
    exception_first | {"head": "compute=float32,output=float32"}, default="mixed_bfloat16", islands=(Centre,)
)
model = mpjax.wrap(Net(), rules)


def loss_fn(params):
    return mpjax.losses.softmax_cross_entropy(model.apply(params, {}, sample)[0], sample).mean()


found = mpjax.audit(jax.grad(loss_fn), params)
print({dtype: f"{found.share(dtype):.0%}" for dtype in ("bfloat16", "float16", "float32")})

# %% [markdown]
# ## The picture
#
# `policy_by_layer` draws the table. The colour is the format; the bar is as long as the module's share of all products,
# which the audit knows. So it answers what `explain` cannot: what a rule *costs*. The head in float32 is one line of the
# map and the longest bar, because a vocabulary is wide. In a deep model its share would be small, and here it is not: a
# reason to ask whether only its `output=` matters to you.
#
# Things to try: let the head compute in bfloat16 and keep its `output=float32`, and look at the count of rounded logits
# again; name `Centre` in a rule and see it sink; write a rule for `block/2`, and read what it says.

# %%
flops = collections.Counter()
for op in found.ops:
    flops[op.path] += op.flops * op.times
folder = tempfile.TemporaryDirectory()  # it goes when this notebook ends
Image(plots.policy_by_layer(model.table(sample), Path(folder.name, "policy.png"), flops=flops), width=1000)
