"""Floor 2, the hall where a step is taken: state, step, evaluation and a plain loop. Knows no Flax."""
