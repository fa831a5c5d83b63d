"""The attentions of an engine whose keys and values are kept as codes, read back from its graph."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.compiler.verify.stored import HINT, StoredGraph
from rqc.models.cache_grid import CacheGrid, StaticCacheGrid, TokenCacheGrid
from rqc.passes.base import sizes
from rqc.passes.int8_cache import PAST, SCALES
from rqc.passes.token_cache import ROLE
from rqc.runtime.errors import EngineFormatError

Codes = NDArray[np.int16]
TABLES = 7
"""Place of the cos table, if there is one, among the inputs of GroupQueryAttention; the sin table comes next."""
_LAYER = re.compile(r"past_key_values\.(\d+)\.key")


@dataclass(frozen=True, eq=False)
class StoredCache:
    """An attention whose keys and values are kept as codes.

    entering: values that it is computed from, q, k and v, or all in one. output: y [batch, tokens, heads · size].
    presents: what it keeps. grids: of keys, of values. tables: cos and sin, where the attention itself turns q and k.
    """

    layer: int
    entering: tuple[str, ...]
    output: str
    presents: tuple[str, ...]
    grids: tuple[CacheGrid, CacheGrid]
    tables: tuple[ir.Value, ...] = ()

    def codes(self, kept: Sequence[NDArray[np.generic]]) -> tuple[Codes, Codes]:
        """Codes of keys and of values [kv heads, tokens, size], counted from their zero points, in what `presents` hold
        of one row."""
        if len(kept) == 2:
            keys, values = (codes.astype(np.int16) for codes in kept)
            return keys, values
        packed, scales, zeros = kept
        parted = packed.astype(np.int16).reshape(*scales.shape, -1)
        if isinstance(self.grids[0], TokenCacheGrid) and self.grids[0].bits == 4:
            parted = np.concatenate([parted & 15, parted >> 4], axis=-1)
        codes = (parted - zeros.astype(np.int16)[..., None]).reshape(*packed.shape[:2], -1)
        keys, values = np.split(codes, 2)
        return keys, values


def read_caches(stored: StoredGraph) -> list[StoredCache]:
    """The attentions of an engine whose manifest says that its cache is rounded; none for a float one.

    Raises EngineFormatError for an engine that has other attentions than it says.
    """
    said = str(stored.file.manifest["kv_cache"])
    nodes = list(stored.model.graph)
    attentions = sum(node.op_type in ("GroupQueryAttention", "Attention") for node in nodes)
    found = [_in_kernel(stored, node) for node in nodes if "kv_cache_bit_width" in node.attributes]
    roles: dict[int, dict[str, ir.Node]] = defaultdict(dict)
    for node in nodes:
        if ROLE in node.metadata_props:
            layer, role = node.metadata_props[ROLE].split()
            roles[int(layer)][role] = node
    found += [_in_steps(stored, layer, marked) for layer, marked in roles.items()]
    if len(found) != (0 if said == "float" else attentions):
        raise EngineFormatError(
            f"{stored.file.path}: {len(found)} of {attentions} attentions round their cache, which is {said}", hint=HINT
        )
    return found


def _in_kernel(stored: StoredGraph, node: ir.Node) -> StoredCache:
    """One that GroupQueryAttention rounds out of sight."""
    past = node.inputs[PAST]
    found = _LAYER.fullmatch(_name(past))
    if past is None or found is None:
        raise EngineFormatError(f"{stored.file.path}: {node.name} has no past", hint=HINT)
    _, heads, _, size = sizes(past)
    scales = [stored.array(value).astype(np.float32) for value in node.inputs[SCALES : SCALES + 2]]
    if len(scales) != 2 or any(scale.shape != (1, heads, 1, size) or not (scale > 0).all() for scale in scales):
        raise EngineFormatError(f"{stored.file.path}: {node.name} has no positive scale for each channel", hint=HINT)
    return StoredCache(
        int(found[1]),
        tuple(_name(value) for value in node.inputs[:3] if value is not None),
        _name(node.outputs[0]),
        tuple(_name(value) for value in node.outputs[1:3]),
        (StaticCacheGrid(scales[0][0]), StaticCacheGrid(scales[1][0])),
        tuple(value for value in node.inputs[TABLES : TABLES + 2] if value is not None),
    )


def _in_steps(stored: StoredGraph, layer: int, marked: dict[str, ir.Node]) -> StoredCache:
    """One that the graph rounds in steps."""
    inputs = {_name(value): sizes(value) for value in stored.model.graph.inputs}
    codes, scales = (inputs.get(f"past_key_values.{layer}.{what}") for what in ("codes", "scales"))
    if not codes or not scales or set(marked) != {"query", "key", "value", "output"}:
        raise EngineFormatError(f"{stored.file.path}: the cache of layer {layer} is not whole", hint=HINT)
    heads, size = codes[1] // 2, int(stored.file.manifest["graph"]["head_dim"])
    bits, group = 8 * codes[3] // size, size // scales[3]
    key = marked["key"]
    mean = (
        stored.array(key.inputs[1]).astype(np.float32) if key.op_type == "Sub" else np.zeros(heads * size, np.float32)
    )
    return StoredCache(
        layer,
        tuple(_name(marked[role].inputs[0]) for role in ("query", "key", "value")),
        _name(marked["output"].outputs[0]),
        tuple(f"present.{layer}.{what}" for what in ("codes", "scales", "zeros")),
        (TokenCacheGrid(bits, group, mean.reshape(heads, 1, size)), TokenCacheGrid(bits, group)),
    )


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""
