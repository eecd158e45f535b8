"""Why a rule can never act, in words, with the paths that its author may have meant."""

from __future__ import annotations

import difflib

from mpjax.policy.patterns import Pattern, Sites, governs


def complaint(pattern: Pattern, sites: Sites, scanned: frozenset[str]) -> str:
    """The message for a rule that no path of the model obeys."""
    name = pattern.__name__ if isinstance(pattern, type) else repr(pattern)
    hits = [path for path in sites if governs(pattern, path, sites)]
    if hits:
        return (
            f"rule {name} never acts: every path it matches ({_few(hits)}) is taken by an earlier rule or is a float32 "
            "island; put it before that rule, or name the island's class or exact path"
        )
    if isinstance(pattern, type):
        classes = sorted({cls.__name__ for cls in sites.values() if isinstance(cls, type)})
        return f"rule {name} matches no module; the classes of this model are {', '.join(classes)}"
    for stack in scanned:
        # Would it act, were the stack unrolled?
        below = [path.removeprefix(stack) for path in sites if path == stack or path.startswith(f"{stack}/")]
        if any(governs(pattern, f"{stack}/{layer}{rest}", {}) for layer in range(200) for rest in below):
            return (
                f"rule {name} names one layer of the scanned stack {stack!r}, whose layers are one traced body with one "
                f"dtype; write a rule for {stack!r}, or unroll the scan"
            )
    near = difflib.get_close_matches(pattern, [path for path in sites if path], n=3, cutoff=0.3)
    meant = f"did you mean {_few(near)}?" if near else f"the paths are {_few([path for path in sites if path])}"
    return f"rule {name} matches no path; {meant} model.explain(sample) lists them all"


def _few(paths: list[str]) -> str:
    return ", ".join(repr(path) for path in paths[:4]) + (", …" if len(paths) > 4 else "")
