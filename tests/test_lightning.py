"""The methods in the pruning callback of Lightning."""

from __future__ import annotations

import copy
import importlib
import warnings
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
    pytest.mark.filterwarnings(
        "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"
    ),
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


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("lottery", [False, True])
def test_lottery_tickets_and_permanence(
    lightning: ModuleType, permanent: bool, lottery: bool, tmp_path: Path
) -> None:
    module = module_of(lightning)
    first = [layer.weight.detach().clone() for layer, _ in params_of(module)]
    pruning = lightning.callbacks.ModelPruning(
        tap.AlignedMagnitude,
        parameters_to_prune=params_of(module),
        amount=0.5,
        make_pruning_permanent=permanent,
        use_lottery_ticket_hypothesis=lottery,
    )
    # One epoch: on a CPU, Lightning trains the copy that it has rewound to.
    trainer = fit(lightning, tmp_path, module, [pruning], epochs=1)
    assert prune.is_pruned(module) is not permanent
    for before, (layer, _) in zip(first, params_of(module), strict=True):
        left = layer.weight if permanent else layer.weight_orig * layer.weight_mask
        rewound = torch.equal(left, before * (left != 0))
        assert rewound is lottery
    zeros = sum(int((layer.weight == 0).sum()) for layer, _ in params_of(module))
    if permanent or not lottery:  # otherwise the shown weights are those before the rewinding
        assert zeros == 160
    path = trainer.checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert ("net.0.weight" in saved) is permanent
    assert ("net.0.weight_mask" in saved) is not permanent


def test_every_parameter_and_by_default(lightning: ModuleType, tmp_path: Path) -> None:
    """All weights and biases, as the callback chooses them."""
    module = module_of(lightning)
    pruning = lightning.callbacks.ModelPruning(tap.AlignedMagnitude, amount=0.5)
    fit(lightning, tmp_path, module, [pruning], epochs=2, enable_checkpointing=False)
    zeros = sum(int((p == 0).sum()) for p in module.net.parameters())
    assert zeros == 344 - 86


def test_resume_from_a_checkpoint(lightning: ModuleType, tmp_path: Path) -> None:
    def made() -> tuple[Any, list[Any]]:
        module = module_of(lightning)
        pruning = lightning.callbacks.ModelPruning(
            tap.AlignedMagnitude,
            parameters_to_prune=params_of(module),
            amount=lambda epoch: 0.4 if epoch < 3 else 0.0,
            use_lottery_ticket_hypothesis=False,
        )
        return module, [pruning]

    module, callbacks = made()
    trainer = fit(lightning, tmp_path / "first", module, callbacks, epochs=2)
    path = trainer.checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=False)["state_dict"]
    again, callbacks = made()
    resumed: list[Tensor] = []

    class Look(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            resumed.extend(layer.weight.detach().clone() for layer, _ in params_of(pl_module))

    callbacks += [Look(), lightning.callbacks.ModelCheckpoint(Path(path).parent, "again")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        fit(lightning, tmp_path, again, callbacks, epochs=4, resume=path)
    # Lightning's checkpoints have the zeros and no masks: it starts to count anew.
    assert torch.equal(resumed[0], saved["net.0.weight"])
    zeros = sum(int((layer.weight == 0).sum()) for layer, _ in params_of(again))
    assert zeros == round(0.4 * 320)
