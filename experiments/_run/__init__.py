"""What experiments share: the command line, the run's folder, the comparison of policies, the table, the picture."""

from __future__ import annotations

from experiments import _data
from experiments._run.command import Policies, Refused, Rules, parse, policy_maps, preset, start
from experiments._run.comparison import compare, report
from experiments._run.folder import RunFolder, made, open_folder, write_json
from experiments._run.ranking import ndcg, rmse
from experiments._run.training import Plan, Trained, data_parallel, on_mesh, train

__all__ = [
    "Plan",
    "Policies",
    "Refused",
    "Rules",
    "RunFolder",
    "Trained",
    "_data",
    "compare",
    "data_parallel",
    "made",
    "ndcg",
    "on_mesh",
    "open_folder",
    "parse",
    "policy_maps",
    "preset",
    "report",
    "rmse",
    "start",
    "train",
    "write_json",
]
