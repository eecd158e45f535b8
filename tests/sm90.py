"""Compiles for an H100 on a machine without one, where jax's CUDA plugin is installed: prints what each program multiplies with.

Run in a process of its own (`python tests/sm90.py`), since it makes a compiler for another platform.
"""

from __future__ import annotations

import collections
import json
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from mpjax.numerics.delayed import COLLECTION, DelayedDot, histories, scaled_by
from mpjax.numerics.dot import QuantizedDot

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def products(fn, *shapes):
    """How often each kind of product stands in the optimised program: cuBLAS calls by target, Triton's, XLA's own dots."""
    jax.devices()  # before the other platform is there
    where = {"platform": "cuda", "target_config": H100, "topology": "1x1x1"}
    mesh = jax.sharding.Mesh([topologies.get_topology_desc("1x1x1", **where).devices[0]], ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    text = jax.jit(fn).lower(*args).compile().as_text()
    found = re.findall(r'custom_call_target="(__cu\w+\$[^"]+)"', text)
    found += re.findall(r"__triton(?:_nested)?_gemm", text) + re.findall(r"(?<= )dot(?=\()", text)
    return dict(collections.Counter(found))


def value_and_gradients(dot):
    def fn(x, w, g):
        y, pull = jax.vjp(lambda x, w: dot(x, w, (((x.ndim - 1,), (0,)), ((), ()))), x, w)
        return y, *pull(g)

    return fn


def delayed(x, w, g):
    with scaled_by({COLLECTION: histories(["up"])}):
        return value_and_gradients(DelayedDot("up"))(x, w, g)


if __name__ == "__main__":
    half = jnp.bfloat16
    shapes = ((4, 128, 256), half), ((256, 512), half), ((4, 128, 512), half)
    programs = {
        "fp8": value_and_gradients(QuantizedDot("fp8")),
        "fp8_delayed": delayed,
        "none": value_and_gradients(jax.lax.dot_general),
    }
    print(json.dumps({name: products(fn, *shapes) for name, fn in programs.items()}))
