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

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from zero_shot_training import load_data, load_model, parse, prune, report

TASK = "xnli"
DEFAULTS = {
    "model": "xlm-roberta-base",
    "learning_rate": 2e-5,
    "batch": 32,
    "num_train_epochs": 5.0,
    "max_length": 128,
}


def main(arguments: Sequence[str] | None = None) -> None:
    options, args = parse(__doc__, DEFAULTS, arguments)
    data = load_data(TASK, options)
    model, tokenizer = load_model(AutoModelForSequenceClassification, TASK, options, args)

    def encode(rows: Mapping[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(
            rows["text"], rows["text_pair"], truncation=True, max_length=options.max_length
        )
        return {**encoded, "labels": rows["label"]}

    columns = data["en"]["train"].column_names
    train, validation = (
        data["en"][split].map(encode, batched=True, remove_columns=columns, desc=split)
        for split in ("train", "validation")
    )
    collator = DataCollatorWithPadding(tokenizer)
    figures = prune(model, tokenizer, train, validation, collator, options, args)
    report(TASK, model, tokenizer, data, figures, options, args)


if __name__ == "__main__":
    main()
