"""Pictures, and the one door to matplotlib: figures are drawn off screen, without pyplot and its global state."""

from mpjax.measure.plots.parity import parity_curves as parity_curves
from mpjax.measure.plots.training import training_curves as training_curves
from mpjax.measure.plots.underflow import gradient_underflow as gradient_underflow
