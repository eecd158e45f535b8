"""Rows added up in the order of the kernel that XLA makes for an H100 of the gradient of a bias: python in_that_order.py"""

import ml_dtypes
import numpy as np

ROWS, COLUMNS = 4096, 512


def added_up(rows: np.ndarray) -> np.ndarray:
    """Each of 32 threads takes every 32nd row, and a butterfly adds up the threads; every sum is rounded to bfloat16."""
    sums = np.zeros((32, rows.shape[1]), ml_dtypes.bfloat16)
    for some in rows.reshape(-1, 32, rows.shape[1]):
        sums = (sums + some).astype(ml_dtypes.bfloat16)
    while len(sums) > 1:
        half = len(sums) // 2
        sums = (sums[:half] + sums[half:]).astype(ml_dtypes.bfloat16)
    return sums[0].astype(np.float64)


def main() -> None:
    random = np.random.default_rng(0)
    cases = {
        "normal(0, 1)": random.normal(0, 1, (ROWS, COLUMNS)),
        "normal(1, 0.2)": random.normal(1, 0.2, (ROWS, COLUMNS)),
        "normal(0.3, 0.02)": random.normal(0.3, 0.02, (ROWS, COLUMNS)),
        "0.3, all of them": np.full((ROWS, 1), 0.3),
    }
    for name, rows in cases.items():
        rows = rows.astype(ml_dtypes.bfloat16)
        exact = rows.astype(np.float64).sum(0)
        error = (added_up(rows) - exact) / np.sqrt((exact**2).mean())
        once = (exact.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64) - exact) / np.sqrt(
            (exact**2).mean()
        )
        print(f"{name:18} in bfloat16 {np.sqrt((error**2).mean()):.4f}, rounded once {np.sqrt((once**2).mean()):.4f}")


if __name__ == "__main__":
    main()
