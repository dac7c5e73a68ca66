"""What pruning does to every language: tasks and their data, zero-shot evaluation, its report.

Needs ``pip install "torchalignprune[crosslingual]"``.
"""

from torchalignprune.crosslingual.evaluation import evaluate_zero_shot
from torchalignprune.crosslingual.figures import plot_heat_map, plot_retention
from torchalignprune.crosslingual.finetuning import FineTuning, finetune
from torchalignprune.crosslingual.generated import (
    GENERATED_POS,
    GENERATED_TOPICS,
    GeneratedCorpus,
    GeneratedLanguage,
    LanguageSpec,
    generate_corpus,
)
from torchalignprune.crosslingual.languages import CC100_GIB, LANGUAGES, Language
from torchalignprune.crosslingual.lexicon import (
    piece_vectors,
    transferred_vectors,
    translation_table,
)
from torchalignprune.crosslingual.piece_states import piece_states
from torchalignprune.crosslingual.pretraining import ParallelText, pretrain, train_tokenizer
from torchalignprune.crosslingual.readers import available_languages, load_task
from torchalignprune.crosslingual.report import (
    Comparison,
    Estimate,
    LanguageScore,
    ZeroShotReport,
)
from torchalignprune.crosslingual.retrieval import retrieval_hits, sentence_embeddings
from torchalignprune.crosslingual.sweep import finetune_and_prune
from torchalignprune.crosslingual.tasks import TASKS, Task
from torchalignprune.crosslingual.words import EncodedWords, encode_words

__all__ = [
    "CC100_GIB",
    "GENERATED_POS",
    "GENERATED_TOPICS",
    "LANGUAGES",
    "TASKS",
    "Comparison",
    "EncodedWords",
    "Estimate",
    "FineTuning",
    "GeneratedCorpus",
    "GeneratedLanguage",
    "Language",
    "LanguageScore",
    "LanguageSpec",
    "ParallelText",
    "Task",
    "ZeroShotReport",
    "available_languages",
    "encode_words",
    "evaluate_zero_shot",
    "finetune",
    "finetune_and_prune",
    "generate_corpus",
    "load_task",
    "piece_states",
    "piece_vectors",
    "plot_heat_map",
    "plot_retention",
    "pretrain",
    "retrieval_hits",
    "sentence_embeddings",
    "train_tokenizer",
    "transferred_vectors",
    "translation_table",
]
