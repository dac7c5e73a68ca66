"""The methods in the pruning callback of Lightning."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

import torchalignprune as tap
from models import mlp

pytestmark = [
    # Lightning 2.6 with torch 2.13.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    # What Lightning advises for real data.
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
]


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


class Both(tap.AlignedMagnitude):
    """A method with options, for a callback that takes nothing but a class."""

    def __init__(self, amount: float) -> None:
        super().__init__(amount, units="both", budget="layer")


def module_of(lightning: ModuleType) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            loss: Tensor = self.net(batch).square().mean()
            return loss

        def validation_step(self, batch: Tensor, number: int) -> None:
            self.net(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)

    return Module()


def params_of(module: Any) -> list[tuple[nn.Module, str]]:
    return [(module.net[0], "weight"), (module.net[2], "weight")]


def fit(
    lightning: ModuleType,
    folder: Path,
    module: Any,
    callbacks: list[Any],
    epochs: int = 3,
    resume: str | None = None,
    **options: Any,
) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    generator = torch.Generator().manual_seed(0)
    data = DataLoader(torch.randn(32, 12, generator=generator), batch_size=8)
    trainer.fit(module, data, data, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("method", [tap.Magnitude, tap.AlignedMagnitude, Both])
def test_the_masks_are_those_of_global_unstructured(
    lightning: ModuleType, method: type[tap.PruningMethod], tmp_path: Path
) -> None:
    module = module_of(lightning)
    twins: list[Any] = []

    class Watch(lightning.Callback):  # type: ignore[misc, name-defined]
        """Comes before the pruning, and does the same to a copy."""

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            net = copy.deepcopy(pl_module.net)
            both = [(net[0], "weight"), (net[2], "weight")]
            if twins:
                check(pl_module)
            tap.global_unstructured(both, method, amount=0.3)
            twins.append(both)

    def check(pl_module: Any) -> None:
        for (ours, _), (theirs, _) in zip(twins[-1], params_of(pl_module), strict=True):
            assert torch.equal(ours.weight_mask, theirs.weight_mask != 0)

    pruning = lightning.callbacks.ModelPruning(
        method,
        parameters_to_prune=params_of(module),
        amount=0.3,
        make_pruning_permanent=False,
        use_lottery_ticket_hypothesis=False,
    )
    fit(lightning, tmp_path, module, [Watch(), pruning], enable_checkpointing=False)
    check(module)
    assert len(twins) == 3
    kept = [float((layer.weight_mask != 0).float().mean()) for layer, _ in params_of(module)]
    assert sum(k * n for k, n in zip(kept, (192, 128), strict=True)) == pytest.approx(110, abs=1)
