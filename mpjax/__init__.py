"""Mixed precision for Flax models in JAX: one policy by path, and a step that skips a bad update whole.

Importing this package imports nothing else: each name below is fetched from its room when it is first used, so that
`mpjax --help` need not wait for jax.

>>> import mpjax
>>> str(mpjax.get_policy("mixed_bfloat16"))
'p=full,c=bf16,o=full'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"
"""The version of this package, as pip reads it."""

# The whole public surface: from room to names, then the names that are rooms themselves. (`mpjax.wrap` is a package
# that can be called, since importing it binds its name here.) The block under TYPE_CHECKING says the same to type
# checkers and editors; a test holds the two together.
_ROOMS: dict[str, tuple[str, ...]] = {
    "core.cautions": (
        "MissingLossScaleWarning",
        "PrecisionWarning",
        "UnneededLossScaleWarning",
        "VanishingEpsilonWarning",
        "VanishingUpdateWarning",
    ),
    "core.dtypes": ("half_dtype",),
    "core.model": ("Model",),
    "core.tree": ("all_finite", "cast_floating", "select_tree"),
    "measure.audit": ("audit",),
    "measure.culprit": ("Culprit", "CulpritHook", "diagnose"),
    "measure.doctor": ("doctor",),
    "measure.equivalence": ("Equivalence", "equivalence"),
    "measure.lint": ("lint", "lint_function"),
    "measure.lint.finding": ("Finding",),
    "measure.memory": ("memory_by_role",),
    "measure.parity": ("Parity", "parity"),
    "measure.probe": ("ProbeLog", "probe"),
    "measure.rates": ("product_rates",),
    "measure.readings": ("ProbeReport",),
    "measure.throughput": ("time_step",),
    "numerics.attention": ("attention",),
    "numerics.loss_scale": (
        "DynamicLossScale",
        "LossScale",
        "NoOpLossScale",
        "StaticLossScale",
        "dynamic_loss_scale",
        "static_loss_scale",
    ),
    "numerics.probe": ("tap",),
    "numerics.remat": ("remat_policy",),
    "numerics.scaled_grad": ("scaled_value_and_grad",),
    "policy.hardware": ("hardware_half", "recommend"),
    "policy.policy": ("Policy", "cast_to_full", "cast_to_half", "get_policy"),
    "policy.rules": ("PolicyMap",),
    "policy.xla_flags": ("xla_flags",),
    "store.checkpoint": ("Checkpointer",),
    "store.export.forward": ("Forward", "load_forward"),
    "store.export.loading": ("Exported", "load_export"),
    "store.export.lowering": ("export_forward",),
    "store.export.report": ("ExportReport",),
    "store.export.weights": ("export_weights",),
    "store.hook": ("CheckpointHook",),
    "store.interop.huggingface": ("load_safetensors",),
    "store.interop.names": ("Imported",),
    "store.interop.orbax": ("load_orbax",),
    "store.manifest": ("CheckpointError", "CheckpointWarning"),
    "store.meta": ("CheckpointInfo",),
    "train.advice": ("check_optimizer",),
    "train.evaluate": ("evaluate", "make_eval_step"),
    "train.job": ("Job",),
    "train.loop": ("fit",),
    "train.hooks": ("FitResult", "Hook", "NonFiniteError"),
    "train.prefetch": ("Prefetch", "prefetch"),
    "train.seeds": ("Seeds", "epoch_batches", "seeds"),
    "train.sharding": ("shard_batch", "shard_state", "state_shardings"),
    "train.specs": ("fsdp",),
    "train.state": ("Aux", "TrainState"),
    "train.step": ("make_train_step",),
}
_MODULES = {"losses": "numerics.losses", "wrap": "wrap"}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = ["__version__", *sorted(_HOME | _MODULES)]

if TYPE_CHECKING:
    from mpjax.core.cautions import (
        MissingLossScaleWarning as MissingLossScaleWarning,
        PrecisionWarning as PrecisionWarning,
        UnneededLossScaleWarning as UnneededLossScaleWarning,
        VanishingEpsilonWarning as VanishingEpsilonWarning,
        VanishingUpdateWarning as VanishingUpdateWarning,
    )
    from mpjax.core.dtypes import half_dtype as half_dtype
    from mpjax.core.model import Model as Model
    from mpjax.core.tree import (
        all_finite as all_finite,
        cast_floating as cast_floating,
        select_tree as select_tree,
    )
    from mpjax.measure.audit import audit as audit
    from mpjax.measure.culprit import Culprit as Culprit, CulpritHook as CulpritHook, diagnose as diagnose
    from mpjax.measure.doctor import doctor as doctor
    from mpjax.measure.equivalence import Equivalence as Equivalence, equivalence as equivalence
    from mpjax.measure.lint import lint as lint, lint_function as lint_function
    from mpjax.measure.lint.finding import Finding as Finding
    from mpjax.measure.memory import memory_by_role as memory_by_role
    from mpjax.measure.parity import Parity as Parity, parity as parity
    from mpjax.measure.probe import ProbeLog as ProbeLog, probe as probe
    from mpjax.measure.rates import product_rates as product_rates
    from mpjax.measure.readings import ProbeReport as ProbeReport
    from mpjax.measure.throughput import time_step as time_step
    from mpjax.numerics import losses as losses
    from mpjax.numerics.attention import attention as attention
    from mpjax.numerics.loss_scale import (
        DynamicLossScale as DynamicLossScale,
        LossScale as LossScale,
        NoOpLossScale as NoOpLossScale,
        StaticLossScale as StaticLossScale,
        dynamic_loss_scale as dynamic_loss_scale,
        static_loss_scale as static_loss_scale,
    )
    from mpjax.numerics.probe import tap as tap
    from mpjax.numerics.remat import remat_policy as remat_policy
    from mpjax.numerics.scaled_grad import scaled_value_and_grad as scaled_value_and_grad
    from mpjax.policy.hardware import hardware_half as hardware_half, recommend as recommend
    from mpjax.policy.policy import (
        Policy as Policy,
        cast_to_full as cast_to_full,
        cast_to_half as cast_to_half,
        get_policy as get_policy,
    )
    from mpjax.policy.rules import PolicyMap as PolicyMap
    from mpjax.policy.xla_flags import xla_flags as xla_flags
    from mpjax.store.checkpoint import Checkpointer as Checkpointer
    from mpjax.store.export.forward import Forward as Forward, load_forward as load_forward
    from mpjax.store.export.loading import Exported as Exported, load_export as load_export
    from mpjax.store.export.lowering import export_forward as export_forward
    from mpjax.store.export.report import ExportReport as ExportReport
    from mpjax.store.export.weights import export_weights as export_weights
    from mpjax.store.hook import CheckpointHook as CheckpointHook
    from mpjax.store.interop.huggingface import load_safetensors as load_safetensors
    from mpjax.store.interop.names import Imported as Imported
    from mpjax.store.interop.orbax import load_orbax as load_orbax
    from mpjax.store.manifest import CheckpointError as CheckpointError, CheckpointWarning as CheckpointWarning
    from mpjax.store.meta import CheckpointInfo as CheckpointInfo
    from mpjax.train.advice import check_optimizer as check_optimizer
    from mpjax.train.evaluate import evaluate as evaluate, make_eval_step as make_eval_step
    from mpjax.train.hooks import FitResult as FitResult, Hook as Hook, NonFiniteError as NonFiniteError
    from mpjax.train.job import Job as Job
    from mpjax.train.loop import fit as fit
    from mpjax.train.prefetch import Prefetch as Prefetch, prefetch as prefetch
    from mpjax.train.seeds import Seeds as Seeds, epoch_batches as epoch_batches, seeds as seeds
    from mpjax.train.sharding import (
        shard_batch as shard_batch,
        shard_state as shard_state,
        state_shardings as state_shardings,
    )
    from mpjax.train.specs import fsdp as fsdp
    from mpjax.train.state import Aux as Aux, TrainState as TrainState
    from mpjax.train.step import make_train_step as make_train_step
    from mpjax.wrap import wrap as wrap

else:  # hidden from type checkers, which would take any name for granted

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            value = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        elif name in _HOME:
            value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        else:
            import difflib

            near = difflib.get_close_matches(name, __all__, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "dir(mpjax) lists what it has"
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; {hint}", name=name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return list(__all__)
