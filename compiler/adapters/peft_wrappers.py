"""Peft's wrappers around the linears of a reference: several adapters in each, by number."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rqc.models.delta import Delta, composed
from rqc.models.experts import peft_sees_linears
from rqc.models.reference import Part, Reference

MARK = "adapter"


def _key(index: int) -> str:
    """What peft calls the adapter of that number."""
    return f"{MARK}{index}"


def attach(reference: Reference, wrapped: Any, directory: Path, index: int) -> tuple[Any, str | None]:
    """Wrap the model's linears by plain peft, with the adapter of a directory, and let all be active.

    wrapped: peft's model of the adapters before it, None for the first. Returns it, and the reason where peft cannot.
    """
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as told, peft_sees_linears(reference.model):
        warnings.simplefilter("always")
        try:
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(
                    reference.model, str(directory), adapter_name=_key(index), torch_device="cpu"
                )
            else:
                wrapped.load_adapter(str(directory), adapter_name=_key(index), torch_device="cpu")
            wrapped.base_model.set_adapter([_key(place) for place in range(index + 1)])
            wrapped.eval()
        except (ValueError, KeyError, RuntimeError, OSError, TypeError) as error:
            return wrapped, " ".join(str(error).split())[:200]
    missing = [str(warning.message) for warning in told if "missing adapter keys" in str(warning.message)]
    return wrapped, missing[0][:200] if missing else None


def wraps(part: Part, index: int) -> bool:
    """Whether a part has an update of the adapter of that number."""
    return _key(index) in getattr(part.module, "lora_A", {})


def one_delta(part: Part, index: int) -> Delta:
    """What peft's wrapper adds to a part for the adapter of that number."""
    return _delta(part, _key(index))


def delta_of(part: Part) -> Delta:
    """What peft's wrapper adds to a part, all adapters summed."""
    layer: Any = part.module
    return composed([_delta(part, key) for key in layer.lora_A])


@torch.no_grad()
def install(part: Part, index: int, delta: Delta) -> None:
    """Let peft's wrapper add another delta to a part. Parts of one module share A, as they share their input."""
    layer: Any = part.module
    key = _key(index)
    a, b = layer.lora_A[key], layer.lora_B[key]
    if delta.rank != a.weight.shape[0]:
        a = layer.lora_A[key] = nn.Linear(a.weight.shape[1], delta.rank, bias=False)
        b = layer.lora_B[key] = nn.Linear(delta.rank, b.weight.shape[0], bias=False)
    a.weight.copy_(torch.from_numpy(delta.a))
    b.weight[part.rows].copy_(torch.from_numpy(delta.b * (delta.scale / layer.scaling[key])))
    if delta.magnitude is not None:
        layer.lora_magnitude_vector[key].weight[part.rows].copy_(torch.from_numpy(delta.magnitude))


def merge_in(reference: Reference, names: Sequence[str]) -> None:
    """W ← W + c B A (DoRA: diag(m / n) of it) of one adapter after the other in float64, B ← 0; wrappers with nothing
    left in them go."""
    for name in names:
        part = reference.parts[name]
        layer: Any = part.module
        weight = reference.read(name)
        for key in layer.lora_A:
            weight = _delta(part, key).merged(weight)
            layer.lora_B[key].weight.data[part.rows] = 0
        reference.set_weight(name, weight.astype(np.float32))
    for path in {reference.parts[name].path for name in names}:
        layer = reference.model.get_submodule(path)
        if not any(up.weight.any() for up in layer.lora_B.values()):
            reference.model.set_submodule(path, layer.get_base_layer())


def _delta(part: Part, key: str) -> Delta:
    layer: Any = part.module
    magnitude = layer.lora_magnitude_vector[key].weight if key in layer.lora_magnitude_vector else None
    return Delta(
        _wide(layer.lora_A[key].weight),
        _wide(layer.lora_B[key].weight[part.rows]),
        float(layer.scaling[key]),
        None if magnitude is None else _wide(magnitude[part.rows]),
    )


def _wide(tensor: torch.Tensor) -> np.ndarray:
    wide: np.ndarray = tensor.detach().double().numpy()
    return wide
