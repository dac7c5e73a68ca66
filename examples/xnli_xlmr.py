"""XNLI: fine-tune XLM-R in English, prune it on the way, and look at all fifteen languages.

    pip install "torchalignprune[crosslingual,trainer]"
    python examples/xnli_xlmr.py --output_dir dense --sparsity 0 --regularizer none
    python examples/xnli_xlmr.py --output_dir pruned --compare dense/report.json
    torchrun --nproc-per-node 8 examples/xnli_xlmr.py --output_dir pruned --bf16 true

Model and data are those of the hub, or of a folder: ``--model``, ``--data`` (the files of
``facebook/xnli``, such as ``en/train-00000-of-00001.parquet``). All arguments of the Trainer are
there; ``--help`` lists them. The same command, given again, goes on from the last checkpoint that
was saved to its end. Training finds in ``--model`` either the pretrained encoder or one that was
fine-tuned already, which is then pruned and retrained.

``OUTPUT_DIR/model`` is for ``from_pretrained``, its zeros baked in; ``report.json`` and
``report.png`` have the accuracy in each language, and with ``--compare`` the drops against the
dense model, with paired intervals, as does ``drops.png``.

The setting is that of the paper (O'Neill, Dutta and Assem, Findings of ACL 2022): XLM-R base,
English training data, magnitude pruning in rounds with retraining between them, a regularizer that
keeps units aligned with those of the unpruned model, zero-shot evaluation. ``--method`` names other
ways to prune, as in ``zero_shot_topics.py`` and the results in ``benchmarks``; those that look at
inputs do so on English training data. The defaults of the fine-tuning are those of XTREME's
baseline (Hu et al. 2020, scripts/train_xnli.sh): learning rate 2e-5, falling to 0, 32 pairs a step,
5 epochs, 128 subwords. The others, those of ``--sparsity``, ``--rounds``, ``--schedule``,
``--begin``, ``--end`` and ``--share``, are this script's own.
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
