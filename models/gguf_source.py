"""The tensors of a GGUF file under their Hugging Face names, dequantized row by row.

Parsing, dequantization and names are those of the package `gguf`. What is undone here is what llama.cpp's converter
(convert_hf_to_gguf.py) does to weights: it interleaves the rows of Llama's q and k within each head, for its rotary
embedding turns neighbours where Hugging Face turns halves, and it stores Gemma's norm gains as 1 + w.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from rqc.models.families import family_of
from rqc.runtime.errors import CheckpointError, UnsupportedModelError

WAY_OUT = "start from the model's safetensors"
NORMS = (
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    *("self_attn.q_norm", "self_attn.k_norm"),
)
ENDS = ("model.embed_tokens", "model.norm", "lm_head")
INTERLEAVED = {"blk.{}.attn_q": "attention.head_count", "blk.{}.attn_k": "attention.head_count_kv"}
"""Tensors whose rows llama.cpp interleaves for a Llama, and the key that says over how many heads."""


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in a GGUF file and what brings it back to the form of Hugging Face.

    `dtype` is GGUF's type, `offset` in bytes from the start of the file. `interleaved`: heads within which the rows are
    interleaved, 0 if they are not. `shift` is what every value is too small by.
    """

    shard: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    interleaved: int = 0
    shift: float = 0.0

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) along the first axis. Raises CheckpointError if the file ends before them."""
        if len(self.shape) == 1:  # blocks lie along its only axis: it is read whole
            values = self._dequantized(0, 1)[0]
            return np.asarray(values[self._stored(np.arange(self.shape[0]))[start:stop]] + self.shift)
        head = self.shape[0] // self.interleaved if self.interleaved else 1
        first, last = start // head * head, -(-stop // head) * head
        values = self._dequantized(first, last)[self._stored(np.arange(start, stop)) - first]
        return values.reshape(stop - start, *self.shape[1:]) + self.shift

    def _stored(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where rows of the Hugging Face tensor lie in the file: row i of the first half of a head at 2i, of the
        second at 2i + 1."""
        if not self.interleaved:
            return rows
        size = self.shape[0] // self.interleaved
        head, row = np.divmod(rows, size)
        half, pair = np.divmod(row, size // 2)
        return np.asarray(head * size + 2 * pair + half)

    def _dequantized(self, first: int, last: int) -> NDArray[np.float64]:
        """Stored rows [first, last) as float64 [rows, values in a row]; a one-dimensional tensor is one row."""
        kind = gguf.GGMLQuantizationType[self.dtype]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        width = prod(self.shape[-1:] if len(self.shape) == 1 else self.shape[1:]) // block * size
        with self.shard.open("rb") as file:
            file.seek(self.offset + first * width)
            data = file.read((last - first) * width)
        if len(data) != (last - first) * width:
            raise _damaged(self.shard, "it has become shorter")
        return np.asarray(gguf.dequantize(np.frombuffer(data, np.uint8).reshape(-1, width), kind), np.float64)


@dataclass(frozen=True)
class GgufFile:
    """What the head of a GGUF file says: its metadata (without the vocabulary) and its tensors by their GGUF names."""

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, GgufTensor] = field(repr=False)

    @property
    def architecture(self) -> str:
        """GGUF's name of the architecture, e.g. llama or gemma3."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own metadata."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_gguf(path: Path) -> GgufFile:
    """Read the head of a GGUF file; again only if the file has changed. No weight is read.

    Raises CheckpointError for a file that is truncated or damaged, UnsupportedModelError for one that rqc cannot read:
    of another byte order, in several parts, with tensors of an unknown type, of an unknown architecture.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="check the path") from error
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)  # parsing a vocabulary takes seconds
def _read(path: Path, _mtime: int, _size: int) -> GgufFile:
    try:
        reader = _Reader(path)
        metadata = {key: _value(item) for key, item in reader.fields.items() if not _is_vocabulary(item)}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError, MemoryError) as error:
        raise _damaged(path, str(error)) from error
    if "general.architecture" not in metadata:
        raise _damaged(path, "it names no architecture")
    if reader.byte_order != "I":
        raise UnsupportedModelError(f"{path} has another byte order than this machine", hint=WAY_OUT)
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedModelError(f"{path} is one part of several", hint="merge them: llama-gguf-split --merge")
    tensors = {tensor.name: _tensor(path, tensor) for tensor in reader.tensors}
    return GgufFile(path, metadata, tensors)


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """GGUF's reader that does not run over the end of the file: a damaged count would keep it busy for ever."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> NDArray[Any]:
        if int(offset) + int(count) * np.dtype(dtype).itemsize > self.data.size:
            raise ValueError(f"it ends at byte {self.data.size}, before its last value")
        found: NDArray[Any] = super()._get(offset, dtype, count, *rest, **more)
        return found


def _is_vocabulary(item: Any) -> bool:
    return bool(item.types and item.types[0] == gguf.GGUFValueType.ARRAY and item.name.startswith("tokenizer."))


def _value(item: Any) -> Any:
    value = item.contents()
    return value.item() if isinstance(value, np.generic) else value


def _tensor(path: Path, tensor: Any) -> GgufTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    _, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), tensor.tensor_type)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"tensor {tensor.name!r} in {path.name} is of type {tensor.tensor_type.name}, which gguf cannot dequantize",
            hint=WAY_OUT,
        ) from error
    return GgufTensor(path, shape, tensor.tensor_type.name, int(tensor.data_offset))


def named_tensors(file: GgufFile, model_type: str) -> dict[str, GgufTensor]:
    """The tensors by their Hugging Face names, in Hugging Face's form; those without one keep their GGUF name.

    Raises UnsupportedModelError for an architecture that has no name map, CheckpointError for senseless head counts.
    """
    family = family_of(model_type)
    layers = file.get("block_count")
    if not isinstance(layers, int) or not 0 < layers <= len(file.tensors):
        raise _damaged(file.path, f"it says that {len(file.tensors)} tensors make {layers} layers")
    paths = [*{linear.path for linear in family.linears}, *NORMS]
    names = _name_map(file, layers)
    known: dict[str, str] = {}
    for stem in [*ENDS, *(f"model.layers.{layer}.{path}" for layer in range(layers) for path in paths)]:
        stored = names.get_name(stem)
        if stored is not None:
            known |= {f"{stored}{suffix}": f"{stem}{suffix}" for suffix in (".weight", ".bias")}
    heads = _interleaved(file, layers) if file.architecture == "llama" else {}
    found = {}
    for stored, tensor in file.tensors.items():
        shift = -1.0 if family.offset_norms and stored.endswith("norm.weight") else 0.0
        count = heads.get(stored.rpartition(".")[0], 0)
        if count and tensor.shape[0] % (2 * count):
            raise _damaged(file.path, f"{stored} has {tensor.shape[0]} rows for {count} heads")
        found[known.get(stored, stored)] = replace(tensor, interleaved=count, shift=shift)
    return found


def _name_map(file: GgufFile, layers: int) -> Any:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if file.architecture not in kinds:
        raise UnsupportedModelError(f"{file.path}: GGUF has no architecture {file.architecture!r}", hint=WAY_OUT)
    return gguf.get_tensor_name_map(kinds[file.architecture], layers)


def _interleaved(file: GgufFile, layers: int) -> dict[str, int]:
    """The number of heads by the stem of every tensor with interleaved rows."""
    counts: dict[str, int] = {}
    for stem, key in INTERLEAVED.items():
        count = file.get(key, file.get("attention.head_count"))
        if not isinstance(count, int) or count < 1:
            raise _damaged(file.path, f"{key} is {count}")
        counts |= {stem.format(layer): count for layer in range(layers)}
    return counts


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read: {reason}", hint="the file is truncated or damaged; download it again"
    )
