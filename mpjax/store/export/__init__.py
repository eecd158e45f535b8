"""Weights and programs for serving: safetensors in five formats, and StableHLO that needs no model code."""
