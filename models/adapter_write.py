"""Writing an adapter as an ordinary PEFT directory: any LoRA loader opens it on the model in the same basis."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rqc.models.adapter_basis import BASIS_FILE, ROTATION_FILE, AdapterBasis
from rqc.models.adapter_config import CONFIG_FILE
from rqc.models.adapter_tensors import tensor_bytes
from rqc.models.delta import Array, Delta
from rqc.runtime.errors import InputError, ResourceError

WEIGHTS_FILE = "adapter_model.safetensors"
RESIDUAL_FILE, START_FILE = "rqc_residual.safetensors", "rqc_start.safetensors"
MARK = "rqc_basis"
"""Key in the metadata of the weights: the hash of the basis, or "none"."""
_PREFIX = "base_model.model."


def write_adapter(
    directory: str | Path,
    deltas: Mapping[str, Delta],
    basis: AdapterBasis | None,
    *,
    torch_names: Mapping[str, str] | None = None,
    residual: Mapping[str, Delta] | None = None,
    start: Mapping[str, Delta] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    base_model: str = "",
) -> None:
    """Write updates, by their linears' weight names, as a PEFT LoRA directory in float32. Equal input, equal bytes.

    torch_names: weight name to the path of the PyTorch module, where that differs; several parts of one packed module
    stand there in the order of its rows. residual, start: those of `Adapter`. rslora: state alpha for α/√r. The files
    are written beside the directory and moved into it at the end; other files in it stay. Raises InputError for updates
    that no such directory holds, ResourceError for a full disk.
    """
    modules = _modules(deltas, torch_names or {})
    if (bool(residual), bool(start)) != ((False, False) if basis is None else (basis.residual, basis.start)):
        raise InputError("an adapter is written with the residual and start of its basis", hint="pass both or neither")
    metadata = {"format": "pt"} | ({} if basis is None else {MARK: basis.mark})
    files = {CONFIG_FILE: _config(modules, rslora=rslora, dropout=dropout, base_model=base_model)}
    if basis is not None:
        files[BASIS_FILE] = basis.to_bytes()
        if (rotation := basis.rotation_bytes()) is not None:
            files[ROTATION_FILE] = rotation
    for name, repaired in ((RESIDUAL_FILE, residual), (START_FILE, start)):
        if repaired:
            plain = {weight: Delta(one.a, one.b * one.scale) for weight, one in repaired.items()}
            files[name] = tensor_bytes(_tensors(_modules(plain, torch_names or {})), {"format": "pt"})
    files[WEIGHTS_FILE] = tensor_bytes(_tensors(modules), metadata)
    _replace(Path(directory), files)


def _modules(deltas: Mapping[str, Delta], torch_names: Mapping[str, str]) -> dict[str, Delta]:
    """Updates by the path of their PyTorch module, the parts of packed ones put together."""
    packed: dict[str, list[str]] = defaultdict(list)
    for name, path in torch_names.items():
        packed[path].append(name)
    modules: dict[str, Delta] = {}
    for name, delta in deltas.items():
        path = torch_names.get(name, name.removesuffix(".weight"))
        if path in modules:
            continue
        parts = packed.get(path, [name])
        if missing := [part for part in parts if part not in deltas]:
            raise InputError(
                f"{path} packs {', '.join(parts)}, and the adapter has no part for {missing[0]}",
                hint="give all parts, those without a change with B = 0",
            )
        modules[path] = delta if len(parts) == 1 else _packed([deltas[part] for part in parts])
    if not modules:
        raise InputError("an adapter without any update", hint="choose target modules that the model has")
    return dict(sorted(modules.items()))


def _packed(parts: list[Delta]) -> Delta:
    """One update of stacked rows: with A shared where it is the same, else with all A's stacked."""
    magnitudes = [part.magnitude for part in parts if part.magnitude is not None]
    if magnitudes and len(magnitudes) < len(parts):
        raise InputError("DoRA on a part of a packed linear alone", hint="train all parts of it, or none, with DoRA")
    magnitude = np.concatenate(magnitudes) if magnitudes else None
    first = parts[0]
    if all(part.scale == first.scale and np.array_equal(part.a, first.a) for part in parts):
        return Delta(first.a, np.concatenate([part.b for part in parts]), first.scale, magnitude)
    b = np.zeros((sum(part.shape[0] for part in parts), sum(part.rank for part in parts)))
    row = column = 0
    for part in parts:
        b[row : row + part.shape[0], column : column + part.rank] = part.scale * part.b
        row, column = row + part.shape[0], column + part.rank
    return Delta(np.concatenate([part.a for part in parts]), b, 1.0, magnitude)


def _tensors(modules: Mapping[str, Delta]) -> dict[str, Array]:
    """The tensors under the names that plain peft gives them."""
    tensors: dict[str, Array] = {}
    for path, delta in modules.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = delta.a
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = delta.b
        if delta.magnitude is not None:
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = delta.magnitude
    return tensors


def _config(modules: Mapping[str, Delta], *, rslora: bool, dropout: float, base_model: str) -> bytes:
    """adapter_config.json: the commonest rank and alpha, and patterns for the other modules."""
    dora = {delta.magnitude is not None for delta in modules.values()}
    if len(dora) > 1:
        raise InputError("DoRA on some linears and plain LoRA on others", hint="peft's directories hold one of the two")
    ranks = {path: delta.rank for path, delta in modules.items()}
    alphas = {p: _number(d.scale * (math.sqrt(d.rank) if rslora else d.rank)) for p, d in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    values: dict[str, Any] = {
        "base_model_name_or_path": base_model or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "alpha_pattern": {path: own for path, own in alphas.items() if own != alpha},
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
        "target_modules": _targets(modules),
        "task_type": "CAUSAL_LM",
        "use_dora": dora == {True},
        "use_rslora": rslora,
    }
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _targets(modules: Mapping[str, Delta]) -> list[str]:
    """target_modules: last names where every layer has all of them, else whole paths (peft would add empty ones)."""
    layers: dict[str, set[str]] = defaultdict(set)
    for path in modules:
        head, _, name = path.rpartition(".")
        layers[name].add(head.split(".layers.")[-1].split(".")[0])
    expected = {str(layer) for layer in range(max(len(own) for own in layers.values()))}
    uniform = all(own == expected for own in layers.values())
    return sorted(layers) if uniform else sorted(modules)


def _number(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def _replace(directory: Path, files: Mapping[str, bytes]) -> None:
    """Put the files into the directory, the weights last; without these it is no adapter, so none is ever a mixture."""
    with _explained(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = directory.parent / f".{directory.name}.rqc-{os.getpid()}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            for name, content in files.items():
                _write(staging / name, content)
            if not directory.exists():
                os.replace(staging, directory)
            else:
                for name in (WEIGHTS_FILE, BASIS_FILE, ROTATION_FILE, RESIDUAL_FILE, START_FILE, "adapter_model.bin"):
                    (directory / name).unlink(missing_ok=True)
                for name in files:
                    os.replace(staging / name, directory / name)
            _sync(directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that name cause and way out."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"no space for {directory}", hint="free some, or write elsewhere") from error
        raise InputError(
            f"{directory} cannot be written ({error.strerror})", hint="choose a writable folder"
        ) from error
