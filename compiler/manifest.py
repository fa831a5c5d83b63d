"""What an engine says of itself: manifest.json and the files that travel with the weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from math import prod
from typing import Any

import onnx_ir as ir

from rqc.compiler.importer import Imported
from rqc.compiler.recipe import Recipe
from rqc.compiler.targets.grids import token_grid
from rqc.compiler.targets.tensorrt import has_static_activations
from rqc.compiler.text import read_tokenizer
from rqc.compiler.tokenizer_files import (
    TOKENIZER_FILES,
    check_template,
    converted_tokenizer,
    optional_object,
    special_ids,
)
from rqc.compiler.widths import table_widths
from rqc.models.algebra import dimensions
from rqc.models.description import EMBEDDING, HEAD, Architecture
from rqc.models.quantized import LazyQuantized
from rqc.models.rotation import Rotation
from rqc.models.rotation_file import ROTATION_FILE, RotationFile
from rqc.models.weights import Weight
from rqc.passes.base import (
    ADAPTER,
    BRANCH_A,
    BRANCH_B,
    CLIP,
    LINEAR,
    OFFSET,
    ONLINE,
    QUANTIZED,
    STORAGE,
    WEIGHT,
    sizes,
)
from rqc.runtime.profiles import Profile

OTHER_FILES = ("config.json", "generation_config.json")
PACKAGES = ("onnx", "onnx-ir", "mobius-onnx", "numpy")


def manifest_of(
    imported: Imported,
    model: ir.Model,
    recipe: Recipe,
    rotation: Rotation,
    adapter: dict[str, Any] | None = None,
    compensation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """manifest.json for a lowered graph; `adapter` is the record of the one that was merged, `compensation` those of
    what is zero and of what makes up for rounding."""
    a = imported.description.architecture
    parameters = parameter_count(imported)
    weight_bytes = stored_bytes(model)
    widths = table_widths(recipe, a)
    return {
        "target": recipe.target,
        **_tensorrt(recipe, a),
        "scheme": recipe.scheme.name,
        **({"weights": recipe.scheme.weights} if recipe.scheme.small_floats else {}),
        "group_size": recipe.group_size,
        "symmetric": recipe.symmetric,
        **({"positive_scales": True} if recipe.positive else {}),
        "clip": recipe.clip,
        "method": recipe.method,
        **(compensation or {}),
        "rotation": {
            **rotation.to_json(),
            "basis": rotation.basis(dimensions(imported.description)) if rotation.sites else None,
        },
        "tied": recipe.tied if a.tied else None,
        "embedding_bits": widths[EMBEDDING],
        "head_bits": widths[HEAD],
        "adapter": adapter,
        "kv_cache": recipe.kv_cache,
        "kv_cache_grid": cache_grid(model, a.head_dim),
        "activations": activation_grid(recipe),
        **_activation_options(recipe),
        "context_length": a.context_length,
        "generation": special_ids(imported.checkpoint.directory, imported.config),
        "architecture": a.to_json(),
        "graph": graph_facts(model, imported),
        "parameters": parameters,
        "weight_bytes": weight_bytes,
        "bits_per_weight": round(8 * weight_bytes / parameters, 4),
        "layers": layers(model),
        "provenance": {
            "rqc": metadata.version("rqc"),
            "model": imported.checkpoint.fingerprint(),
            "packages": {name: metadata.version(name) for name in PACKAGES},
        },
    }


def cache_grid(model: ir.Model, size: int) -> str:
    """The grid on which keys and values lie, in the words of `inspect`; PyTorch's reference reproduces it."""
    if any("kv_cache_bit_width" in node.attributes for node in model.graph):
        return "int8 per kv head and channel, static scales from the calibration text, by the attention's kernel"
    caches = (value for value in model.graph.inputs if (value.name or "").startswith("past_key_values.0."))
    slots = {(value.name or "").rpartition(".")[2]: sizes(value)[-1] for value in caches}
    if "codes" not in slots:
        return "float"
    means = any(name.endswith(".mean") for name in model.graph.initializers)
    return (
        f"int{8 * slots['codes'] // size} per token and {size // slots['scales']} channels of a kv head, asymmetric"
        f"{', keys from their mean on the calibration text' * means}, in steps of the graph"
    )


def activation_grid(recipe: Recipe) -> str:
    """The grid on which activations lie, in the words of `inspect`; PyTorch's reference reproduces it."""
    bits = recipe.scheme.activation_bits
    if recipe.target != "onnx":
        return _tensorrt_grid(recipe)
    if bits == 8:
        return "int8 per token and weight block, by the kernel (MatMulNBits accuracy_level 4)"
    if recipe.scheme.quantizes_activations:
        return _per_token(recipe)
    return "float32"


def _per_token(recipe: Recipe) -> str:
    searched = ", clip searched per tensor on the calibration text" if recipe.activation_clip == "auto" else ""
    return f"{token_grid(recipe)}{searched}, quantize-dequantize in float32"


def _activation_options(recipe: Recipe) -> dict[str, Any]:
    """What of the activations' grid is not the default."""
    return {
        **({} if recipe.activation_symmetric else {"activation_symmetric": False}),
        **({} if recipe.activation_clip == 1 else {"activation_clip": recipe.activation_clip}),
    }


def _tensorrt(recipe: Recipe, architecture: Architecture) -> dict[str, Any]:
    """What only engines for TensorRT have: the type of floats, the shapes and capabilities to build for
    and, later, plans."""
    if recipe.target == "onnx":
        return {}
    profile = recipe.profile or Profile.of_model(architecture.context_length)
    sms = {"sms": list(recipe.sm)} if recipe.sm else {}
    return {"dtype": recipe.dtype, "profile": profile.to_json(), **sms, "plans": []}


def _tensorrt_grid(recipe: Recipe) -> str:
    if has_static_activations(recipe):
        return "int8 per tensor, static scales from the calibration text"
    if recipe.scheme.quantizes_activations:
        return _per_token(recipe)
    return {"fp16": "float16", "bf16": "bfloat16"}.get(recipe.dtype or "", "float32")


def graph_facts(model: ir.Model, imported: Imported) -> dict[str, Any]:
    """How the runtime must drive the graph."""
    a = imported.description.architecture
    shared = any(node.op_type in ("GroupQueryAttention", "TensorScatter") for node in model.graph)
    caches = [value for value in model.graph.inputs if (value.name or "").startswith("past_key_values.")]
    cache_type = next((value.dtype for value in caches if value.dtype is not None), ir.DataType.FLOAT)
    slots = ((heads * size, value.dtype or cache_type) for value in caches for _, heads, _, size in [sizes(value)])
    return {
        "cache": "shared" if shared else "concat",
        "layers": a.layers,
        "kv_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "cache_dtype": cache_type.numpy().name,
        "cache_bytes": sum(count * dtype.bitwidth // 8 for count, dtype in slots),
        "vocab_size": a.vocab_size,
    }


def parameter_count(imported: Imported) -> int:
    """Parameters of the model; a tied table counts once."""
    tensors = imported.checkpoint.tensors
    tied = imported.description.architecture.tied
    return sum(prod(info.shape) for name, info in tensors.items() if not (tied and name == HEAD))


def stored_bytes(model: ir.Model) -> int:
    """Bytes of weights in the engine: everything that came from the checkpoint and the adapter; constants of the graph
    do not count."""
    sizes: dict[object, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and any(key in tensor.meta for key in (QUANTIZED, WEIGHT, ADAPTER)):
            key = tensor.meta.get(STORAGE)
            sizes[id(tensor) if key is None else key] = tensor.nbytes
    return sum(sizes.values())


def layers(model: ir.Model) -> list[dict[str, Any]]:
    """Every linear and table, and what an adapter keeps beside them: what it is stored as and which operator runs it;
    online rotations counted by site."""
    rows = []
    for node in model.graph:
        if beside := _beside(node):
            rows.append(beside)
            continue
        form = next((form for value in node.inputs if (form := _form(node, value)) is not None), None)
        name = node.metadata_props.get(LINEAR)
        if form is not None and (name is not None or node.op_type in ("Gather", "GatherBlockQuantized")):
            clip = {"activation_clip": float(node.metadata_props[CLIP])} if CLIP in node.metadata_props else {}
            rows.append({"name": name or EMBEDDING, "op": node.op_type, **form, **clip})
    products = [node for node in model.graph if ONLINE in node.metadata_props and node.op_type == "MatMul"]
    online = Counter(node.metadata_props[ONLINE] for node in products)
    return rows + [{"name": f"online {site}", "op": "MatMul", "count": online[site]} for site in sorted(online)]


def _beside(node: ir.Node) -> dict[str, Any] | None:
    """The row of a product that runs beside a linear, of an adapter or to make up for rounding: a branch's factor or a
    correction of zero points."""
    for mark, kind in ((BRANCH_A, "branch A"), (BRANCH_B, "branch B"), (OFFSET, "correction")):
        if mark in node.metadata_props:
            name = f"{node.metadata_props[mark]} {kind}"
            if (form := _form(node, node.inputs[1])) is not None and "storage_bits" in form:
                return {"name": name, "op": node.op_type, **form}
            shape = [int(size) for size in reversed(sizes(node.inputs[1]))]
            return {"name": name, "op": node.op_type, "bits": 32, "shape": shape}
    return None


def _form(node: ir.Node, value: ir.Value | None) -> dict[str, Any] | None:
    """How the weight behind an input is stored, or None if there is none; a cast in between is looked through."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose" and LINEAR in node.metadata_props:
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    while producer is not None and producer.op_type in ("Cast", "DequantizeLinear"):
        value = producer.inputs[0]
        producer = value.producer() if value is not None else None
    if value is None or value.const_value is None:
        return None
    quantized, weight = value.const_value.meta.get(QUANTIZED), value.const_value.meta.get(WEIGHT)
    if isinstance(weight, Weight) and len(weight.shape) == 2:
        return {"bits": value.const_value.dtype.bitwidth, "shape": list(weight.shape)}
    if not isinstance(quantized, LazyQuantized):
        return None
    level, stored = node.attributes.get("accuracy_level"), node.attributes.get("bits")
    return {
        "bits": quantized.grid.bits,
        "storage_bits": stored.as_int() if stored is not None else value.const_value.dtype.bitwidth,
        "group_size": quantized.grid.group_size,
        "block_size": quantized.block,
        "symmetric": quantized.grid.symmetric,
        "accuracy_level": None if level is None else level.as_int(),
        "shape": list(quantized.shape),
    }


def check_files(imported: Imported) -> None:
    """Raise CheckpointError for a tokenizer or settings beside the weights that no engine could use."""
    directory = imported.checkpoint.directory
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        optional_object(directory / name)
    check_template(directory)
    read_tokenizer(directory)
    special_ids(directory, imported.config)


def companion_bytes(imported: Imported) -> int:
    """Bytes of the files that travel beside the weights."""
    paths = (imported.checkpoint.directory / name for name in (*TOKENIZER_FILES, *OTHER_FILES))
    return sum(path.stat().st_size for path in paths if path.is_file())


def engine_files(imported: Imported, report: dict[str, Any], rotation: Rotation) -> dict[str, bytes]:
    """The files of the model directory that a device needs, report.json, and the matrices of a learned rotation."""
    directory = imported.checkpoint.directory
    files = {
        name: (directory / name).read_bytes()
        for name in (*TOKENIZER_FILES, *OTHER_FILES)
        if (directory / name).is_file()
    }
    if "tokenizer.json" not in files:
        converted = converted_tokenizer(directory)
        if converted is not None:
            files["tokenizer.json"] = converted.to_str().encode()
    files["report.json"] = json.dumps(report, indent=1, sort_keys=True).encode()
    if rotation.learned is not None:
        files[ROTATION_FILE] = RotationFile(rotation, imported.checkpoint.fingerprint()).to_bytes()
    return files
