"""A Hugging Face model directory, read tensor by tensor and row by row.

Nothing stays mapped between reads: pages of a mapped file count as resident memory, so a shard is opened, sliced and closed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from rqc.runtime.errors import CheckpointError, UnsupportedModelError

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its shard, shape and safetensors dtype."""

    shard: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model directory (safetensors, single or sharded)."""

    directory: Path
    tensors: dict[str, TensorInfo] = field(repr=False)

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Read the headers of all shards; no weight is read.

        Raises CheckpointError when the directory, a shard or a tensor is missing, truncated or pickled.
        """
        directory = Path(directory)
        tensors: dict[str, TensorInfo] = {}
        for shard, expected in _shards(directory).items():
            found = dict(_headers(shard))
            for name in expected - found.keys():
                raise CheckpointError(
                    f"{shard.name} lacks tensor {name!r} that the index promises", hint="download the checkpoint again"
                )
            tensors.update(found)
        return cls(directory, tensors)

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
        with _opened(info.shard, "pt" if info.dtype == "BF16" else "np") as shard:
            if info.shape:
                raw = shard.get_slice(name)[start : info.shape[0] if stop is None else stop]
            else:
                raw = shard.get_tensor(name)
            values = raw.double().numpy() if info.dtype == "BF16" else np.asarray(raw, dtype=np.float64)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"tensor {name!r} in {info.shard.name} holds NaN or infinite values",
                hint="the checkpoint is damaged; download it again or export it anew",
            )
        return values

    def fingerprint(self) -> str:
        """sha256 over config.json and, per tensor, its name, type, shape and first row: the identity of a base model."""
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            digest.update(self.read(name, 0, 1).tobytes())
        return digest.hexdigest()


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
    raise CheckpointError(f"{directory} holds no weights", hint="a model directory has *.safetensors beside config.json")


def _indexed_shards(index: Path) -> dict[Path, set[str]]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error}", hint="download it again") from error
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise CheckpointError(f"{index.name} names a shard outside of its directory: {file!r}", hint="do not use it")
        shards.setdefault(index.parent / file, set()).add(name)
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"shard {shard.name} is missing in {index.parent}", hint="download the missing shard")
    return shards


def _headers(shard: Path) -> Iterator[tuple[str, TensorInfo]]:
    with _opened(shard, "np") as opened:
        for name in opened.keys():  # noqa: SIM118 (a safetensors handle is not iterable)
            part = opened.get_slice(name)
            dtype = str(part.get_dtype())
            if dtype not in FLOAT_TYPES:
                raise UnsupportedModelError(
                    f"tensor {name!r} in {shard.name} is of type {dtype}; rqc quantizes float checkpoints",
                    hint="start from the float (fp32, fp16, bf16) checkpoint of this model",
                )
            yield name, TensorInfo(shard, tuple(part.get_shape()), dtype)


@contextmanager
def _opened(shard: Path, framework: str) -> Iterator[Any]:
    try:
        with safetensors.safe_open(shard, framework) as opened:  # type: ignore[no-untyped-call]
            yield opened
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard} cannot be read: {error}", hint="the file is truncated or damaged; download it again") from error


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a model directory. Raises CheckpointError when there is none or it is no JSON object."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a model directory", hint="give a Hugging Face model directory")
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json", hint="give a Hugging Face model directory")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", hint="download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object", hint="download it again")
    return config
