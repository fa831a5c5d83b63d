"""Engines with one thing wrong and everything else right: hashes and places are those of the forged content."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from rqc.compiler.plan import write_engine
from rqc.runtime import engine_writer
from rqc.runtime.container import EngineFile
from rqc.runtime.zip_layout import MANIFEST, Entry, local_bytes, tail_bytes

FILES = {"config.json": b'{"a": 1}', "tokenizer.json": b"{}"}
GIVEN: dict[str, Any] = {
    "target": "onnx",
    "context_length": 128,
    "graph": {"cache": "shared", "layers": 1, "kv_heads": 2, "head_dim": 8, "cache_dtype": "float32", "vocab_size": 9},
    "generation": {"eos_token_ids": [2], "bos_token_id": None, "pad_token_id": 0, "add_bos": False},
}
Edit = Callable[[dict[str, Any]], object]


def model(seed: int = 0) -> ir.Model:
    """y = x W + b, both external; weights.bin has padding between them."""
    rng = np.random.default_rng(seed)
    initializers = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in {"W": (3, 300), "b": (300,)}.items()
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 300])],
        initializers,
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def parts(folder: Path) -> dict[str, bytes]:
    """The entries of a sound engine, which is written to `folder`."""
    write_engine(folder / "sound.plan", model(), GIVEN, FILES)
    with EngineFile.open(folder / "sound.plan", check=True) as engine:
        return {name: engine.read(name) for name in engine.names()}


def keep(manifest: dict[str, Any]) -> None:
    """The edit that changes nothing."""


def assemble(content: Mapping[str, bytes], edit: Edit = keep, wrong: str = "") -> bytes:
    """The engine file of these entries in this order; `edit` changes the manifest, or returns bytes to hold instead."""
    text = b""
    while True:
        sizes = [(name, len(text if name == MANIFEST else data)) for name, data in content.items()]
        entries = engine_writer._place(sizes)
        before, text = text, _manifest(content, entries, edit)
        if len(before) == len(text):
            return join({**content, MANIFEST: text}, entries, wrong)


def _manifest(content: Mapping[str, bytes], entries: list[Entry], edit: Edit) -> bytes:
    manifest = json.loads(content[MANIFEST])
    manifest["entries"] = {
        entry.name: {
            "offset": entry.start,
            "size": entry.size,
            "sha256": hashlib.sha256(content[entry.name]).hexdigest(),
        }
        for entry in entries
        if entry.name != MANIFEST
    }
    edited = edit(manifest)
    return edited if isinstance(edited, bytes) else json.dumps(manifest).encode()


def join(content: Mapping[str, bytes], entries: list[Entry], wrong: str = "") -> bytes:
    """The ZIP file of these entries at these places; the CRC-32 of the entry `wrong` is that of nothing."""
    sealed = [replace(entry, crc=zlib.crc32(content[entry.name] * (entry.name != wrong))) for entry in entries]
    pieces = [local_bytes(entry) + content[entry.name] for entry in sealed]
    return b"".join(pieces) + tail_bytes(sealed)
