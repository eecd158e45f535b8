"""Pictures: what is drawn is read off the figure, the file is a PNG, and nothing global is touched."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from mpjax.measure.plots import gradient_underflow, training_curves

EPS = np.finfo(float).eps
STEPS = np.arange(100)
LOSS = 2 * np.exp(-STEPS / 30)
REFERENCE = {"attempt": STEPS, "loss": LOSS, "loss_scale": np.ones(100), "skipped": np.zeros(100),
             "eval_attempt": [50, 100], "accuracy": [0.9, 0.95]}  # fmt: skip
SCALED = REFERENCE | {
    "loss": np.where(STEPS == 40, np.inf, LOSS + 1e-3),
    "loss_scale": np.where(STEPS <= 40, 2.0**16, 2.0**15),
    "skipped": (STEPS >= 1).astype(int) + (STEPS >= 40),
}


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


def thick(axes):
    """The curves that are meant to be read: name of colour to values."""
    return {
        line.get_color(): line.get_ydata() for line in axes.lines if line.get_linewidth() > 1 and len(line.get_xdata())
    }


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_four_panels_with_units_and_a_legend(figures):
    training_curves({"float32": REFERENCE, "float16": SCALED}, "x.png", title="both")
    (figure,) = figures
    found = panels(figure)
    assert list(found) == ["training loss", "distance from the loss of float32", "test accuracy", "loss scale"]
    assert [axes.get_ylabel() for axes in found.values()] == [
        "loss (log scale)", "|difference of losses| (log scale)", "accuracy (%)", "loss scale (log scale)",
    ]  # fmt: skip
    assert {axes.get_xlabel() for axes in found.values()} == {"attempt (applied and skipped steps)"}
    assert (figure.get_suptitle(), labels(figure)) == ("both", ["float32", "float16"])


def test_the_curves_are_the_numbers(figures):
    training_curves({"float32": REFERENCE, "float16": SCALED}, "x.png")
    found = panels(figures[0])
    reference, scaled = thick(found["training loss"]).values()
    windows = [LOSS[max(i - 1, 0) : i + 1].mean() for i in STEPS]  # a fortieth of 100 attempts: two
    np.testing.assert_allclose(reference, windows, rtol=2 * EPS)  # a sum of two and a division
    assert np.isfinite(scaled).all()  # the mean leaves the infinite loss out
    thin = [line.get_ydata() for line in found["training loss"].lines if line.get_linewidth() < 1]
    assert (thin[0] == LOSS).all() and np.flatnonzero(np.isnan(thin[1])).tolist() == [40]
    (distance,) = thick(found["distance from the loss of float32"]).values()
    np.testing.assert_allclose(distance, 1e-3, atol=2 * 2 * EPS)  # the rounding of losses up to 2
    points = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in found["test accuracy"].lines]
    assert points == [([50, 100], [90, 95])] * 2


def test_one_huge_loss_does_not_blur_those_after_it(figures):
    training_curves({"a": {"loss": np.where(STEPS == 10, 1e30, LOSS)}}, "x.png")
    (curve,) = thick(panels(figures[0])["training loss"]).values()
    np.testing.assert_allclose(curve[12:], (LOSS[11:-1] + LOSS[12:]) / 2, rtol=2 * EPS)


def test_skipped_steps_are_marked_and_a_scale_of_one_is_not_drawn(figures):
    training_curves({"float32": REFERENCE, "float16": SCALED}, "x.png")
    axes = panels(figures[0])["loss scale"]
    curve, marks = axes.lines
    assert (curve.get_ydata() == SCALED["loss_scale"]).all()
    assert (marks.get_marker(), marks.get_xdata().tolist(), marks.get_ydata().tolist()) == ("x", [1, 40], [2**16] * 2)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["skipped step"]
    assert axes.get_yscale() == "log"
    training_curves({"float32": REFERENCE}, "x.png")
    assert "loss scale" not in panels(figures[1])
    skipped = REFERENCE | {"skipped": np.ones(100)}
    training_curves({"bfloat16": skipped}, "x.png")
    assert panels(figures[2])["loss scale"].lines[1].get_xdata().tolist() == [0]


def test_what_is_missing_is_left_out(figures):
    training_curves({"float32": {"loss": [2.0, 1.0]}, "b": {"accuracy": [0.5]}}, "x.png")
    assert list(panels(figures[0])) == ["training loss", "test accuracy"]
    training_curves({"a": {"loss": [1.0]}}, "x.png")
    assert list(panels(figures[1])) == ["training loss"]
    training_curves({"a": {"accuracy": [1.0]}, "b": {"loss": [1.0]}}, "x.png")
    assert list(panels(figures[2])) == ["training loss", "test accuracy"]
    apart = {"attempt": [0], "loss": [1.0]}, {"attempt": [1], "loss": [1.0], "accuracy": [], "eval_attempt": []}
    training_curves(dict(zip("ab", apart, strict=True)), "x.png")
    assert list(panels(figures[3])) == ["training loss"]


def test_runs_of_different_length_are_compared_where_both_went(figures):
    training_curves({"a": {"loss": [3.0, 2.0, 1.0]}, "b": {"attempt": [1, 2, 3], "loss": [2.5, 1.25, 1.0]}}, "x.png")
    (line,) = panels(figures[0])["distance from the loss of a"].lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([1, 2], [0.5, 0.25])


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([2.0, 1.0], "log"),
        ([1.0, 0.0], "log"),
        ([1.0, -1.0], "linear"),
        ([np.nan, np.nan], "linear"),
        ([0.0], "linear"),
    ],
)
def test_the_loss_is_on_a_log_axis_where_it_can_be(losses, scale, figures, tmp_path):
    training_curves({"a": {"loss": losses}}, "x.png")
    axes = panels(figures[0])["training loss"]
    assert (axes.get_yscale(), "log scale" in axes.get_ylabel()) == (scale, scale == "log")
    figures[0].savefig(tmp_path / "x.png")  # and no warning comes


def test_another_metric_is_shown_as_it_is(figures):
    training_curves({"a": {"perplexity": [30.0, 20.0]}}, "x.png", metric="perplexity")
    axes = panels(figures[0])["test perplexity"]
    assert (axes.get_ylabel(), axes.lines[0].get_ydata().tolist()) == ("perplexity", [30, 20])


def test_many_runs_can_be_told_apart(figures):
    training_curves({str(i): {"loss": [2.0, 1.0 + i]} for i in range(7)}, "x.png")
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in panels(figures[0])["training loss"].lines}
    assert len({colour for colour, _ in looks}) == len(looks) == 7


def test_nothing_to_draw_and_curves_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match=r"got 1 runs with no curve to draw; legal are loss, .*; give at least one"):
        training_curves({"a": {"los": [1.0]}}, "x.png")
    with pytest.raises(ValueError, match=r"got 0 runs with no curve to draw"):
        training_curves({}, "x.png")
    with pytest.raises(ValueError, match=r"got 2 values of 'loss' for 3 of 'attempt'; legal is one each; drop or add"):
        training_curves({"a": {"attempt": [0, 1, 2], "loss": [1.0, 2.0]}}, "x.png")


def test_underflow_shows_each_layer_in_both_panels(figures):
    layers = ["layers/0", "layers/1", "head"]
    lost = {"unscaled": [1.0, 0.5, 0.0], "scaled": [0.0, 0.0, 0.0]}
    errors = {"unscaled": [1.0, 0.1, 1e-3], "scaled": [4e-4, 0.0, np.inf]}
    gradient_underflow(layers, lost, errors, "x.png")
    (figure,) = figures
    vanished, error = figure.axes
    assert [text.get_text() for text in vanished.get_yticklabels()] == layers
    assert vanished.get_ylim()[0] > vanished.get_ylim()[1]  # the input on top
    assert [line.get_xdata().tolist() for line in vanished.lines] == [[100, 50, 0], [0, 0, 0]]
    unscaled, scaled, rounding = error.lines
    low, high = error.get_xlim()
    assert unscaled.get_xdata().tolist() == errors["unscaled"]
    assert scaled.get_xdata().tolist() == [4e-4, low, high]  # what a log axis cannot hold stands at its edges
    assert set(rounding.get_xdata()) == {2.0**-11} and error.get_xscale() == "log"
    assert (vanished.get_xlabel(), error.get_xlabel()) == (
        "gradient elements lost to zero (%)", "relative error (log scale)",
    )  # fmt: skip
    assert labels(figure) == ["unscaled", "scaled"]


def test_underflow_refuses_series_of_another_length():
    with pytest.raises(ValueError, match=r"got 2 layers, 1 series, .* \{'a': 1\}; legal is .*; give all of them"):
        gradient_underflow(["x", "y"], {"a": [0.1]}, {"a": [0.1, 0.2]}, "x.png")
    with pytest.raises(ValueError, match=r"got 1 layers, 0 series"):
        gradient_underflow(["x"], {}, {}, "x.png")


def test_a_png_is_written_into_a_new_folder(tmp_path):
    path = training_curves({"float32": REFERENCE, "float16": SCALED}, str(tmp_path / "new" / "curves.png"))
    assert path == tmp_path / "new" / "curves.png"
    assert pixels(path) > (1200, 900)
    path = gradient_underflow(["a"], {"s": [0.5]}, {"s": [0.5]}, tmp_path / "underflow.png", rounding=None)
    assert pixels(path) > (1200, 300)


def pixels(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_matplotlib_is_loaded_late_and_its_global_state_left_alone(tmp_path):
    program = f"""
import sys
from mpjax.measure.plots import training_curves
assert "matplotlib" not in sys.modules
import matplotlib
before = dict(matplotlib.rcParams)
training_curves({{"a": {{"loss": [2.0, 1.0]}}}}, {str(tmp_path / "x.png")!r})
assert "matplotlib.pyplot" not in sys.modules
assert dict(matplotlib.rcParams) == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_two_runs_that_overflow_at_one_attempt_have_no_distance_there(figures):
    """And no warning comes."""
    training_curves({name: {"loss": [np.inf, 1.0]} for name in "ab"}, "x.png")
    (line,) = panels(figures[0])["distance from the loss of a"].lines
    assert np.isnan(line.get_ydata()[0])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"need matplotlib, which is not installed; install mpjax\[experiments\]"):
        training_curves({"a": {"loss": [1.0]}}, "x.png")
