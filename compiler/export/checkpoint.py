"""Writing a quantized Hugging Face checkpoint: shards of tensors, their index, config.json and what stands beside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from rqc.compiler.export.layout import BITS, ScaleRounding, Tensor
from rqc.runtime.directories import Part, write_directory
from rqc.runtime.errors import EngineFormatError, ResourceError

SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class ExportReport:
    """A checkpoint that was written: linears in 4 bits, bytes of all tensors, what rounding left of an adapter.

    scale_error: the largest ‖Ŵ₁₆ − Ŵ‖ / ‖Ŵ‖ of a linear by scales in float16. notes: what a reader should know.
    """

    directory: str
    format: str
    linears: int
    size_bytes: int
    scale_error: float
    survival: dict[str, float] | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report with the keys of `rqc export --json`."""
        return {
            "directory": self.directory,
            "format": self.format,
            "linears": self.linears,
            "size_bytes": self.size_bytes,
            "scale_error": self.scale_error,
            "survival": self.survival,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, eq=False)
class GptqCheckpoint:
    """All that goes into a directory. config: the model's own config.json; files: tokenizer and settings by name."""

    tensors: Sequence[Tensor]
    rounding: ScaleRounding
    config: Mapping[str, Any]
    group_size: int
    tied: bool
    files: Mapping[str, Part]

    def settings(self) -> dict[str, Any]:
        """config.json with what was done to the weights."""
        quantization = {
            "quant_method": "gptq",
            "bits": BITS,
            "group_size": self.group_size,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": "gptq",
        }
        raw = {key: value for key, value in self.config.items() if key != "dtype"}
        own = {"torch_dtype": "float16", "tie_word_embeddings": self.tied}
        return {**raw, **own, "quantization_config": quantization}

    def write(
        self, target: Path, *, survival: dict[str, float] | None = None, notes: Sequence[str] = ()
    ) -> ExportReport:
        """Write the directory, whole or not at all. Raises ResourceError where there is no space."""
        parts, shards = _shards(self.tensors)
        size = sum(one.nbytes for one in self.tensors)
        index = {"metadata": {"total_size": size}, "weight_map": shards}
        texts = {"config.json": self.settings(), "model.safetensors.index.json": index}
        parts |= {**self.files, **{name: partial(_json, value) for name, value in texts.items()}}
        try:
            write_directory(parts, target)
        except OSError as error:
            raise ResourceError(
                f"{target} cannot be written: {error.strerror}", hint="free space, or another place"
            ) from error
        linears = sum(one.name.endswith(".qweight") for one in self.tensors)
        moved = float(f"{self.rounding.error:.3g}")
        return ExportReport(str(target), "gptq", linears, size, moved, survival, (*notes, *self.rounding.notes()))


def _shards(tensors: Sequence[Tensor]) -> tuple[dict[str, Part], dict[str, str]]:
    """(safetensors files by name, the file of each tensor), none much over a gigabyte."""
    groups: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(one.nbytes for one in groups[-1]) + tensor.nbytes > SHARD_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    names = [f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors" for index in range(len(groups))]
    parts: dict[str, Part] = {name: partial(_shard, group) for name, group in zip(names, groups, strict=True)}
    return parts, {one.name: name for name, group in zip(names, groups, strict=True) for one in group}


def _shard(tensors: Sequence[Tensor]) -> list[bytes]:
    return [save({one.name: _evaluated(one) for one in tensors}, metadata={"format": "pt"})]


def _evaluated(tensor: Tensor) -> np.ndarray:
    """Its value. Raises EngineFormatError where that is not what it declares: names and shapes are out already."""
    value = np.ascontiguousarray(tensor.value())
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise EngineFormatError(f"{tensor.name} is {value.dtype}{list(value.shape)}, not {list(tensor.shape)}")
    return value


def _json(value: Mapping[str, Any]) -> list[bytes]:
    return [json.dumps(value, indent=1).encode() + b"\n"]
