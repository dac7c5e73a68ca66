"""What the commands load from a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchalignprune.cli.options import InputError

if TYPE_CHECKING:
    from torchalignprune.checkpoints import Checkpoint


def load_checkpoint(folder: Path) -> Checkpoint:
    """Loads a checkpoint folder, dense or in the format ``"bitmask"``."""
    from torchalignprune import checkpoints, saving
    from torchalignprune.pruned_files import is_bitmask

    load = saving.load_checkpoint if is_bitmask(folder) else checkpoints.load_checkpoint
    return load(folder)


def load_tokenizer(folder: Path, what: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{what} needs the tokenizer of {folder}: {reason}") from error
    # Without tokenizer files, transformers may return a tokenizer of special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(f"{what} needs the tokenizer of {folder}: it has no vocabulary")
    return tokenizer
