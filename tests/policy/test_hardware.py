"""The table of chips, and what is recommended on each: with fakes for the devices that are not here."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from mpjax.policy.hardware import CHIPS, FORMATS, Recommendation, find_chip, hardware_half, recommend
from mpjax.policy.policy import get_policy

KINDS = {
    "Tesla V100-SXM2-16GB": "V100",
    "Tesla V100S-PCIE-32GB": "V100",
    "Tesla T4": "T4",
    "NVIDIA A100-SXM4-40GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": "A100",
    "NVIDIA L4": "L4",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H100",
    "NVIDIA GH200 480GB": "H100",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "B200",
    "TPU v2": "TPU v2",
    "TPU v3": "TPU v3",
    "TPU v4": "TPU v4",
    "TPU v5 lite": "TPU v5e",
    "TPU v5e": "TPU v5e",
    "TPU v5": "TPU v5p",
    "TPU v5p": "TPU v5p",
    "TPU v6 lite": "TPU v6e",
    "TPU v6e": "TPU v6e",
    "TPU7x": "TPU v7",
    "TPU v7": "TPU v7",
    "cpu": "CPU",
}
STRANGERS = ["NVIDIA L40S", "NVIDIA T400", "NVIDIA GeForce RTX 3090", "TPU v4 lite", "AMD Instinct MI300X", "", "TPU8i"]


def device(kind: str, platform: str = "gpu", **more: Any) -> SimpleNamespace:
    return SimpleNamespace(platform=platform, device_kind=kind, **more)


@pytest.mark.parametrize("kind, name", KINDS.items())
def test_jax_names_of_devices_find_their_row(kind, name):
    assert find_chip(kind).name == name
    assert sum(bool(re.search(chip.pattern, kind, re.IGNORECASE)) for chip in CHIPS) == 1


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_chip_that_is_not_in_the_table_is_not_taken_for_another(kind):
    assert find_chip(kind) is None


def test_the_table_is_whole():
    assert {chip.name for chip in CHIPS} == set(KINDS.values()) and len(CHIPS) == 14
    for chip in CHIPS:
        assert tuple(chip.support) == FORMATS
        assert set(chip.support.values()) <= {"native", "emulated", "none", "unknown"}
        assert all(chip.support[column] == "native" and peak > 0 for column, peak in chip.tflops.items())
        assert chip.source and all(re.search(r"\b20[12]\d\b|\w\.(com|io|org|edu)\b", line) for line in chip.source)
        assert any(re.search(r"\b20[12]\d\b", line) for line in chip.source), "a source has its year"


def test_rows_cannot_be_changed():
    chip = find_chip("cpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        chip.name = "GPU"
    with pytest.raises(TypeError):
        chip.support["float32"] = "none"
    assert len(set(CHIPS)) == len(CHIPS)  # and so they hash


def test_the_facts_that_everything_here_rests_on():
    native = {column: {chip.name for chip in CHIPS if chip.support[column] == "native"} for column in FORMATS}
    tpus = {name for name in KINDS.values() if name.startswith("TPU")}
    assert native["bfloat16"] == {"A100", "L4", "H100", "B200"} | tpus
    assert native["float16"] == {"V100", "T4", "A100", "L4", "H100", "B200"}
    assert native["tf32"] == {"A100", "L4", "H100", "B200"}
    assert native["float8_e4m3fn"] == {"L4", "H100", "B200", "TPU v7"}
    assert native["float8_e5m2"] == native["float8_e4m3fn"] | {"TPU v5e", "TPU v5p", "TPU v6e"}
    assert native["float4_e2m1fn"] == {"B200"}


@pytest.mark.parametrize("kind, name", KINDS.items())
def test_what_is_recommended_follows_from_the_row(kind, name):
    found, row = recommend(device(kind)), find_chip(kind)
    want = {"V100": "mixed_float16", "T4": "mixed_float16", "CPU": "float32"}.get(name, "mixed_bfloat16")
    assert found.policy == want and kind in found.why
    assert found.needs_loss_scale == (want == "mixed_float16")
    half = "float16" if name in ("V100", "T4") else "bfloat16"
    assert hardware_half(device(kind)) == jnp.dtype(half)
    assert row.support[half] == ("emulated" if name == "CPU" else "native")
    assert recommend(kind) == found and hardware_half(kind) == jnp.dtype(half)  # a name will do
    assert get_policy(found.policy).compute_dtype == jnp.dtype(half if want != "float32" else "float32")


@pytest.mark.parametrize(
    "capability, policy, half, why",
    [
        ("6.0", "float32", "bfloat16", "6.0: no Tensor Cores before 7.0"),
        ("7.0", "mixed_float16", "float16", "7.0 multiplies float16 natively and bfloat16 only as float32"),
        ("7.5", "mixed_float16", "float16", "7.5 multiplies float16"),
        ("8.0", "mixed_bfloat16", "bfloat16", "8.0 multiplies bfloat16 natively"),
        ("8.9", "mixed_bfloat16", "bfloat16", "8.9 multiplies bfloat16"),
        ("10.3", "mixed_bfloat16", "bfloat16", "10.3 multiplies bfloat16"),
        ("12.0", "mixed_bfloat16", "bfloat16", "12.0 multiplies bfloat16"),
    ],
)
def test_an_unknown_nvidia_chip_is_judged_by_its_compute_capability(capability, policy, half, why):
    stranger = device("NVIDIA Something", compute_capability=capability)
    found = recommend(stranger)
    assert found.policy == policy and why in found.why and "NVIDIA Something" in found.why
    assert found.needs_loss_scale == (policy == "mixed_float16")
    assert hardware_half(stranger) == jnp.dtype(half)


@pytest.mark.parametrize(
    "stranger", [device("AMD Instinct MI300X", compute_capability="gfx942"), device("M3", "METAL")]
)
def test_anything_else_gets_float32_with_a_reason(stranger):
    found = recommend(stranger)
    assert found == Recommendation("float32", False, found.why)
    assert stranger.device_kind in found.why and "not in the table" in found.why
    assert hardware_half(stranger) == jnp.dtype("bfloat16")


def test_every_tpu_gets_bfloat16():
    for kind in ("TPU v4 lite", "TPU8i"):
        assert recommend(device(kind, "tpu")).policy == recommend(kind).policy == "mixed_bfloat16"
        assert hardware_half(device(kind, "tpu")) == jnp.dtype("bfloat16")


def test_the_device_at_hand():
    (cpu, *_) = jax.devices("cpu")
    assert recommend(cpu).policy == "float32" and hardware_half(cpu) == jnp.dtype("bfloat16")
    assert recommend() == recommend(jax.local_devices()[0])
    assert hardware_half() == hardware_half(jax.local_devices()[0])


@pytest.mark.gpu
def test_the_gpu_at_hand():
    found = recommend()
    assert jax.local_devices()[0].device_kind in found.why and found.policy.startswith("mixed_")


def test_a_recommendation_reads_well():
    assert str(recommend("Tesla T4")) == (
        "mixed_float16, with a dynamic loss scale: Tesla T4 multiplies float16 natively (65 against 8.1 TFLOP/s in "
        "float32 at best) and bfloat16 only as float32; gradients under 2⁻²⁴ need the scale"
    )
    assert str(recommend("TPU v4")) == (
        "mixed_bfloat16, without a loss scale: TPU v4 multiplies bfloat16 natively (275 TFLOP/s at best); it has "
        "float32's range"
    )


def test_float8_is_an_option_where_it_is_native_and_no_more_than_that():
    kinds = {"NVIDIA L4", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200"}
    others = {"NVIDIA A100-SXM4-40GB", "Tesla V100-SXM2-16GB", "Tesla T4", "TPU v5 lite", "cpu", "NVIDIA Unheard 1"}
    assert {kind for kind in kinds | others if "mixed_fp8" in recommend(kind).why} == kinds
    assert {recommend(kind).policy for kind in kinds} == {"mixed_bfloat16"}
    for capability, told in (("8.9", True), ("10.0", True), ("8.6", False), ("7.5", False)):
        assert ("mixed_fp8" in recommend(device("NVIDIA Unheard 1", compute_capability=capability)).why) == told
    assert str(recommend("NVIDIA H100 80GB HBM3")).endswith(
        "; it has float32's range; mixed_fp8 is an option for wide dense layers, to be measured on your own model: on one "
        "H200 a GPT of 1.3B params ran at 1.22 × the speed of bfloat16 with it, GPT-2 124M at 0.99 ×"
    )


@pytest.mark.parametrize("bad", [3, "", " ", jnp.float32(1), SimpleNamespace(platform="gpu"), [], device(None)])
def test_row_13_what_is_no_device_is_refused(bad):
    for function in (recommend, hardware_half):
        with pytest.raises(ValueError, match=r"device is .*; legal is a jax device .*; pass one of jax.devices\(\)"):
            function(bad)


def test_a_name_that_is_no_text_is_refused():
    # In the suite the annotation is checked first.
    with pytest.raises((ValueError, TypeCheckError), match="device_kind"):
        find_chip(None)


def test_the_table_is_printed_without_jax():
    code = (
        "import sys; from mpjax.policy.hardware import CHIPS, find_chip, recommend; recommend('NVIDIA L4'); "
        "print(len(CHIPS), 'jax' in sys.modules, 'ml_dtypes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["14", "False", "False"]
