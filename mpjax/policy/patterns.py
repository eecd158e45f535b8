"""How a rule names modules: a glob over canonical paths, a regex when marked so, or a module class."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

Pattern: TypeAlias = str | type
Sites: TypeAlias = Mapping[str, Any]
"""From each module's canonical path to its class, or None where that is not known; the root is `""`."""

REGEX = "re:"


def names(pattern: Pattern, path: str, cls: Any) -> bool:
    """Whether `pattern` names this very module, not one that contains it.

    In a glob `*` and `?` stay within a segment, `**/` stands for zero or more segments and `**` alone for every module, the
    root too. An index may be written either way, `layers_0` or `layers/0`. A regex (`re:…`) must match the whole canonical
    path. A class names its own instances and those of its subclasses.

    >>> [names("**/attention", path, object) for path in ("attention", "layers/0/attention", "attention/query")]
    [True, True, False]
    """
    if isinstance(pattern, type):
        return isinstance(cls, type) and issubclass(cls, pattern)
    if pattern.startswith(REGEX):
        return re.fullmatch(pattern.removeprefix(REGEX), path) is not None
    return pattern == "**" or _glob(pattern).fullmatch(path + "/") is not None


def governs(pattern: Pattern, path: str, sites: Sites) -> bool:
    """Whether `pattern` names `path` or a module that contains it: a rule means the subtree."""
    return any(names(pattern, above, sites.get(above)) for above in lineage(path))


def lineage(path: str) -> Iterator[str]:
    """The path and every path above it, nearest first, the root last.

    >>> list(lineage("a/b"))
    ['a/b', 'a', '']
    """
    while path:
        yield path
        path = path.rpartition("/")[0]
    yield ""


def is_exact(pattern: Pattern, path: str) -> bool:
    """Whether a glob spells out the last segment of `path`, so that it is meant and not merely swept up."""
    if isinstance(pattern, type) or pattern.startswith(REGEX):
        return False
    return not re.search(r"[*?]", pattern.rpartition("/")[2]) and names(pattern, path, None)


@functools.cache
def _glob(pattern: str) -> re.Pattern[str]:
    # `_` also stands for the slash before an index, so that `Dense_*` and `layers_0` match the canonical spelling.
    special = {"*": "[^/]*", "?": "[^/]", "_": r"(?:_|/(?=\d+/))"}
    segments = pattern.split("/")
    regex = "".join(
        "(?:[^/]+/)*" if segment == "**" else "".join(special.get(c, re.escape(c)) for c in segment) + "/"
        for segment in segments
    )
    return re.compile(regex)
