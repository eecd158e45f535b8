"""One lock file serves both Pythons: it pins all that `pyproject.toml` asks for, within its bounds."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pinned(python: str) -> dict[str, str]:
    """Package to version on Linux under one Python."""
    place = {"python_full_version": f"{python}.1", "python_version": python, "sys_platform": "linux"}
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in PINS
        if pin.marker is None or pin.marker.evaluate(place)
    }


def test_every_line_pins_one_version():
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in PINS)


@pytest.mark.parametrize(("python", "jax"), [("3.11", "0.10."), ("3.12", "0.12.")])
def test_each_python_gets_its_jax(python, jax):
    assert pinned(python)["jax"].startswith(jax) and pinned(python)["jaxlib"] == pinned(python)["jax"]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_all_that_is_asked_for_is_pinned_within_its_bounds(python):
    pins = pinned(python)
    asked = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    wanted = [r for r in map(Requirement, asked) if r.name != PROJECT["name"]]
    assert len(wanted) > 20
    for requirement in wanted:
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier
