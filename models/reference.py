"""The PyTorch side: a transformers model whose linears go by the graph's names, folded and rotated in place.

What the compiler does to initializers is done here to parameters, by the same functions (`rqc.models.algebra`). The
online halves of a rotation become hooks: before the down projections, at the two ends of a tied stream, and in the
attention.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from rqc.models.algebra import apply_folds, folded_norms, norm_folds, rotation_folds
from rqc.models.checkpoint import Checkpoint, model_directory, read_config
from rqc.models.description import EMBEDDING, HEAD, Architecture, Description, segments
from rqc.models.families import FFN, family_of
from rqc.models.rotation import Orthogonal, Rotation
from rqc.models.torch_model import load_torch_model


@dataclass(frozen=True)
class Part:
    """Where a linear of the graph lives in the torch model: rows of a module's weight, all if it isn't packed."""

    module: nn.Module
    rows: slice

    @property
    def weight(self) -> Tensor:
        """A view [out, in] of the module's weight."""
        weight: Any = self.module.weight
        view: Tensor = weight.data[self.rows]
        return view

    @property
    def bias(self) -> Tensor | None:
        """A view [out] of the module's bias, if it has one."""
        bias: Any = getattr(self.module, "bias", None)
        return None if bias is None else bias.data[self.rows]


class Reference:
    """A transformers model in float32 on the CPU, with its linears under the names that the graph gives them.

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

    @classmethod
    def load(cls, model_dir: str | Path) -> Reference:
        """The model of a directory (or GGUF file), computed in float32.

        Raises CheckpointError for one that is incomplete, damaged or pickled, UnsupportedModelError for an unknown
        family.
        """
        family_of(str(read_config(model_directory(model_dir)).get("model_type")))
        Checkpoint.open(model_dir)
        return cls(load_torch_model(model_dir))

    @torch.inference_mode()
    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [n, vocab] of one sequence of token ids [n]."""
        output = self.model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
        logits: NDArray[np.float32] = output.logits[0].float().numpy()
        return logits

    def untie(self) -> None:
        """Give the head a table of its own, equal to the embedding's: from here on the two may differ."""
        head, embedding = self.parts[HEAD].module, self.parts[EMBEDDING].module
        if head.weight is embedding.weight:
            head.weight = nn.Parameter(self.parts[EMBEDDING].weight.clone(), requires_grad=False)

    def rotate(self, rotation: Rotation, *, tied: bool) -> None:
        """Fold norm gains (where R1 needs it) and the rotation into the weights, add the online halves: same function.

        tied: embedding and head are one table and stay so; R1 then acts online at the two ends of the stream.
        Raises RotationError where the family refuses a site.
        """
        if not tied:
            self.untie()
        if "r1" in rotation.sites:
            self._fold(norm_folds(self.description, head=not tied))
            neutral = 0.0 if self.description.family.offset_norms else 1.0
            for name in folded_norms(self.description, head=not tied):
                self.model.get_parameter(name).data.fill_(neutral)
        self._fold(rotation_folds(self.description, rotation, ends=not tied))
        self._rotate_online(rotation, tied)

    def set_weight(self, name: str, weight: NDArray[np.float32]) -> None:
        """Replace a linear's (or table's) weight [out, in]."""
        self.parts[name].weight.copy_(torch.from_numpy(weight))

    def _fold(self, folds: dict[str, list[Any]]) -> None:
        for name, applied in folds.items():
            part = self.parts[name]
            folded = apply_folds(applied, part.weight.double().numpy(), self._gain)
            part.weight.copy_(torch.from_numpy(folded))
            if part.bias is not None:
                bias = part.bias.double().numpy()
                for fold in applied:
                    bias = fold.bias(bias)
                part.bias.copy_(torch.from_numpy(bias))

    def _gain(self, norm: str) -> NDArray[np.float64]:
        gain: NDArray[np.float64] = self.model.get_parameter(norm).data.double().numpy()
        return gain

    def _rotate_online(self, rotation: Rotation, tied: bool) -> None:
        a = self.description.architecture
        r1, r3 = rotation.r1(a.hidden_size), rotation.r3(a.head_dim)
        if r1 is not None and tied:
            self.parts[EMBEDDING].module.register_forward_hook(lambda module, args, out: turn(out, r1))
            norm: nn.Module = self.model.model.norm
            norm.register_forward_pre_hook(lambda module, args: (turn(args[0], r1, inverse=True), *args[1:]))
        for claim in self.description.claims:
            if claim.linear.reads == FFN and (r4 := rotation.r4(self.description.sizes(claim.expert)[FFN])) is not None:
                self.parts[claim.weight].module.register_forward_pre_hook(_rotate_input(r4))
        if r3 is not None:
            _rotate_attention(self.model, r3)


def turn(x: Tensor, rotation: Orthogonal, *, inverse: bool = False) -> Tensor:
    """x Q (x Qᵀ if inverse) on the last axis, computed in float64, in the type of x."""
    y = rotation.apply_inverse(x.double().numpy()) if inverse else rotation.apply(x.double().numpy())
    return torch.from_numpy(y).to(x.dtype)


def _rotate_input(rotation: Orthogonal) -> Any:
    return lambda module, args: (turn(args[0], rotation), *args[1:])


def _rotate_attention(model: Any, r3: Orthogonal) -> None:
    """Let every attention of the model see q R3 and k R3, which it gets after RoPE."""
    plain = model.config._attn_implementation
    module: Any
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "o_proj"):
            module.rqc_attention = (plain, r3)
    AttentionInterface.register(f"rqc_{plain}", _rotated_attention)
    AttentionMaskInterface.register(f"rqc_{plain}", ALL_MASK_ATTENTION_FUNCTIONS[plain])
    model.config._attn_implementation = f"rqc_{plain}"


def _rotated_attention(module: Any, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
    plain, r3 = module.rqc_attention
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(plain, eager)
    return attention(module, turn(query, r3), turn(key, r3), *args, **options)


class Expert(nn.Module):
    """One expert of a mixture as three plain linears: W_down (act(x W_gateᵀ) · (x W_upᵀ))."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (_linear(weight) for weight in (gate, up, down))
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.ModuleList):
    """Experts side by side: Σ_e p_e expert_e(x), every expert computed on every token as the graph does it."""

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden]; chosen, weights [tokens, k]: the experts of each token and their shares."""
        total = torch.zeros_like(x)
        for index, expert in enumerate(self):
            share = (weights * (chosen == index)).sum(-1, keepdim=True).to(x.dtype)
            total += expert(x) * share
        return total


def unpack_experts(model: Any) -> None:
    """Replace the experts that transformers packs in three-dimensional tensors by plain linears on the same memory."""
    for parent in list(model.modules()):
        packed: Any = getattr(parent, "experts", None)
        if getattr(getattr(packed, "gate_up_proj", None), "ndim", 0) == 3:
            experts = []
            for gate_up, down in zip(packed.gate_up_proj.data, packed.down_proj.data, strict=True):
                gate, up = gate_up.chunk(2)
                experts.append(Expert(gate, up, down, packed.act_fn))
            parent.experts = Experts(experts)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


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
                yield f"{match[1]}{path}.weight", Part(module, rows)
        else:
            yield f"{name}.weight", Part(module, slice(0, weight.shape[0]))
