"""A policy in plain words that JSON can hold, and back: what stands in checkpoints and exports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jmp

from mpjax.core.dtypes import short_name
from mpjax.policy.rules import PolicyMap, Rule

_CLASS = "class "


def policy_to_words(policy: str | jmp.Policy | PolicyMap | Mapping[Any, Any]) -> dict[str, Any]:
    """A policy as a dict of strings: `{"default": …, "rules": {pattern: …}, "islands": [class names]}`.

    A rule on a module class is written under `"class NAME"`, for a human to read: code is never named in a way that could
    be imported.

    >>> policy_to_words({"head": "compute=float32,output=float32"})["rules"]
    {'head': 'params=full,compute=full,output=full'}
    """
    rules = PolicyMap.of(policy)
    return {
        "default": str(rules.default),
        "rules": {_pattern(rule): _words(rule) for rule in rules.rules},
        "islands": [cls.__name__ for cls in rules.islands],
    }


def policy_from_words(words: Mapping[str, Any]) -> PolicyMap:
    """The policy map that `policy_to_words` wrote.

    Raises:
      ValueError: it names module classes, which are the caller's to give, or it is no such dict.

    >>> policy_from_words(policy_to_words("mixed_float16")).default.compute_dtype
    dtype('float16')
    """
    try:
        default, rules, islands = str(words["default"]), dict(words["rules"]), list(words["islands"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"got {words!r} for a policy; legal is what policy_to_words gives") from error
    classes = [name for name in rules if name.startswith(_CLASS)] + [f"{_CLASS}{name}" for name in islands]
    if classes:
        raise ValueError(
            f"the policy has rules for {', '.join(classes)}, which stand here by name only; make the PolicyMap with the "
            "classes themselves"
        )
    return PolicyMap(rules, default=default)


def _pattern(rule: Rule) -> str:
    return f"{_CLASS}{rule.pattern.__name__}" if isinstance(rule.pattern, type) else rule.pattern


def _words(rule: Rule) -> str:
    """The keys that act: `output` only where the rule hands its own dtype back."""
    keys = {"params": rule.policy.param_dtype, "compute": rule.policy.compute_dtype}
    keys |= {"output": rule.policy.output_dtype} if rule.hands_back else {}
    words = [f"{key}={short_name(dtype)}" for key, dtype in keys.items()]
    words += [f"dot={rule.policy.dot}"] * (rule.policy.dot is not None) + ["input=keep"] * rule.keeps_input
    return ",".join(words)
