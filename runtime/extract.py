"""The raw parts of an engine as a directory: graph.onnx with its weights beside it, tokenizer …, or its plans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rqc.runtime.container import EngineFile
from rqc.runtime.directories import Part, new_directory, write_directory
from rqc.runtime.errors import InputError, ResourceError, TargetError
from rqc.runtime.zip_layout import GRAPH

FORMATS = (None, "trt")


def extract(engine: str | Path, directory: str | Path, format: str | None = None) -> list[Path]:
    """Write every entry of `engine` into `directory`, new or empty; the paths written.

    format "trt": its TensorRT plans alone, as NAME.plan for trtexec or Triton, and beside each a NAME.json with its
    profile, compute capabilities, version and tensors. Otherwise graph.onnx is rebound to read its weights from
    weights.bin beside it, so any ONNX Runtime loads it; every other entry comes out byte for byte, checked against its
    hash. All or nothing: on an error `directory` is as it was. Raises InputError if `directory` is in use or cannot be
    written, ResourceError if the disk is full, TargetError if there is no plan.
    """
    if format not in FORMATS:
        raise InputError(f"format is {format!r}", hint='format is "trt", or none for every part')
    target = new_directory(directory)
    with EngineFile.open(engine) as file:
        parts = _plans(file) if format == "trt" else _entries(file)
        try:
            return write_directory(parts, target)
        except OSError as error:
            problem = f"the parts of {engine} cannot be written to {target}: {error.strerror}"
            raise ResourceError(problem, hint=f"{file.size_bytes} bytes are needed, in a writable place") from error


def _entries(file: EngineFile) -> dict[str, Part]:
    """Every entry by its name."""
    parts: dict[str, Part] = {name: partial(file.chunks, name) for name in file.names()}
    return parts | {GRAPH: lambda: [file.standalone_graph()]}


def _plans(file: EngineFile) -> dict[str, Part]:
    """The raw plans and what each is, by name. Raises TargetError where there is none."""
    records = file.manifest.get("plans") or []
    target = str(file.manifest.get("target"))
    if not records:
        pending = target.startswith("tensorrt")
        raise TargetError(
            f"{file.path} has no TensorRT plan{' yet' if pending else ''}",
            hint=f"rqc build {file.path} --target {target if pending else 'tensorrt-rtx'}",
        )
    parts: dict[str, Part] = {}
    for record in records:
        parts[f"{record['name']}.plan"] = partial(file.chunks, record["entry"])
        parts[f"{record['name']}.json"] = partial(_about, file, record)
    return parts


def _about(file: EngineFile, record: Mapping[str, Any]) -> list[bytes]:
    """What a program needs that runs the plan without rqc, as JSON."""
    keys = ("name", "flavour", "version", "sms", "profile", "verified", "reason")
    context = record["profile"]["context"]
    about = {**{key: record.get(key) for key in keys}, "tensors": plan_tensors(file.manifest, context)}
    return [json.dumps(about, indent=1).encode() + b"\n"]


def plan_tensors(manifest: Mapping[str, Any], context: int) -> list[dict[str, Any]]:
    """Inputs and outputs of a plan whose caches hold `context` tokens: name, type, shape (-1: of the profile).

    An output that "shares" is to be bound to the address of that input, which the plan updates in place.
    """
    graph = manifest.get("graph") or {}
    layers = int(graph.get("layers", 0))
    heads, dims = (_per_layer(graph.get(key, -1), layers) for key in ("kv_heads", "head_dim"))
    names = (manifest.get("adapter") or {}).get("names", [])
    whole = ("input_ids", "position_ids", "logits_positions")
    tensors: list[dict[str, Any]] = [_tensor(name, "input", "int64", [-1, -1]) for name in whole]
    if names:
        tensors.append(_tensor("adapter_gates", "input", "float32", [-1, len(names)]))
    tensors.append(_tensor("logits", "output", "float32", [-1, -1, graph.get("vocab_size", -1)]))
    for layer in range(layers):
        for kind in ("key", "value"):
            past = f"past_key_values.{layer}.{kind}"
            form = (str(graph.get("cache_dtype")), [-1, heads[layer], context, dims[layer]])
            tensors.append(_tensor(past, "input", *form))
            tensors.append({**_tensor(f"present.{layer}.{kind}", "output", *form), "shares": past})
    return tensors


def _tensor(name: str, mode: str, kind: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "mode": mode, "type": kind, "shape": shape}


def _per_layer(value: Any, layers: int) -> list[int]:
    return [int(item) for item in value] if isinstance(value, list) else [int(value)] * layers
