"""A model directory, read tensor by tensor and row by row: safetensors (one file or shards) or one GGUF file.

Nothing stays mapped between reads: pages of a mapped file count as resident memory, so a shard is opened, sliced and
closed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
from numpy.typing import NDArray

from rqc.models.gguf_files import directory_of, gguf_of, rope_is_scaled, scaled_rope
from rqc.models.gguf_source import named_tensors, read_gguf
from rqc.models.json_files import check_config, read_object
from rqc.runtime.errors import CheckpointError, UnsupportedModelError

GGUF = ".gguf"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}


class TensorInfo(Protocol):
    """Where one tensor lies: its file, its shape, its type there, and how its rows are read."""

    @property
    def shard(self) -> Path: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) along the first axis; all of a tensor without axes. Raises CheckpointError."""


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor of a safetensors file."""

    shard: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop), exact: bfloat16 goes through PyTorch, NumPy has no such type."""
        with _opened(self.shard, "pt" if self.dtype == "BF16" else "np") as shard:
            raw = shard.get_slice(self.name)[start:stop] if self.shape else shard.get_tensor(self.name)
            return raw.double().numpy() if self.dtype == "BF16" else np.asarray(raw, dtype=np.float64)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model directory by their Hugging Face names.

    `directory` holds config.json and the tokenizer: the model's own, or for a GGUF one that was made from it.
    """

    directory: Path
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Read the headers of a model directory (or of a GGUF file); no weight is read.

        Raises CheckpointError when the directory, a shard or a tensor is missing, truncated or pickled,
        UnsupportedModelError when rqc does not know the kind of a tensor or of a GGUF.
        """
        directory = model_directory(model)
        gguf = gguf_of(directory)
        return cls(directory, _safetensors(directory) if gguf is None else _gguf(gguf, read_config(directory)))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """The header entry of a tensor. Raises CheckpointError when there is none."""
        if name not in self.tensors:
            raise CheckpointError(
                f"tensor {name!r} is missing in {self.directory}",
                hint="the checkpoint does not match its config.json; download it again",
            )
        return self.tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float64]:
        """Rows [start, stop) of a tensor as float64. Raises CheckpointError on NaN or infinite values."""
        info = self.info(name)
        length = info.shape[0] if info.shape else 1
        values = info.rows(start, length if stop is None else min(stop, length))
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"tensor {name!r} in {info.shard.name} holds NaN or infinite values",
                hint="the checkpoint is damaged; download it again or export it anew",
            )
        return values

    def fingerprint(self) -> str:
        """sha256 over config.json and, per tensor, its name, type, shape and first row: the identity of a base
        model."""
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            digest.update(self.read(name, 0, 1).tobytes())
        return digest.hexdigest()


def model_directory(model: str | Path) -> Path:
    """The directory that holds a model's config.json and tokenizer, by the directory or GGUF file that was named.

    Safetensors win over a GGUF beside them. A GGUF (alone in its directory or named itself) gets a directory made from
    what it says; files beside it win over those made. Raises CheckpointError when there is no such directory, and
    when it holds several GGUF files of which none is named.
    """
    path = Path(model)
    if path.suffix == GGUF and path.is_file():
        return directory_of(path.absolute())
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a model directory", hint="give a Hugging Face model directory")
    found = sorted(path.glob(f"*{GGUF}"))
    if not found or any(path.glob("*.safetensors")):
        return path
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds several GGUF files: {', '.join(file.name for file in found)}",
            hint="name the file itself instead of the directory",
        )
    return directory_of(found[0].absolute())


def _gguf(path: Path, config: dict[str, Any]) -> Mapping[str, TensorInfo]:
    tensors = named_tensors(read_gguf(path), str(config.get("model_type")))
    derived = scaled_rope(tensors) if rope_is_scaled(config) else set()
    return {name: tensor for name, tensor in tensors.items() if name not in derived}


def _safetensors(directory: Path) -> Mapping[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard, expected in _shards(directory).items():
        found = dict(_headers(shard))
        for name in sorted(expected - found.keys()):
            raise CheckpointError(
                f"{shard.name} lacks tensor {name!r} that the index promises", hint="download the checkpoint again"
            )
        tensors.update(found)
    return tensors


def _shards(directory: Path) -> dict[Path, set[str]]:
    """Every shard and the tensor names that the index expects in it (none without an index)."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_shards(index)
    single = directory / "model.safetensors"
    if single.is_file():
        return {single: set()}
    loose = sorted(directory.glob("*.safetensors"))
    if loose:
        return {shard: set() for shard in loose}
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLED)
    if pickled:
        raise CheckpointError(
            f"{directory} holds pickled weights ({pickled[0]}), which can run code when they are read",
            hint="convert them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
        )
    raise CheckpointError(
        f"{directory} holds no weights", hint="a model directory has *.safetensors beside config.json, or one GGUF file"
    )


def _indexed_shards(index: Path) -> dict[Path, set[str]]:
    try:
        weight_map = read_object(index)["weight_map"]
        if not isinstance(weight_map, dict) or not all(file and isinstance(file, str) for file in weight_map.values()):
            raise TypeError("weight_map does not give a file for every tensor")
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error}", hint="download it again") from error
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise CheckpointError(
                f"{index.name} names a shard outside of its directory: {file!r}", hint="do not use it"
            )
        shards.setdefault(index.parent / file, set()).add(name)
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"shard {shard.name} is missing in {index.parent}", hint="download the missing shard")
    return shards


def _headers(shard: Path) -> Iterator[tuple[str, SafetensorsTensor]]:
    with _opened(shard, "np") as opened:
        for name in opened.keys():  # noqa: SIM118 (a safetensors handle is not iterable)
            part = opened.get_slice(name)
            dtype = str(part.get_dtype())
            if dtype not in FLOAT_TYPES:
                raise UnsupportedModelError(
                    f"tensor {name!r} in {shard.name} is of type {dtype}; rqc quantizes float checkpoints",
                    hint="start from the float (fp32, fp16, bf16) checkpoint of this model",
                )
            yield name, SafetensorsTensor(shard, name, tuple(part.get_shape()), dtype)


@contextmanager
def _opened(shard: Path, framework: str) -> Iterator[Any]:
    if shard.exists() and not shard.is_file():  # opening a named pipe would wait forever
        raise CheckpointError(f"{shard} cannot be read: it is no regular file", hint="download it again")
    try:
        with safetensors.safe_open(shard, framework) as opened:
            yield opened
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{shard} cannot be read: {error}", hint="the file is truncated or damaged; download it again"
        ) from error


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a model directory. Raises CheckpointError when there is none, it is no JSON object, or what it
    says can be true of no model."""
    directory = model_directory(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json", hint="give a Hugging Face model directory")
    config = read_object(path)
    check_config(config, path)
    return config
