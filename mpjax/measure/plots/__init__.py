"""Pictures, and the one door to matplotlib: figures are drawn off screen, without pyplot and its global state."""

from mpjax.measure.plots.exponents import exponent_ranges as exponent_ranges
from mpjax.measure.plots.parity import parity_curves as parity_curves
from mpjax.measure.plots.policy import policy_by_layer as policy_by_layer
from mpjax.measure.plots.scale import loss_scale_history as loss_scale_history
from mpjax.measure.plots.training import training_curves as training_curves
from mpjax.measure.plots.underflow import gradient_underflow as gradient_underflow
