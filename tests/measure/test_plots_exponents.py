"""The picture of exponents: strips, windows, boxes and numbers are read off the figure."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mpjax.measure.plots import exponent_ranges

# By hand, from the formats' definitions: log2 of the smallest subnormal, of the smallest normal and of the largest.
WINDOWS = {
    "float16": (-24, -14, math.log2(65504)),
    "bfloat16": (-133, -126, 127 + math.log2(2 - 2**-7)),
    "float8_e4m3fn": (-9, -6, math.log2(448)),
    "float8_e5m2": (-16, -14, math.log2(57344)),
}
COUNTS = {
    "activation": {"in": {-1: 30, 0: 50, "zero": 20}, "out": {3: 5, "inf": 10, "nan": 85}},
    "gradient": {"in": {-20: 3, -18: 1}, "out": {2: 4}},
}


def texts(axes):
    """What stands at which row beside and in the panel."""
    found: dict[float, list[str]] = {}
    for text in axes.texts:
        row = text.xy[1] if hasattr(text, "xy") else text.get_position()[1]
        found.setdefault(row, []).append(text.get_text().strip())
    return found


def strips(axes):
    """For each layer: from exponent to share, as the mesh has it."""
    (mesh,) = axes.collections[:1]
    edges = mesh.get_coordinates()[0, :, 0]
    rows = np.ma.filled(mesh.get_array(), 0)[::2]  # a gap lies between two layers
    return [{int(edge): share for edge, share in zip(edges, row, strict=False) if share} for row in rows]


def boxes(axes):
    return [(p.get_x(), p.get_width(), p.get_y() + p.get_height() / 2) for p in axes.patches if not p.get_fill()]


def test_strips_are_the_shares_of_all_values_also_of_zeros_and_what_is_not_finite(figures):
    exponent_ranges(COUNTS, "x.png", title="both")
    activations, gradients, _ = figures[0].axes  # and the bar of colours
    assert (activations.get_title(), gradients.get_title()) == ("activations", "gradients")
    assert figures[0].get_suptitle() == "both"
    assert strips(activations) == [{-1: 0.3, 0: 0.5}, {3: 0.05}]
    assert strips(gradients) == [{-20: 0.75, -18: 0.25}, {2: 1}]
    assert activations.collections[0].get_coordinates()[0, 1, 0] - activations.get_xlim()[0] == 1  # [2^e, 2^(e+1))
    labels = [text.get_text() for text in activations.get_yticklabels()]
    assert labels == [*WINDOWS, "in", "out"]
    assert activations.get_ylim()[0] > activations.get_ylim()[1]  # the input on top


def test_windows_of_the_formats_are_solid_where_numbers_are_normal(figures):
    exponent_ranges({"update": {"a": {-139: 1, 129: 1}}}, "x.png", span=(-140, 130))
    axes = figures[0].axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    rows = {round(row, 9): label for row, label in zip(axes.get_yticks(), labels, strict=True)}
    drawn: dict[str, list[tuple[float, float]]] = {}
    for bar in axes.patches:
        name = rows[round(bar.get_y() + bar.get_height() / 2, 9)]
        drawn.setdefault(name, []).append((bar.get_x(), bar.get_x() + bar.get_width()))
        assert (bar.get_alpha() is None) == (len(drawn[name]) == 2)  # the second part is the normal one
    for name, (smallest, tiny, largest) in WINDOWS.items():
        np.testing.assert_allclose(drawn[name], [(smallest, tiny), (tiny, largest)], rtol=1e-15)
    lines = {path.vertices[0, 0] for lines in axes.collections[1:] for path in lines.get_paths()}
    ends = sorted(end for window in WINDOWS.values() for end in window[::2])
    np.testing.assert_allclose(sorted(lines), ends, rtol=1e-15)


def test_a_window_that_goes_on_beyond_the_axis_says_where_it_ends(figures):
    exponent_ranges(COUNTS, "x.png")
    axes = figures[0].axes[0]
    assert axes.get_xlim() == (-25, 17)  # float16's window and one more on either side
    said = [text for at_row in texts(axes).values() for text in at_row if "◂" in text or "▸" in text]
    assert said == ["◂ $2^{-133}$", "$2^{128}$ ▸"]


def test_what_a_strip_cannot_show_stands_beside_it(figures):
    exponent_ranges(COUNTS, "x.png")
    found = texts(figures[0].axes[0])
    assert found[-0.9] == ["zero", "inf", "NaN"]
    assert (found[0], found[1]) == (["20%", "0", "0"], ["0", "10%", "85%"])


@pytest.mark.parametrize(
    ("zeros", "others", "said"), [(1, 10**6, "<0.01%"), (10**6, 1, ">99%"), (5, 0, "100%"), (994, 6, "99%")]
)
def test_a_share_is_never_rounded_to_nothing_or_all(zeros, others, said, figures):
    exponent_ranges({"update": {"a": {"zero": zeros, 0: others}}}, "x.png")
    assert texts(figures[0].axes[0])[0][0] == said


def test_values_beyond_the_axis_are_told_and_not_cut_in_silence(figures):
    exponent_ranges({"update": {"a": {-100: 1, -64: 2, 40: 3, 41: 4}, "b": {0: 1}}}, "x.png")
    axes = figures[0].axes[0]
    assert axes.get_xlim() == (-64, 41)
    assert strips(axes)[0] == {-64: 0.2, 40: 0.3}
    found = texts(axes)
    assert found[-0.9] == ["zero", "inf", "NaN", "< $2^{-64}$", "≥ $2^{41}$"]
    assert (found[0][3:], found[1][3:]) == (["10%", "40%"], ["0", "0"])


def test_scaled_gradients_show_where_they_would_lie_without_the_scale(figures):
    exponent_ranges(COUNTS, "x.png", loss_scale=2.0**10)
    activations, gradients, _ = figures[0].axes
    assert gradients.get_title() == "gradients, times the loss scale $2^{10}$"
    assert strips(gradients)[0] == {-20: 0.75, -18: 0.25}  # as the backward pass holds them
    assert boxes(gradients) == [(-30, 3, 0), (-8, 1, 1)] and boxes(activations) == []
    assert gradients.get_xlim()[0] == -30
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["normal numbers", "subnormal numbers", "gradients without the loss scale"]
    exponent_ranges(COUNTS, "x.png")
    assert len(figures[1].legends[0].get_texts()) == 2
    exponent_ranges(COUNTS, "x.png", loss_scale=3.0)  # no power of two
    assert figures[2].axes[1].get_title() == "gradients, times the loss scale 3"
    assert boxes(figures[2].axes[1])[1][0] == 2 - math.log2(3)


def test_a_layer_without_readings_of_a_kind_has_an_empty_row(figures):
    exponent_ranges({"activation": {"a": {0: 1}, "b": {}}, "gradient": {"c": {1: 1}, "a": {2: 1}}}, "x.png")
    activations, gradients, _ = figures[0].axes
    assert [text.get_text() for text in activations.get_yticklabels()][-3:] == ["a", "b", "c"]
    assert strips(activations) == [{0: 1}, {}, {}] and strips(gradients) == [{2: 1}, {}, {1: 1}]
    assert not {1, 2} & texts(activations).keys() and 1 not in texts(gradients)


def test_kinds_without_a_common_layer_stand_below_each_other(figures):
    """Updates are of params and the others of modules: side by side, half of each panel would be empty."""
    exponent_ranges(COUNTS | {"update": {"in/kernel": {-9: 1}, "in/bias": {-8: 1}, "out/kernel": {-7: 1}}}, "x.png")
    *_, updates, _ = panels = figures[0].axes
    assert [axes.get_title() for axes in panels[:3]] == ["activations", "gradients", "updates"]
    places = [(axes.get_subplotspec().rowspan.start, axes.get_subplotspec().colspan.start) for axes in panels[:3]]
    assert places == [(0, 0), (0, 1), (1, 0)]
    named = [[text.get_text() for text in axes.get_yticklabels()][4:] for axes in (panels[0], updates)]
    assert named == [["in", "out"], ["in/kernel", "in/bias", "out/kernel"]]
    assert strips(updates) == [{-9: 1}, {-8: 1}, {-7: 1}]
    assert updates.get_xlim() == panels[0].get_xlim()
    assert [axes.get_ylabel() for axes in (panels[0], updates)] == ["layer, input on top", "param"]


def test_long_names_leave_out_what_they_share_and_then_their_middle(figures):
    names = [f"encoder/transformer/layers/{i}/attention/query" for i in range(2)]
    exponent_ranges({"update": {name: {0: 1} for name in names}}, "x.png")
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()][-2:] == ["0/attention/query", "1/attention/query"]
    assert axes.get_ylabel() == "param of encoder/transformer/layers"
    exponent_ranges({"update": {name: {0: 1} for name in ("", *names)}}, "x.png")
    axes = figures[1].axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels[-3:] == ["·", f"encoder/…{names[0][-25:]}", f"encoder/…{names[1][-25:]}"]  # 34 characters
    assert axes.get_ylabel() == "param"


def test_sixty_layers_are_readable(figures):
    exponent_ranges({"gradient": {f"layers/{i}/dense": {-i: 1, "zero": 1} for i in range(60)}}, "x.png", loss_scale=8)
    figure = figures[0]
    figure.draw_without_rendering()
    labels = sorted((text.get_window_extent() for text in figure.axes[0].get_yticklabels()), key=lambda box: box.y0)
    assert len(labels) == 64
    apart = [above.y0 - below.y1 for below, above in itertools.pairwise(labels)]
    assert min(apart) > -1  # a pixel, for rounding
    assert labels[0].x0 >= 0 and labels[-1].y1 <= figure.bbox.y1
    edge = max(text.get_window_extent().x1 for text in figure.axes[0].texts)
    assert edge <= figure.bbox.x1


@pytest.mark.parametrize(
    ("counts", "settings", "said"),
    [
        ({}, {}, r"got 0 kinds with no values to draw, .*; legal are counts ≥ 0, .*; give a histogram for"),
        ({"update": {"a": {}}}, {}, r"got 1 kinds with no values"),
        ({"update": {"a": {0: -1, 1: 5}}}, {}, r"or a negative count"),
        ({"update": {"a": {"-3": 1}}}, {}, r"got the keys \['-3'\] .*; legal are whole exponents, .*; turn text into"),
        ({"update": {"a": {0.5: 1}}}, {}, r"got the keys \[0.5\]"),
        ({"update": {"a": {0: 1}}}, {"loss_scale": 0.0}, r"got the loss scale 0.0 .*; legal are a positive number"),
        ({"update": {"a": {0: 1}}}, {"loss_scale": math.nan}, r"got the loss scale nan"),
        ({"update": {"a": {0: 1}}}, {"span": (3, 3)}, r"the span \(3, 3\); legal are .* a lower exponent before"),
    ],
)
def test_what_cannot_be_drawn_says_so(counts, settings, said):
    with pytest.raises(ValueError, match=said):
        exponent_ranges(counts, "x.png", **settings)


def test_a_png_is_written_and_numpy_counts_will_do(tmp_path):
    x = np.float16([0.5, 0.75, 3.0, 0.0])
    exponents, n = np.unique(np.frexp(x[x != 0])[1] - 1, return_counts=True)
    counts = {"activation": {"a": dict(zip(exponents, n, strict=True)) | {"zero": 1}}}
    path = exponent_ranges(counts, tmp_path / "new" / "a.png")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000


def test_a_kind_without_layers_and_a_span_beyond_all_values(figures):
    exponent_ranges({"activation": {}, "gradient": {"a": {3: 1}}}, "x.png", span=(20, 60))
    (axes, _) = figures[0].axes  # and the colour bar
    assert axes.get_title() == "gradients" and axes.get_xlim() == (20, 61)
