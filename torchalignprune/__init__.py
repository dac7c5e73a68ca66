"""Pruning for pretrained transformers that keeps the units of a network aligned.

The README is an introduction; :mod:`torchalignprune.methods` has the pruning methods and
:mod:`torchalignprune.criteria` the importance scores.
"""

from torchalignprune import build_info as _build_info

_build_info.check()

from torchalignprune import criteria, ddp, methods, ops, schedules  # noqa: E402
from torchalignprune.alignment_report import AlignmentReport, alignment_report  # noqa: E402
from torchalignprune.calibration import Calibration  # noqa: E402
from torchalignprune.hooks import cached_weights, load_state_dict  # noqa: E402
from torchalignprune.matching import Matching, match_units  # noqa: E402
from torchalignprune.methods import (  # noqa: E402
    AlignedMagnitude,
    AlignedNM,
    Magnitude,
    Random,
    aligned_magnitude,
    aligned_nm,
    magnitude,
    random,
)
from torchalignprune.parameters import PrunableParameters, prunable_parameters  # noqa: E402
from torchalignprune.pruner import Pruner  # noqa: E402
from torchalignprune.pruning import PruningMethod, global_unstructured  # noqa: E402
from torchalignprune.realign import realign  # noqa: E402
from torchalignprune.reference import Reference  # noqa: E402
from torchalignprune.regularizers import CosineAlignment, FrobeniusAlignment  # noqa: E402
from torchalignprune.saving import load_pruned, save_pruned  # noqa: E402
from torchalignprune.semi_structured import to_semi_structured  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AlignedMagnitude",
    "AlignedNM",
    "AlignmentReport",
    "Calibration",
    "CosineAlignment",
    "FrobeniusAlignment",
    "Magnitude",
    "Matching",
    "PrunableParameters",
    "Pruner",
    "PruningMethod",
    "Random",
    "Reference",
    "__version__",
    "aligned_magnitude",
    "aligned_nm",
    "alignment_report",
    "cached_weights",
    "criteria",
    "ddp",
    "global_unstructured",
    "load_pruned",
    "load_state_dict",
    "magnitude",
    "match_units",
    "methods",
    "ops",
    "prunable_parameters",
    "random",
    "realign",
    "save_pruned",
    "schedules",
    "to_semi_structured",
]
