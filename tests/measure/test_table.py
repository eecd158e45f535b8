"""Tables: how numbers are written, where units stand, and what fits into a terminal."""

from __future__ import annotations

import io

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mpjax.measure.table import policy_table, to_markdown

ROWS = [
    {
        "policy": "float32", "test accuracy": 0.97222, "final loss": 0.0123, "skipped": 0, "final scale": 1.0,
        "steps/s": 33.333, "temp memory": 29_728_604, "matrix FLOPs": {"float32": 1.0}, "largest deviation of loss": 0.0,
    },
    {
        "policy": "mixed_float16", "test accuracy": 0.96944, "final loss": 1.0, "skipped": 2, "final scale": 2.0**15,
        "steps/s": 41.0, "temp memory": 26_895_974, "matrix FLOPs": {"float16": 0.9998, "float32": 0.0002},
        "largest deviation of loss": 3.2e-05,
    },
]  # fmt: skip


def cells(rows, **options):
    """The Markdown cells of the body."""
    return [line[2:-2].split(" | ") for line in to_markdown(rows, **options).splitlines()[2:]]


def printed(rows, width, **options):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(policy_table(rows, width=width, **options))
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def test_the_markdown_of_an_experiment():
    assert to_markdown(ROWS).splitlines() == [
        "| policy | test accuracy (%) | final loss | skipped | final scale | steps/s | temp memory (MiB) "
        "| matrix FLOPs (%) | largest deviation of loss |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|",
        "| float32 | 97.2 | 0.0123 | 0 | 1 | 33.33 | 28.35 | float32 100.0 | 0 |",
        "| mixed_float16 | 96.9 | 1 | 2 | 32768 | 41 | 25.65 | float16 >99.9, float32 <0.1 | 3.20e-05 |",
    ]


def test_the_table_of_an_experiment_in_a_wide_terminal():
    assert printed(ROWS, 200, title="digits")[1:] == [
        " policy         test accuracy (%)  final loss  skipped  final scale  steps/s  temp memory (MiB)  "
        "matrix FLOPs (%)  largest deviation of loss",
        " " + "─" * 139,
        " float32                     97.2      0.0123        0            1    33.33              28.35  "
        "float32 100.0                             0",
        " mixed_float16               96.9           1        2        32768       41              25.65  "
        "float16 >99.9                      3.20e-05",
        " " * 97 + "float32 <0.1",
    ]


@pytest.mark.parametrize(("width", "columns"), [(200, 9), (100, 9), (80, 3), (60, 3)])
def test_a_table_fits_the_terminal_and_breaks_no_number(width, columns):
    """First headers are wrapped, then the table is turned: a column for each policy."""
    assert len(policy_table(ROWS, width=width).columns) == columns
    lines = printed(ROWS, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for whole in (
        "mixed_float16",
        "float32 100.0",
        "float16 >99.9",
        "3.20e-05",
        "32768",
        "0.0123",
        "accuracy",
        "28.35",
    ):
        assert whole in text


def test_the_title_stands_above():
    assert printed(ROWS, 200, title="digits, 300 steps")[0].strip() == "digits, 300 steps"


@pytest.mark.parametrize(
    ("key", "value", "header", "cell"),
    [
        ("accuracy", 1.0, "accuracy (%)", "100.0"),
        ("share of time", 0.0, "share of time (%)", "0.0"),
        ("vanished, worst layer", 0.123, "vanished, worst layer (%)", "12.3"),
        ("relative error, worst layer", 0.00188, "relative error, worst layer", "1.88e-03"),
        ("temp memory", 512, "temp memory (B)", "512"),
        ("temp memory", 2**20 - 1, "temp memory (KiB)", "1024"),
        ("temp memory", 2**20, "temp memory (MiB)", "1"),
        ("temp memory", 3 * 2**40, "temp memory (TiB)", "3"),
        ("temp memory", 0, "temp memory (B)", "0"),
        ("temp memory (MiB)", 12.3456, "temp memory (MiB)", "12.35"),
        ("rate (img/s)", 5655.4, "rate (img/s)", "5655"),
        ("final scale", 2.0**24, "final scale", "16777216"),
        ("loss", float("nan"), "loss", "nan"),
        ("loss", float("inf"), "loss", "inf"),
        ("loss", 1.23456e-9, "loss", "1.235e-09"),
        ("loss", jnp.float32(0.25), "loss", "0.25"),
        ("loss", jnp.bfloat16(0.25), "loss", "0.25"),
        ("loss", np.float16(0.25), "loss", "0.25"),
        ("skipped", np.int32(7), "skipped", "7"),
        ("done", True, "done", "yes"),
        ("done", np.bool_(False), "done", "no"),
        ("note", "a|b\nc", "note", r"a\|b c"),
        ("accuracy", None, "accuracy", "–"),
        ("parts", {}, "parts", "–"),
        ("parts", {"a": 0.5, "b": None}, "parts (%)", "a 50.0, b –"),
    ],
)
def test_a_value_is_written_by_its_unit(key, value, header, cell):
    rows = [{key: value}]
    assert to_markdown(rows).splitlines()[0] == f"| {header} |"
    assert cells(rows) == [[cell]]


def test_one_prefix_for_a_column_of_bytes():
    assert cells([{"temp memory": 2**30}, {"temp memory": 2**29}]) == [["1"], ["0.5"]]


def test_a_row_may_lack_a_column():
    rows = [{"a": 1}, {"b": 2}]
    assert to_markdown(rows).splitlines() == ["| a | b |", "|---:|---:|", "| 1 | – |", "| – | 2 |"]


def test_units_can_be_given():
    rows = [{"x": 0.5, "y": 2048, "z": 0.5, "accuracy": 0.5}]
    units = {"x": "%", "y": "bytes", "z": "scientific", "accuracy": ""}
    assert to_markdown(rows, units).splitlines()[::2] == [
        "| x (%) | y (KiB) | z | accuracy |", "| 50.0 | 2 | 5.00e-01 | 0.5 |"
    ]  # fmt: skip
    assert len(policy_table(rows, units=units).columns) == 4


def test_what_looks_like_markup_is_text():
    header, _, cell = printed([{"[bold]a[/bold]": "[bold]x[/bold]"}], 80)
    assert (header.strip(), cell.strip()) == ("[bold]a[/bold]", "[bold]x[/bold]")


def test_wrong_units_and_no_rows_say_so():
    with pytest.raises(
        ValueError, match=r"got the unit 'percent' for 'a'; legal are '%', .* for one of 'a'; name such"
    ):
        to_markdown([{"a": 1}], {"a": "percent"})
    with pytest.raises(ValueError, match=r"got the unit '%' for 'b'; legal are .* for one of 'a'; name such a pair"):
        policy_table([{"a": 1}], units={"b": "%"})
    for rows in ([], [{}]):
        with pytest.raises(ValueError, match=r"got no rows, .*; legal is at least one row with one value; leave"):
            policy_table(rows)
