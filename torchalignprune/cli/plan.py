"""The pruning method that the options of ``torchalignprune prune`` ask for."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from torchalignprune import criteria, methods
from torchalignprune.calibration import Calibration
from torchalignprune.cli.options import InputError
from torchalignprune.parameters import PrunableParameters
from torchalignprune.pruning import PruningMethod, global_unstructured

_BUDGETS = {"wanda": "unit", "lookahead": "layer"}  # of criteria, as in their papers
_Scores = dict[tuple[nn.Module, str], Tensor]


class Plan:
    """The method and its options.

    Raises:
        InputError: the options do not go together.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        name = options.method or ("magnitude" if options.criterion else "aligned-magnitude")
        aligned, n_of_m = name == "aligned-magnitude", name == "aligned-nm"
        if options.criterion and name != "magnitude":
            raise InputError(f"--criterion goes with --method magnitude, not {name}")
        if options.criterion == "wanda" and not options.calibration:
            raise InputError("--criterion wanda needs --calibration FILE")
        if options.realign and not options.calibration:
            raise InputError("--realign needs --calibration FILE")
        seen = aligned or n_of_m or options.criterion == "wanda"
        if options.calibration and not (seen or options.realign):
            raise InputError(
                "--calibration goes with --method aligned-magnitude or aligned-nm, with "
                "--criterion wanda, or with --realign"
            )
        self.calibrated = bool(options.calibration) and seen
        for option in ("alignment", "units"):
            if getattr(options, option) and not aligned:
                raise InputError(f"--{option} goes with --method aligned-magnitude, not {name}")
        frobenius = options.alignment == "frobenius"
        if frobenius and options.units and options.budget != "unit":
            raise InputError(
                "--units does not go with --alignment frobenius, unless --budget is unit"
            )
        for option in ("sparsity", "budget"):
            if n_of_m and getattr(options, option) is not None:
                raise InputError(
                    f"--{option} does not go with --method aligned-nm, which takes --nm instead"
                )
        if options.nm and not n_of_m:
            raise InputError(f"--nm goes with --method aligned-nm, not {name}")
        if options.sparsity is None and not n_of_m:
            raise InputError(f"--method {name} needs --sparsity")
        self.name = name
        self.criterion: str | None = options.criterion
        self.options: dict[str, Any]
        if n_of_m:
            n, m = options.nm or (2, 4)
            self.options = {"n": n, "m": m}
        else:
            budget = options.budget or _BUDGETS.get(options.criterion, "global")
            self.options = {"amount": options.sparsity, "budget": budget}
        if aligned:
            self.options["alignment"] = options.alignment or "cosine"
            if options.units or not frobenius:
                self.options["units"] = options.units or "out"
        self.described = {
            "name": name,
            "criterion": options.criterion,
            **self.options,
            "calibration": [str(path) for path in options.calibration or ()],
            "realign": options.realign,
            "include": options.include,
            "exclude": options.exclude,
        }

    def __str__(self) -> str:
        details = [f"{key} {value}" for key, value in self.options.items() if key != "amount"]
        inputs = ["inputs"] if self.calibrated else []
        realigned = [f"{self.described['realign']} realigned"] if self.described["realign"] else []
        return ", ".join([self.criterion or self.name, *details, *inputs, *realigned])

    def prune(self, params: PrunableParameters, calibration: Calibration | None, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        options = dict(self.options)
        scores = None
        if self.criterion:
            scores = self._scores(params, calibration, generator)
        elif self.calibrated:
            options["input_norms"] = calibration
        if self.name == "random":
            options["generator"] = generator
        kinds: dict[str, type[PruningMethod]] = {
            "aligned-magnitude": methods.AlignedMagnitude,
            "magnitude": methods.Magnitude,
            "random": methods.Random,
            "aligned-nm": methods.AlignedNM,
        }
        global_unstructured(params, kinds[self.name], importance_scores=scores, **options)

    def _scores(
        self,
        params: PrunableParameters,
        calibration: Calibration | None,
        generator: torch.Generator,
    ) -> _Scores:
        if self.criterion == "wanda":
            assert calibration is not None
            return criteria.wanda(params, calibration)
        if self.criterion == "lookahead":
            return criteria.lookahead(params, criteria.transformer_chains(params))
        if self.criterion == "random":
            return criteria.random(params, generator)
        return criteria.lamp(params) if self.criterion == "lamp" else criteria.magnitude(params)
