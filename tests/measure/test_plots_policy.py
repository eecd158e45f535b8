"""Policy by layer, read off the figure."""

from __future__ import annotations

import numpy as np
import pytest

import mpjax
from mpjax.measure.plots import policy_by_layer
from mpjax.policy.resolution import Row, resolution_table

F32, F16, BF16 = (np.dtype(name) for name in ("float32", "float16", "bfloat16"))
ROWS = [
    Row("", "Net", "default", F32, BF16, "full"),
    Row("layers/0", "Block", "default", F32, BF16, "caller's", "scanned stack"),
    Row("layers/0/attention", "MultiHeadDotProductAttention", "'**/attention'", F16, F16, "caller's"),
    Row("layers/0/norm", "LayerNorm", "float32 island", F32, F32, "caller's"),
    Row("head", "Dense", "'head'", F32, F32, "full"),
]
BLUE, VERMILION, GREY = "#0072b2", "#d55e00", "#444444"


def names(axes):
    return [text.get_text() for text in axes.get_yticklabels()]


def words(axes):
    """What stands at each row."""
    found: dict[float, list[str]] = {}
    for text in axes.texts:
        row = text.xy[1] if hasattr(text, "xy") else text.get_position()[1]
        found.setdefault(row, []).append(text.get_text())
    return found


def bars(axes):
    """From row to length and colour of its bar."""
    from matplotlib.colors import to_hex

    drawn = [p for p in axes.patches if p.get_width() >= 0]
    return {round(p.get_y() + p.get_height() / 2): (p.get_width(), to_hex(p.get_facecolor())) for p in drawn}


def test_each_module_has_a_row_below_the_one_that_holds_it(figures):
    policy_by_layer(ROWS, "x.png", title="both")
    (axes,) = figures[0].axes
    assert names(axes) == [
        "· (Net)", "    layers/0 (Block)", "        attention (MultiH…tProductAttention)", "        norm (LayerNorm)",
        "    head (Dense)",
    ]  # fmt: skip
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert figures[0].get_suptitle() == "both"


def test_colour_and_words_say_what_it_computes_in_and_why(figures):
    policy_by_layer(ROWS, "x.png")
    (axes,) = figures[0].axes
    assert [colour for _, colour in bars(axes).values()] == [BLUE, BLUE, VERMILION, GREY, GREY]
    found = words(axes)
    assert found[-0.95] == ["params", "hands back", "rule"]
    assert found[0] == ["bfloat16", "full", "full", "default"]
    assert found[1] == ["bfloat16", "full", "caller's", "default  (scanned stack)"]
    assert found[2] == ["float16", "f16", "caller's", "'**/attention'"]
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["computes in bfloat16", "computes in float16", "computes in float32"]


def test_bars_are_as_long_as_the_share_of_flops(figures):
    flops = {"layers/0/attention": 30, "layers/0/attention/query": 20, "head": 40, "layers/1": 10}
    policy_by_layer(ROWS, "x.png", flops=flops)
    (axes,) = figures[0].axes
    # The query lies in the attention; layers/1 is no module of the table, and lies in the root.
    assert [length for length, _ in bars(axes).values()] == [10, 0, 50, 0, 40]
    assert [at_row[0] for row, at_row in sorted(words(axes).items()) if row >= 0] == ["10.0%", "", "50.0%", "", "40.0%"]
    tabs = [p for p in axes.patches if p.get_width() < 0]  # a module without products shows its colour all the same
    assert len(tabs) == 5
    assert axes.get_xlabel() == "share of the FLOPs of all products (%)"


def test_a_module_whose_name_begins_another_does_not_hold_it(figures):
    rows = [Row(path, "Dense", "default", F32, F16, "full") for path in ("layer", "layers/0", "layer/a")]
    policy_by_layer(rows, "x.png")
    assert names(figures[0].axes[0]) == ["layer (Dense)", "layers/0 (Dense)", "    a (Dense)"]


def test_a_table_is_drawn_as_it_is_and_written(tmp_path):
    table = resolution_table(mpjax.PolicyMap({"head": "compute=f8_e3m4"}), {"": object, "head": object})
    data = policy_by_layer(table, tmp_path / "new" / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5_000


@pytest.mark.parametrize("flops", [None, {"head": 1}])
def test_all_words_have_room(flops, figures):
    note = "rounded at 'layers': name it with output= too, and more words"
    long = Row(
        "layers/0/attention/query", "MultiHeadDotProductAttention", f"'{'**/query' * 9}'", F32, F16, "full", note
    )
    policy_by_layer([*ROWS, long], "x.png", flops=flops)
    figure = figures[0]
    figure.draw_without_rendering()
    (axes,) = figure.axes
    edges = [text.get_window_extent() for text in (*axes.texts, *axes.get_yticklabels())]
    assert min(box.x0 for box in edges) >= 0 and max(box.x1 for box in edges) <= figure.bbox.x1
    assert axes.bbox.width > 250  # pixels for the bars
    assert max(text.get_window_extent().x1 for text in axes.get_yticklabels()) < axes.bbox.x0


def test_nothing_to_draw_and_flops_of_another_model_say_so():
    with pytest.raises(ValueError, match=r"got a table without rows; legal is one row or more; give what model.table"):
        policy_by_layer([], "x.png")
    with pytest.raises(ValueError, match=r"some at \['body'\] outside the table; legal are .*; give the FLOPs and the"):
        policy_by_layer(ROWS[1:], "x.png", flops={"body": 1.0, "head": 2.0})
    with pytest.raises(ValueError, match=r"got FLOPs that sum to 0"):
        policy_by_layer(ROWS, "x.png", flops={"head": 0})
    with pytest.raises(ValueError, match=r"legal are numbers ≥ 0"):
        policy_by_layer(ROWS, "x.png", flops={"head": 3, "layers/0": -1})
