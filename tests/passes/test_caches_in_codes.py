"""Caches of codes: the kernel and the graph's steps keep numpy's codes, and compute with what they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from tiny import TinyModel
from torch import Tensor

from rqc.compiler.calibration.ranges import measured
from rqc.compiler.importer import import_model
from rqc.compiler.pipeline import compile_model
from rqc.compiler.recipe import Recipe
from rqc.models.cache_grid import StaticCacheGrid, TokenCacheGrid
from rqc.models.online import before_attention
from rqc.models.reference import Reference
from rqc.passes.cache_ranges import (
    HEADROOM,
    KEY_MEAN,
    KEY_RANGE,
    STEPS,
    RecordCacheRanges,
    RecordKeyMeans,
    means,
    ranges,
)
from rqc.passes.cleanup import RemoveDeadParts
from rqc.passes.int8_cache import Int8Cache
from rqc.passes.token_cache import TokenCache, groups_of
from rqc.runtime.errors import RqcError

HEADS, KV, SIZE, TOKENS = 6, 2, 64, 24
REFUSED = {"target": "tensorrt-rtx", "kv_cache": "int8"}
Arrays = dict[str, Any]


def attention(op: str, softcap: float = 0.0) -> ir.Model:
    """One attention on q, k and v with a cache, as the lowering leaves it."""

    def value(name: str, shape: list[Any], kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))

    flows = [value(name, ["batch", "tokens", count * SIZE]) for name, count in (("q", HEADS), ("k", KV), ("v", KV))]
    pasts = [value(f"past_key_values.0.{kind}", ["batch", KV, "past", SIZE]) for kind in ("key", "value")]
    common = {"scale": SIZE**-0.5, "softcap": softcap}
    if op == "Attention":
        more = [value("mask", ["batch", 1, "tokens", "total"], ir.DataType.BOOL)]
        inputs, domain = [*flows, *more, *pasts], ""
        attributes = {**common, "q_num_heads": HEADS, "kv_num_heads": KV, "is_causal": 0}
    else:
        more = [value("seqlens", ["batch"], ir.DataType.INT32), value("total", [], ir.DataType.INT32)]
        inputs, domain = [*flows, *pasts, *more], "com.microsoft"
        attributes = {**common, "num_heads": HEADS, "kv_num_heads": KV}
    node = ir.node(op, inputs, attributes=attributes, domain=domain, num_outputs=3, name="layers.0/attention")
    for output, name in zip(node.outputs, ("y", "present.0.key", "present.0.value"), strict=True):
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    imports = {"": 24, "com.microsoft": 1}
    places = value("position_ids", ["batch", "tokens"], ir.DataType.INT64)
    last = ir.node("Identity", [node.outputs[0]], name="y")
    last.outputs[0].name, last.outputs[0].type = "out", ir.TensorType(ir.DataType.FLOAT)
    outputs = [last.outputs[0], *node.outputs[1:]]
    graph = ir.Graph([*flows, *pasts, *more, places], outputs, nodes=[node, last], opset_imports=imports)
    return ir.Model(graph, ir_version=11)


def run(model: ir.Model, given: Arrays) -> Arrays:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


def drawn(batch: int = 2) -> tuple[Arrays, Any, Any]:
    """q, k and v as the graph takes them, and k and v by heads; some tokens are zero or of one sign."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((batch, TOKENS, count * SIZE)).astype("f") for count in (HEADS, KV, KV))
    k *= draw.choice([0.01, 1, 20], (1, 1, KV * SIZE)).astype("f")
    k[0, 1], v[0, 2], v[1, 3] = 0, 0, np.abs(v[1, 3])
    keys, values = (x.reshape(batch, TOKENS, KV, SIZE).transpose(0, 2, 1, 3) for x in (k, v))
    return {"q": q, "k": k, "v": v}, keys, values


def expected(q: Any, keys: Any, values: Any, softcap: float = 0.0) -> Any:
    """Causal attention in PyTorch."""
    query = torch.from_numpy(q).reshape(len(q), TOKENS, HEADS, SIZE).transpose(1, 2).double()
    k, v = (torch.from_numpy(x).double().repeat_interleave(HEADS // KV, 1) for x in (keys, values))
    scores = query @ k.mT * SIZE**-0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    seen = torch.ones(TOKENS, TOKENS).tril().bool()
    y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return y.transpose(1, 2).reshape(len(q), TOKENS, -1).numpy()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_kernel_keeps_the_codes_of_the_grid(softcap: float) -> None:
    model, (given, keys, values) = attention("GroupQueryAttention", softcap), drawn()
    node = next(iter(model.graph))
    marks = ["-8 " * (KV * SIZE), "3 " * (KV * SIZE)]  # narrow: some keys and values are cut off
    node.metadata_props.update(zip((KEY_RANGE, "rqc.cache.value_range"), marks, strict=True))
    assert Int8Cache()(model).modified
    assert not Int8Cache()(model).modified
    empty = np.zeros((2, KV, 0, SIZE), np.int8)
    given |= {"past_key_values.0.key": empty, "past_key_values.0.value": empty}
    given |= {"seqlens": np.full(2, TOKENS - 1, np.int32), "total": np.asarray(TOKENS, np.int32)}
    RemoveDeadParts()(model)
    found = run(model, given)
    grids = [StaticCacheGrid(np.float32(ranges(mark) / 127).reshape(KV, 1, SIZE)) for mark in marks]
    for grid, x, kind in zip(grids, (keys, values), ("key", "value"), strict=True):
        np.testing.assert_array_equal(found[f"present.0.{kind}"], grid.codes(x))
        assert (np.abs(grid.codes(x)) >= 127).any()
    rounded = [grid.round(x) for grid, x in zip(grids, (keys, values), strict=True)]
    np.testing.assert_allclose(found["out"], expected(given["q"], *rounded, softcap), rtol=0, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_steps_keep_the_codes_of_the_grid(bits: int, softcap: float) -> None:
    model, (given, keys, values) = attention("Attention", softcap), drawn()
    mean = np.random.default_rng(1).standard_normal(KV * SIZE).astype("f")
    next(iter(model.graph)).metadata_props[KEY_MEAN] = " ".join(f"{m:.9g}" for m in mean)
    step = TokenCache(bits)
    assert step(model).modified
    assert not step(model).modified
    groups = groups_of(SIZE)
    widths = {"codes": (SIZE * bits // 8, np.uint8), "scales": (groups, np.float32), "zeros": (groups, np.uint8)}
    past = {f"past_key_values.0.{what}": np.zeros((2, 2 * KV, TOKENS, n), t) for what, (n, t) in widths.items()}
    RemoveDeadParts()(model)
    found = run(model, {**given, **past, "position_ids": np.tile(np.arange(TOKENS), (2, 1))})
    centre = np.zeros((KV, 1, SIZE), np.float32) if softcap else mean.reshape(KV, 1, SIZE)
    grids = [TokenCacheGrid(bits, SIZE // groups, centre), TokenCacheGrid(bits, SIZE // groups)]
    packed = found["present.0.codes"].reshape(2, 2 * KV, TOKENS, groups, -1).astype(int)
    codes = np.concatenate([packed & 15, packed >> 4], -1) if bits == 4 else packed
    codes = (codes - found["present.0.zeros"][..., None].astype(int)).reshape(2, 2 * KV, TOKENS, SIZE)
    for grid, x, mine in zip(grids, (keys, values), np.split(codes, 2, axis=1), strict=True):
        np.testing.assert_array_equal(mine, grid.codes(x))
    rounded = [grid.round(x) for grid, x in zip(grids, (keys, values), strict=True)]
    np.testing.assert_allclose(found["out"], expected(given["q"], *rounded, softcap), rtol=0, atol=2e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_lies_on_the_grid_stays_there(bits: int) -> None:
    """Ends that are both ties take one step less than the grid has."""
    x = np.random.default_rng(0).standard_normal((2, 200, 32)).astype("f")
    x[0, 0] = np.resize([-7.5, 7.5, 1, 3], 32)
    x[0, 1] = np.resize([-6.5, 8.5, 1, 3], 32)
    grid = TokenCacheGrid(bits, 32)
    rounded = grid.round(x)
    np.testing.assert_array_equal(grid.codes(rounded), grid.codes(grid.round(rounded)))
    steps = (np.maximum(x.max(-1), 0) - np.minimum(x.min(-1), 0)) / (2**bits - 1)
    assert (np.abs(rounded - x).max(-1) <= 1.01 * steps).all()


def test_what_is_recorded_holds_what_was_seen() -> None:
    draw = np.random.default_rng(0)
    seen = np.abs(draw.standard_normal(40)).astype("f") * 10.0 ** draw.integers(-3, 3, 40)
    seen[3] = 0

    def measure(model: ir.Model, names: Any, kind: str = "largest") -> Any:
        return {name: seen.astype("f") if kind == "largest" else seen - seen.mean() for name in names}

    model = attention("Attention")
    assert RecordCacheRanges(measure)(model).modified
    assert RecordKeyMeans(measure)(model).modified
    assert not RecordCacheRanges(measure)(model).modified
    assert not RecordKeyMeans(measure)(model).modified
    marks = next(iter(model.graph)).metadata_props
    wide = ranges(marks[KEY_RANGE])
    there = seen > 0
    assert (wide[there] >= seen[there]).all()
    assert (wide[there] <= seen[there] * HEADROOM * 2 ** (0.51 / STEPS)).all()
    assert wide[3] > 0
    assert np.abs(means(marks[KEY_MEAN]) - (seen - seen.mean())).max() <= np.abs(seen - seen.mean()).max() / 16


def test_means_of_keys_are_pytorchs_and_take_offsets_off_their_grid(tiny_model: TinyModel) -> None:
    """In more windows than are run at a time; channels that RoPE hardly turns, off by a bias of 10 in each head."""
    directory, name = tiny_model("llama-bias"), "model.layers.1.self_attn.k_proj"
    imported, reference = import_model(directory), Reference.load(directory)
    bias = reference.parts[f"{name}.weight"].bias
    assert bias is not None
    bias.view(KV, -1)[:, [7, 15]] += 10
    imported.model.graph.initializers[f"{name}.bias"].const_value = ir.tensor(bias.numpy(), name=f"{name}.bias")
    nodes = [node for node in imported.model.graph if node.op_type == "Attention"]
    names = [node.inputs[1].name or "" for node in nodes if node.inputs[1] is not None]
    ids = np.random.default_rng(0).integers(3, 96, (6, 20))
    seen: dict[int, list[Any]] = {0: [], 1: []}

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen[layer].append(k[0].numpy())
        return q, k, v

    before_attention(reference.model, keep)
    for row in ids:
        reference.logits(row)
    found = measured(imported.model, names, ids, "mean")
    for layer, value in enumerate(names):
        keys = np.concatenate(seen[layer], axis=1)  # [kv heads, tokens of all windows, size]
        np.testing.assert_allclose(found[value], keys.mean(1).ravel(), rtol=1e-4, atol=1e-5)
    step = RecordKeyMeans(lambda model, names, kind="largest": measured(model, names, ids, kind))
    assert step(imported.model).modified
    mean = means(nodes[1].metadata_props[KEY_MEAN]).astype("f").reshape(KV, 1, -1)
    errors = [np.linalg.norm(TokenCacheGrid(4, 16, m).round(keys) - keys) for m in (mean, np.zeros_like(mean))]
    assert errors[0] < 0.5 * errors[1]


def test_a_target_without_such_caches_refuses_them(tiny_model: TinyModel) -> None:
    with pytest.raises(RqcError, match="--kv-cache int8 on tensorrt-rtx") as raised:
        compile_model(tiny_model("llama16"), None, recipe=Recipe.from_values(REFUSED), dry_run=True)
    assert "--target onnx" in raised.value.hint
