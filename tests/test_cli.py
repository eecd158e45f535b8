"""The command line, as a user meets it: what it prints, on which stream, and its exit code."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import mpjax
from mpjax.cli import main, target
from mpjax.cli.output import print_json, show
from mpjax.policy.hardware import CHIPS


def refused(argv: list[str]) -> int:
    """The exit code of a call that tyro itself refuses or answers."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_help_names_every_command(capsys):
    assert refused(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "policy" in shown and "hardware" in shown and "train" in shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mpjax {mpjax.__version__}\n"


def test_policy_shows_three_dtypes_with_the_facts_of_each(capsys):
    assert main(["policy", "p=f32, c=f16, o=bf16"]) == 0
    shown = capsys.readouterr().out
    assert "p=full,c=f16,o=bf16" in shown
    rows = {line.split()[1]: line for line in shown.splitlines() if "float" in line}
    assert list(rows) == ["param", "compute", "output"]
    assert "float32" in rows["param"] and "3.40282e+38" in rows["param"]
    # float16: largest 65504, smallest normal 2^-14, smallest 2^-24, eps 2^-10.
    for fact in ("float16", "16", "65504", "6.1e-05", "5.96e-08", "0.000977"):
        assert fact in rows["compute"]
    assert "bfloat16" in rows["output"] and "0.00781" in rows["output"]


def test_policy_shows_how_dense_layers_multiply(capsys):
    assert main(["policy", "mixed_fp8"]) == 0
    shown = capsys.readouterr().out
    assert "p=full,c=bf16,o=full,dot=fp8" in shown and "dot: dense layers multiply in float8 with a scale" in shown
    assert main(["policy", "mixed_bfloat16"]) == 0 and "dot" not in capsys.readouterr().out
    assert main(["policy", "mixed_fp8", "--json"]) == 0 and json.loads(capsys.readouterr().out)["dot"] == "fp8"


@pytest.mark.parametrize("text", ["bf17", "c=bf16,c=f16", "q=f32"])
def test_a_policy_that_does_not_parse_is_told_on_stderr(text, capsys):
    assert main(["policy", text]) == 2
    shown = capsys.readouterr()
    with pytest.raises(ValueError) as said:
        mpjax.get_policy(text)
    assert shown.out == ""
    assert shown.err == f"mpjax policy: {said.value}\n"


def test_json_says_the_same(capsys):
    assert main(["policy", "c=f16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compute"]["max"] == 65504.0
    assert main(["hardware", "--json"]) == 0
    chips = {chip["name"]: chip for chip in json.loads(capsys.readouterr().out)}
    assert chips["T4"]["support"]["bfloat16"] == "emulated" and chips["T4"]["begin_with"] == "mixed_float16"


def test_json_has_a_word_for_everything(capsys):
    print_json({"nan": float("nan"), "array": np.array([1.0, np.inf]), 3: (np.dtype("float16"), Path("a"), None, True)})
    told = {"nan": "nan", "array": [1.0, "inf"], "3": ["float16", "a", None, True]}
    assert json.loads(capsys.readouterr().out) == told


@pytest.mark.parametrize("argv", [[], ["bake"], ["policy"], ["hardware", "--loud"], ["train"], ["train", "--steps=1"]])
def test_a_call_that_makes_no_sense_exits_with_2(argv, capsys):
    assert refused(argv) == 2
    assert capsys.readouterr().err


def test_a_reader_who_leaves_is_no_traceback(monkeypatch):
    """As `mpjax hardware --json | head -1`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["hardware", "--json"]) == 1


@pytest.mark.parametrize("columns", [80, 40])
def test_a_narrow_terminal_cuts_nothing_off(columns, monkeypatch, capsys):
    """`bfloat16` and `float16` must not both be `float…`, nor 989.4 be `98…`."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    facts = ["bfloat16", "emulated", "3.38953e+38", "989.4", "1978.9", "mixed_bfloat16"] * 2
    show("Facts", [f"column {n}" for n in range(12)], [facts])
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert ["".join(parts).replace(" ", "") for parts in zip(*lines, strict=True)] == facts


def test_names_in_a_table_are_no_markup(capsys):
    names = ["w[in]", "[red]", "[/b]", ":x:"]
    show("Params", ["module"], [[name] for name in names])
    assert [line.strip("│ ") for line in capsys.readouterr().out.splitlines() if line.startswith("│")] == names


def test_hardware_shows_every_chip_and_every_source(capsys):
    assert main(["hardware"]) == 0
    shown = capsys.readouterr().out
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in shown.splitlines()
        if "│" in line
    }
    assert list(rows) == [chip.name for chip in CHIPS]
    # float32, tf32, bfloat16, float16, …, begin with, sources
    assert rows["V100"][2:4] == ["emulated", "125"] and rows["V100"][-2] == "mixed_float16 + loss scale"
    assert rows["H100"][2:4] == ["989.4", "989.4"] and rows["H100"][-2] == "mixed_bfloat16"
    footnotes = [line for line in shown.splitlines() if line[:2].strip().isdigit()]
    for chip in CHIPS:
        told = {footnotes[int(number) - 1][4:] for number in rows[chip.name][-1].split()}
        assert told == set(chip.source) and told


def test_train_runs_an_experiment_with_all_its_flags(tmp_path, capsys):
    argv = ["train", "mlp_jax", "--steps=10", "--eval-every=5", "--policy", "float32", "--width=16", "--progress=False"]
    assert main([*argv, f"--workdir={tmp_path}"]) == 0
    folder = tmp_path
    config = json.loads((folder / "config.json").read_text())["config"]
    assert (config["steps"], config["policies"], config["width"]) == (10, ["float32"], 16)
    assert [row["policy"] for row in json.loads((folder / "table.json").read_text())] == ["float32"]
    assert str(folder) in capsys.readouterr().out


def test_train_has_help_of_its_own_and_of_each_experiment(capsys):
    assert refused(["train", "--help"]) == 0
    assert "NAME" in capsys.readouterr().out
    assert refused(["train", "mlp_jax", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: mpjax train mlp_jax" in shown and "Question" in shown and "--width" in shown
    assert refused(["train", "mlp_jax", "--stepz=1"]) == 2
    assert "--stepz=1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vision", "_run", "_data", "../experiments/mlp_jax"])
def test_train_lists_the_experiments_there_are(name, capsys):
    assert main(["train", name]) == 2
    listed = capsys.readouterr().err.partition("there are ")[2].strip().split(", ")
    assert {"language_gpt", "mlp_jax", "vision_digits"} <= set(listed) and not any(n.startswith("_") for n in listed)


def test_train_without_a_checkout_says_where_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(target.mpjax, "__file__", str(tmp_path / "site-packages" / "mpjax" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "mlp_jax"]) == 2
    assert "git clone" in capsys.readouterr().err
    monkeypatch.chdir(Path(__file__).parents[1])  # where one stands in a checkout, it is found
    assert main(["train", "none"]) == 2
    assert "mlp_jax" in capsys.readouterr().err
