"""Which policy holds at which path: ordered rules over subtrees, float32 islands behind them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jmp
import numpy as np

from mpjax.core.dtypes import canonical, wide
from mpjax.policy.patterns import REGEX, Pattern, Sites, governs, is_exact, lineage, names
from mpjax.policy.policy import Policy, parse_dot, parse_keys

ISLANDS = frozenset(
    {"BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "SpectralNorm", "WeightNorm"}
)  # fmt: skip
"""Names of module classes that run in float32 by default: a class with one of them in its MRO is an island."""

WRAPPERS = frozenset({"SpectralNorm", "WeightNorm"})
"""Islands that do not reach into the layer that they wrap: its weights are normalised in float32, its product is not run so."""

KEEPS_DTYPE = frozenset(
    {"head", "heads", "lm_head", "mlm_head", "logits", "to_logits", "logits_dense", "classifier", "score", "cls",
     "qa_outputs", "unembed", "unembedding", "embed_out", "embed", "embedding", "embeddings", "embed_in",
     "embed_tokens", "tok_embeddings", "wte", "wpe", "patch_embed", "patch_embedding", "patch_embeddings"}
)  # fmt: skip
"""Names of modules that multiply in the compute dtype under a `dot=` recipe: the first layer and the last lose most by it.

What Flax's and Hugging Face's models call them; not `output` and `decoder`, by which others mean a layer in the middle.
"""

DENSE = frozenset({"Dense", "DenseGeneral", "Linear", "LinearGeneral"})
"""Names of Flax's module classes that a `dot=` recipe reaches: those with one of them in their MRO."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a policy map, parsed: the modules it names and what holds below them."""

    pattern: Pattern
    policy: Policy
    hands_back: bool = False
    """The rule wrote `output=`: results leave its subtree in that dtype, not in the caller's compute dtype."""
    keeps_input: bool = False
    """The rule wrote `input=keep`: float arguments enter its subtree as they are (coordinates, timesteps)."""

    def __str__(self) -> str:
        return self.pattern.__name__ if isinstance(self.pattern, type) else repr(self.pattern)


@dataclasses.dataclass(frozen=True)
class PolicyMap:
    """One policy for a whole model, told by path.

        policy(module) = the first rule that names the module or a module around it
                         but a float32 island obeys only a rule that names its class or its exact path
                         (or a module inside it); else float32 if it is an island, and float64 in float64; else the default

    A `dot=` recipe holds for the dense layers below its rule, but for modules with the name of a head or an embedding
    (`KEEPS_DTYPE`) and all in them, unless a rule names their class or spells out their path, or that of a module in them.

    Args:
      rules: from pattern to policy. A pattern is a glob over canonical paths (`"head"`, `"layers/*/attention"`,
        `"**/mlp"`), a regex marked `"re:…"`, or a module class. It means the subtree, and `mlp_1`, canonically `mlp/1`, is
        in that of `mlp`: name it in an earlier rule where it is to differ. A policy is a preset, a dtype
        name, a `Policy`, or `key=value` pairs; a key that is not named comes from the default, but for `dot` where
        `compute=` is named: it is none then. Two keys act at the borders of the subtree: `output=dtype` hands results
        back in that dtype, `input=keep` leaves float arguments unrounded.
      default: the policy where no rule matches; its `output` is what the whole model returns.
      islands: further module classes to run in float32.

    Raises:
      ValueError: text that does not parse. Rules that can never act raise when they meet a model: see `check`.

    >>> rules = PolicyMap({"head": "compute=float32"}, default="mixed_bfloat16")
    >>> str(rules.resolve("head/dense", {}).policy)
    'p=full,c=full,o=full'
    """

    rules: tuple[Rule, ...] = ()
    default: Policy = Policy("float32", "bfloat16", "float32")
    islands: tuple[type, ...] = ()

    def __init__(
        self,
        rules: Mapping[Any, str | jmp.Policy] | None = None,
        default: str | jmp.Policy = "mixed_bfloat16",
        islands: tuple[type, ...] = (),
    ):
        base = Policy.of(default)
        object.__setattr__(self, "default", base)
        object.__setattr__(self, "rules", tuple(_parse(key, value, base) for key, value in (rules or {}).items()))
        object.__setattr__(self, "islands", tuple(islands))

    @staticmethod
    def of(policy: str | jmp.Policy | PolicyMap | Mapping[Any, Any]) -> PolicyMap:
        """A policy map from whatever names one: a map, a dict of rules, a policy, a string.

        >>> PolicyMap.of("mixed_float16").default.compute_dtype
        dtype('float16')
        """
        if isinstance(policy, PolicyMap):
            return policy
        return PolicyMap(policy) if isinstance(policy, Mapping) else PolicyMap(default=policy)

    @property
    def compute_dtypes(self) -> frozenset[np.dtype]:
        """Every dtype in which the default or a rule computes; the islands' float32 is not counted."""
        return frozenset(rule.policy.compute_dtype for rule in self.rules) | {self.default.compute_dtype}

    def is_island(self, cls: Any) -> bool:
        """Whether a module class runs in float32 unless a rule says otherwise: by class, or by a name in its MRO."""
        if not isinstance(cls, type):
            return False
        return issubclass(cls, self.islands) or not ISLANDS.isdisjoint(base.__name__ for base in cls.__mro__)

    def _reaches(self, cls: Any, is_self: bool) -> bool:
        """Whether a module of this class makes an island of itself, or of a module below it."""
        if is_self or not self.is_island(cls):
            return self.is_island(cls)
        return issubclass(cls, self.islands) or WRAPPERS.isdisjoint(base.__name__ for base in cls.__mro__)

    def resolve(self, path: str, sites: Sites) -> Resolution:
        """What holds at `path`, given the classes of the modules around it (unknown ones are no islands)."""
        above = list(lineage(path))
        depth = next((n for n, p in enumerate(above) if self._reaches(sites.get(p), is_self=n == 0)), None)
        island = None if depth is None else above[depth]
        inside = above[:depth]  # the modules from `path` up to, not including, the island
        for index, rule in enumerate(self.rules):
            meant = island is not None and _means_island(rule.pattern, island, sites.get(island), self)
            hit = names if island is None else _means_inside
            if meant or any(hit(rule.pattern, p, sites.get(p)) for p in (above if island is None else inside)):
                return Resolution(index, rule)
        if island is None:
            return Resolution(None, Rule("", self.default))
        around = next(
            (r.policy for r in self.rules if any(names(r.pattern, p, sites.get(p)) for p in above)), self.default
        )
        param, compute = wide(around.param_dtype), wide(around.compute_dtype)  # float64 stays: an island never narrows
        return Resolution("island", Rule("", Policy(param, compute, self.default.output_dtype)))

    def dot_at(self, path: str, sites: Sites) -> str | None:
        """By which recipe a dense layer at `path` multiplies: None in its compute dtype.

        >>> rules = PolicyMap(default="mixed_fp8")
        >>> [rules.dot_at(path, {}) for path in ("layers/0/up", "head")]
        ['fp8', None]
        """
        found = self.resolve(path, sites)
        if found.policy.dot is None or found.source == "island":
            return None
        pattern, kept, above = found.rule.pattern, keeping_dtype(path), list(lineage(path))
        if kept and isinstance(pattern, type) and names(pattern, "", sites.get("")):
            return None  # a base of everything is a sweep
        meant = [_means_inside(pattern, p, sites.get(p)) for p in above]
        return found.policy.dot if all(any(meant[: above.index(p) + 1]) for p in kept) else None

    def check(self, sites: Sites, scanned: frozenset[str] = frozenset()) -> None:
        """Refuse a rule that can never act on this model.

        Args:
          sites: the class at each module path; a path known only from the params has `None`.
          scanned: paths whose layers are one traced body (`nn.scan`).

        Raises:
          ValueError: a rule that matches no path, is shadowed by an earlier one or by an island, or names one layer
            of a scanned stack; the message names the rule and the nearest paths.
        """
        from mpjax.policy.complaints import complaint

        winners = {self.resolve(path, sites).source for path in sites}
        for index, rule in enumerate(self.rules):
            if index not in winners:
                raise ValueError(complaint(rule.pattern, sites, scanned))
        for cls in self.islands:
            if not any(names(cls, path, found) for path, found in sites.items()):
                raise ValueError(f"island {cls.__name__} is no class of this model; its classes are {_classes(sites)}")


@dataclasses.dataclass(frozen=True)
class Resolution:
    """The rule that holds somewhere, and where it came from: its index, `"island"`, or None for the default."""

    source: int | str | None
    rule: Rule

    @property
    def policy(self) -> Policy:
        return self.rule.policy

    @property
    def said_by(self) -> str:
        """The source in words, for tables and errors."""
        if self.source is None:
            return "default"
        return "float32 island" if self.source == "island" else str(self.rule)


def is_dense(cls: Any) -> bool:
    """Whether a `dot=` recipe reaches modules of this class: one of Flax's, and not another that bears its name."""
    return isinstance(cls, type) and any(
        base.__name__ in DENSE and base.__module__.partition(".")[0] == "flax" for base in cls.__mro__
    )


def keeping_dtype(path: str) -> list[str]:
    """The modules at and around `path` with the name of a head or an embedding, nearest first.

    >>> keeping_dtype("embed/project")
    ['embed']
    """
    return [above for above in lineage(path) if above.rpartition("/")[2] in KEEPS_DTYPE]


def _means_island(pattern: Pattern, path: str, cls: Any, rules: PolicyMap) -> bool:
    """Whether a rule means this island: by its class (not a base of everything), or by spelling out its path."""
    if isinstance(pattern, type):
        return rules.is_island(pattern) and names(pattern, path, cls)
    return is_exact(pattern, path)


def _means_inside(pattern: Pattern, path: str, cls: Any) -> bool:
    """Whether a rule means a module inside an island: by its class, or by spelling out its path; a sweep does not."""
    return names(pattern, path, cls) if isinstance(pattern, type) else is_exact(pattern, path)


def _parse(pattern: Pattern, text: Any, default: Policy) -> Rule:
    if not isinstance(pattern, (str, type)):
        raise ValueError(f"got {pattern!r} for a rule; write a glob over paths, 're:' and a regex, or a module class")
    if isinstance(pattern, str) and pattern.startswith(REGEX):
        try:
            re.compile(pattern.removeprefix(REGEX))
        except re.error as error:
            raise ValueError(f"rule {pattern!r} is not a regex: {error}; without 're:' it would be a glob") from None
    if not isinstance(text, str) or "=" not in text:
        return Rule(pattern, Policy.of(text))
    named = parse_keys(text, extra=("input",))
    if named.get("input", "keep") != "keep":
        raise ValueError(f"got input={named['input']} in rule {pattern!r}; only input=keep is legal, or leave it out")
    param, compute, output = (
        canonical(named[key]) if key in named else getattr(default, f"{key}_dtype")
        for key in ("param", "compute", "output")
    )
    # A rule that says in which dtype to compute means the products too.
    dot = parse_dot(named["dot"]) if "dot" in named else None if "compute" in named else default.dot
    policy = Policy(param, compute, output, dot)
    return Rule(pattern, policy, hands_back="output" in named, keeps_input="input" in named)


def _classes(sites: Sites) -> str:
    return ", ".join(sorted({cls.__name__ for cls in sites.values() if isinstance(cls, type)}))


__all__ = ["ISLANDS", "Pattern", "PolicyMap", "Resolution", "Rule", "Sites", "governs"]
