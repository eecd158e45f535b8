"""The measurement of the input pipeline, shrunk: each way is measured, bytes are exact, and a prefetched step waits for none."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import input_pipeline

SMALL = {"size": 8, "batch_size": 4, "width": 2, "stages": 0, "steps": 3, "repeats": 1}


def test_each_way_is_measured_and_its_bytes_are_counted(tmp_path):
    """By hand: 4 images of 8 × 8 × 3 are 768 numbers; 4 labels of 4 bytes."""
    told = input_pipeline.main(input_pipeline.Config(**SMALL, workdir=str(tmp_path)))
    sent = {name: found["MiB"] * 2**20 for name, (found,) in told["rounds"].items()}
    assert sent["floor"] == 0 and sent["plain"] == 4 * 768 + 16 and sent["cast"] == 2 * 768 + 16
    # The thread has made as many batches as there were steps, and sent them.
    assert sent["prefetch"] == pytest.approx(4 * 768 + 16) and sent["prefetch + cast"] == pytest.approx(2 * 768 + 16)
    assert all(0 <= found["wait"] < found["step"] for (found,) in told["rounds"].values())
    assert json.loads((tmp_path / "table.json").read_text()) == told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "table.json", "table.md"]


def test_a_batch_is_a_function_of_seed_and_attempt():
    config = input_pipeline.Config(**SMALL)
    batches, again = input_pipeline.source(config), input_pipeline.source(config)
    image = batches(3)["image"]
    assert image.dtype == np.float32 and image.shape == (4, 8, 8, 3) and np.array_equal(image, again(3)["image"])
    assert not np.array_equal(image, batches(4)["image"])
    assert abs(image.mean()) < 0.2 and image.std() == pytest.approx(1, abs=0.1)  # 768 even bytes: σ = 73.9
