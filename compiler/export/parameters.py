"""Whether a checkpoint has every parameter of the model that its config.json describes, and no other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rqc.compiler.export.layout import Tensor
from rqc.compiler.importer import full_config
from rqc.models.description import HEAD
from rqc.runtime.errors import EngineFormatError

Shapes = dict[str, tuple[int, ...]]


def check_parameters(config: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """Raise EngineFormatError, naming it, for a parameter that transformers' model has and the checkpoint does not, in
    its shape, or the other way round."""
    wanted, found = _parameters(config), _stored(tensors)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise EngineFormatError(
                f"{name} is {_told(found.get(name))} in the engine, {_told(wanted.get(name))} in its config.json",
                hint="rqc export MODEL_DIR",
            )


def _parameters(config: Mapping[str, Any]) -> Shapes:
    """Shapes of the parameters of transformers' model, made without memory; a tied head is none."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(plain))
        settings = full_config(Path(folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {name: shape for name, shape in shapes.items() if not (name == HEAD and config["tie_word_embeddings"])}


def _stored(tensors: Sequence[Tensor]) -> Shapes:
    """Shapes of the parameters that the tensors are or stand for."""
    found: Shapes = {}
    for tensor in tensors:
        stem, _, part = tensor.name.rpartition(".")
        if part == "qweight":
            found[f"{stem}.weight"] = (tensor.shape[1], 8 * tensor.shape[0])
        elif part in ("weight", "bias"):
            found[tensor.name] = tensor.shape
    return found


def _told(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
