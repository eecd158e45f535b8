"""The resolution table: what each module of a model computes in, and which rule said so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from mpjax.core.dtypes import short_name
from mpjax.policy.patterns import Sites
from mpjax.policy.rules import PolicyMap, is_dense, keeping_dtype


@dataclasses.dataclass(frozen=True)
class Row:
    """One module: its path, class, the rule that holds, and the dtypes it means here."""

    path: str
    cls: str
    rule: str
    param: np.dtype
    compute: np.dtype
    hands_back: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows in calling order. `str(table)` is what `model.explain(sample)` returns.

    >>> print(resolution_table(PolicyMap({"head": "compute=float32"}), {"": object, "head": object}))
    path  class   rule     params  compute  hands back
    ·     object  default  full    bf16     full
    head  object  'head'   full    full     caller's
    """

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("path", "class", "rule", "params", "compute", "hands back", "note")]
        cells += [
            (r.path or "·", r.cls, r.rule, short_name(r.param), short_name(r.compute), r.hands_back, r.note)
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        if not any(row.note for row in self.rows):
            cells = [row[:-1] for row in cells]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in cells)


def resolution_table(
    rules: PolicyMap,
    sites: Sites,
    scanned: frozenset[str] = frozenset(),
    rounded_at: Callable[[str], str | None] = lambda path: None,
    unfit: Mapping[str, str] = MappingProxyType({}),
) -> Table:
    """The table of a policy map over the modules of one model.

    Args:
      rules: the policy map.
      sites: the class at each path, in calling order.
      scanned: paths whose layers are one traced body.
      rounded_at: for a path where `output=` acts, the ancestor that rounds the result all the same (None: nobody).
      unfit: for each dense layer that no `dot=` recipe reaches, the reason that lies in itself: its sizes, for one.
    """
    rows = []
    for path, cls in sites.items():
        found = rules.resolve(path, sites)
        if path == "":
            back = short_name(found.policy.output_dtype if found.rule.hands_back else rules.default.output_dtype)
        else:
            back = short_name(found.policy.output_dtype) if found.rule.hands_back else "caller's"
        notes = ["scanned stack"] * (path in scanned) + ["input kept"] * found.rule.keeps_input
        if found.policy.dot is not None and is_dense(cls):
            recipe = rules.dot_at(path, sites)
            kept = keeping_dtype(path)
            why = unfit.get(path) if recipe else f"{kept[0]!r} is head or embedding"
            notes.append(f"dot={recipe}" if why is None else f"dot=none: {why}")
        rounds = rounded_at(path) if found.rule.hands_back else None
        if rounds is not None and not rules.resolve(rounds, sites).rule.hands_back:
            notes.append(f"rounded at {rounds!r}: name it with output= too")
        policy = found.policy
        rows.append(
            Row(path, getattr(cls, "__name__", "?"), found.said_by, policy.param_dtype, policy.compute_dtype, back,
                ", ".join(notes))
        )  # fmt: skip
    return Table(tuple(rows))
