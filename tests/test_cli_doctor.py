"""`mpjax doctor`: the table, the JSON, the exit code."""

from __future__ import annotations

import json

import jax
import pytest

from mpjax.cli import main
from mpjax.measure import doctor as room, symptoms
from mpjax.measure.rates import ProductRate
from mpjax.measure.timing import Timing


@pytest.fixture
def rates(monkeypatch):
    """The products that the command finds, in place of measured ones."""
    found = [
        ProductRate("float32", 1000, Timing((0.5, 1.0, 2.0)), 1e-7, 1e-6),
        ProductRate("float16", 1000, refused="no such product"),
        ProductRate("int8", 1000, Timing((1e-3,)), 0.0, 0.0),
    ]
    monkeypatch.setattr(room, "product_rates", lambda size, formats, clock: tuple(found))
    monkeypatch.setattr(symptoms, "from_trials", lambda: ["jax's attention fails here"])
    return found


def test_a_diagnosis_is_shown_and_written(rates, tmp_path, capsys):
    assert main(["doctor", "--write", str(tmp_path / "doctor.json")]) == 0
    shown = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert cells == [
        ["float32", "native", "0.002", "0.00133 to 0.00267", "–", "–", "1.0e-07", "1.0e-06", "yes"],
        ["float16", "emulated", "refused", "–", "–", "–", "–", "–", "–"],
        ["int8", "native", "2", "2 to 2", "–", "–", "0", "exact", "yes"],
    ]
    assert f"jax {jax.__version__}" in shown and "Begin with float32" in shown
    assert "- jax's attention fails here" in shown and "refused here (tried): no such product" in shown
    told = json.loads((tmp_path / "doctor.json").read_text())
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == told
    first, second, _ = told["rates"]
    assert (first["tflops"], first["table"], first["right"], first["timing"]["seconds"]) == (
        0.002, "native", True, [0.5, 1.0, 2.0]
    )  # fmt: skip
    assert (second["tflops"], second["right"], second["refused"]) == (None, None, "no such product")
    assert told["recommendation"]["policy"] == "float32" and told["versions"]["jax"] == jax.__version__


def test_a_wrong_native_product_exits_with_1(rates, capsys):
    rates[2] = ProductRate("int8", 1000, Timing((1e-3,)), 0.5, 0.0)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "int8 products are WRONG here" in shown and " NO " in shown


def test_a_file_that_cannot_be_written_exits_with_1(rates, tmp_path, capsys):
    assert main(["doctor", "--write", str(tmp_path / "none" / "doctor.json")]) == 1
    assert "none" in capsys.readouterr().err


def test_a_size_that_makes_no_sense_exits_with_2(capsys):
    assert main(["doctor", "--size", "100"]) == 2
    assert "multiple of 16" in capsys.readouterr().err


def test_no_device_exits_with_1(monkeypatch, capsys):
    def no_device():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "local_devices", no_device)
    assert main(["doctor"]) == 1
    told = capsys.readouterr().err
    assert "JAX_PLATFORMS='cuda'" in told and "Unable to initialize" in told
