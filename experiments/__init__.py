"""Experiments: each runs by itself, `python -m experiments.NAME --help`, and is its own lab note."""
