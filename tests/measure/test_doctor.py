"""The diagnosis: what it reads, what it tries here, and where each warning comes from."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import stat

import jax
import jax.numpy as jnp
import pytest

from mpjax.measure import doctor as room, symptoms
from mpjax.measure.doctor import Smi, doctor, nvidia_smi
from mpjax.measure.rates import ProductRate
from mpjax.measure.timing import Timing
from mpjax.policy.hardware import find_chip, recommend


@functools.cache
def diagnosis():
    ticks = itertools.count()
    return doctor(64, ("float32", "float16"), clock=lambda: float(next(ticks)))


def test_the_facts_of_this_machine():
    found = diagnosis()
    device = jax.local_devices()[0]
    assert (found.platform, found.device_kind, found.devices) == (device.platform, device.device_kind, 8)
    assert found.versions["jax"] == jax.__version__ and {"python", "jaxlib", "flax", "optax", "numpy"} <= set(
        found.versions
    )
    assert (found.chip, found.says("float16"), found.says("float32")) == ("CPU", "emulated", "native")
    assert found.recommendation == recommend(device)
    assert [rate.format for rate in found.rates] == ["float32", "float16"] and found.wrong == ()


def test_a_peak_is_that_of_the_slower_operand():
    found = dataclasses.replace(diagnosis(), peaks={"float8_e4m3fn": 20.0, "float8_e5m2": 10.0, "tf32": 5.0})
    assert (found.peak("float8_e4m3fn×float8_e5m2"), found.peak("tf32"), found.peak("int8")) == (10.0, 5.0, None)


def test_float16_attention_on_a_cpu_is_tried():
    """jax's own raises in a jitted function, ours runs; bfloat16 is fine. Seen in jax 0.10, 0.11 and 0.12."""
    with pytest.raises(ValueError, match="F16_F16_F32"):
        x = jnp.ones((1, 4, 1, 8), jnp.float16)
        jax.jit(jax.nn.dot_product_attention)(x, x, x)
    (told,) = [warning for warning in diagnosis().warnings if "attention" in warning]
    assert "dot_product_attention in float16 fails here when jitted" in told and "F16_F16_F32" in told
    assert "mpjax's own attention, which a wrapped module gets, runs" in told


def test_a_trial_that_fails_tells_of_ours_too():
    def broken(query, key, value, is_causal):
        raise RuntimeError("no kernel\nlong story")

    def poisoned(query, key, value, is_causal):
        return query * jnp.nan

    def fine(query, key, value, is_causal):
        return query

    half = ("float16",)
    assert symptoms.from_trials(fine, fine, half) == []
    assert symptoms.from_trials(fine, broken, half) == [
        "jax.nn.dot_product_attention in float16 fails here when jitted (tried): RuntimeError, no kernel; mpjax's own "
        "attention, which a wrapped module gets, runs"
    ]
    assert "mpjax's own fails too" in symptoms.from_trials(broken, poisoned, half)[0]
    assert symptoms.from_trials(poisoned, fine, half) == [
        "mpjax's attention in float16 fails here (tried): NaN or infinity in its result"
    ]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("Tesla T4", ["bfloat16 is emulated on Tesla T4", "float8_e4m3fn, float8_e5m2: emulated"]),
        ("cpu", ["bfloat16 is emulated on cpu", "float16 is emulated on cpu", "float8_e4m3fn, float8_e5m2: emulated"]),
        ("TPU v5 lite", ["float16 is emulated on TPU v5 lite", "float8_e4m3fn: emulated"]),
        ("NVIDIA H100 80GB HBM3", []),
        ("NVIDIA Unheard 1", ["NVIDIA Unheard 1 is not in the table of chips"]),
    ],
)
def test_the_table_says_what_is_emulated(kind, told):
    found = symptoms.from_table(kind, find_chip(kind))
    assert len(found) == len(told) and all(line.startswith(words) for line, words in zip(found, told, strict=True))


def rate(name, tflops, **facts):
    return ProductRate(name, 10_000, Timing((2 / tflops,)), **{"error": 0.0, "tolerance": 0.1} | facts)


def test_the_rates_say_what_is_wrong_refused_or_slow():
    native = dict.fromkeys(("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"), "native")
    full = rate("float32", 50.0)
    assert symptoms.from_rates([full, rate("bfloat16", 51.0)], native) == []
    (slow,) = symptoms.from_rates([full, rate("bfloat16", 49.0)], native)
    assert "bfloat16 ran at 49 TFLOP/s and float32 at 50" in slow
    assert symptoms.from_rates([full, rate("bfloat16", 49.0)], native | {"bfloat16": "emulated"}) == []
    (wrong,) = symptoms.from_rates([full, rate("float16", 99.0, error=0.5)], {})
    assert wrong == ("float16 products are WRONG here: off by 5.0e-01 of the largest element, where 1.0e-01 is legal")
    refused = ProductRate("float8_e4m3fn×float8_e5m2", 64, refused="no")
    assert symptoms.from_rates([full, refused], native) == [
        "float8_e4m3fn×float8_e5m2 products are refused here (tried): no"
    ]


def test_settings_that_change_precision_are_told():
    flags = {"XLA_FLAGS": "--xla_allow_excess_precision=false --xla_dump_to=f8/tf32"}
    with jax.enable_x64(True), jax.default_matmul_precision("bfloat16"):
        x64, precision, flag = symptoms.from_settings("cpu", None, flags)
    assert "jax_enable_x64" in x64 and "'bfloat16'" in precision
    assert "--xla_allow_excess_precision=false" in flag
    on, off = symptoms.from_settings("cpu", None, {"XLA_FLAGS": "--xla_a_fast_math=true --xla_a_fast_math=false"})
    assert "=true: it lets XLA assume that there are no NaNs" in on and "=false: off; on, it lets XLA assume" in off
    assert symptoms.from_settings("gpu", "NVIDIA L4", {}) == []
    (idle,) = symptoms.from_settings("cpu", "NVIDIA L4", {})
    assert "nvidia-smi finds NVIDIA L4, but jax runs on the CPU" in idle


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ("echo 'NVIDIA H100 80GB HBM3, 535.1, 81559'; echo 'another, 535.1, 81559'",
         Smi("NVIDIA H100 80GB HBM3", "535.1", 81559 * 2**20)),
        ("echo 'NVIDIA-SMI has failed'", None),
        ("echo; exit 9", None),
        ("exit 0", None),
        (None, None),
    ],
)  # fmt: skip
def test_nvidia_smi_never_fails(script, wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert nvidia_smi() == wanted


def test_a_wrong_native_product_is_what_fails_a_diagnosis(monkeypatch):
    wrong = [rate("float16", 1.0, error=1.0), rate("int8", 1.0, error=1.0), rate("float32", 1.0)]
    monkeypatch.setattr(room, "product_rates", lambda *args: tuple(wrong))
    monkeypatch.setattr(symptoms, "from_trials", lambda: [])
    assert doctor().wrong == ("int8",)  # float16 is emulated on a CPU
