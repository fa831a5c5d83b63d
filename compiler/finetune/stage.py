"""The model that is trained: folded and rotated as an engine is, its linears on the deployed grid, adapters on top.

The order matters. Folds come first (a grid is not equivariant), then the grid or LoftQ, then peft's wrappers, then the
pooled factors in place of peft's own, and at the end the online rotations and the rounding of activations, as hooks on
the wrappers, so that linear and adapter read the same input.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from rqc.compiler.finetune.eora_starts import eora_starts
from rqc.compiler.finetune.grids import find_starts, grid_of, put_on_grid
from rqc.compiler.finetune.settings import CHANGES_BASE, Settings
from rqc.compiler.finetune.targets import Target, block_linears, chosen_targets
from rqc.compiler.instruments import Progress
from rqc.models.adapter_basis import MERGED_POOLS, POOLED
from rqc.models.delta import Delta, without
from rqc.models.experts import peft_sees_linears
from rqc.models.fake_quant import round_inputs_ste, training_grids
from rqc.models.grid_linear import GridLinear
from rqc.models.pooled import attach, delta_of, set_factors
from rqc.models.reference import Reference

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEFT_INITS = {"default": True, "loftq": True, "eora": True}
"""peft's word for a start, where it is not ours."""


@dataclass(frozen=True, eq=False)
class Stage:
    """A model that is ready to be trained.

    model: peft's, with gradients for the adapters alone. removed: what a start such as PiSSA took out of the base, by
    module path. residuals: what LoftQ takes off a weight before it is rounded, by weight name. starts: what
    adapters make up for from the start where the weight itself was rounded, by weight name. base_bytes: the blocks'
    linears as they are held; float_bytes: what they would take as floats of the training's type.
    """

    reference: Reference
    model: Any
    targets: Sequence[Target]
    removed: Mapping[str, Delta]
    residuals: Mapping[str, Delta]
    starts: Mapping[str, Delta]
    base_bytes: int
    float_bytes: int

    @property
    def trainable_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(each.numel() for each in self.model.parameters() if each.requires_grad)

    @property
    def repaired(self) -> dict[str, Delta]:
        """What adapters say that float weights have already (`Adapter.repaired`)."""
        return {**self.starts, **self.residuals}

    def deltas(self) -> dict[str, Delta]:
        """What the adapters add to each weight of the untouched base, by the graph's weight names."""
        found: dict[str, Delta] = {}
        for target in self.targets:
            delta = delta_of(self.reference.model.get_submodule(target.path))
            found |= _cut(target, without(delta, self.removed.get(target.path)))
        return found


def build_stage(model_dir: str | Path, settings: Settings, progress: Progress) -> Stage:
    """Load a model directory and make what the settings ask for of it.

    Raises CheckpointError, UnsupportedModelError, RotationError (the family refuses a site), InputError (target modules
    that match nothing, a rank that is too large), SchemeError (pools that do not divide a layer).
    """
    eora = eora_starts(model_dir, settings, progress) if settings.init == "eora" else {}
    reference = Reference.load(model_dir)
    tied = reference.description.architecture.tied
    linears = block_linears(reference)
    targets = chosen_targets(linears, settings)
    starts = find_starts(reference, targets, settings, progress) if settings.init == "loftq" else {}
    reference.fold(settings.rotation, tied=tied)
    grid = grid_of(settings)
    if grid is not None:
        put_on_grid(reference.model, linears, grid, starts, progress)
    set_seed(settings.seed)
    model = _with_adapters(reference, targets, settings)
    removed = _removed(reference, targets) if settings.init in CHANGES_BASE else {}
    repairs = {**eora, **{path: start.delta for path, start in starts.items()}}
    for path, delta in repairs.items():
        set_factors(reference.model.get_submodule(path), delta)
    _narrow(linears, FLOATS[settings.dtype])
    reference.rotate_online(settings.rotation, tied=tied, dtype=torch.float32)
    if settings.activations < 16:
        grids = training_grids(reference.description, settings.activations, settings.group_size)
        # A kernel rounds to 8 bits out of sight, so that a branch beside it reads x as it is.
        branched = settings.grid is not None and settings.adapter_type not in MERGED_POOLS
        round_inputs_ste(reference, grids, linear_alone=settings.activations == 8 and branched)
    taken = {path: start.residual for path, start in starts.items() if start.residual is not None}
    made_up = {path: delta for path, delta in repairs.items() if path not in taken}
    residuals, kept = _cut_all(targets, taken), _cut_all(targets, made_up)
    held, as_floats = _bytes(linears, FLOATS[settings.dtype])
    return Stage(reference, model, targets, removed, residuals, kept, held, as_floats)


def _with_adapters(reference: Reference, targets: Sequence[Target], settings: Settings) -> Any:
    """peft's wrappers around the targets, in place, with pooled factors where the type has them."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=[target.path for target in targets],
        use_rslora=settings.rslora,
        use_dora=settings.adapter_type == "dora",
        init_lora_weights=PEFT_INITS.get(settings.init, settings.init),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings(), peft_sees_linears(reference.model):
        warnings.simplefilter("ignore")  # on how to save what such a start changed: `Stage.removed`
        model = get_peft_model(reference.model, config)
    if settings.adapter_type in POOLED:
        attach(model, settings.adapter_type, pool=settings.pooled_inputs, repeat=settings.repeated_outputs)
    if settings.optimizer == "lora-fa":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and ".lora_A." not in name)
    model.config.use_cache = False
    return model


def _removed(reference: Reference, targets: Sequence[Target]) -> dict[str, Delta]:
    """The adapters as they start: what has been taken out of the base."""
    found = {}
    for target in targets:
        delta = delta_of(reference.model.get_submodule(target.path))
        found[target.path] = Delta(delta.a.copy(), delta.b.copy(), delta.scale)
    return found


def _cut_all(targets: Sequence[Target], deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """Updates of some modules, by path, as those of the weights that they hold, by name."""
    found: dict[str, Delta] = {}
    for target in targets:
        if target.path in deltas:
            found |= _cut(target, deltas[target.path])
    return found


def _cut(target: Target, delta: Delta) -> dict[str, Delta]:
    """A module's update by the weights that it holds."""
    if len(target.parts) == 1:
        return {next(iter(target.parts)): delta}
    return {name: delta.rows(part.rows) for name, part in target.parts.items()}


def _narrow(linears: Sequence[Target], dtype: torch.dtype) -> None:
    """Hold frozen float weights in the type that autocast would cast them to in every step."""
    for target in linears:
        linear = next(iter(target.parts.values())).linear
        if not isinstance(linear, GridLinear) and dtype != torch.float32:
            linear.to(dtype)


def _bytes(linears: Sequence[Target], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the blocks' linears, without biases: as held, and as floats of `dtype`."""
    held = as_floats = 0
    for target in linears:
        linear: Any = next(iter(target.parts.values())).linear
        size = int(np.prod(target.shape)) * dtype.itemsize
        as_floats += size
        held += linear.stored_bytes if isinstance(linear, GridLinear) else size
    return held, as_floats
