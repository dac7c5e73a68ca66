"""XNLI: fine-tune XLM-R in English, prune it on the way, and evaluate in all fifteen languages.

    pip install "torchalignprune[crosslingual,trainer]"
    python examples/xnli_xlmr.py --output_dir dense --sparsity 0 --regularizer none
    python examples/xnli_xlmr.py --output_dir pruned --compare dense/report.json
    torchrun --nproc-per-node 8 examples/xnli_xlmr.py --output_dir pruned --bf16 true

Model and data come from the hub, or from folders: ``--model``, and ``--data`` with the files of
``facebook/xnli``, such as ``en/train-00000-of-00001.parquet``. ``--model`` is either the pretrained
encoder or one that has been fine-tuned, which is then pruned and retrained. The script takes all
arguments of the Trainer; ``--help`` lists them. Run again, the same command resumes from the last
complete checkpoint.

Writes ``OUTPUT_DIR/model``, with zeros baked in, for ``from_pretrained``. ``report.json`` and
``report.png`` have the accuracy in each language. With ``--compare``, ``report.json`` and
``drops.png`` have the drops against the dense model with paired intervals.

The setting is that of the paper (O'Neill, Dutta and Assem, Findings of ACL 2022): XLM-R base,
English training data, magnitude pruning in rounds with retraining between them, a regularizer that
keeps units aligned with those of the unpruned model, and zero-shot evaluation. ``--method`` selects
other methods, as in ``zero_shot_topics.py`` and the results in ``benchmarks``; calibration uses
English training data. The defaults for fine-tuning are those of XTREME's baseline (Hu et al. 2020,
scripts/train_xnli.sh): learning rate 2e-5, falling to 0, 32 pairs per step, 5 epochs, 128 subwords.
The defaults of ``--sparsity``, ``--rounds``, ``--schedule``, ``--begin``, ``--end`` and ``--share``
are this script's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from zero_shot_training import encode_pairs, run

DEFAULTS = {
    "model": "xlm-roberta-base",
    "learning_rate": 2e-5,
    "batch": 32,
    "num_train_epochs": 5.0,
    "max_length": 128,
}


def main(arguments: Sequence[str] | None = None) -> None:
    run(
        "xnli",
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        encode_pairs,
        __doc__,
        DEFAULTS,
        arguments,
    )


if __name__ == "__main__":
    main()
