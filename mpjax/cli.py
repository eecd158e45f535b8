"""The command line. Each command imports what it needs when it runs, so that `mpjax --help` never waits for jax."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

import mpjax


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 not understood (told on stderr), 130 Ctrl-C.

    >>> main(["--version"]) == main(["policy", "c=bf16"]) == 0  # doctest: +ELLIPSIS
    mpjax 0...
    True
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"mpjax {mpjax.__version__}")
        return 0
    if args[:1] == ["train"] and len(args) > 1 and not args[1].startswith("-"):
        return train(args[1], tuple(args[2:]))  # its flags are the experiment's to understand
    return tyro.extras.subcommand_cli_from_dict(
        {"policy": policy, "hardware": hardware, "train": train},
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


def train(
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")],
    flags: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[--FLAG=VALUE ...]")] = (),
) -> int:
    """Run an experiment of a checkout, with all its flags: the same as `python -m experiments.NAME`.

    `mpjax train NAME --help` lists its flags. Most have: --policy P, one policy only (--policies P Q for several);
    --rules PATTERN POLICY, repeated, a policy map of your own, trained as one more policy; --workdir FOLDER. Ctrl-C writes
    what was measured so far.

    Args:
      name: the experiment's, e.g. vision_digits; a name that is none is answered with all that there are.
      flags: the experiment's own.
    """
    root = _checkout()
    if root is None:
        print(
            "mpjax train: the experiments are not in the package, and neither here nor beside it is a checkout that has "
            "them; get mpjax's repository (git clone), and run this in its folder",
            file=sys.stderr,
        )
        return 2
    names = sorted(path.stem for path in (root / "experiments").glob("[!_]*.py"))
    if name not in names:
        print(f"mpjax train: no experiment is called {name!r}; there are {', '.join(names)}", file=sys.stderr)
        return 2
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        runner = importlib.import_module("experiments._run")
        experiment = importlib.import_module(f"experiments.{name}")
    except KeyboardInterrupt:
        return 130
    code: int = runner.start(
        experiment.Config, experiment.main, experiment.__doc__, list(flags), prog=f"mpjax train {name}"
    )
    return code


def _checkout() -> Path | None:
    """The folder that holds the experiments: that of the source mpjax runs from, else the one that one stands in."""
    for root in (Path(mpjax.__file__).parents[1], Path.cwd()):
        if (root / "experiments" / "_run.py").exists():
            return root
    return None


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
