"""The history of the loss scale, read off the figure."""

from __future__ import annotations

import pytest

from mpjax.measure.plots import loss_scale_history

FLOAT16 = {"loss_scale": [2.0**17, 2.0**16, 2.0**16, 2.0**17], "skipped": [1, 1, 1, 2], "attempt": [10, 11, 12, 13]}
FLOAT32 = {"loss_scale": [1.0, 1.0], "skipped": [0, 0]}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_scale_is_drawn_with_its_skips_on_an_axis_of_powers_of_two(figures):
    assert loss_scale_history({"float32": FLOAT32, "float16": FLOAT16}, "x.png", title="both").name == "x.png"
    (figure,) = figures
    (axes,) = figure.axes
    curve, marks = axes.lines
    assert (curve.get_xdata().tolist(), curve.get_ydata().tolist()) == (FLOAT16["attempt"], FLOAT16["loss_scale"])
    assert curve.get_drawstyle() == "steps-post"
    assert (marks.get_marker(), marks.get_xdata().tolist()) == ("x", [10, 13])
    assert marks.get_ydata().tolist() == [2**17] * 2  # at the scale that was too large
    assert (axes.get_yscale(), axes.yaxis.get_transform().base) == ("log", 2)
    assert legend(figure) == ["float16: 2 of 4 skipped"]  # a scale that is always 1 says nothing
    assert figure.get_suptitle() == "both"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("attempt (applied and skipped steps)", "loss scale (log scale)")


def test_a_resumed_run_has_not_skipped_what_was_skipped_before(figures):
    loss_scale_history({"a": FLOAT16 | {"skipped": [7, 7, 7, 8], "skipped_in_a_row": [0, 0, 0, 1]}}, "x.png")
    assert figures[0].axes[0].lines[1].get_xdata().tolist() == [13] and legend(figures[0]) == ["a: 1 of 4 skipped"]


def test_a_run_has_the_colour_that_it_has_in_training_curves(figures):
    loss_scale_history({"float32": FLOAT32, "float16": FLOAT16}, "x.png")
    assert figures[0].axes[0].lines[0].get_color() == "#0072B2"  # the second colour, though it is drawn alone


def test_a_line_is_thinner_than_the_crosses_on_it(figures):
    loss_scale_history({"float16": FLOAT16}, "x.png")
    curve, marks = figures[0].axes[0].lines
    assert curve.get_linewidth() < marks.get_markeredgewidth() < marks.get_markersize() / 3


def test_the_largest_number_of_a_format_is_a_line_where_asked_for(figures):
    loss_scale_history({"a": FLOAT16}, "x.png", limit="f16")
    line = figures[0].axes[0].lines[-1]
    assert set(line.get_ydata()) == {65504} and line.get_linestyle() == ":"
    assert legend(figures[0]) == ["a: 2 of 4 skipped", "largest number of float16, 65504"]


def test_a_scale_of_one_with_a_skip_is_drawn(figures):
    loss_scale_history({"bfloat16": {"loss_scale": [1.0, 1.0], "skipped": [0, 1]}}, "x.png")
    assert figures[0].axes[0].lines[1].get_xdata().tolist() == [1]


def test_no_scale_other_lengths_and_an_unknown_format_say_so():
    with pytest.raises(ValueError, match=r"got 1 runs without a loss scale other than 1; legal is .*; give one"):
        loss_scale_history({"float32": FLOAT32}, "x.png")
    with pytest.raises(ValueError, match=r"got 2 values of 'loss_scale' for 1 of 'attempt'"):
        loss_scale_history({"a": {"loss_scale": [2.0, 2.0], "attempt": [0]}}, "x.png")
    with pytest.raises(ValueError, match=r"bf17"):
        loss_scale_history({"a": FLOAT16}, "x.png", limit="bf17")
