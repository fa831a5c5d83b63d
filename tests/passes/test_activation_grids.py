"""Activations on their grids in front of DequantizeLinear and MatMul: codes equal to numpy's, ranges to PyTorch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from scatter_runs import Cached, on_grid, session
from tiny import TinyModel
from tiny_adapters import Lines, talking
from transformers import AutoModelForCausalLM

from rqc.compiler.calibration.calibration_text import calibration_ids
from rqc.compiler.calibration.ranges import measured, ranges_on_text
from rqc.compiler.importer import import_model
from rqc.compiler.passlist import passes_of
from rqc.compiler.probe import drift
from rqc.compiler.recipe import Recipe
from rqc.compiler.targets import guards
from rqc.compiler.targets.settle import settled
from rqc.models.description import HEAD
from rqc.models.rotation import Rotation
from rqc.models.token_grid import TokenGrid
from rqc.passes.activations import QuantizeActivations
from rqc.passes.base import CLIP, LINEAR, QUANTIZED, linears
from rqc.passes.static_activations import RANGE, RecordRanges, StaticActivations
from rqc.runtime.errors import CheckpointError, InputError

WIDTH = 48
TYPES = {np.float32: ir.DataType.FLOAT, np.float16: ir.DataType.FLOAT16}


def product(dtype: Any, **marks: str) -> ir.Model:
    """y = x I, the identity in codes: y is what x becomes on its grid."""
    kind = TYPES[dtype]
    x = ir.Value(name="x", shape=ir.Shape(["rows", "tokens", WIDTH]), type=ir.TensorType(kind))
    codes = ir.Value(name="codes", const_value=ir.tensor(np.eye(WIDTH).astype(ml_dtypes.int4), name="codes"))
    scales = ir.Value(name="scales", const_value=ir.tensor(np.ones(WIDTH, dtype), name="scales"))
    dequantize = ir.node(
        "DequantizeLinear", [codes, scales], attributes={"axis": 1}, metadata_props={QUANTIZED: "w"}, name="w"
    )
    matmul = ir.node("MatMul", [x, dequantize.outputs[0]], metadata_props={LINEAR: "w", **marks}, name="w/MatMul")
    y = matmul.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(kind), x.shape
    graph = ir.Graph([x], [y], nodes=[dequantize, matmul], initializers=[codes, scales], opset_imports={"": 24})
    return ir.Model(graph, ir_version=11)


def computed(model: ir.Model, x: Any) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    made = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return made.run(["y"], {"x": x})[0]


def inputs(dtype: Any) -> Any:
    """Tokens of very different size, one of zeros, some of exact halves of a step."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((2, 40, WIDTH)) * draw.choice([1e-3, 1, 30], (2, 40, 1))
    x[0, 0] = 0
    x[0, 1] = np.resize([7, 0.5, 1.5, -2.5, 3.5], WIDTH)
    x[0, 2] = np.resize([127, 63.5, -63.5, 0.5], WIDTH)
    return x.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_dynamic_codes_are_numpys_token_for_token(bits: int, dtype: Any) -> None:
    model, x = product(dtype), inputs(dtype)
    step = QuantizeActivations(TokenGrid(bits))
    assert step(model).modified
    assert not step(model).modified
    y = computed(model, x)
    assert y.dtype == dtype
    wide, limit = x.astype(np.float32), np.float32(2 ** (bits - 1) - 1)
    scale = np.maximum(np.abs(wide).max(-1, keepdims=True) / limit, np.finfo(np.float32).tiny)
    codes = np.rint(wide / scale)
    np.testing.assert_array_equal(np.rint(y.astype(np.float32) / scale), codes)
    np.testing.assert_array_equal(y, (codes * scale).astype(dtype))
    assert not y[0, 0].any()
    assert np.abs(codes).max() == limit


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("marks", [{}, {CLIP: "0.7"}], ids=str)
@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_grid_per_token_is_numpys(
    bits: int, symmetric: bool, clip: float, marks: dict[str, str], dtype: Any
) -> None:
    """A mark on the linear overrides the ratio of the pass."""
    model, x = product(dtype, **marks), inputs(dtype)
    x[1, :5] += 40  # to one side of zero
    x[1, 5:9] = np.asarray([[0.3], [-7], [1e-7], [-1e-7]], dtype)  # constant
    step = QuantizeActivations(TokenGrid(bits, symmetric, clip))
    assert step(model).modified
    assert not step(model).modified
    grid = TokenGrid(bits, symmetric, 0.7 if marks else clip)
    y = computed(model, x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, grid.round(x.astype(np.float32)).astype(dtype))


def test_linears_that_read_the_same_share_one_rounding(tiny_model: TinyModel) -> None:
    """q, k and v; gate and up; packed or not."""
    for target in ("onnx", "tensorrt-rtx"):
        imported = import_model(tiny_model("llama16"))
        recipe = Recipe.from_values({"scheme": "w4a4", "target": target, "rotate": "none", "activation_clip": 0.9})
        recipe = settled(recipe, imported.description.architecture, None)
        for step in passes_of(recipe, imported.description, Rotation.parse("none")):
            step(imported.model)
        assert sum(node.op_type == "Clip" for node in imported.model.graph) == 4 * 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_static_codes_are_numpys_and_saturate(dtype: Any) -> None:
    model, x = product(dtype, **{RANGE: "12.7"}), inputs(dtype)
    step = StaticActivations()
    assert step(model).modified
    assert not step(model).modified
    scale = dtype(12.7 / 127)
    codes = np.clip(np.rint(x.astype(np.float32) / np.float32(scale)), -128, 127)
    assert (codes == 127).any()
    assert (codes == -128).any()
    np.testing.assert_array_equal(computed(model, x), (codes.astype(dtype) * scale))
    kinds = [node.op_type for node in model.graph]
    assert kinds == ["DequantizeLinear", "QuantizeLinear", "DequantizeLinear", "MatMul"]


def test_a_range_of_zero_still_has_a_scale() -> None:
    model = product(np.float16, **{RANGE: "0"})
    StaticActivations()(model)
    assert np.isfinite(computed(model, inputs(np.float16))).all()


@pytest.mark.parametrize("name", ["llama16", "phi3", "qwen3-moe"])
def test_ranges_are_those_of_pytorch(name: str, tiny_model: TinyModel) -> None:
    """In more windows than are run at a time; names that share a value share its range."""
    directory = tiny_model(name)
    imported = import_model(directory)
    ids = np.random.default_rng(0).integers(3, 96, (6, 20))
    names = {weight: node.inputs[0].name or "" for weight, node in linears(imported.model) if weight != HEAD}  # type: ignore[union-attr]
    found = measured(imported.model, sorted(set(names.values())), ids)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    seen: dict[str, float] = {}

    def watch(weight: str) -> Any:
        def hook(_module: Any, args: Any) -> None:
            seen[weight] = max(seen.get(weight, 0.0), float(args[0].abs().max()))

        return hook

    for path, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            module.register_forward_pre_hook(watch(f"{path}.weight"))
    with torch.inference_mode():
        reference(input_ids=torch.from_numpy(ids))
    shared = [weight for weight in seen if weight in names]
    assert len(shared) >= 6
    for weight in shared:
        assert found[names[weight]].max() == pytest.approx(seen[weight], rel=1e-4), weight


def test_ranges_are_recorded_once_and_become_scales(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = talking(tiny_model("llama16"), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog ran to the hat. " * 40)
    options: dict[str, Any] = {"calibration": text, "calibration_samples": 5, "calibration_length": 40}
    imported, recipe = on_grid(directory, scheme="w8a8", **options)
    lines = Lines()
    measure = ranges_on_text(recipe, imported, lines)
    ids = calibration_ids(recipe, imported, 200)
    assert ids is not None
    assert ids.shape == (5, 40)
    names = {weight: node.inputs[0].name or "" for weight, node in linears(imported.model) if weight != HEAD}  # type: ignore[union-attr]
    expected = measured(imported.model, sorted(set(names.values())), ids)
    step = RecordRanges(measure)
    assert step(imported.model).modified
    assert not step(imported.model).modified
    for weight, node in linears(imported.model):
        assert node.metadata_props.get(RANGE) == (f"{expected[names[weight]].max():.3g}" if weight != HEAD else None)
    assert not lines.lines
    imported, recipe = on_grid(directory, scheme="w8a8", **{**options, "calibration_samples": 500})
    RecordRanges(ranges_on_text(recipe, imported, lines))(imported.model)
    assert lines.lines == ["calibration: the text holds 52 windows of 40 tokens, 500 were asked for"]


def test_a_model_with_static_scales_is_close_to_itself(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = talking(tiny_model("llama16"), tmp_path / "model")
    imported = import_model(directory)
    options = {"target": "tensorrt-rtx", "scheme": "w8a8", "rotate": "r1,r4", "calibration_samples": 4}
    recipe = settled(Recipe.from_values(options), imported.description.architecture, None)
    assert recipe.rotation is not None
    passes = passes_of(recipe, imported.description, recipe.rotation, measure=ranges_on_text(recipe, imported, Lines()))
    for step in passes[:-1]:
        step(imported.model)
    ids = np.random.default_rng(0).integers(3, 96, 40)
    before = Cached(session(imported.model)).read(ids)
    passes[-1](imported.model)
    after = Cached(session(imported.model)).read(ids)
    assert 1e-4 < drift(before, after) < 5e-2
    guards.check_graph(imported.model, recipe.target, recipe.sm)
    rounded = [node for node in imported.model.graph if node.op_type == "QuantizeLinear"]
    assert len(rounded) == 4 * 2


def test_ranges_need_a_tokenizer_and_finite_numbers(tiny_model: TinyModel) -> None:
    imported, recipe = on_grid(tiny_model("llama-tied"), scheme="w8a8")
    with pytest.raises(InputError, match=r"static activation scales.*no tokenizer\.json") as raised:
        RecordRanges(ranges_on_text(recipe, imported, Lines()))(imported.model)
    assert "w4a8" in raised.value.hint
    imported = import_model(tiny_model("llama-tied"))
    name = "model.layers.1.input_layernorm.weight"
    imported.model.graph.initializers[name].const_value = ir.tensor(np.full(96, np.inf, np.float32), name=name)
    value = next(node.inputs[0].name or "" for weight, node in linears(imported.model) if "1.self_attn.q" in weight)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="is not finite on the calibration text"):
        measured(imported.model, [value], np.full((1, 8), 5))
