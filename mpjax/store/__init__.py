"""Floor 3: what outlives the process: checkpoints, weights and programs for serving, trees that others wrote."""
