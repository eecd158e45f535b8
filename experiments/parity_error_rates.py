"""How often the verdict of `mpjax.parity` is wrong, by simulation; nothing is trained.

Question   a policy that loses the whole margin must be called equivalent at most alpha of the time. Is it so, also where
           differences between seeds are not normal? And how many seeds does a decision need?
Method     paired differences are drawn with a true mean of 0, ½, 1 and 2 margins and a spread (sd) of ¼, ½, 1 and 2, and the
           verdict function of `mpjax.measure.equivalence` itself is counted. The laws have mean 0 and sd 1: normal;
           Student's t with 3 degrees of freedom (heavy tails); exponential − 1 (skew 2), and mirrored (skew −2).
Looks      what becomes of the rate if one looks after 5 seeds, and where that is undecided again after 10 and after 20.
Needed     the seeds for a power of 0.8 by `decision_power`, and the power found at that number; and how often the number
           that an undecided run of 3 or 5 seeds names decides, when it is run anew. From so few seeds it is a guess.
Error      of a rate p counted on n draws: √(p(1 − p)/n), at most 0.0016 (0.0007 at 5 %) for the default.
Time       under a minute on 2 CPU cores.
Run        python -m experiments.parity_error_rates --draws=20000
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import numpy as np
from rich.console import Console

from experiments import _run
from mpjax.measure.equivalence import MOST_SEEDS, decision_power, equivalence, verdicts
from mpjax.measure.table import policy_table, to_markdown


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, with its unit."""

    draws: int = 100_000
    """Simulated comparisons for each rate."""
    pilots: int = 1000
    """Simulated comparisons whose named number of seeds is tried."""
    seeds: tuple[int, ...] = (3, 5, 10, 20)
    """Pairs in a comparison."""
    spreads: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """Standard deviation of the differences, in margins."""
    truths: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    """True mean difference, in margins."""
    alpha: float = 0.05
    """Of each one-sided test."""
    seed: int = 0
    """Of the draws."""
    workdir: str | None = None
    """The run's own folder, new or empty. Default: runs/parity_error_rates-date-time."""


def draw(law: str, random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Numbers of mean 0 and standard deviation 1."""
    if law == "normal":
        return random.standard_normal(shape)
    if law == "heavy tails":
        return random.standard_t(3, shape) / np.sqrt(3)  # the variance of t with 3 degrees of freedom is 3
    return (random.standard_exponential(shape) - 1) * (1 if law == "skewed up" else -1)


LAWS = ("normal", "heavy tails", "skewed up", "skewed down")


def rates(config: Config, random: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """For each law, number of seeds and spread: how often each truth is called equivalent, and how often different."""
    tables: dict[str, list[dict[str, Any]]] = {"equivalent": [], "different": []}
    for law in LAWS:
        for seeds in config.seeds:
            z = draw(law, random, (config.draws, seeds))
            for spread in config.spreads:
                found = {truth: verdicts(truth + spread * z, 1.0, config.alpha) for truth in config.truths}
                for verdict, rows in tables.items():
                    called = {f"at {truth:g} (%)": 100 * float((v == verdict).mean()) for truth, v in found.items()}
                    rows.append({"law": law, "seeds": seeds, "spread": spread, **called})
    return tables


def looks(config: Config, random: np.random.Generator) -> list[dict[str, Any]]:
    """How often a truth on the margin is accepted, by one look after 20 seeds, and by looks after 5, 10 and 20."""
    rows = []
    for law in LAWS:
        z = draw(law, random, (config.draws, 20))
        for spread in config.spreads:
            seen = [verdicts(1 + spread * z[:, :n], 1.0, config.alpha) for n in (5, 10, 20)]
            first = np.select([v != "undecided" for v in seen], seen, "undecided")
            one, many = (float((v == "equivalent").mean()) for v in (seen[-1], first))
            rows.append({"law": law, "spread": spread, "one look (%)": 100 * one, "three looks (%)": 100 * many})
    return rows


def needed(config: Config, random: np.random.Generator) -> list[dict[str, Any]]:
    """The seeds for a power of 0.8, and how often so many normal differences were decided rightly."""
    rows = []
    for truth, right in ((0.0, "equivalent"), (0.5, "equivalent"), (2.0, "different")):
        for spread in config.spreads:
            enough = (n for n in range(2, MOST_SEEDS) if decision_power(n, truth, spread, 1.0, config.alpha) >= 0.8)
            seeds = next(enough)
            found = verdicts(truth + spread * random.standard_normal((config.draws, seeds)), 1.0, config.alpha)
            power = {
                "computed (%)": 100 * decision_power(seeds, truth, spread, 1.0, config.alpha),
                "simulated (%)": 100 * float((found == right).mean()),
            }
            rows.append({"truth": truth, "spread": spread, "seeds": seeds, **power})
    return rows


def named(config: Config, random: np.random.Generator) -> list[dict[str, Any]]:
    """What comes of the number that an undecided run of few seeds names: how often that many new pairs decide."""
    rows = []
    for seeds in config.seeds[:2]:
        for spread in config.spreads:
            tests = [
                equivalence(spread * random.standard_normal(seeds), 1.0, config.alpha) for _ in range(config.pilots)
            ]
            undecided = [test.seeds_needed for test in tests if test.verdict == "undecided"]
            again = [n for n in undecided if n is not None]
            decided = [equivalence(spread * random.standard_normal(n), 1.0, config.alpha).verdict for n in again]
            rows.append({
                "seeds": seeds, "spread": spread, "share undecided": len(undecided) / config.pilots,
                "share without a number": 1 - len(again) / len(undecided) if undecided else None,
                "median named": int(np.median(again)) if again else None,
                "share decided by it": float(np.mean(np.array(decided) != "undecided")) if again else None,
            })  # fmt: skip
    return rows


def main(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Simulate, show and write; returns the rows of each table."""
    folder = _run.open_folder(config, "parity_error_rates", goes_on=False)
    random = np.random.default_rng(config.seed)
    tables = rates(config, random)
    tables |= {"looks": looks(config, random), "needed": needed(config, random), "named": named(config, random)}
    text = []
    for name, rows in tables.items():
        Console().print(policy_table(rows, title=name))
        text.append(f"## {name}\n\n{to_markdown(rows)}\n")
    with folder.begin() as path:
        (path / "table.json").write_text(json.dumps(tables, indent=1) + "\n")
        (path / "table.md").write_text("\n".join(text))
    Console(soft_wrap=True).print(f"written to {path}: config.json, table.json, table.md", highlight=False)
    return tables


if __name__ == "__main__":
    sys.exit(_run.start(Config, main, __doc__))
