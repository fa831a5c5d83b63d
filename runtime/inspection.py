"""What is inside an engine: scheme, rotation, sizes, memory at a context, how it is executed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rqc.runtime.container import EngineFile
from rqc.runtime.errors import InputError

_FLOATS = {
    "fp8": "weights are 8-bit floats (e4m3), with one scale per output channel",
    "nvfp4": "weights are 4-bit floats (e2m1) in blocks of 16, with 8-bit float scales (e4m3) and one scale per tensor",
}
"""Weights of small floats, by what the manifest calls them."""
_NO_FALLBACK = "it runs by its plan alone: ONNX Runtime has no kernels for 4-bit floats on a CPU (w4a16 runs there too)"
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class Inspection:
    """An engine's manifest with the sizes of its file.

    weight_bytes: size of weights.bin. context: tokens for which memory is told. checked: whether all hashes were.
    """

    path: str
    manifest: Mapping[str, Any]
    size_bytes: int
    weight_bytes: int
    context: int
    checked: bool

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        """One record per weight (name, bits, storage_bits, group_size, op, shape) and per rotation that stays in it."""
        return list(self.manifest.get("layers", []))

    @property
    def plans(self) -> list[Mapping[str, Any]]:
        """One record per TensorRT plan."""
        return list(self.manifest.get("plans") or [])

    def to_json(self) -> dict[str, Any]:
        """The keys of the interface, and beside them what else is known."""
        manifest = self.manifest
        rotation = manifest.get("rotation")
        keys = ("format_version", "target", "scheme", "group_size", "method", "adapter", "kv_cache", "parameters")
        more = (
            "symmetric",
            "clip",
            "tied",
            "context_length",
            "architecture",
            "generation",
            "graph",
            "compensation",
            "sparsity",
        )
        return {
            **{key: manifest.get(key) for key in keys},
            "rotation": None if rotation is None else dict(rotation),
            "size_bytes": self.size_bytes,
            "weight_bytes": self.weight_bytes,
            "bits_per_weight": self.bits_per_weight,
            "layers": [dict(layer) for layer in self.layers],
            "provenance": manifest.get("provenance"),
            **{key: manifest.get(key) for key in more},
            "memory": self.memory(),
            "execution": self.execution(),
            "plans": [{**plan, "size_bytes": manifest["entries"][plan["entry"]]["size"]} for plan in self.plans],
            "entries": {name: entry["size"] for name, entry in manifest["entries"].items()},
            "checked": self.checked,
        }

    @property
    def bits_per_weight(self) -> float | None:
        """Bits in the file for each parameter of the model, scales and all."""
        parameters = self.manifest.get("parameters")
        return 8 * self.weight_bytes / parameters if parameters else self.manifest.get("bits_per_weight")

    def memory(self) -> dict[str, int]:
        """Bytes at `context` tokens of one sequence, an estimate without ONNX Runtime's scratch buffers.

        weights are mapped pages of the file, which the system can drop; packed copies and the cache are private.
        """
        packed = copied_bytes(self.manifest, self.layers)
        cache = cache_bytes(self.manifest.get("graph", {}), self.context)
        total = self.weight_bytes + packed + cache
        return {
            "context": self.context,
            "weights": self.weight_bytes,
            "packed_copies": packed,
            "kv_cache": cache,
            "kv_cache_per_1000_tokens": cache_bytes(self.manifest.get("graph", {}), 1000),
            "total": total,
        }

    def execution(self) -> list[str]:
        """How the target executes what it has no native arithmetic for, in sentences."""
        stated = self.manifest.get("execution")
        return list(stated) if isinstance(stated, list) else execution_notes(self.manifest, self.layers)

    def to_text(self, *, layers: bool = False) -> str:
        """For a person; `layers` adds a line for each weight."""
        width = 16
        lines = [f"{name:<{width}}{value}" for name, value in self._rows()]
        lines += [f"{'execution' if not place else '':<{width}}{note}" for place, note in enumerate(self.execution())]
        return "\n".join(lines + (["", *layer_table(self.layers)] if layers else []))

    def _rows(self) -> list[tuple[str, str]]:
        manifest, memory = self.manifest, self.memory()
        bits = self.bits_per_weight
        provenance = manifest.get("provenance") or {}
        return [
            ("engine", f"{self.path}, format {manifest.get('format_version')}{', every hash right' * self.checked}"),
            ("target", str(manifest.get("target"))),
            *_plan_rows(manifest, self.plans),
            ("scheme", _scheme_text(manifest)),
            ("rotation", _rotation_text(manifest.get("rotation"))),
            ("adapter", _adapter_text(manifest.get("adapter"))),
            *_compensation_rows(manifest),
            ("model", _model_text(manifest)),
            ("size", f"{size_text(self.size_bytes)}, weights {size_text(self.weight_bytes)}"),
            ("bits per weight", "unknown" if bits is None else f"{bits:.2f}"),
            *_width_rows(self.layers),
            ("kv cache", f"{_cache_text(manifest)}, {size_text(memory['kv_cache_per_1000_tokens'])} for 1,000 tokens"),
            ("context", f"{manifest.get('context_length')} tokens"),
            *_memory_rows(memory),
            ("made by", f"rqc {provenance.get('rqc')}"),
            ("weights kept as", kinds_text(self.layers)),
        ]


def inspect_engine(engine: str | Path, *, check: bool = False, context: int | None = None) -> Inspection:
    """Open `engine` and tell what it holds. check: hash everything, the weights too.

    context: tokens for the memory estimate, by default the engine's context length. Raises EngineFormatError for a bad
    file, InputError for a context that the engine does not have.
    """
    with EngineFile.open(engine, check=check) as file:
        manifest = file.manifest
        longest = int(manifest["context_length"])
        if context is not None and not 1 <= context <= longest:
            raise InputError(f"a context of {context} tokens", hint=f"this engine has contexts from 1 to {longest}")
        weights = int(manifest["entries"]["weights.bin"]["size"])
        return Inspection(str(engine), manifest, file.size_bytes, weights, context or longest, check)


def copied_bytes(manifest: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of private copies of weights that ONNX Runtime makes on a CPU when it loads an engine.

    float16 weights are widened to float32 and packed; a tied table is then there as a table and as a packed head.
    8-bit floats are written out as float32, tables with them; 4-bit ones do not run on a CPU.
    """
    if manifest.get("weights") == "nvfp4":
        return 0
    if manifest.get("weights") == "fp8":
        return sum(4 * math.prod(map(int, layer["shape"])) for layer in layers if "shape" in layer)
    if manifest.get("scheme") != "fp16":
        return sum(packed_bytes(layer) for layer in layers)
    architecture = manifest.get("architecture") or {}
    head = int(architecture.get("vocab_size", 0)) * int(architecture.get("hidden_size", 0))
    return 4 * (int(manifest.get("parameters", 0)) + head * bool(architecture.get("tied")))


def packed_bytes(layer: Mapping[str, Any]) -> int:
    """Bytes of the packed copy of one weight.

    MatMulNBits lays codes out anew, at accuracy_level 4 with a float scale and a float block sum beside each block; a
    float matrix product packs its matrix. A gather reads the file's own pages.
    """
    op, shape = str(layer.get("op", "")), layer.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        return 0
    n, k = int(shape[0]), int(shape[1])
    if op == "MatMulNBits":
        block = int(layer["block_size"])
        beside = 8 if layer.get("accuracy_level") == 4 else 0
        return n * math.ceil(k / block) * (block * int(layer["storage_bits"]) // 8 + beside)
    if op == "MatMul" and layer.get("storage_bits") in (4, 8):  # a TensorRT graph's, which becomes MatMulNBits
        return n * k * int(layer["storage_bits"]) // 8
    return 4 * n * k if "MatMul" in op else 0


def cache_bytes(graph: Mapping[str, Any], context: int) -> int:
    """Bytes of keys and values of one sequence of `context` tokens; a cache that grows by copying exists twice."""
    return token_bytes(graph) * context * (2 if graph.get("cache") == "concat" else 1)


def token_bytes(graph: Mapping[str, Any]) -> int:
    """Bytes of keys and values of one token, in all layers, scales included; engines of old do not state them."""
    if "cache_bytes" in graph:
        return int(graph["cache_bytes"])
    count = int(graph.get("layers", 0))
    heads, dims = (_per_layer(graph.get(key, 0), count) for key in ("kv_heads", "head_dim"))
    return sum(2 * h * d for h, d in zip(heads, dims, strict=True)) * _BYTES.get(str(graph.get("cache_dtype")), 4)


def execution_notes(manifest: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is stored or computed in another form than the scheme's name says."""
    if manifest.get("target", "onnx") != "onnx":
        return tensorrt_notes(manifest, layers)
    notes = []
    scheme = str(manifest.get("scheme"))
    found = re.fullmatch(r"w(\d+)a(\d+)", scheme)
    activation = int(found.group(2)) if found else 16
    if scheme == "fp16":
        notes.append("weights are stored as float16; ONNX Runtime widens them to float32 when it loads them")
    elif activation == 16:
        notes.append("activations and accumulation are float32")
    elif activation == 8:
        notes.append("activations are rounded to int8 per token and block inside MatMulNBits (accuracy_level 4)")
    else:
        notes.append(f"activations are {manifest.get('activations')}, then multiplied as floats")
    for bits, storage in sorted({(layer.get("bits"), layer.get("storage_bits")) for layer in layers}, key=str):
        if bits is None or storage is None or bits == storage:
            continue
        planes = f"run as two {storage}-bit planes: 8-bit codes have no fast kernel at float accumulation"
        notes.append(f"{bits}-bit weights {planes if bits > storage else f'are stored in {storage} bits'}")
    if found and manifest.get("group_size") == -1:
        notes.append("one scale per output channel is stored as blocks of equal scale")
    return notes


def tensorrt_notes(manifest: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """How TensorRT and, where no plan runs, ONNX Runtime compute an engine of a TensorRT target."""
    weights = manifest.get("weights")
    bits = {(layer["bits"], layer["storage_bits"]) for layer in layers if "bits" in layer and "storage_bits" in layer}
    return [
        f"computed in {manifest.get('dtype', 'fp16')}, activations: {manifest.get('activations')}",
        *([_FLOATS[weights]] if weights in _FLOATS else []),
        _NO_FALLBACK
        if weights == "nvfp4"
        else "where no plan runs, ONNX Runtime computes the same graph on the CPU with float products",
        *(f"{own}-bit weights are stored in {stored} bits" for own, stored in sorted(bits) if own != stored),
    ]


def layer_table(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """One aligned line for each weight."""
    clips = ("activation_clip",) if any("activation_clip" in layer for layer in layers) else ()
    names = ("name", "bits", "storage_bits", "group_size", "op", "accuracy_level", *clips, "shape", "count")
    rows: list[tuple[str, ...]] = [names, *(tuple(_cell(layer.get(name)) for name in names) for layer in layers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def kinds_text(layers: Sequence[Mapping[str, Any]]) -> str:
    """How many weights have which form, such as "210 x 4-bit MatMulNBits", and the rotations that stay in the graph."""
    weights = {(layer.get("name"), layer.get("bits"), str(layer.get("op"))) for layer in layers if "count" not in layer}
    counts = Counter((bits, op) for _, bits, op in sorted(weights, key=str))
    kinds = [f"{count} x {bits}-bit {op}" for (bits, op), count in counts.most_common()]
    online = [f"{layer['count']} products of {layer.get('name')}" for layer in layers if "count" in layer]
    return ", ".join(kinds + online) or "not recorded"


def size_text(size: int) -> str:
    """Bytes for a person, in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def _width_rows(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How many linears of the blocks have which width, where they differ, and the mean over their weights."""
    linears_only = (row for row in layers if "layers." in str(row.get("name")) and " " not in str(row.get("name")))
    rows = {row["name"]: row for row in linears_only if "storage_bits" in row}
    linears, weights = Counter[int](), Counter[int]()
    for name, row in rows.items():
        linears[row["bits"]] += len(name.split("+"))
        weights[row["bits"]] += math.prod(row["shape"])
    if len(linears) < 2:
        return []
    counts = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(linears.items()))
    mean = sum(bits * count for bits, count in weights.items()) / max(1, weights.total())
    return [("linears", f"{counts}: {mean:.3f} bits on average, without scales")]


def _memory_rows(memory: Mapping[str, int]) -> list[tuple[str, str]]:
    parts = f"weights {size_text(memory['weights'])} (mapped), packed copies {size_text(memory['packed_copies'])}"
    total = f"about {size_text(memory['total'])} at {memory['context']} tokens"
    return [("memory", f"{total}: {parts}, kv cache {size_text(memory['kv_cache'])}")]


def _plan_rows(manifest: Mapping[str, Any], plans: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What each TensorRT plan was built with and for; a target of TensorRT's without one has it pending."""
    if not plans and str(manifest.get("target")).startswith("tensorrt"):
        return [("plan", "pending: rqc build adds it")]
    return [("plan", _plan_text(plan, manifest["entries"][plan["entry"]]["size"])) for plan in plans]


def _plan_text(plan: Mapping[str, Any], size: int) -> str:
    profile = plan["profile"]
    batch, prompt = (":".join(map(str, profile[key])) for key in ("batch", "prompt"))
    takes = f"batch {batch}, prompt {prompt}, context {profile['context']}"
    sms = f"SM {', '.join(map(str, plan['sms']))}" if plan["sms"] else "the GPU that built it"
    why = f": {plan['reason']}" if plan.get("reason") else ""
    checked = "verified" if plan.get("verified") else f"not verified{why}"
    return f"{plan['name']}, {plan['flavour']} {plan['version']}, {sms}, {takes}, {size_text(size)}, {checked}"


def _scheme_text(manifest: Mapping[str, Any]) -> str:
    scheme, group = manifest.get("scheme"), manifest.get("group_size")
    if scheme in ("fp32", "fp16"):
        return str(scheme)
    blocks = "one scale per output channel" if group == -1 else f"groups of {group}"
    kind = "symmetric" if manifest.get("symmetric", True) else "asymmetric"
    return f"{scheme}, {blocks}, {kind}, {manifest.get('method')}, clip {manifest.get('clip')}"


def _rotation_text(rotation: Mapping[str, Any] | None) -> str:
    if not rotation or not rotation.get("sites"):
        return "none"
    sites, basis = ",".join(rotation["sites"]), str(rotation.get("basis"))[:16]
    learned = " and ".join(sorted(rotation.get("learned") or {}))
    learned += " learned, " * bool(learned)
    return f"{sites}, {learned}{rotation.get('hadamard')} Hadamard, seed {rotation.get('seed')}, basis {basis}"


def _cache_text(manifest: Mapping[str, Any]) -> str:
    """What keys and values are kept as; engines of old state no grid."""
    return str(manifest.get("kv_cache_grid") or manifest.get("kv_cache"))


def _adapter_text(adapter: Any) -> str:
    """Kind, way and survival of the adapters that an engine holds, and what they are switched by."""
    if not isinstance(adapter, Mapping):
        return "none"
    how = {"fold": "folded into the weights", "zero-point": "in zero points", "branch": "beside the weights"}
    survival = adapter.get("survival")
    left = f", at least {survival:.3g} of it left in every linear" if isinstance(survival, (int, float)) else ""
    merge, kind, names = str(adapter.get("merge")), adapter.get("kind"), adapter.get("names")
    count = len(adapter.get("adapters", []))
    what = f"{count} adapters ({kind})" if count else str(kind)
    switch = f", switched at run time: {', '.join(map(str, names))}" if isinstance(names, list) else ""
    return f"{what}, {how.get(merge, merge)}{left}{switch}"


def _compensation_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which weights are zero, and what makes up for rounding, where there is something of the kind."""
    rows = []
    if isinstance(sparse := manifest.get("sparsity"), Mapping):
        rows.append(("sparsity", f"{sparse.get('pattern')} by {sparse.get('prune')}, zeros stored as codes"))
    if isinstance(branch := manifest.get("compensation"), Mapping):
        least, most = branch.get("least_rank"), branch.get("rank")
        ranks = f"rank {most}" if least == most else f"ranks {least} to {most}"
        budget = f", {branch['budget']:g} bits per weight" if "budget" in branch else ""
        rows.append(("compensation", f"{branch.get('method')}, {ranks} beside {branch.get('linears')} linears{budget}"))
    return rows


def _model_text(manifest: Mapping[str, Any]) -> str:
    architecture = manifest.get("architecture") or {}
    shape = f"{architecture.get('layers')} layers x {architecture.get('hidden_size')}"
    count = manifest.get("parameters")
    parameters = f"{count / 1e6:.1f} M parameters" if count else "parameters not recorded"
    return f"{architecture.get('model_type')}, {shape}, vocabulary {architecture.get('vocab_size')}, {parameters}"


def _per_layer(value: Any, count: int) -> list[int]:
    return [int(item) for item in value] if isinstance(value, list) else [int(value)] * count


def _cell(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)
