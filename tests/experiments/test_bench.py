"""The bench, shrunk: the twins are one model, the counts are right, a side that fails does not end its row."""

from __future__ import annotations

import collections
import dataclasses
import doctest
import importlib
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.bench import (
    command,
    flops,
    gpt,
    gpt_flax,
    in_turn,
    process,
    products,
    profile,
    resnet,
    resnet_flax,
    rows,
    scaling,
)
from experiments.bench.rows import ROWS, TINY, WORKS, Settings, Side
from experiments.bench.timing import block_ms, host_ms
from mpjax.measure.audit import audit
from mpjax.numerics.attention import attention

ROOT = Path(__file__).parents[2]
TWINS = {"gpt2-bf16": (gpt, gpt_flax), "resnet50-bf16": (resnet, resnet_flax)}


def small_gpt() -> rows.GPT:
    return dataclasses.replace(TINY["gpt2-124m"], layers=1)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The command itself, on a row with a side that cannot be built; its exit code, its folder and its record."""
    folder = tmp_path_factory.mktemp("bench")
    row = ROWS["gpt2-bf16"]
    sides = {"flax": row.sides["flax"], "broken": Side("mpjax", "bf17"), "mpjax-off": row.sides["mpjax-off"]}
    args = ["gpt2-bf16", "--tiny", "--no-isolated", "--losses=4", "--steps=1", "--blocks=2", "--profile=1"]
    cached = jax.config.jax_enable_compilation_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TINY, "gpt2-124m", small_gpt())
        patch.setitem(rows.ROWS, "gpt2-bf16", dataclasses.replace(row, sides=sides))
        # On a GPU both call cuDNN's kernel. Elsewhere jax's own attention is another program than ours.
        patch.setattr(jax.nn, "dot_product_attention", attention)
        code = command.run([*args, f"--out={folder}"])
    jax.config.update("jax_enable_compilation_cache", cached)
    return code, folder, json.loads((folder / "gpt2-bf16.json").read_text())


def test_the_twins_train_alike(ran):
    """Logits here are below 0.5, and a bfloat16 number is off by 2⁻⁸ of itself at most."""
    hand, wrapped = (np.array(ran[2]["sides"][name]["losses"]) for name in ("flax", "mpjax-off"))
    tolerance = 0.5 * 2**-8
    np.testing.assert_allclose(wrapped, hand, rtol=0, atol=tolerance)
    assert abs(hand[0] - np.log(128)) < 0.1 and hand[0] - hand[-1] > 10 * tolerance


def test_a_wrapped_step_without_its_guard_compiles_to_the_same_products(ran):
    """By hand: 6 FLOPs a token for each weight of a kernel or the head; attention's two products forward, four backward.

    XLA's own passes run in full here; what the suite switches off is LLVM's.
    """
    hand, wrapped = (ran[2]["sides"][name]["products"] for name in ("flax", "mpjax-off"))
    assert products.kinds(hand) == products.kinds(wrapped)
    width, tokens = 32, 4 * 32
    expected = 6 * tokens * (12 * width**2 + 128 * width) + 12 * 4 * 32**2 * width
    for found in (hand, wrapped):
        assert sum(product["flops"] * product["count"] for product in found) == expected
        assert sum(product["count"] for product in found) == 3 * 5 + 6  # qkv, out, up, down, head; attention
    assert "mpjax-off: 21 products in the program, 1.416e-05 TFLOP, the same as flax's" in read(ran, "md")


def test_every_number_is_there_and_of_its_own_kind(ran):
    _, _, record = ran
    for name in ("flax", "mpjax-off"):
        side = record["sides"][name]
        assert len(side["block_ms"]) == 2 and min(side["block_ms"]) > 0 and side["host_ms"] > 0
        assert min(side["seconds"].values()) > 0 and side["seconds"].keys() == {"import", "build", "trace", "compile"}
        plan = side["planned_bytes"]
        state = 3 * 4 * flops.gpt_params(small_gpt())  # params, both moments: float32
        assert plan["peak"] == plan["arguments"] + plan["new outputs"] + plan["temporaries"]
        assert state < plan["arguments"] < state + 2000
        assert sum(kind["share"] for kind in side["kernels"]["kinds"]) == pytest.approx(1)
    assert record["products"]["rates"]["bfloat16"]["tflops"] > 0
    assert (record["items"], record["flops"]) == (128, flops.step_flops(small_gpt()))


def test_a_side_that_fails_is_told_and_the_row_goes_on(ran, capsys):
    code, folder, record = ran
    assert code == 1 and list(record["sides"]) == ["flax", "broken", "mpjax-off"]
    assert "bf17" in record["sides"]["broken"]["failed"] and "gpt.py" in record["sides"]["broken"]["log"]
    assert command.run(["table", str(folder)]) == 0
    text = capsys.readouterr().out
    assert text == read(ran, "md") + "\n"
    assert "| broken | failed |" in text and "- broken failed: ValueError" in text and "| flax | " in text


def read(ran, suffix: str) -> str:
    return (ran[1] / f"gpt2-bf16.{suffix}").read_text()


@pytest.mark.parametrize("row", TWINS)
def test_the_twins_multiply_the_same_in_bfloat16(row, monkeypatch):
    """As they are traced: on a CPU the compiler widens every bfloat16 product."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    work = small_gpt() if row == "gpt2-bf16" else TINY["resnet50"]
    found = []
    for room, name in zip(TWINS[row], ("mpjax-off", "flax"), strict=True):
        program: list = []

        def make(room=room, name=name, program=program):
            made = room.build(work, ROWS[row].sides[name], Settings(clip_norm=1.0))
            program.append(made.step)
            return made.state, made.batch

        state, batch = jax.eval_shape(make)
        ops = audit(getattr(program[0], "pure", program[0]), state, batch).ops
        found.append(collections.Counter((op.primitive, op.operands, op.flops) for op in ops if op.flops))
    assert found[0] == found[1] and {operands for _, operands, _ in found[0]} == {("bfloat16", "bfloat16")}


def test_flops_by_hand():
    """GPT-2: nanoGPT's 124,439,808 params and 47 more rows of the table. ResNet-50: 4.09 · 10⁹ multiply-adds, as published."""
    work = WORKS["gpt2-124m"]
    assert flops.gpt_params(work) == 124_439_808 + 47 * 768
    assert flops.step_flops(work) == 6 * 124_475_904 * 16_384 + 12 * 12 * 768 * 1024**2 * 16
    assert flops.gpt_params(WORKS["gpt-1.3b"]) == pytest.approx(1.31e9, rel=0.01)
    assert sum(flops.multiply_adds(WORKS["resnet50"])) == 4_089_184_256
    tiny = [
        147 * 8 * 64,  # the stem: 16 × 16 to 8 × 8, then pooled to 4 × 4
        (8 * 8 + 9 * 8 * 8 + 8 * 32 + 8 * 32) * 16,  # the first block, with its shortcut
        32 * 16 * 16 + (9 * 16 * 16 + 16 * 64 + 32 * 64) * 4,  # the second, which halves the picture in its 3 × 3
        64 * 10,
    ]
    assert flops.step_flops(TINY["resnet50"]) == 3 * 4 * 2 * sum(tiny)


@pytest.mark.parametrize("name", ["flops", "in_turn", "products", "profile"])
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"experiments.bench.{name}"))
    assert found.attempted and not found.failed


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["gpt3"], "legal are gpt2-bf16"),
        (["gpt2-bf16", "--sides", "flux"], "flax, mpjax, mpjax-gradients, mpjax-off"),
        (["gpt2-bf16", "--in-turn", "flax", "torch"], "two JAX sides or more"),
        (["gpt2-bf16", "--in-turn", "flax"], "two JAX sides or more"),
        (["table", "."], "holds no results"),
        (["gpt2-bf16", "--tiny", "--blocks=0"], "got --blocks=0; legal is 1 or more"),
    ],
)
def test_what_makes_no_sense_ends_with_2(args, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command.run(args) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("started", [command.run, scaling.run])
def test_what_was_measured_is_not_written_over(started, tmp_path, capsys):
    """Told before anything is measured, which may take long; so is a folder that cannot be made."""
    row, name = ("gpt2-bf16", "gpt2-bf16") if started is command.run else ("gpt-1.3b", "gpt-1.3b-scaling")
    (tmp_path / f"{name}.json").write_text("kept")
    args = [row, "--tiny"] if started is command.run else [row, "--tiny", "--devices=1"]
    assert started([*args, f"--out={tmp_path}"]) == 2
    assert f"holds {name}.json already, which is not written over; give another --out" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]
    assert started([*args, f"--out={tmp_path / f'{name}.json'}"]) == 2
    assert "cannot be made: File exists; give another --out" in capsys.readouterr().err


def test_a_task_runs_in_a_process_of_its_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    task = process.Task("gpt2-bf16", (), Settings(tiny=True))
    found = process.launch(task, timeout=120)
    assert found["rates"]["bfloat16"]["right"] is True and found["environment"]["jax"] == jax.__version__
    assert process.launch(task, timeout=0.01)["failed"] == "it took more than 0.01 s"


def test_sides_take_turns_and_a_drift_cancels(monkeypatch):
    """The clock of the chip sinks by a percent a block; mpjax takes twice as long all the while, and one cannot be built.

    The first round warms up and is not counted.
    """
    turns: list[str] = []

    class Ready:
        seconds = {"trace": 1.0, "compile": 2.0}  # noqa: RUF012

        def __init__(self, work, side, settings):
            if side.by == "torch":
                raise MemoryError("too large")
            self.call, self.wait, self.executable = side.by, None, self

        def losses(self, steps):
            return [0.0] * steps

        def as_text(self):
            return ""

    def block(call, wait, steps):
        turns.append(call)
        return 1.01 ** len(turns) * (2 if call == "mpjax" else 1)

    monkeypatch.setattr(in_turn, "Compiled", Ready)
    monkeypatch.setattr(in_turn, "block_ms", block)
    monkeypatch.setattr(in_turn, "planned", lambda executable: {"peak": 0})
    sides = {name: Side(name, "bfloat16") for name in ("flax", "torch", "mpjax")}
    found = in_turn.measure(small_gpt(), sides, Settings(blocks=3))["sides"]
    assert turns[:6] == ["mpjax", "flax", "flax", "mpjax", "mpjax", "flax"] and len(found["flax"]["block_ms"]) == 6
    assert found["torch"]["failed"] == "MemoryError: too large"
    told = {row["side in turn"]: row for row in in_turn.rows({"sides": found})}
    assert told["flax"]["× time"] == "1.0000" and told["torch"]["step (ms)"] == "failed"
    low, high = map(float, told["mpjax"]["95 % interval"].split("–"))
    assert low == 1.9802 and high == 2.02 and float(told["mpjax"]["× time"]) == pytest.approx(2, abs=2e-4)  # 2 / 1.01
    first_fails = in_turn.measure(small_gpt(), {"torch": sides["torch"], "flax": sides["flax"]}, Settings())
    assert first_fails["failed"] == "MemoryError: too large"


def test_a_side_may_have_options_of_the_compiler(monkeypatch):
    """XLA itself says that it was told: the one option has a value that no option of that kind has."""
    side = Side("mpjax", "mixed_bfloat16", compiler={"xla_cpu_enable_fast_math": "maybe"})
    found = in_turn.measure(
        small_gpt(), {"flax": Side("flax", "bfloat16"), "wrong": side}, Settings(losses=1, blocks=1, steps=1)
    )
    assert (
        "xla_cpu_enable_fast_math" in found["sides"]["wrong"]["failed"] or "maybe" in found["sides"]["wrong"]["failed"]
    )


def test_the_clock_waits_once_a_block_and_before_each_call_of_the_host(monkeypatch):
    ticks, sent = itertools.count(), []
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    assert block_ms(lambda: sent.append("call"), lambda: sent.append("wait"), 4) == 250.0
    assert sent == ["call"] * 4 + ["wait"]
    sent.clear()
    assert host_ms(lambda: sent.append("call"), lambda: sent.append("wait"), 2) == [1000.0, 1000.0]
    assert sent == ["wait", "call", "wait", "call", "wait"]


def test_kernels_are_grouped_and_counted_a_step():
    names = ["nvjet_hsh_128x256_1", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "loop_convert_fusion_7",
             "loop_convert_fusion_9", "gemm_fusion_dot_3", "MemcpyD2D", "sm90_xmma_dgrad_implicit_gemm_indexed_bf16"]  # fmt: skip
    found = profile.summary([profile.Kernel(name, "op", 2e6) for name in names * 2], 2, {"op": "jit(step)/norm"})
    assert found["ms"] == 14 and {kind["kind"]: kind["ms"] for kind in found["kinds"]} == {
        "product": 4, "attention": 2, "loop_convert_fusion": 4, "copy": 2, "convolution": 2
    }  # fmt: skip
    assert found["top"][0]["from"] == "jit(step)/norm" and found["top"][0]["launches"] == 1
    assert sum(kind["share"] for kind in found["kinds"]) == pytest.approx(1)


@pytest.mark.parametrize("name", ["gpt", "resnet"])
def test_pytorchs_twin_is_the_same_model(name):
    """With the params of Flax's twin its first loss is that of Flax's, in float32."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; it is no dependency of mpjax")
    room = importlib.import_module(f"experiments.bench.{name}_torch")
    row, work = ("gpt2-bf16", TINY["gpt2-124m"]) if name == "gpt" else ("resnet50-bf16", TINY["resnet50"])
    program = TWINS[row][1].build(work, Side("flax", "float32"), Settings())
    model, _, batch = room.build(work, Settings(), "cpu")
    room.copy_params(model, jax.device_get(program.state[0]))
    expected = float(program.step(program.state, program.batch)[1]["loss"])
    with torch.no_grad():
        assert float(model(*batch)) == pytest.approx(expected, rel=1e-5)
