"""Trains from the last complete checkpoint to the end, and saves after every step."""

from __future__ import annotations

import sys
from pathlib import Path

from test_hf import made
from torchalignprune import hf


def main(folder: Path) -> None:
    options = {"max_steps": 40, "save_steps": 1, "save_total_limit": 2}
    trainer, _ = made("movement, regrow", folder, **options)
    checkpoint = hf.last_complete_checkpoint(folder)
    print(checkpoint, flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
