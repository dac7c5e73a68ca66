"""POS tagging: fine-tune XLM-R in English, prune it on the way, and evaluate on all treebanks.

    pip install "torchalignprune[crosslingual,trainer]"
    python examples/pos_xlmr.py --output_dir dense --sparsity 0 --regularizer none
    python examples/pos_xlmr.py --output_dir pruned --compare dense/report.json
    torchrun --nproc-per-node 2 examples/pos_xlmr.py --output_dir pruned --bf16 true

Model and data come from the hub, or from folders: ``--model``, and ``--data`` with the files of
``universal-dependencies/universal_dependencies``, such as ``en_ewt/train.parquet``, or plain
``train.en.tsv.gz``. The English training data is EWT. A word is labelled at its first subword that
has a character. Arguments, resuming and the files that are written are described in
``xnli_xlmr.py``.

The setting is that of the paper (O'Neill, Dutta and Assem, Findings of ACL 2022): XLM-R base,
English training data, magnitude pruning in rounds with retraining between them, a regularizer that
keeps units aligned with those of the unpruned model, and zero-shot evaluation. The defaults for
fine-tuning are those of XTREME's baseline (Hu et al. 2020, scripts/train_udpos.sh): learning rate
2e-5, falling to 0, 32 sentences per step, 10 epochs, 128 subwords. The defaults of ``--sparsity``,
``--rounds``, ``--schedule``, ``--begin``, ``--end`` and ``--share`` are this script's own. The
treebanks, the score (accuracy over words) and the languages differ from XTREME's, so its figures
are no baseline for these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from torchalignprune.crosslingual import encode_words
from zero_shot_training import run

DEFAULTS = {
    "model": "xlm-roberta-base",
    "learning_rate": 2e-5,
    "batch": 32,
    "num_train_epochs": 10.0,
    "max_length": 128,
}


def encode_tagged(tokenizer: Any, rows: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    sentences = encode_words(tokenizer, rows["tokens"], rows["labels"], max_length=max_length)
    inputs = {key: [each.inputs[key] for each in sentences] for key in sentences[0].inputs}
    return {**inputs, "labels": [each.labels for each in sentences]}


def main(arguments: Sequence[str] | None = None) -> None:
    run(
        "pos",
        AutoModelForTokenClassification,
        DataCollatorForTokenClassification,
        encode_tagged,
        __doc__,
        DEFAULTS,
        arguments,
    )


if __name__ == "__main__":
    main()
