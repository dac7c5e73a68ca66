"""PAWS-X: fine-tune mBERT in English, prune it on the way, and evaluate in seven languages.

    pip install "torchalignprune[crosslingual,trainer]"
    python examples/pawsx_mbert.py --output_dir dense --sparsity 0 --regularizer none
    python examples/pawsx_mbert.py --output_dir pruned --compare dense/report.json
    torchrun --nproc-per-node 2 examples/pawsx_mbert.py --output_dir pruned --bf16 true

Model and data come from the hub, or from folders: ``--model``, and ``--data`` with the files of
``google-research-datasets/paws-x``, such as ``en/train-00000-of-00001.parquet``. Arguments,
resuming and the files that are written are described in ``xnli_xlmr.py``.

The pruning is that of the paper (O'Neill, Dutta and Assem, Findings of ACL 2022): English training
data, magnitude pruning in rounds with retraining between them, a regularizer that keeps units
aligned with those of the unpruned model, and zero-shot evaluation. The paper's model is XLM-R base
(``--model xlm-roberta-base``); the default here is mBERT. The defaults for fine-tuning are those of
XTREME's baseline (Hu et al. 2020, scripts/train_pawsx.sh): learning rate 2e-5, falling to 0, 32
pairs per step, 5 epochs, 128 subwords. The defaults of ``--sparsity``, ``--rounds``,
``--schedule``, ``--begin``, ``--end`` and ``--share`` are this script's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from zero_shot_training import encode_pairs, run

DEFAULTS = {
    "model": "bert-base-multilingual-cased",
    "learning_rate": 2e-5,
    "batch": 32,
    "num_train_epochs": 5.0,
    "max_length": 128,
}


def main(arguments: Sequence[str] | None = None) -> None:
    run(
        "pawsx",
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        encode_pairs,
        __doc__,
        DEFAULTS,
        arguments,
    )


if __name__ == "__main__":
    main()
