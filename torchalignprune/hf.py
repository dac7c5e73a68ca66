"""Pruning inside the Trainer of Hugging Face Transformers.

A :class:`PruningCallback` makes any ``Trainer`` prune, and an :class:`AlignmentTrainer` adds a
regularizer to the loss. Use them together or alone::

    params = tap.prunable_parameters(model)
    reference = tap.Reference.capture(params)
    penalty = tap.CosineAlignment(params, reference)
    schedule = tap.schedules.cubic(0.0, 0.7, begin=100, end=900, every=100)
    pruner = tap.Pruner(params, tap.AlignedMagnitude, schedule, penalty=penalty)

    trainer = hf.AlignmentTrainer(
        model, args, train_dataset=data, penalty=penalty, strength=1000.0,
        callbacks=[hf.PruningCallback(pruner)],
    )
    trainer.train(resume_from_checkpoint=hf.last_complete_checkpoint(args.output_dir))
    pruner.finalize()
    trainer.save_model()

The model is an ordinary one after ``finalize()``. Until then it is saved with ``weight_orig`` and
``weight_mask`` instead of ``weight``, which ``from_pretrained`` cannot read.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchalignprune.ddp import ignore_masks
from torchalignprune.dtensors import is_dtensor
from torchalignprune.parameters import mask_of, stored
from torchalignprune.pruner import Pruner
from torchalignprune.regularizers import leaves_of
from torchalignprune.state_files import load_state, save_state
from torchalignprune.targets import targets_of
from torchalignprune.weight_files import WeightFiles

try:
    import accelerate  # noqa: F401  (the Trainer needs it, but says so only when it is constructed)
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "torchalignprune.hf needs transformers with its Trainer: pip install "
        '"torchalignprune[trainer]"'
    ) from error

__all__ = [
    "AlignmentTrainer",
    "AlignmentTrainerMixin",
    "PruningCallback",
    "last_complete_checkpoint",
    "merge_lora",
]

_FILE = "pruner.safetensors"
_TRAINER_STATE = "trainer_state.json"
_SENTINEL = "checkpoint-is-incomplete.txt"  # of the Trainer's enable_jit_checkpoint
_VERSION = 1
_DELAY = (
    "TrainingArguments(eval_delay=n) lets only later checkpoints be the best; n counts steps, or "
    'epochs with eval_strategy="epoch".'
)


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the model of an unmodified ``Trainer`` while it trains.

    The pruner takes a step after each optimizer step, so only one for all batches of a gradient
    accumulation. Everything that the Trainer logs while it trains includes the pruner's numbers
    (:meth:`torchalignprune.Pruner.log`): its history, ``report_to``, the metrics of evaluations.

    Every checkpoint has the pruner's state in ``pruner.safetensors``, which
    ``train(resume_from_checkpoint=...)`` restores; the masks are part of the model. To resume, make
    the model and the pruner as for the first start, so that their names fit. PEFT's checkpoints
    only have the adapters, so the masks are in ``pruner.safetensors`` too.

    A run that has taken its last step cannot be resumed, because the Trainer would take one more.
    Its model is in the checkpoint.

    A warning says if the training will end before the pruner's schedule does.

    With ``load_best_model_at_end``, the best checkpoint may have been saved before the pruning was
    done; a warning says so. ``eval_delay=n`` excludes checkpoints before step ``n`` (before epoch
    ``n`` with ``eval_strategy="epoch"``, as Transformers counts there). With PEFT, the adapters are
    then those of the best checkpoint, but the masks are those of the end. With ``regrow``, the
    values that pruned entries may take back are those of the end; a warning says if there are none.

    Args:
        pruner: made from the parameters of the model that the Trainer trains.

    Raises:
        TypeError: not a Pruner.
        ValueError: when training begins: the pruner is finished, or of another model; a setup that
            this does not work with (FSDP, DeepSpeed, tensor parallelism,
            ``torch.nn.DataParallel``); a checkpoint without the pruner's state, with one that does
            not fit, of a run that has taken its last step, or with weights that the Trainer does
            not load, because Transformers renames them when it saves them (those of ViT).

    Example:
        >>> import tempfile, torch, transformers, torchalignprune as tap
        >>> from torchalignprune import hf
        >>> config = transformers.BertConfig(
        ...     vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     intermediate_size=8,
        ... )
        >>> model = transformers.BertForSequenceClassification(config)
        >>> rows = [{"input_ids": [i, 1, 2], "labels": i % 2} for i in range(8)]
        >>> schedule = tap.schedules.linear(0.0, 0.5, end=2)
        >>> pruner = tap.Pruner(tap.prunable_parameters(model), tap.AlignedMagnitude, schedule)
        >>> args = transformers.TrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=3, save_strategy="no", report_to=[],
        ...     dataloader_pin_memory=False, disable_tqdm=True, use_cpu=True,
        ... )
        >>> callback = hf.PruningCallback(pruner)
        >>> trainer = transformers.Trainer(model, args, train_dataset=rows, callbacks=[callback])
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ... 'pruning/sparsity': '0.5', 'pruning/target_sparsity': '0.5'}
        3
    """

    def __init__(self, pruner: Pruner) -> None:
        if not isinstance(pruner, Pruner):
            raise TypeError(
                f"pruner should be a torchalignprune.Pruner, got {pruner!r} (without "
                "restore_callback_states_from_checkpoint, which makes callbacks anew: this one "
                "takes its state up by itself)"
            )
        self.pruner = pruner
        # What the Trainer has said last, while it trains.
        self._args: Any = None
        self._state: Any = None
        self._model: Any = None
        # The sparsity before the best checkpoint is loaded.
        self._reached = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        trainer, folder = _running_trainer()
        _check_setup(args, trainer)
        if self.pruner.finished:
            raise ValueError("the pruner is finished: finalize() has taken its hooks away")
        self._check_model(model)
        if trainer is not None:
            # The first to hear of logs, so that all others get the numbers that it adds. The list
            # is being walked through now: those before it move by one, and none is skipped.
            callbacks = trainer.callback_handler.callbacks
            if sum(isinstance(other, PruningCallback) for other in callbacks) > 1:
                raise ValueError("a Trainer should have one PruningCallback, got several")
            callbacks.remove(self)
            callbacks.insert(0, self)
            self._keep_masks_home(trainer.model_wrapped)
        if state.global_step > 0:
            own = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            own = own if folder is None else Path(folder)
            if state.global_step >= state.max_steps:
                raise ValueError(
                    f"{own} is of step {state.global_step} of {state.max_steps}, the last one: its "
                    "model is the one that the run ends with, and the Trainer would train it for "
                    "one more step. Load that, or raise max_steps or num_train_epochs to go on"
                )
            self._resume(own, state.global_step, model)
        self._check_end(self.pruner.steps + state.max_steps - state.global_step)
        self._args, self._state, self._model = args, state, model
        self._reached = self.pruner.sparsity()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.pruner.step():
            self._reached = self.pruner.sparsity()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._state is None:
            return
        found = self.pruner.log()
        kwargs["logs"].update(found)
        state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, self._args, self._state, self._model = self._model, None, None, None
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        if hasattr(model, "peft_config"):
            if not self.pruner.finished:
                self._compare_with_best(Path(state.best_model_checkpoint))
            return
        sparsity = self.pruner.sparsity()
        if not self.pruner.finished:
            self.pruner.look_again()
        if sparsity < self._reached - 1e-3:
            warnings.warn(
                f"load_best_model_at_end has loaded {state.best_model_checkpoint}, which was saved "
                f"at a sparsity of {sparsity:.4g}; the training ended at {self._reached:.4g}. "
                f"{_DELAY}",
                UserWarning,
                stacklevel=2,
            )

    def _compare_with_best(self, best: Path) -> None:
        """Warns if the best PEFT checkpoint, which only has adapters, had other masks than now."""
        if not (best / _FILE).is_file():
            return
        there, here = load_state(best / _FILE)["pruner"], self.pruner.state_dict()
        if (there["pruned"], there["masks"]) != (here["pruned"], here["masks"]):
            size = sum(target.weight.numel() for target in targets_of(self.pruner.params))
            warnings.warn(
                f"load_best_model_at_end has loaded the adapters of {best}, which were trained "
                f"with other masks, at a sparsity of {sum(there['pruned'].values()) / size:.4g}; "
                f"the masks are those of the end, at {self.pruner.sparsity():.4g}. {_DELAY}",
                UserWarning,
                stacklevel=3,
            )

    def state(self) -> dict[str, Any]:
        """Saves the pruner's state, when the Trainer saves a checkpoint.

        The Trainer calls this after it has saved the model and the optimizer, but before it saves
        its own state and deletes older checkpoints.
        """
        if self._state is not None and not self._state.is_hyper_param_search and _is_saving():
            folder = Path(self._args.output_dir) / f"checkpoint-{self._state.global_step}"
            # A finished pruner has no state, and the model no masks to go on with.
            if folder.is_dir() and not self.pruner.finished:
                self._save(folder)
        return {"args": {"pruner": None}, "attributes": {}}

    def _check_end(self, last: int) -> None:
        """Warns if training ends before the schedule: the model is then less sparse than meant."""
        try:
            reached, later = (self.pruner.schedule(step) for step in (last, sys.maxsize))
        except LookupError:  # A table of the user's, which ends with the training.
            return
        if reached < later <= 1:
            warnings.warn(
                f"the training ends at step {last} of the pruner's schedule, at a sparsity of "
                f"{reached:.4g}, before the schedule does, at {later:.4g}: end the schedule "
                "earlier, or train longer",
                UserWarning,
                stacklevel=3,
            )

    def _check_model(self, model: nn.Module) -> None:
        paths = {module: path for path, module in model.named_modules()}
        for module, name in self.pruner.params:
            if module not in paths:
                raise ValueError(
                    "the pruner's parameters should be those of the trained model, got some of "
                    "another one (model_init and hyperparameter searches make new models)"
                )
            if paths[module].endswith(".original_module"):
                raise ValueError(
                    f"{paths[module]}.{name} is not trained, because PEFT's modules_to_save trains "
                    "a copy of it: leave it out of the pruner's parameters"
                )
            if is_dtensor(stored(module, name)):
                raise ValueError(
                    f"{paths[module]}.{name} should not be sharded, got a DTensor, because the "
                    "Trainer saves checkpoints on one rank: train sharded models in your own loop, "
                    "with torch.distributed.checkpoint"
                )

    def _keep_masks_home(self, wrapped: nn.Module) -> None:
        """Stops DistributedDataParallel from broadcasting masks, which all processes agree on."""
        for ddp in wrapped.modules():
            if isinstance(ddp, DistributedDataParallel):
                ignore_masks(ddp)

    def _save(self, folder: Path) -> None:
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        left_out = {_FILE, _TRAINER_STATE, _SENTINEL}
        state: dict[str, Any] = {
            "version": _VERSION,
            "global_step": self._state.global_step,
            "ranks": _ranks_of_this_disk(self._args),
            "files": sorted(path.as_posix() for path in files if path.name not in left_out),
            "pruner": self.pruner.state_dict(),
        }
        if hasattr(self._model, "peft_config"):
            targets = targets_of(self.pruner.params)
            state["masks"] = {target.name: target.mask for target in targets}
        save_state(folder / _FILE, state)

    def _resume(self, folder: Path, global_step: int, model: nn.Module) -> None:
        path = folder / _FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {_FILE}: it was saved without a PruningCallback, or is "
                "incomplete (torchalignprune.hf.last_complete_checkpoint finds a complete one)"
            )
        state = load_state(path)
        if state.get("version") != _VERSION:
            raise ValueError(f"{path} should be of version {_VERSION}, got {state.get('version')}")
        if state["global_step"] != global_step:
            raise ValueError(
                f"{path} should be of step {global_step}, like {folder / _TRAINER_STATE}, got step "
                f"{state['global_step']}"
            )
        if "masks" not in state:
            self._check_names(folder, model)
        try:
            if "masks" in state:
                self._check_masks(state["masks"])
                self.pruner.check_state(state["pruner"], state["masks"])
                self._load_masks(state["masks"])
            self.pruner.load_state_dict(state["pruner"])
        except ValueError as error:
            raise ValueError(f"{path} does not fit the pruner: {error}") from error

    def _check_names(self, folder: Path, model: nn.Module) -> None:
        """Raises if the Trainer, which only warns of names that are missing, cannot have loaded."""
        paths = {module: path for path, module in model.named_modules()}
        try:
            found = set(WeightFiles(folder))
        except ValueError:  # of another format
            return
        # Tied weights are saved in one of their places.
        places: dict[int, list[str]] = {}
        for module, name in self.pruner.params:
            own = places.setdefault(id(stored(module, name)), [])
            own.append(f"{paths[module]}.{name}_mask")
        for names in places.values():
            if found.isdisjoint(names):
                raise ValueError(
                    f"the Trainer has not loaded all of {folder}, which has no {names[0]}: "
                    "Transformers renames the weights of some architectures when it saves them, "
                    f"and its Trainer does not rename them back. A run of {type(model).__name__} "
                    "with such names cannot be resumed"
                )

    def _check_masks(self, masks: dict[str, Tensor]) -> None:
        for target in targets_of(self.pruner.params):
            if target.name not in masks or masks[target.name].shape != target.weight.shape:
                raise ValueError(f"it has no mask of the shape of {target.name}")

    @torch.no_grad()
    def _load_masks(self, masks: dict[str, Tensor]) -> None:
        for target in targets_of(self.pruner.params):
            assert target.mask is not None
            target.mask.copy_(masks[target.name])
            target.weight.masked_fill_(~target.mask, 0)
            for module, name in target.places:  # Moving a model unties the masks of tied weights.
                module.register_buffer(f"{name}_mask", target.mask)


class AlignmentTrainerMixin:
    """Adds a regularizer to the loss of a ``Trainer``: ``strength * penalty()``.

    :class:`AlignmentTrainer` is such a Trainer. For other kinds::

        class MyTrainer(AlignmentTrainerMixin, SentenceTransformerTrainer): ...

    The penalty is evaluated and counts once per optimizer step, however many batches its gradients
    are accumulated over. It is computed in full precision, scaled by the gradient scaler like the
    loss, and averaged over processes. The logged ``loss`` includes it, ``eval_loss`` does not. The
    Trainer also logs, averaged over the steps since the last log: ``penalty_loss``, the addition
    to the loss; ``penalty_share``, its share of the loss; and ``penalty_strength``.

    Args:
        args: arguments of the Trainer.
        penalty: a module such as :class:`torchalignprune.CosineAlignment` that is called without
            arguments and returns a scalar. The same penalty may be passed to the
            :class:`torchalignprune.Pruner`, which logs its value without the strength and saves the
            state of its matching.
        strength: not negative; a number, or a schedule (:mod:`torchalignprune.schedules`) of the
            Trainer's ``global_step``.
        kwargs: keyword arguments of the Trainer.

    Raises:
        TypeError: the penalty is not a module, or the strength is neither a number nor a function.
        ValueError: the strength is negative or not finite; the Trainer uses FSDP, DeepSpeed or
            ``torch.nn.DataParallel``; or the penalty has no gradient or is of another model.

    Example:
        >>> import tempfile, torch, transformers, torchalignprune as tap
        >>> from torchalignprune import hf
        >>> class Regression(torch.nn.Linear):
        ...     def forward(self, x, y):
        ...         return {"loss": (super().forward(x) - y).square().mean()}
        >>> model = Regression(4, 1)
        >>> params = [(model, "weight")]
        >>> penalty = tap.CosineAlignment(params, tap.Reference.capture(params))
        >>> rows = [{"x": [1.0 * i, 0.0, 1.0, 2.0], "y": [1.0]} for i in range(8)]
        >>> args = transformers.TrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=3, logging_steps=3, save_strategy="no", report_to=[],
        ...     dataloader_pin_memory=False, disable_tqdm=True, use_cpu=True,
        ... )
        >>> strength = tap.schedules.linear(0.0, 0.5, end=2)
        >>> trainer = hf.AlignmentTrainer(
        ...     model, args, train_dataset=rows, penalty=penalty, strength=strength
        ... )
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'loss': ... 'penalty_strength': '0.25', 'epoch': ...}
        {'train_runtime': ...}
    """

    if TYPE_CHECKING:
        args: Any
        state: Any
        accelerator: Any

    def __init__(
        self,
        *args: Any,
        penalty: nn.Module,
        strength: float | Callable[[int], float],
        **kwargs: Any,
    ) -> None:
        if not isinstance(penalty, nn.Module):
            raise TypeError(
                f"penalty should be a regularizer such as CosineAlignment, got {penalty!r}"
            )
        self.penalty = penalty
        self.strength: Callable[[int], float] = (
            strength if callable(strength) else _constant(strength)
        )
        # Sums of the additions to the loss and of the strengths since the last log, and its steps.
        self._added: Tensor | float = 0.0
        self._strengths = 0.0
        self._steps = 0
        self._counted_in: Any = None  # the state, which is a new one in each training
        self._checked = False
        super().__init__(*args, **kwargs)
        _check_setup(self.args, self)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        # At the last of the accumulated batches, before its own backward, in which
        # DistributedDataParallel averages all gradients accumulated so far.
        added = self._penalize(model) if self.accelerator.sync_gradients else None
        loss: Tensor = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        return loss if added is None else loss + added.to(loss.device, loss.dtype)

    def _penalize(self, model: nn.Module) -> Tensor | None:
        """Adds the gradient of the penalty; returns the penalty's addition to the loss."""
        step = self.state.global_step
        strength = _checked_strength(self.strength(step), f" at step {step}")
        if self._counted_in is not self.state:
            # Drop the steps of an earlier training that failed or ended without a log.
            self._counted_in = self.state
            self._added, self._strengths, self._steps = 0.0, 0.0, 0
            self._checked = False
        self._steps += 1
        self._strengths += strength
        if strength == 0:
            return None
        with self.accelerator.no_sync(model):
            value = strength * self.penalty()
            if not value.requires_grad:
                raise ValueError("none of the parameters of the penalty requires a gradient")
            if not self._checked:
                own = {id(parameter) for parameter in model.parameters()}
                if not any(id(leaf) in own for leaf in leaves_of(value)):
                    raise ValueError(
                        "the penalty's parameters should be those of the trained model, got those "
                        "of another one (model_init and hyperparameter searches make new models)"
                    )
                self._checked = True
            self.accelerator.backward(value)
        added: Tensor = value.detach()
        self._added = self._added + added
        return added

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._steps:
            added = float(self._added) / self._steps
            logs["penalty_loss"] = added
            logs["penalty_share"] = added / logs["loss"] if logs["loss"] else 0.0
            logs["penalty_strength"] = self._strengths / self._steps
            self._added, self._strengths, self._steps = 0.0, 0.0, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class AlignmentTrainer(AlignmentTrainerMixin, Trainer):
    """A ``Trainer`` that adds a regularizer to its loss: see :class:`AlignmentTrainerMixin`."""


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a run that was saved completely.

    ``train(resume_from_checkpoint=True)`` takes the newest folder, whatever is in it. If a run was
    killed while saving, that folder cannot be loaded.

    Args:
        output_dir: the ``output_dir`` of a Trainer with a :class:`PruningCallback`.

    Returns:
        The folder, for ``trainer.train(resume_from_checkpoint=...)``; if there is none, None, which
        starts from the beginning.
    """
    output_dir = Path(output_dir)
    numbered = {}
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if found:
            numbered[int(found[1])] = folder
    for number in sorted(numbered, reverse=True):
        if _is_complete(numbered[number]):
            return str(numbered[number])
    return None


def merge_lora(model: Any, pruner: Pruner) -> Any:
    """Merges LoRA adapters into the pruned weights beneath them, and keeps the zeros.

    Merging fills in pruned entries. They are set to zero again, which changes the model a little.
    The pruner is finished afterwards.

    Do not use PEFT's own ``merge_and_unload``, ``merge_adapter`` and ``unmerge_adapter`` with
    masked weights. They write to the product with the mask, which the next forward recomputes, or
    past it to the weights beneath, from which it is not removed again.

    Args:
        model: a ``peft.PeftModel`` with LoRA adapters on pruned weights.
        pruner: the pruner of the base model's parameters; not finished.

    Returns:
        The ordinary base model, as ``model.merge_and_unload()`` returns it.

    Raises:
        TypeError: the model has no adapters that can be merged; it is not changed.
        ValueError: the pruner is finished.
    """
    if not callable(getattr(model, "merge_and_unload", None)):
        raise TypeError(
            "model should be a peft.PeftModel whose adapters can be merged, such as those of LoRA, "
            f"got {type(model).__name__}"
        )
    if pruner.finished:
        raise ValueError(
            "pruner should not be finished, because finalize() has removed the masks: call "
            "merge_lora instead of finalize()"
        )
    masks = [(module, name, mask_of(module, name)) for module, name in pruner.params]
    pruner.finalize()
    merged = model.merge_and_unload()
    with torch.no_grad():
        for module, name, mask in masks:
            if mask is not None:
                stored(module, name).masked_fill_(mask == 0, 0)
    return merged


def _running_trainer() -> tuple[Any, str | None]:
    """The calling Trainer and the checkpoint that it resumes from.

    The Trainer passes neither to its callbacks, but both are in its frame.
    """
    frame = sys._getframe(1).f_back
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer) and "resume_from_checkpoint" in frame.f_locals:
            return trainer, frame.f_locals["resume_from_checkpoint"]
        frame = frame.f_back
    return None, None


def _is_saving() -> bool:
    """Whether the Trainer asks for the state in order to save a checkpoint.

    It also asks when it begins to train, when this may have the state of an earlier, failed run.
    """
    frame = sys._getframe(1).f_back
    while frame is not None:
        own = isinstance(frame.f_locals.get("self"), Trainer)
        if own and frame.f_code.co_name == "_save_checkpoint":
            return True
        frame = frame.f_back
    return False


def _check_setup(args: Any, trainer: Any) -> None:
    for what in ("fsdp", "deepspeed"):
        if getattr(trainer, f"is_{what}_enabled", False):
            raise ValueError(
                f"{what} is not supported, because it shards the parameters after the pruner was "
                "made: use a training loop that shards the model before it makes the Pruner"
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"torch.nn.DataParallel, which the Trainer would use for {args.n_gpu} GPUs, is not "
            "supported: start one process for each, with torchrun or accelerate launch"
        )


def _constant(strength: float) -> Callable[[int], float]:
    checked = _checked_strength(strength)
    return lambda step: checked


def _checked_strength(strength: Any, when: str = "") -> float:
    if not isinstance(strength, int | float):
        raise TypeError(f"strength should be a number or a schedule, got {strength!r}{when}")
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"strength should be finite and not negative, got {strength}{when}")
    return float(strength)


def _ranks_of_this_disk(args: Any) -> list[int]:
    """The ranks that save to the same disk as this process."""
    if not args.save_on_each_node:
        return list(range(args.world_size))
    first = args.process_index - args.local_process_index
    return list(range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))))


def _is_complete(folder: Path) -> bool:
    if (folder / _SENTINEL).exists():
        return False
    try:
        state = load_state(folder / _FILE)
        step = json.loads((folder / _TRAINER_STATE).read_bytes())["global_step"]
        names = {str(name) for name in state["files"]}
        ranks = [int(rank) for rank in state["ranks"]]
        if step != state["global_step"]:
            return False
    except (ValueError, KeyError, TypeError, OSError):
        return False
    if any(name.startswith("rng_state_") for name in names):
        names |= {f"rng_state_{rank}.pth" for rank in ranks}
    return all(_is_readable(folder / name) for name in names)


def _is_readable(path: Path) -> bool:
    """Whether a file exists and, in formats that allow to check this, is complete."""
    if path.suffix in (".bin", ".pt", ".pth"):
        return zipfile.is_zipfile(path)
    try:
        if path.suffix == ".safetensors":
            WeightFiles(path)
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
    except (ValueError, OSError):
        return False
    return path.is_file()
