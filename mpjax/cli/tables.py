"""`mpjax policy TEXT` and `mpjax hardware`: what is known without a model."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

import mpjax
from mpjax.cli.output import Json, print_json, show
from mpjax.cli.target import Refused


def policy(text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")], as_json: Json = False) -> int:
    """Show what a policy string means: its three dtypes, what each can hold, and how dense layers multiply.

    Args:
      text: a preset (mixed_bfloat16), a dtype (bf16) or key=dtype pairs (p=f32,c=bf16,o=f32,dot=fp8).
      as_json: print JSON instead.
    """
    from mpjax.core.dtypes import facts
    from mpjax.policy.policy import DOTS

    try:
        found = mpjax.get_policy(text)
    except ValueError as error:
        raise Refused(str(error)) from error
    roles = {role: facts(getattr(found, f"{role}_dtype")) for role in ("param", "compute", "output")}
    if as_json:
        print_json(
            {"policy": str(found), "dot": found.dot, **{role: dataclasses.asdict(f) for role, f in roles.items()}}
        )
        return 0
    rows = [
        (role, f.name, f.bits, f"{f.max:.6g}", f"{f.tiny:.3g}", f"{f.smallest_subnormal:.3g}", f"{f.eps:.3g}")
        for role, f in roles.items()
    ]
    show(str(found), ("", "dtype", "bits", "largest", "smallest normal", "smallest", "eps"), rows)
    if found.dot is not None:
        print(f"dot: dense layers multiply in {DOTS[found.dot]}; sums, and all else, as above")
    return 0


def hardware(as_json: Json = False) -> int:
    """Show which chip multiplies which format natively, at which peak, and the policy to begin with on each.

    A number is the peak of dense products in TFLOP/s (TOP/s for int8). native: no source gives the peak. emulated: the
    product runs in another format, no faster. none: there is no such product. ?: no source was found.

    Args:
      as_json: print JSON instead.
    """
    from mpjax.policy.hardware import CHIPS, FORMATS, recommend

    if as_json:
        print_json([vars(chip) | {"begin_with": recommend(chip.name).policy} for chip in CHIPS])
        return 0
    sources = list(dict.fromkeys(source for chip in CHIPS for source in chip.source))
    rows = []
    for chip in CHIPS:
        cells = [f"{chip.tflops[f]:g}" if f in chip.tflops else chip.support[f] for f in FORMATS]
        advice = recommend(chip.name)
        begin = advice.policy + (" + loss scale" if advice.needs_loss_scale else "")
        numbers = " ".join(str(sources.index(source) + 1) for source in chip.source)
        rows.append((chip.name, *("?" if cell == "unknown" else cell for cell in cells), begin, numbers))
    formats = (name.replace("_", "\n") for name in FORMATS)
    show("Dense products, TFLOP/s", ("chip", *formats, "begin with", "sources"), rows)
    for number, source in enumerate(sources, 1):
        print(f"{number:2}  {source}")
    return 0
