"""The matrix products of an optimised HLO program: which, how many, how many FLOPs. To be held against another program's."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_ARRAY = r"(\w+)\[([\d,]*)\]"
_DEFINED = re.compile(rf"^\s*(?:ROOT )?%?([\w.-]+) = \(?{_ARRAY}", re.MULTILINE)
_PRODUCT = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.-]+ = \(?{_ARRAY}.*? (dot|convolution|custom-call)\(([^)]*)\)(.*)$", re.MULTILINE
)
_TARGET = re.compile(r'custom_call_target="([^"]*(?:cublas|cudnn|matmul|gemm)[^"]*)"', re.IGNORECASE)
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')


class Product(NamedTuple):
    """One kind of product: which instruction, its operands and its result, as `bf16[64,32]`."""

    kind: str
    operands: tuple[str, ...]
    result: str
    flops: int
    """Of one; 0 where the text does not tell, as of attention and of convolutions."""


def products(hlo: str) -> collections.Counter[Product]:
    """How often each product stands in the text of a compiled program. What is in a loop's body counts once.

    >>> text = '''
    ...   a = bf16[2,3] parameter(0)
    ...   b = bf16[3,4] parameter(1)
    ...   ROOT c = f32[2,4] dot(a, b), lhs_contracting_dims={1}, rhs_contracting_dims={0}'''
    >>> products(text)
    Counter({Product(kind='dot', operands=('bf16[2,3]', 'bf16[3,4]'), result='f32[2,4]', flops=48): 1})
    """
    shapes = {name: (dtype, dims) for name, dtype, dims in _DEFINED.findall(hlo)}
    found: collections.Counter[Product] = collections.Counter()
    for dtype, dims, kind, inside, rest in _PRODUCT.findall(hlo):
        if kind == "custom-call":
            target = _TARGET.search(rest)
            if target is None:
                continue
            kind = target.group(1)
        names = [part.split()[-1].lstrip("%") for part in inside.split(", ") if part.strip()]
        operands = [shapes[name] for name in names if name in shapes]
        contracted = _CONTRACTED.search(rest)
        flops = 0
        if contracted and operands:
            lhs = _numbers(operands[0][1])
            flops = 2 * math.prod(_numbers(dims)) * math.prod(lhs[n] for n in _numbers(contracted.group(1)))
        spelled = tuple(f"{dtype}[{dims}]" for dtype, dims in operands[:2])
        found[Product(kind, spelled, f"{dtype}[{dims}]", flops)] += 1
    return found


def table(hlo: str) -> list[dict[str, object]]:
    """The same for a JSON file, the dearest first."""
    found = products(hlo)
    rows = sorted(found.items(), key=lambda item: (-item[0].flops * item[1], item[0]))
    return [{**product._asdict(), "count": count} for product, count in rows]


def kinds(rows: Iterable[Mapping[str, Any]]) -> dict[tuple, int]:
    """Of a `table`, how often each product is there, whichever kernel runs it and whichever operand stands first.

    A product is told by its FLOPs and the dtypes of its operands; one whose FLOPs the program does not tell (attention's
    kernel, a convolution) by its kernel and shapes. The result's dtype says nothing: where a kernel cuts the sum into
    parts, which is left to measurement on the device, each part is float32.
    """
    found: dict[tuple, int] = {}
    for product in rows:
        dtypes = tuple(sorted(text.partition("[")[0] for text in product["operands"]))
        shapes = (product["kind"], *product["operands"], product["result"])
        key: tuple = (product["flops"], *dtypes) if product["flops"] else shapes
        found[key] = found.get(key, 0) + product["count"]
    return found


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
