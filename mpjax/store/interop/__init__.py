"""Weights that others wrote, by a map of names: Orbax trees and safetensors, such as Hugging Face has them."""
