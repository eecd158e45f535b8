"""The scaling run, shrunk, on eight virtual devices: what is counted, what is kept of a cut run, and the checks of its goals."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import types
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import mpjax
from experiments.bench import collectives, flops, goals, gpt, overlap, rows, scaling, scaling_table, spread
from experiments.bench.rows import TINY, Settings
from experiments.bench.spread import Case, Maker, cases
from mpjax.core.tree import path_of
from tests.train.meshes import needs_eight

SMALL = dataclasses.replace(TINY["gpt-1.3b"], layers=1)
QUICK = ["--tiny", "--losses=2", "--steps=1", "--blocks=2", "--profile=0"]
CHUNKS = 4
REDUCED = get_args(spread.Reduced)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The command itself, with a loss in four chunks; what would run on two devices does not fit. Its exit code and folder."""
    folder = tmp_path_factory.mktemp("scaling")
    program = Maker.program

    def fitting(maker, case):
        if case.devices == 2:
            raise MemoryError("too large\nand a page of XLA's")
        return program(maker, case)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.TINY, "gpt-1.3b", SMALL)
        patch.setattr(gpt, "CHUNK", 64)
        patch.setattr(Maker, "program", fitting)
        args = ["gpt-1.3b", *QUICK, "--devices", "1", "2", "8", "--ways=fsdp", "--batch=8", f"--out={folder}"]
        code = scaling.run(args)
    return code, folder


def record(ran):
    return json.loads((ran[1] / "gpt-1.3b-scaling.json").read_text())


def found(ran, reduce):
    return record(ran)["cases"][Case("fsdp", 8, "weak", reduce, 1).name]


@needs_eight
def test_the_bytes_of_collectives_are_those_of_the_params(ran):
    """Params are float32: 4 bytes each; a CPU widens what it gathers in bfloat16, so that these are, too. A few scalars are
    summed beside their gradients: losses, flags, and of each gradient the norm."""
    params = 4 * flops.gpt_params(SMALL)
    leaves = jax.tree.leaves(Maker(SMALL, Settings(tiny=True)).shardings(Case("fsdp", 8, "weak", "float32", 1)).params)
    for reduce in REDUCED:
        moved = collectives.totals(found(ran, reduce)["collectives"])
        assert moved["all-gather"]["bytes"] == params and moved["all"]["unknown"] == 0
        assert moved["all-gather"]["sent"] == params * 7 / 8  # an eighth is there already
        if reduce != "gspmd":
            assert moved["reduce-scatter"]["bytes"] == params and moved["reduce-scatter"]["sent"] == params * 7 / 8
            assert 0 < moved["all-reduce"]["bytes"] - 4 * len(leaves) < 64
    assert collectives.totals(record(ran)["cases"]["one device"]["collectives"])["all"]["runs"] == 0


@needs_eight
def test_the_heads_gradient_is_summed_once_a_chunk_by_gspmd_and_once_a_step_apart(ran):
    """The table of tokens is the head. Each device has as many chunks as one device alone, and apart gets its part of the
    sum."""
    whole, part = (f"f32[{SMALL.vocabulary // cut},{SMALL.width}]" for cut in (1, 8))
    sums = {
        reduce: [(x["kind"], x["times"], x["count"]) for x in found(ran, reduce)["collectives"]
                 if x["kind"] != "all-gather" and {whole, part} & set(x["arrays"])]
        for reduce in REDUCED
    }  # fmt: skip
    assert ("all-reduce", CHUNKS, 1) in sums["gspmd"]
    assert sums["float32"] == sums["bfloat16"] == [("reduce-scatter", 1, 1)]
    assert all(x["times"] == 1 for reduce in REDUCED[1:] for x in found(ran, reduce)["collectives"])


@needs_eight
def test_every_number_of_a_case_is_there(ran):
    told = record(ran)
    assert told["left_out"] == [] and told["command"].startswith("python -m experiments.bench.scaling gpt-1.3b --tiny")
    assert "--out=FOLDER" in told["command"] and str(ran[1]) not in json.dumps(told)
    state = 3 * 4 * flops.gpt_params(SMALL)  # params and both moments
    for case, cut in ((told["cases"]["one device"], 1), *((found(ran, reduce), 8) for reduce in REDUCED)):
        rows = 8 * case["devices"]
        assert (case["rows"], case["items"]) == (rows, rows * SMALL.context)
        assert len(case["block_ms"]) == 2 and min(case["block_ms"]) > 0 and np.isfinite(case["losses"]).all()
        assert case["seconds"].keys() == {"build", "trace", "compile"} and case["time"] is None
        assert state / cut < case["planned_bytes"]["arguments"] < state / cut + 2000
    # The same rows from the same params: sums in another order and dtype, rounded to bfloat16 on the way (eps 2⁻⁸).
    losses = np.array([found(ran, reduce)["losses"] for reduce in REDUCED])
    assert losses.shape == (3, 2) and np.ptp(losses, axis=0).max() <= 2**-8 * losses.max()


@needs_eight
def test_what_fails_is_told_in_a_line_and_the_run_goes_on(ran, capsys):
    code, folder = ran
    told = record(ran)["cases"]
    assert code == 1 and sum("failed" in case for case in told.values()) == 3 and len(told) == 7
    assert scaling.run(["table", str(folder)]) == 0
    text = capsys.readouterr().out
    assert text == (folder / "gpt-1.3b-scaling.md").read_text() + "\n"
    assert "| fsdp, 2 devices, weak, float32 | – | failed |" in text and "and a page" not in text
    assert "- fsdp, 2 devices, weak, float32 failed: MemoryError: too large\n" in text
    assert "| fsdp, 8 devices, weak, float32 | 64 | " in text and "not measured" in text


def test_one_device_and_the_most_come_first_then_the_first_value_of_each_setting():
    order = list(cases(["data", "fsdp"], [4, 1, 8, 2], ["weak", "strong"], ["gspmd"], [1, 8]))
    names = [case.name for case in order]
    assert names[:8] == ["one device"] + [
        f"{way}, {n} devices, weak, gspmd" for way, n in
        [("data", 8), ("fsdp", 8), ("data", 4), ("data", 2), ("fsdp", 4), ("fsdp", 2)]
    ] + ["data, 8 devices, strong, gspmd"]  # fmt: skip
    assert names[13] == "one device, accumulate 8" == order[-1].alone.name and len(order) == 26
    both = list(cases(["data", "fsdp"], [1, 2], ["weak"], ["gspmd"], [1], ["defaults", "overlap"]))
    plain = ["data, 2 devices, weak, gspmd", "fsdp, 2 devices, weak, gspmd"]
    assert [case.name for case in both] == ["one device", *plain, *(f"{name}, overlap" for name in plain)]
    assert both[-1].alone == both[0]
    weak, strong = (Case("data", 4, scaling, "gspmd", 8) for scaling in ("weak", "strong"))
    assert (weak.rows(SMALL), strong.rows(SMALL), weak.alone.rows(SMALL)) == (8 * 4 * 2, 8 * 2, 8 * 2)


def fake(block_ms, case=None, **changes):
    """What a case wrote, with step times of its own."""
    case = case or Case("data", 1, "weak", "gspmd", 1)
    return {
        "case": dataclasses.asdict(case), "devices": case.devices, "rows": case.rows(SMALL), "items": 100 * case.devices,
        "block_ms": block_ms, "seconds": {"compile": 1.0}, "losses": [1.0], "planned_bytes": {"peak": 1}, "time": None,
        "peak_bytes": None, "peak_bytes_before": None, "collectives": [],
    } | changes  # fmt: skip


def run_of(*found, name="gpt-1.3b"):
    settings = dataclasses.asdict(Settings())
    return {
        "scaling": name, "unit": "tok", "settings": settings, "date": "today", "command": "run", "environment": {"jax": "1"},
        "cases": {Case(**one["case"]).name: one for one in found}, "left_out": ["a case"],
    }  # fmt: skip


def test_xlas_options_are_numbers_texts_and_truths():
    """XLA takes no text for a bool."""
    given = ("a=true", "b=False", "c=33554432", "d=FUSION,CUBLAS", "e=x=y")
    assert scaling.options(given) == {"a": True, "b": False, "c": "33554432", "d": "FUSION,CUBLAS", "e": "x=y"}


@pytest.mark.parametrize(("xla", "more"), [("defaults", {}), ("overlap", spread.OVERLAP)])
def test_xlas_options_reach_the_compiler(xla, more, monkeypatch):
    given = []

    def caught(program, compiler):
        given.append(compiler)
        raise MemoryError("enough")

    monkeypatch.setattr(scaling, "OnMany", caught)
    maker = Maker(dataclasses.replace(SMALL, batch=2), Settings(tiny=True))
    with pytest.raises(MemoryError, match="enough"):
        scaling.measure(maker, Case("data", 1, "weak", "gspmd", 1, xla), Settings(tiny=True), {"xla_gpu_x": True})
    assert given == [{"xla_gpu_x": True, **more}] and len(spread.OVERLAP) == 2


def test_this_jaxlib_knows_the_options():
    """XLA refuses a name that it does not know."""
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert lowered.compile(dict(spread.OVERLAP))(1.0) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        lowered.compile({"xla_gpu_no_such_option": True})


def test_efficiency_by_hand_and_the_goals():
    data, fsdp = (Case(way, 8, "weak", "gspmd", 1) for way in ("data", "fsdp"))
    told = run_of(fake([10.0, 8.0, 12.0]), fake([16.0, 12.5, 20.0], data), fake([10.8] * 3, fsdp))
    assert scaling_table.efficiency(told, data.name) == (10 / 16, 8 / 20, 12 / 12.5)
    row = scaling_table.rows(told)[1]
    assert row["efficiency"] == "62.5% (40.0%–96.0%)" and row["rate a device (tok/s)"] == "6,250"
    notes = list(scaling_table.notes(told))
    assert f"{data.name}: found 62.5%, goal on 8 devices 95%, not met" in notes
    assert f"{fsdp.name}: found 92.6%, goal on 8 devices 92%, met" in notes
    two = Case("fsdp", 2, "weak", "gspmd", 1)
    fewer = scaling_table.notes(run_of(fake([10.0]), fake([10.8], two)))
    assert f"{two.name}: found 92.6%, goal on 8 devices 92%, none for 2" in list(fewer)
    assert notes[-1] == "left out, for want of time: a case"
    assert not any(
        "goal" in note for note in scaling_table.notes(run_of(fake([1.0]), fake([1.0], data), name="gpt2-124m"))
    )
    alone_failed = run_of(fake([1.0]) | {"failed": "x"}, fake([1.0], data))
    assert scaling_table.efficiency(alone_failed, data.name) is None


def test_a_peak_is_shown_where_a_device_rose_above_all_before():
    assert scaling_table.peak(fake([1.0], peak_bytes=[7, 9], peak_bytes_before=[7, 0])) == 9
    assert scaling_table.peak(fake([1.0], peak_bytes=[7, 9], peak_bytes_before=[7, 9])) is None
    assert scaling_table.peak(fake([1.0])) is None


def test_a_cut_run_keeps_what_it_had_and_says_what_it_left_out(monkeypatch, tmp_path):
    """By a clock of our own the first case takes 60 seconds and the second 40; a third of 60 would end at 160, not 130."""
    now, there = [0.0], []

    def measure(maker, case, settings, compiler):
        now[0] += 60 if case.devices == 1 else 40
        there.append(sorted(path.name for path in tmp_path.iterdir()))
        return fake([1.0], case)

    monkeypatch.setattr(scaling.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(scaling, "measure", measure)
    args = [
        "gpt-1.3b",
        *QUICK,
        "--devices",
        "1",
        "2",
        "--scaling",
        "weak",
        "strong",
        "--batch=2",
        "--stop-after",
        "130",
    ]
    assert scaling.run([*args, f"--out={tmp_path}"]) == 0
    told = json.loads((tmp_path / "gpt-1.3b-scaling.json").read_text())
    assert there == [[], ["gpt-1.3b-scaling.json", "gpt-1.3b-scaling.md"]]
    assert list(told["cases"]) == ["one device", "data, 2 devices, weak, gspmd"] and len(told["left_out"]) == 11
    assert (
        "left out, for want of time: fsdp, 2 devices, weak, gspmd; " in (tmp_path / "gpt-1.3b-scaling.md").read_text()
    )


@needs_eight
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["resnet50"], "got the work 'resnet50'; legal are gpt2-124m, gpt-1.3b"),
        (["gpt-1.3b", "--tiny", "--devices", "9"], "got --devices 9; legal are 1 to 8"),
        (["gpt-1.3b", "--tiny", "--batch=0"], "got --batch 0; legal is a number of rows from 1"),
        (["gpt-1.3b", "--tiny", "--scaling", "strong"], "2 rows, which 8 devices cannot share; give --batch a multiple of 8"),
        (["gpt-1.3b", "--tiny", "--ways", "fsdp+tensor", "--tensor=3"], "got --tensor 3; legal is a divisor of 8"),
        (["gpt-1.3b", "--tiny", "--compiler", "xla"], "got --compiler xla; legal is NAME=VALUE"),
        (["checks", "--tiny", "--batch=9"], "9 rows, which 8 devices cannot share"),
        (["checks", "--tiny", "--devices=1"], "got --devices 1; legal are 2 to 8"),
        (["table", "."], "holds no *-scaling.json"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_ends_with_2(args, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert scaling.run(args) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


@needs_eight
def test_tensor_parallelism_cuts_the_kernels_of_a_block_over_both_axes():
    """The state is never made: where its leaves lie follows from their shapes."""
    placed = Maker(SMALL, Settings(tiny=True)).shardings(Case("fsdp+tensor", 8, "weak", "float32", 1))
    found = {path_of(keys): x.spec for keys, x in jax.tree_util.tree_flatten_with_path(placed.params)[0]}
    columns, cut_rows = P("data", "model"), P("model", "data")
    assert {path.rpartition("layers/0/")[2]: spec for path, spec in found.items() if path.endswith("kernel")} == {
        "attention/query/kernel": columns, "attention/key/kernel": columns, "attention/value/kernel": columns,
        "attention/out/kernel": cut_rows, "up/kernel": columns, "down/kernel": cut_rows,
    }  # fmt: skip
    assert found["embed/embedding"] == cut_rows and found["norm/scale"] == P("data")


# ---- what moves, read in HLO -----------------------------------------------------------------------------------------

ASYNCHRONOUS = """HloModule jit_step, is_scheduled=true, replica_count=1, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: bf16[64]) -> bf16[8] {
  ROOT %inner = bf16[8]{0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

%generic (p: f32[8]) -> f32[16] {
  ROOT %inner.2 = f32[16]{0} all-gather(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

%body (t: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %r = (f32[4,4]{1,0:T(8,128)}, f32[]) all-reduce-start(%x, %y), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %r.done = (f32[4,4]{1,0:T(8,128)}, f32[]) all-reduce-done(%r)
  %inner_loop = (s32[]) while(%c), condition=%cond, body=%unknown
}

%unknown (t: (s32[])) -> (s32[]) {
  %a2a = (u8[3]{0}, u8[3]{0}) all-to-all(%m, %n), replica_groups={{0,1},{2,3},{4,5},{6,7}}
}

%cond (t: (s32[])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[64]) -> f32[] {
  %rs = ((bf16[64]{0}), bf16[8]{0}, u32[]{:S(5)}) reduce-scatter-start(%p), calls=%wrapped, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  %rs.done = bf16[8]{0} reduce-scatter-done(%rs), metadata={op_name="jit(step)/x = all-gather(y)"}
  %g = ((f32[8]{0}), f32[16]{0}) async-start(%q), calls=%generic
  %g.done = f32[16]{0} async-done(%g), calls=%generic
  %cp = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%z), source_target_pairs={{0,1},{1,2}}
  %cp.done = f32[2]{0} collective-permute-done((f32[2]{0}, f32[2]{0}, u32[], u32[]) %cp)
  %alone = f32[9]{0} all-reduce(%z), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %all = pred[7]{0} all-reduce(%z), replica_groups={}, to_apply=%add
  %named = f32[2]{0} all-reduce(%z), replica_groups=mesh['data'=2,'model'=4] {'model'}, to_apply=%add
  %ordered = f32[3]{0} all-reduce(%z), replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}, to_apply=%add
  %part = f32[5]{0} all-gather(%z), replica_groups=mesh['data'=8] {'data':(1)4}, dimensions={0}
  ROOT %w = (s32[], f32[4,4]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
}
"""  # noqa: E501


def test_each_collective_is_counted_once_as_often_as_it_runs():
    """As a GPU's program writes them: pairs, one inside a computation that the pair wraps, loops with and without a length."""
    assert sorted(collectives.collectives(ASYNCHRONOUS)) == [
        ("all-gather", ("f32[16]",), 2, 64, 1),
        ("all-gather", ("f32[5]",), 4, 20, 1),
        ("all-reduce", ("f32[2]",), 4, 8, 1),
        ("all-reduce", ("f32[3]",), 2, 12, 1),
        ("all-reduce", ("f32[4,4]", "f32[]"), 4, 68, 3),
        ("all-reduce", ("pred[7]",), 8, 7, 1),
        ("all-to-all", ("u8[3]", "u8[3]"), 2, 6, None),
        ("collective-permute", ("f32[2]",), 2, 8, 1),
        ("reduce-scatter", ("bf16[8]",), 8, 128, 1),
    ]
    found = collectives.totals(collectives.table(ASYNCHRONOUS))
    assert found["all-reduce"] == {
        "runs": 6,
        "bytes": 8 + 12 + 3 * 68 + 7,
        "sent": 1.5 * (8 + 3 * 68) + 12 + 1.75 * 7,
        "unknown": 0,
    }
    assert found["reduce-scatter"]["sent"] == 128 * 7 / 8 and found["collective-permute"]["sent"] == 8
    assert found["all"]["unknown"] == found["all-to-all"]["unknown"] == 1 and found["all-to-all"]["bytes"] == 6


# ---- the time in them ------------------------------------------------------------------------------------------------


def test_the_streams_of_every_gpu_are_read(monkeypatch):
    def line(name, *events):
        events = [types.SimpleNamespace(name=n, start_ns=start, duration_ns=end - start) for n, start, end in events]
        return types.SimpleNamespace(name=name, events=events)

    kernels = line("Stream #13(Compute)", ("gemm", 0, 60), ("gemm", 100, 200))
    nccl = line("Stream #20", ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 50, 100))
    derived = line("XLA Ops", ("all-reduce.1", 0, 200))
    planes = [types.SimpleNamespace(name=f"/device:GPU:{n}", lines=[kernels, nccl, derived]) for n in range(2)]
    planes.append(types.SimpleNamespace(name="/host:CPU", lines=[line("python", ("call", 0, 900))]))
    trace = types.SimpleNamespace(planes=planes)
    monkeypatch.setattr(jax.profiler, "ProfileData", types.SimpleNamespace(from_file=lambda path: trace))
    found = overlap.shares(overlap.read("trace"), steps=2)
    assert found == pytest.approx({"step_ms": 1e-4, "collectives": 0.25, "exposed": 0.2, "idle": 0})


def test_on_a_cpu_the_time_in_collectives_is_not_measured():
    double = jax.jit(lambda x: x * 2)
    assert overlap.measure(lambda: double(1.0), lambda: None, 1) is None


@pytest.mark.parametrize("name", ["collectives", "goals", "overlap"])
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"experiments.bench.{name}"))
    assert found.attempted and not found.failed


# ---- the goals -------------------------------------------------------------------------------------------------------


@needs_eight
def test_the_checks_hold(monkeypatch, tmp_path):
    """`tests/train` and `tests/store` hold the same of every placement, on toys; here it is the step that is timed."""
    monkeypatch.setitem(rows.TINY, "gpt-1.3b", SMALL)
    args = [
        "--tiny",
        "--work=gpt-1.3b",
        "--ways",
        "fsdp",
        "--reduce-dtype",
        "float32",
        "--policies",
        "float32",
        "--steps=20",
    ]
    assert scaling.run(["checks", *args, f"--out={tmp_path}"]) == 0
    told = json.loads((tmp_path / "checks.json").read_text())["checks"]
    assert [(row["check"], row["limit"], row["met"]) for row in told] == [
        ("shards that a NaN on one device changed", 0, True),
        ("loss after 20 steps", 2e-6, True),
        ("leaves that a checkpoint changed", 0, True),
        ("leaves that a checkpoint changed", 0, True),
    ]
    assert told[1]["last"] < 0.99 * told[1]["first"]  # it trained: there was something to differ in


def one_weight(skip):
    """A state of eight weights, one on each device, and a step that is never skipped if it is not told to."""
    mesh = jax.make_mesh((8,), ("data",))
    model = mpjax.Model(lambda key: ({"w": jnp.ones(8)}, {}), print)
    state = mpjax.TrainState.create(model, optax.sgd(0.1), jax.random.key(0))
    step = mpjax.make_train_step(lambda p, m, batch, rng: (p["w"] * batch).mean(), optax.sgd(0.1), skip=skip)
    return step, mpjax.shard_state(state, mesh, mpjax.fsdp(min_size=0)), mpjax.shard_batch(np.ones(8, np.float32), mesh)


@needs_eight
def test_a_step_that_applies_a_nan_is_found_and_so_is_a_nan_that_was_not_planted():
    step, state, batch = one_weight("off")
    bad = batch.at[5].set(np.nan)
    _, row = goals.planted(step, state, bad)
    assert not row["met"]
    step, state, _ = one_weight("nonfinite")
    state, row = goals.planted(step, state, bad)
    assert row["met"] and row["found"] == 0
    _, row = goals.planted(step, state, batch)
    assert not row["met"]


def test_a_check_that_is_not_met_ends_with_1(monkeypatch, capsys):
    found = [goals.row("a", 1.0, 2.0), goals.row("b", 3.0, 2.0)]
    for shown, code in ((found, 1), (found[:1], 0)):
        monkeypatch.setattr(goals, "checks", lambda *_, shown=shown: iter(shown))
        assert goals.main(goals.Checks(tiny=True), SMALL) == code
    assert "b (): found 3, limit 2, NOT met" in capsys.readouterr().err
    assert list(goals.LIMITS.values()) == [2e-6, 2e-2]
