"""RoPE tables as transformers computes them: every scaling exact, whatever the importer makes of its parameters."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from rqc.models.description import Architecture
from rqc.passes.base import sizes
from rqc.runtime.errors import UnsupportedModelError

TABLES = (".cos_cache", ".sin_cache")
LOCAL = "rotary_emb_local"
"""In the names of the tables that sliding layers use, where they have tables of their own (Gemma 3)."""
CHUNK = 8192
"""Positions computed at a time."""

F32 = NDArray[np.float32]


def exact_rope(model: ir.Model, config: Any, architecture: Architecture) -> None:
    """Put transformers' own cos and sin [context, rotary / 2] into the graph, looked up by position alone.

    config: the PreTrainedConfig. A longrope model, whose frequencies change with the length of the text, keeps those
    of texts within its original context, which is the engine's context (`Architecture.context_length`). Raises
    UnsupportedModelError where the graph turns another part of the heads than transformers does.
    """
    positions = next((value for value in model.graph.inputs if value.name == "position_ids"), None)
    computed: dict[str | None, tuple[F32, F32]] = {}
    moved = False
    for name, value in model.graph.initializers.items():
        if not name.endswith(TABLES):
            continue
        kind = _kind(name, config.rope_parameters)
        if kind not in computed:
            computed[kind] = rope_tables(config, architecture.context_length, kind)
        table = computed[kind][TABLES.index(f".{name.rsplit('.', 1)[1]}")]
        if sizes(value)[1] != table.shape[1]:
            raise UnsupportedModelError(
                f"{architecture.model_type}: RoPE turns {2 * table.shape[1]} elements of a head, the graph "
                f"{2 * sizes(value)[1]}",
                hint="rqc does not know this variant of the architecture (partial_rotary_factor)",
            )
        value.const_value = ir.Tensor(table, name=name)
        value.shape = ir.Shape(table.shape)
        for gather, _ in list(value.uses()):
            assert positions is not None  # tables are looked up by it; a model without RoPE in any layer has neither
            moved |= gather.inputs[1] is not positions
            gather.replace_input_with(1, positions)
    if moved:
        common.RemoveUnusedNodesPass()(model)


def rope_tables(config: Any, length: int, kind: str | None) -> tuple[F32, F32]:
    """cos and sin, float32 [length, rotary / 2], of transformers' rotary embedding for this config.

    kind: the layer type, for families whose layer types have tables of their own.
    """
    import torch

    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    (rotary_class,) = {value for name, value in vars(module).items() if name.endswith("RotaryEmbedding")}
    rotary = rotary_class(config)
    options = {} if kind is None else {"layer_type": kind}
    pieces: list[tuple[F32, F32]] = []
    with torch.inference_mode():
        for start in range(0, length, CHUNK):
            positions = torch.arange(start, min(start + CHUNK, length))[None]
            whole = rotary(torch.zeros(1), positions, **options)
            cos, sin = (table[0, :, : table.shape[-1] // 2].contiguous().numpy() for table in whole)
            pieces.append((cos, sin))
    return np.concatenate([cos for cos, _ in pieces]), np.concatenate([sin for _, sin in pieces])


def _kind(name: str, parameters: dict[str, Any]) -> str | None:
    """The layer type whose table this is; None where all layers share one."""
    if "rope_type" in parameters:
        return None
    return "sliding_attention" if LOCAL in name else "full_attention"
