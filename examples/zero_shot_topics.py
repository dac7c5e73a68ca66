"""Fine-tune a cross-lingual encoder on English topics, prune it on the way, look at the others.

    pip install "torchalignprune[crosslingual]"
    python examples/zero_shot_topics.py --out results
    python examples/zero_shot_topics.py --model FacebookAI/xlm-roberta-base \
        --learning-rate 5e-5 --head-learning-rate 5e-5 \
        --method magnitude aligned --regularizer none cosine --seeds 3 --out results

It learns the 701 English sentences of SIB-200 with their 7 topics, and is evaluated on its 204 test
sentences, which are the same in every language. DATA, a folder for ``--data``, holds ``sib200``
(:func:`torchalignprune.crosslingual.load_task` says how); without it they come from the hub.

One run gives all sparsities: it trains the dense model, evaluates it, prunes it to the first
sparsity, trains on, evaluates, prunes to the next one, and so on, as in the paper's iterative
pruning with retraining. The drops are against the dense model before its first pruning; later ones
have been trained for longer. ``--method dense`` trains as long and prunes nothing.

Results are written after every run, and runs that are there already are not repeated, so that the
command can be given again after it was stopped. A table, ``summary.json``, a heat map for each way
of pruning and a picture of what is left are made of all runs of the same settings in OUT.
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
