"""FAULTS 1 on real digits: unscaled float16 loses gradients, scaled it equals float64 to float16's accuracy."""

from __future__ import annotations

import numpy as np

from experiments import numerics_underflow


def test_unscaled_fails_and_scaled_equals_float64(tmp_path):
    config = numerics_underflow.Config(workdir=str(tmp_path))
    found = numerics_underflow.main(config)
    assert found["unscaled"]["vanished"][0] == 1.0 and found["unscaled"]["error"][0] == 1.0
    # Each of the eight layers rounds activations and cotangents to eps / 2 a few times; these add up at random.
    tolerance = 4 * float(np.finfo(np.float16).eps)
    for name in ("static scale", "dynamic scale"):
        assert max(found[name]["error"]) < tolerance
        assert max(found[name]["vanished"]) == 0.0
    folder = tmp_path
    assert (folder / "underflow.png").read_bytes()[:4] == b"\x89PNG" and (folder / "layers.json").exists()
