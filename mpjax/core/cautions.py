"""Warnings about silent losses of training time; each category can be filtered by itself."""

from __future__ import annotations


class PrecisionWarning(UserWarning):
    """Base of every warning that mpjax gives about a choice of precision."""


class VanishingUpdateWarning(PrecisionWarning):
    """Low-precision master weights under a plain optimizer: updates under half an ulp round away."""


class VanishingEpsilonWarning(PrecisionWarning):
    """The optimizer's epsilon is zero in the dtype of its state, so that a zero gradient divides by zero."""


class MissingLossScaleWarning(PrecisionWarning):
    """float16 compute without a loss scale: gradients under 2⁻²⁴ become zero."""


class UnneededLossScaleWarning(PrecisionWarning):
    """A loss scale where nothing computes in float16: it costs time and guards nothing."""
