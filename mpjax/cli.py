"""The command line. Each command imports what it needs when it runs, so that `mpjax --help` never waits for jax."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

import mpjax


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 not understood (told on stderr).

    >>> main(["--version"]) == main(["policy", "c=bf16"]) == 0  # doctest: +ELLIPSIS
    mpjax 0...
    True
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"mpjax {mpjax.__version__}")
        return 0
    return tyro.extras.subcommand_cli_from_dict(
        {"policy": policy, "hardware": hardware},
        prog="mpjax",
        description="Mixed precision for Flax models in JAX. `mpjax --version` tells the version.",
        args=args,
    )


def policy(text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")]) -> int:
    """Show what a policy string means: its three dtypes, and what each can hold.

    Args:
      text: a preset (mixed_bfloat16), a dtype (bf16) or key=dtype pairs (p=f32,c=bf16,o=f32).
    """
    from mpjax.core.dtypes import facts

    try:
        found = mpjax.get_policy(text)
    except ValueError as error:
        print(f"mpjax policy: {error}", file=sys.stderr)
        return 2
    rows = []
    for role in ("param", "compute", "output"):
        f = facts(getattr(found, f"{role}_dtype"))
        rows.append(
            (role, f.name, f.bits, f"{f.max:.6g}", f"{f.tiny:.3g}", f"{f.smallest_subnormal:.3g}", f"{f.eps:.3g}")
        )
    _show(str(found), ("", "dtype", "bits", "largest", "smallest normal", "smallest", "eps"), rows)
    return 0


def hardware() -> int:
    """Show which chip multiplies which format natively, at which peak, and the policy to begin with on each.

    A number is the peak of dense products in TFLOP/s (TOP/s for int8). native: no source gives the peak. emulated: the
    product runs in another format, no faster. none: there is no such product. ?: no source was found.
    """
    from mpjax.policy.hardware import CHIPS, FORMATS, recommend

    sources = list(dict.fromkeys(source for chip in CHIPS for source in chip.source))
    rows = []
    for chip in CHIPS:
        cells = [f"{chip.tflops[f]:g}" if f in chip.tflops else chip.support[f] for f in FORMATS]
        advice = recommend(chip.name)
        begin = advice.policy + (" + loss scale" if advice.needs_loss_scale else "")
        numbers = " ".join(str(sources.index(source) + 1) for source in chip.source)
        rows.append((chip.name, *("?" if cell == "unknown" else cell for cell in cells), begin, numbers))
    formats = (name.replace("_", "\n") for name in FORMATS)
    _show("Dense products, TFLOP/s", ("chip", *formats, "begin with", "sources"), rows)
    for number, source in enumerate(sources, 1):
        print(f"{number:2}  {source}")
    return 0


def _show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """One table on stdout; on a pipe as wide as it needs to be, so that nothing is cut."""
    import rich.console
    import rich.table

    console = rich.console.Console(width=None if sys.stdout.isatty() else 160)
    table = rich.table.Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
