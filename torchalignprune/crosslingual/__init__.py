"""What pruning does to every language: tasks and their data, zero-shot evaluation, its report.

Needs ``pip install "torchalignprune[crosslingual]"``.
"""

from torchalignprune.crosslingual.evaluation import evaluate_zero_shot
from torchalignprune.crosslingual.figures import plot_heat_map, plot_retention
from torchalignprune.crosslingual.languages import CC100_GIB, LANGUAGES, Language
from torchalignprune.crosslingual.readers import available_languages, load_task
from torchalignprune.crosslingual.report import (
    Comparison,
    Estimate,
    LanguageScore,
    ZeroShotReport,
)
from torchalignprune.crosslingual.tasks import TASKS, Task
from torchalignprune.crosslingual.words import EncodedWords, encode_words

__all__ = [
    "CC100_GIB",
    "LANGUAGES",
    "TASKS",
    "Comparison",
    "EncodedWords",
    "Estimate",
    "Language",
    "LanguageScore",
    "Task",
    "ZeroShotReport",
    "available_languages",
    "encode_words",
    "evaluate_zero_shot",
    "load_task",
    "plot_heat_map",
    "plot_retention",
]
