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
# # Where it underflows, where it overflows
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mpjax/mpjax/blob/main/notebooks/04_where_it_underflows.ipynb)
#
# A run in half precision that goes wrong says little by itself: the loss is NaN, or it stops falling, or it ends a little
# higher than it used to. This notebook goes through the instruments that say more, on one tiny model and in the order
# in which you would take them up: what the policy *intends* for each layer, what the traced program *does*, how large
# the numbers really *are*, which module made the first infinity, and at last whether the result is still the same.
# One of its layers will be made sick on purpose, in a way that float32
# cannot see.
#
# The words used here (loss scale, island, master weights) come from `01_formats` and `02_first_mixed_step`. A CPU is
# enough. The next cell installs mpjax from a checkout if it is not there yet, as on Colab, and does nothing otherwise.
# On a GPU or a TPU, write the line that its comment names before you run it. On such a machine begin with the command
# `mpjax doctor`: it tells which formats the chip multiplies natively, and measures how fast.

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

temporary = tempfile.TemporaryDirectory()  # for the pictures; it goes when this notebook ends
folder = Path(temporary.name)
random = np.random.default_rng(0)
label = random.integers(10, size=1800)
image = random.normal(0, 0.5, (10, 64))[label] + random.normal(0, 1, (1800, 64))  # ten patterns under noise
data = {"image": image.astype(np.float32), "label": label.astype(np.int32)}
train, test = ({key: x[part] for key, x in data.items()} for part in (slice(360, None), slice(360)))
sample = train["image"][:2]

# %% [markdown]
# ## The model and a job
#
# Four residual blocks and a linear head, for ten random patterns under noise: what is learned does not matter here. A
# block normalises, widens, squares what is positive, and narrows again. The squared ReLU is a serious activation of
# language models (So et al., *Primer*), and honest trouble for float16: a square doubles the exponent. The blocks are
# a *scanned stack*, one module whose params carry the layer as their first axis, so that XLA compiles one block and
# not four. To a policy such a stack is one path; we shall see how to learn which of its layers is the sick one all
# the same. (`wrap` takes an NNX model as well, and none of the instruments asks which Flax is inside.)
#
# `mpjax.Job` holds what is needed to train one model: wrapped model, loss, optimizer, data, and a held-out evaluation. The
# comparison at the end asks for a function from policy and seed to a job, so it is written right here. The seed decides
# initial weights and the order of the data. Two things keep this notebook quick: numpy draws the weights, since to compile
# an initialisation takes longer than to train so small a model; and the functions are cached by policy, so that all
# seeds share one compiled step.


# %%
class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(128, use_bias=False, name="up")(x)
        return nn.Dense(x.shape[-1], use_bias=False, name="down")(nn.relu(h) ** 2)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + FeedForward(name="ffn")(nn.RMSNorm(use_scale=False, name="norm")(x)), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        x, _ = stack(name="blocks")(x, None)
        return nn.Dense(10, use_bias=False, name="head")(x)


@functools.cache
def functions(policy):
    model = mpjax.wrap(Net(), policy)

    def loss_fn(params, mstate, batch, rng=None):
        logits, mstate = model.apply(params, mstate, batch["image"])
        return mpjax.losses.softmax_cross_entropy(logits, batch["label"]).mean(), mpjax.Aux(mstate)

    return model, loss_fn, lambda *args: {"loss": loss_fn(*args)[0]}


optimizer = optax.sgd(0.05, momentum=0.9)
shapes, _ = jax.eval_shape(functions("float32")[0].init, jax.random.key(0), sample)


def make_job(policy, seed):
    model, loss_fn, eval_fn = functions(policy)
    random = np.random.default_rng(seed)
    initial = jax.tree.map(lambda x: np.float32(random.normal(0, 0.5 * x.shape[-2] ** -0.5, x.shape)), shapes)
    model = dataclasses.replace(model, init=lambda rng, x: (initial, {}))
    batches = mpjax.epoch_batches(train, 128, mpjax.seeds(seed))
    return mpjax.Job(model, loss_fn, optimizer, batches, (sample,), eval_fn, [test])


# %% [markdown]
# ## What is intended, and what is traced
#
# First the intention: `explain` prints what the policy makes of each module. Then what became of it: `mpjax.audit` reads
# the program that jax traced, here the gradient, and lists which products, exponentials, reductions and casts run in
# which dtype. Look at the reductions: each of them is in float32, the norm's and the loss's, although no rule asked.

# %%
job = make_job("mixed_float16", seed=0)
state = job.state(jax.random.key(0), loss_scale=mpjax.dynamic_loss_scale(2.0**24, growth_interval=5))
print(job.model.explain(sample), end="\n\n")
found = mpjax.audit(jax.grad(job.loss_fn, has_aux=True), state.params, state.mstate, job.batches(0))
print(found)
assert found.share("float16") == 1.0 and set(found.dtypes("reduce")) == {"float32"}

# %% [markdown]
# `policy_by_layer` draws the table. If it is told how the work is spread, which the audit knows, the bars are as long as a
# module's share of it. So the picture shows the price of a rule before you write it: the norm is a float32 island and
# costs next to nothing, while a rule that puts `blocks/ffn` into float32 would take nearly all products with it.

# %%
flops = {op.path: 0 for op in found.ops}
for op in found.ops:
    flops[op.path] += op.flops * op.times
Image(plots.policy_by_layer(job.model.table(sample), folder / "policy.png", flops=flops), width=800)

# %% [markdown]
# ## Training, with a probe in it
#
# A dtype does not say whether the numbers fit. `mpjax.probe` takes a train step and gives back one that, at every N-th call,
# also counts how large all values are: what each module returns, the gradient of that, and how far each param moved. It is
# a second compiled variant on the same state, so the calls between are as fast as ever. The run below is short and is probed
# at each step; in your own, a hundred is a good distance. `ProbeLog` keeps the reports, and can write them to a file.
#
# The loss scale starts too high on purpose and may grow after five good steps, so that it moves in sight.
# `loss_scale_history` draws it with a cross at each skipped step: a staircase down to where gradients fit, then now and
# then a step up, a cross, a step down. That is a healthy float16 run. Crosses one after the other would not be.

# %%
log = mpjax.ProbeLog()
step = mpjax.probe(job.step(clip_norm=1.0), every=1)
result = mpjax.fit(step, state, job.batches, attempts=60, hooks=[log])
curves = {name: [metrics[name] for metrics in result.history] for name in result.history[0]}
skipped = [metrics["attempt"] for metrics in result.history if not metrics["grads_finite"]]
print(f"loss {curves['loss'][0]:.3f} -> {curves['loss'][-1]:.3f}, skipped attempts: {skipped}")
Image(plots.loss_scale_history({"mixed_float16": curves}, folder / "scale.png", limit="float16"), width=800)

# %% [markdown]
# ## Where the numbers lie
#
# The last report, first as a picture. Each layer is a strip, darker where more of its values lie; above it are the windows
# of the formats, whose ends are drawn through. What is left of a window becomes zero in that format, what is right of it
# overflows. The activations sit at ease in float16. Their gradients are shown as the backward pass holds them, times the loss
# scale, and the hollow boxes show where they would lie without it: a large part of them left of float16's end.
# The updates of the params are in float32, and small beside the weights: the reason for master weights.

# %%
report = log.reports[-1]
ranges = plots.exponent_ranges(report.histograms(), folder / "exponents.png", loss_scale=report.loss_scale)
Image(ranges, width=1000)

# %% [markdown]
# Then as a table, with what each format would lose. An arrow down is the share that would be flushed to zero, an
# arrow up the share that would overflow. Behind `→` stands the same for scaled values, which for a gradient is its
# loss scale. So in the column of float16 read "lost without the loss scale, nothing with it". The two float8 formats
# lose something in these rows even then, the finer one at both ends at once: they want a scale for each tensor, not
# one for all.
#
# Half of the gradient at `blocks/ffn/up` is zero, and that is no loss: it is the half that the ReLU switched off.

# %%
print(report)
gradients = report.select("gradient")
lost = {path: (r.underflow("float16", 1 / r.loss_scale), r.underflow("float16")) for path, r in gradients.items()}
assert all(before > 0.02 and after == 0 for before, after in lost.values())

# %% [markdown]
# ## A layer that overflows
#
# Now the sick layer. In the third block of the trained model, `up` is multiplied by a power of two and `down` divided by
# its square. Squared ReLU passes a factor on squared, so the two cancel, and as powers of two they do so without any
# rounding: in float32 the model is *the same function to the last bit*. Training may drift along such a direction for
# long, and nothing in a float32 run tells. Yet between `up` and `down` the numbers are now too large for float16.
#
# The step notices, of course, and skips. But its metrics say only *that* something was not finite.

# %%
sick = jnp.float32([1, 1, 2**7, 1])[:, None, None]
params = jax.tree.map(jnp.copy, result.state.params)
ffn = params["blocks"]["ffn"]
ffn["up"]["kernel"], ffn["down"]["kernel"] = ffn["up"]["kernel"] * sick, ffn["down"]["kernel"] / sick**2

batch, full = job.batches(60), jax.jit(functions("float32")[1])
healthy, sick_loss = (float(full(tree, {}, batch)[0]) for tree in (result.state.params, params))
print(
    f"float32: loss {healthy:.4f}, and with the sick layer {sick_loss:.4f}; the same to the bit: {healthy == sick_loss}"
)
state, metrics = step(dataclasses.replace(result.state, params=params), batch)
print({name: float(metrics[name]) for name in ("loss", "grads_finite", "loss_scale", "skipped_in_a_row")})

# %% [markdown]
# ## Who did it
#
# `mpjax.diagnose` runs the same step one operation at a time and follows each infinity back to where it was made from
# finite numbers. It names the module, the pass, the operation, the largest number that went in, and, in a scanned
# stack, the iteration, counted from zero: the layer. It also says which rule would give the numbers room.
#
# You need not stand by. `mpjax.fit(..., hooks=[mpjax.CulpritHook()])` does this when too many skips in a row end a run, and
# puts the sentence into the error. Until then the hook costs nothing.

# %%
culprit = mpjax.diagnose(job.model, state, batch, job.loss_fn)
print(culprit)
assert (culprit.path, culprit.layer, culprit.phase, culprit.kind) == ("blocks/ffn", 2, "forward", "+inf")
assert culprit.amax**2 > 65504

# %% [markdown]
# ## The rule that mends it
#
# The path in the sentence is the key of the rule. Two things want thought. *How far must it reach?* A module hands its result
# back in its caller's dtype, so a rule has to hold from where the number gets too large to where it is small again: here
# `ffn`, with the square and with `down`. *Which format?* float32 has room and is the careful answer; the first picture shows what
# it costs. bfloat16 has the same room, and the products stay in half precision. We take that.
#
# The proof is a real step on the sick weights, which the skipped step has left as they were: it is finite, and its loss is
# that of float32 but for bfloat16's rounding.

# %%
rules = mpjax.PolicyMap({culprit.path: "compute=bfloat16"}, default="mixed_float16")
mended = make_job(rules, seed=0)
state = mended.state(jax.random.key(0), params=state.params)
state, metrics = mended.step(clip_norm=1.0)(state, batch)
print(f"loss {float(metrics['loss']):.4f} and in float32 {healthy:.4f}, finite: {bool(metrics['grads_finite'])}")
assert metrics["grads_finite"] and abs(metrics["loss"] - healthy) < 0.02

# %% [markdown]
# ## Is the result the same?
#
# A finite step is not yet a good run. `mpjax.parity` trains the same job under float32 and under a candidate, on paired seeds:
# both get the same weights and the same batches, so the difference between the two is due to the policy alone. The
# held-out loss is compared. You state a *margin*, the largest difference that would not matter to you, before you look.
# The candidate is *equivalent* only if the whole confidence interval of the mean difference lies within the margin.

# %%
settings = {"attempts": 40, "seeds": 3, "step_options": {"clip_norm": 1.0}}
parity = mpjax.parity(make_job, "mixed_bfloat16", margin=0.02, **settings)
print(parity)
assert parity.verdict == "equivalent" and not parity.diverged

# %% [markdown]
# The last line but one is worth a look: the seeds of float32 alone differ from each other by much more than the
# candidate differs from float32. That is what the pairs are for. Without them, the one would hide the other.
#
# And *undecided*? It means that the interval reaches over the margin's edge: the seeds are too few for so fine a question. It
# does not mean "almost equivalent", nor "worse". Below, the same runs are asked for a margin that is made a little too
# fine for them. The picture shows it: the bar of the mean sticks out of the green band. The sentence tells how many seeds
# would do. Run those anew rather than adding one at a time until the verdict pleases, and never choose the margin as it is
# chosen here, from the result: it is done to show the word.
#
# From here: `mpjax parity`, `mpjax probe` and `mpjax plot` do the same on the command line, for a job in a file of yours. Things to
# try: give the mended rules to `parity`; put `float32` into the rule, and see in the audit what it costs; or make the *first*
# block sick, and see its index in the culprit.

# %%
edge = max(map(abs, parity.test.interval))
differences = [pair.difference for pair in parity.pairs]
finer = mpjax.equivalence(differences, margin=float(f"{0.85 * edge:.2g}"))
undecided = dataclasses.replace(parity, test=finer)
print(undecided.explain())
Image(plots.parity_curves(undecided, folder / "parity.png"), width=900)
