"""How many FLOPs a step of a work needs: what the model asks for, whatever a program computes again."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.bench.rows import GPT, ResNet, Work


def step_flops(work: Work) -> int:
    """FLOPs of a step, a multiply-add counted as two.

        GPT:    6 · params · tokens + 12 · layers · width · context² · batch
        ResNet: 3 · batch · Σ over convolutions of 2 · taps · inputs · outputs · places

    A GPT's are counted as nanoGPT and PaLM (Chowdhery et al., 2022, appendix B) do: the embedding, which is also the
    head, and the positions are among the params, and attention is counted whole though a causal one needs half. A
    backward pass is two forward passes.

    >>> step_flops(GPT(width=2, layers=1, heads=1, context=4, batch=3, vocabulary=5))
    8064
    """
    if isinstance(work, GPT):
        attention = 12 * work.layers * work.width * work.context**2 * work.batch
        return 6 * gpt_params(work) * work.items + attention
    return 3 * work.batch * sum(2 * n for n in multiply_adds(work))


def gpt_params(work: GPT) -> int:
    """Its params: tables of tokens and places; a layer's 12 width² of kernels and 13 width of biases and norms; the norm."""
    width = work.width
    return (work.vocabulary + work.context) * width + work.layers * (12 * width**2 + 13 * width) + 2 * width


def multiply_adds(work: ResNet) -> Iterator[int]:
    """Of each convolution and of the head, for one picture; taps that meet only padding are counted, too."""
    size, inputs = work.size // 2, work.width
    yield 7 * 7 * 3 * inputs * size**2
    size //= 2  # the pooling
    for stage, blocks in enumerate(work.stages):
        width = work.width * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            yield inputs * width * size**2
            yield 9 * width * width * (size // stride) ** 2
            yield width * 4 * width * (size // stride) ** 2
            if not block:
                yield inputs * 4 * width * (size // stride) ** 2
            size, inputs = size // stride, 4 * width
    yield inputs * work.classes
