"""The PyTorch side: a transformers model whose linears go by the graph's names, folded and rotated in place.

What the compiler does to initializers is done here to parameters, by the same functions (`rqc.models.algebra`,
`rqc.models.weights`), down to the last bit. The online halves of a rotation become hooks: before the down projections,
at the two ends of a tied stream, and in the attention.

For adapters the order is fold, wrap by peft, `rotate_online`: then both the linear and its adapter see the rotated x.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rqc.models.algebra import Fold, check_sites, folded_norms, norm_folds, rotation_folds
from rqc.models.checkpoint import Checkpoint, model_directory, read_config
from rqc.models.description import EMBEDDING, FINAL_NORM, HEAD, Architecture, Description, segments
from rqc.models.experts import unpack_experts
from rqc.models.families import FFN, family_of
from rqc.models.online import TorchRotation, rotate_attention, rotate_input, rotate_output
from rqc.models.rotation import Rotation
from rqc.models.torch_model import load_torch_model
from rqc.models.weights import Weight
from rqc.runtime.errors import RotationError


@dataclass(frozen=True)
class Part:
    """Where a linear of the graph lives in the torch model: rows of a module's weight, all if it isn't packed."""

    model: nn.Module
    path: str
    rows: slice

    @property
    def module(self) -> nn.Module:
        """What stands at that path now: the linear, or what wraps it."""
        return self.model.get_submodule(self.path)

    @property
    def linear(self) -> nn.Module:
        """The linear itself, under any number of peft's wrappers."""
        module: Any = self.module
        while isinstance(getattr(module, "base_layer", None), nn.Module):
            module = module.base_layer
        plain: nn.Module = module
        return plain

    @property
    def weight(self) -> Tensor:
        """A view [out, in] of the linear's weight."""
        weight: Any = self.linear.weight
        view: Tensor = weight.data[self.rows]
        return view

    @property
    def bias(self) -> Tensor | None:
        """A view [out] of the linear's bias, if it has one."""
        bias: Any = getattr(self.linear, "bias", None)
        return None if bias is None else bias.data[self.rows]


class Reference:
    """A transformers model, in any float type and on any device, with its linears under the graph's names.

    `parts` holds the linears of all layers, the embedding and the head; `description` what the algebra knows of them.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        unpack_experts(model)
        # A checkpoint may store a head of its own where config.json ties it: what counts is what transformers made.
        tied = self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight
        architecture = replace(Architecture.from_config(self.model.config.to_dict()), tied=tied)
        self.parts = dict(_parts(model, architecture))
        self.description = Description.of(architecture, self.parts)
        self._online = False

    @classmethod
    def load(cls, model_dir: str | Path) -> Reference:
        """The model of a directory (or GGUF file), in float32 on the CPU.

        Raises CheckpointError for one that is incomplete, damaged or pickled, UnsupportedModelError for an unknown
        family.
        """
        family_of(str(read_config(model_directory(model_dir)).get("model_type")))
        Checkpoint.open(model_dir)
        return cls(load_torch_model(model_dir))

    @torch.inference_mode()
    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [n, vocab] of one sequence of token ids [n]."""
        device = self.parts[EMBEDDING].weight.device
        output = self.model(input_ids=torch.from_numpy(ids)[None].to(device), use_cache=False)
        logits: NDArray[np.float32] = output.logits[0].float().cpu().numpy()
        return logits

    def untie(self) -> None:
        """Give the head a table of its own, equal to the embedding's: from here on the two may differ."""
        head: Any = self.parts[HEAD].linear
        if head.weight is self.parts[EMBEDDING].linear.weight:
            head.weight = nn.Parameter(self.parts[EMBEDDING].weight.clone(), requires_grad=False)

    def rotate(self, rotation: Rotation, *, tied: bool) -> None:
        """Fold norm gains (where R1 needs it) and the rotation into the weights, add the online halves: same function.

        tied: embedding and head are one table and stay so; R1 then acts online at the two ends of the stream.
        Raises RotationError where the family refuses a site, or where the model is rotated already.
        """
        self.fold(rotation, tied=tied)
        self.rotate_online(rotation, tied=tied)

    def fold(self, rotation: Rotation, *, tied: bool) -> None:
        """The offline half of `rotate`: weights and biases. Each is cast once, to float32, as in an engine; then to the
        model's own type."""
        check_sites(self.description, rotation)
        if not tied:
            self.untie()
        folds: dict[str, list[Fold]] = defaultdict(list)
        if "r1" in rotation.sites:
            for name, applied in norm_folds(self.description, head=not tied).items():
                folds[name] += applied
        for name, applied in rotation_folds(self.description, rotation, ends=not tied).items():
            folds[name] += applied
        for name, applied in folds.items():
            self._fold(name, tuple(applied))
        if "r1" in rotation.sites:
            self._empty_norms(tied=tied)

    def fold_norms(self, *, tied: bool) -> None:
        """Move the norms' gains into the linears that read them, so that any R1 commutes with the norms."""
        if not tied:
            self.untie()
        for name, applied in norm_folds(self.description, head=not tied).items():
            self._fold(name, tuple(applied))
        self._empty_norms(tied=tied)

    def rotate_online(self, rotation: Rotation, *, tied: bool, dtype: torch.dtype = torch.float64) -> None:
        """The online half of `rotate`, computed in `dtype`: hooks on whatever stands at each linear's path now.

        An adapter must be in place before: peft's wrappers hide a linear's hooks from their adapters. Raises
        RotationError for a second call: two rotations would be no error that anything else notices.
        """
        if self._online:
            raise RotationError("the model is rotated online already", hint="load it again to rotate it otherwise")
        self._online = True
        a = self.description.architecture
        if (r1 := rotation.r1(a.hidden_size)) is not None and tied:
            rotate_output(self.parts[EMBEDDING].module, TorchRotation(r1, dtype=dtype))
            norm = self.model.get_submodule(FINAL_NORM.removesuffix(".weight"))
            rotate_input(norm, TorchRotation(r1, inverse=True, dtype=dtype))
        before_down: dict[int, TorchRotation] = {}
        for claim in self.description.claims:
            if claim.linear.reads == FFN and (r4 := rotation.r4(self.description.sizes(claim.expert)[FFN])) is not None:
                shared = before_down.setdefault(r4.n, TorchRotation(r4, dtype=dtype))
                rotate_input(self.parts[claim.weight].module, shared)
        if (r3 := rotation.r3(a.head_dim)) is not None:
            rotate_attention(self.model, TorchRotation(r3, dtype=dtype))

    def set_weight(self, name: str, weight: NDArray[np.float32]) -> None:
        """Replace a linear's (or table's) weight [out, in]."""
        self.parts[name].weight.copy_(torch.from_numpy(weight))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float64]:
        """Rows [start, stop) of a parameter, float64, by the graph's name: what folds read (`weights.Source`)."""
        part, is_bias = self.parts.get(name), name.endswith(".bias")
        if part is None and is_bias:
            part = self.parts.get(name.removesuffix("bias") + "weight")
        if part is None:
            tensor = self.model.get_parameter(name).data
        else:
            found = part.bias if is_bias else part.weight
            assert found is not None
            tensor = found
        values: NDArray[np.float64] = tensor[start:stop].double().cpu().numpy()
        return values

    def _empty_norms(self, *, tied: bool) -> None:
        neutral = 0.0 if self.description.family.offset_norms else 1.0
        for name in folded_norms(self.description, head=not tied):
            self.model.get_parameter(name).data.fill_(neutral)

    def _fold(self, name: str, folds: tuple[Fold, ...]) -> None:
        part = self.parts[name]
        views = {name: part.weight}
        if part.bias is not None:
            views[name.removesuffix("weight") + "bias"] = part.bias
        for label, view in views.items():
            folded = Weight(self, label, tuple(view.shape), folds=folds).float32()
            view.copy_(torch.from_numpy(folded))


def _parts(model: nn.Module, architecture: Architecture) -> Iterator[tuple[str, Part]]:
    """Every module with a two-dimensional weight, by the graph's name; packed ones by the names of their parts."""
    sizes = Description(family_of(architecture.model_type), architecture, ()).sizes()
    packed: dict[str, list[tuple[str, slice]]] = {}
    for path, source, kinds in family_of(architecture.model_type).sources:
        if kinds:
            kind = Description.of(architecture, [f"model.layers.0.{path}.weight"]).claims[0].linear.writes[0]
            packed.setdefault(source, []).append((path, segments(kinds, sizes)[kind]))
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        match = re.fullmatch(r"(model\.layers\.\d+\.)(.+)", name)
        if match and match[2] in packed:
            for path, rows in packed[match[2]]:
                yield f"{match[1]}{path}.weight", Part(model, name, rows)
        else:
            yield f"{name}.weight", Part(model, name, slice(0, weight.shape[0]))
