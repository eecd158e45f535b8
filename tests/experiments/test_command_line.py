"""Experiments as a user starts them: `--help` shows every field with its unit, a wrong name is an error."""

from __future__ import annotations

import dataclasses

import pytest

from experiments import _run, numerics_underflow, vision_digits


@pytest.mark.parametrize("experiment", [vision_digits, numerics_underflow])
def test_help_shows_the_lab_note_and_every_field(experiment, capsys):
    with pytest.raises(SystemExit) as end:
        _run.parse(experiment.Config, experiment.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "Question" in text
    for field in dataclasses.fields(experiment.Config):
        assert f"--{field.name.replace('_', '-')}" in text


def test_fields_are_overridden_by_name():
    config = _run.parse(vision_digits.Config, None, ["--steps=7", "--policies", "float32", "p=f32,c=bf16"])
    assert (config.steps, config.policies, config.width) == (7, ("float32", "p=f32,c=bf16"), 64)


def test_an_unknown_name_ends_with_2(capsys):
    with pytest.raises(SystemExit) as end:
        _run.parse(vision_digits.Config, None, ["--stepz=7"])
    assert end.value.code == 2 and "stepz" in capsys.readouterr().err
