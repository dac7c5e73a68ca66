"""Fine-tune a cross-lingual encoder on English topics, prune it on the way, evaluate in all.

    pip install "torchalignprune[crosslingual]"
    python examples/zero_shot_topics.py --out results
    python examples/zero_shot_topics.py --model FacebookAI/xlm-roberta-base \
        --learning-rate 5e-5 --head-learning-rate 5e-5 \
        --method magnitude aligned --regularizer none cosine --seeds 3 --out results

Trains on the 701 English sentences of SIB-200, which have 7 topics, and evaluates on its 204 test
sentences, the same in every language. The data comes from the hub, or from the folder ``--data``
with ``sib200`` (:func:`torchalignprune.crosslingual.load_task` describes the files).

One run covers all sparsities: it trains the dense model, evaluates it, prunes it to the first
sparsity, trains on, evaluates, prunes to the next one, and so on, as in the paper's iterative
pruning with retraining. Drops are against the dense model before its first pruning, so pruned
models have been trained for longer. ``--method dense`` trains as long and prunes nothing.

Results are written after every run. Run again, the same command skips the runs that are done. A
table, ``summary.json``, a heat map for each method and a plot of the retained accuracy cover all
runs in OUT that have the same settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import zero_shot_runs
from torchalignprune.crosslingual.experiment import Training


def main(arguments: Sequence[str] | None = None) -> None:
    training = Training(epochs=6, retraining_epochs=2)
    zero_shot_runs.main(__doc__ or "", "topics", "topics", training, arguments)


if __name__ == "__main__":
    main()
