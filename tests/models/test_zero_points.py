"""Zero-point merge: codes and scales bit for bit, nothing lost, on every grid; kernels agree on what it means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from zero_point_proofs import block_sums, certify

from rqc.models.delta import Delta
from rqc.models.grid import Grid, Quantized, quantize
from rqc.models.quantized import Update
from rqc.models.zero_points import (
    block_offsets,
    merge_zero_points,
    real_zero_points,
    with_zero_points,
)
from rqc.runtime.errors import InputError

GRIDS = [
    Grid(bits, group, symmetric, clip)  # type: ignore[arg-type]
    for bits, group, symmetric, clip in [
        (2, 32, True, "none"),
        (2, 32, False, "mse"),
        (3, 16, True, "mse"),
        (3, 64, False, "none"),
        (4, 32, True, "none"),
        (4, 128, False, "none"),
        (4, -1, True, "mse"),
        (8, 32, False, "none"),
    ]
]
SHAPES = [(24, 128), (7, 152), (40, 96)]


def pooled(rows: int, width: int, block: int, size: float, seed: int = 0, rank: int = 3) -> Delta:
    generator = np.random.default_rng(seed)
    compact = generator.standard_normal((rank, -(-width // block)))
    return Delta(np.repeat(compact, block, axis=1)[:, :width], size * generator.standard_normal((rows, rank)), 0.5)


def case(grid: Grid, shape: tuple[int, int], size: float = 0.02) -> tuple[Quantized, Delta]:
    w = 0.05 * np.random.default_rng(1).standard_normal(shape)
    w[0, : min(32, shape[1])] = 0  # a block with scale 0
    return quantize(w, grid), pooled(*shape, grid.block(shape[1]), size)


@pytest.mark.parametrize("size", [1e-6, 0.02, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nothing_is_lost_and_codes_and_scales_stay(grid: Grid, shape: tuple[int, int], size: float) -> None:
    before, delta = case(grid, shape, size)
    offset = block_offsets(delta, before.block_size)
    zeros, correction = merge_zero_points(before, offset)
    after = with_zero_points(before, zeros)
    proof = certify(before, after, correction, offset)
    assert proof.sound
    assert proof.codes_equal
    assert proof.scales_equal
    assert zeros.max() < 1 << grid.storage_bits
    x = np.random.default_rng(2).standard_normal((5, shape[1]))
    exact = x @ (before.dequantize().astype(np.float64) + delta.dense()).T
    found = x @ after.dequantize().astype(np.float64).T + block_sums(x, before.block_size) @ correction.T
    assert np.linalg.norm(found - exact) < 1e-6 * np.linalg.norm(exact)
    for wrong in (x @ after.dequantize().T, x @ before.dequantize().T):  # without the correction; without the merge
        lost = np.linalg.norm(wrong - exact) / np.linalg.norm(x @ delta.dense().T)
        assert lost > 0.01 or size == 1e-6
    if size == 3.0:
        assert proof.lowest < 0
        assert proof.highest > (1 << grid.storage_bits) - 1


def test_zero_scales_take_the_whole_offset_as_a_correction() -> None:
    before, delta = case(Grid(4, 32, False), (4, 64))
    assert before.scales[0, 0] == 0
    offset = block_offsets(delta, 32)
    zeros, correction = merge_zero_points(before, offset)
    assert zeros[0, 0] == before.zero_points[0, 0]  # type: ignore[index]
    assert correction[0, 0] == np.float32(offset[0, 0])


def test_negative_scales_move_zero_points_the_other_way() -> None:
    grid = Grid(4, 16)
    w = np.random.default_rng(0).standard_normal((64, 32))
    before = quantize(w, grid)
    assert (before.scales < 0).any()
    assert (before.scales > 0).any()
    moved = real_zero_points(before, np.full(before.scales.shape, 0.3)) - 8
    assert (np.sign(moved) == -np.sign(before.scales)).all()


def test_rounded_zero_points_alone_lose_much_of_a_small_adapter() -> None:
    before, delta = case(Grid(4, 32), (64, 256), 0.004)
    offset = block_offsets(delta, 32)
    zeros, _ = merge_zero_points(before, offset)
    kept = with_zero_points(before, zeros).dequantize() - before.dequantize()
    lost = np.linalg.norm(kept - delta.dense()) / np.linalg.norm(delta.dense())
    assert lost > 0.3


def test_an_update_that_is_not_pooled_is_refused() -> None:
    delta = pooled(8, 64, 16, 0.1)
    assert block_offsets(delta, 16).shape == (8, 4)
    with pytest.raises(InputError, match="not constant inside blocks of 32"):
        block_offsets(delta, 32)
    bumped = delta.a.copy()
    bumped[0, 5] += 1e-12
    with pytest.raises(InputError, match="not constant inside blocks of 16"):
        block_offsets(replace(delta, a=bumped), 16)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_what_is_not_finite_is_refused(value: float) -> None:
    before, _ = case(Grid(4, 32), (4, 64))
    offset = np.zeros(before.scales.shape)
    offset[1, 1] = value
    with pytest.raises(InputError, match="not finite"):
        merge_zero_points(before, offset)


@pytest.mark.parametrize("is_pooled", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dora_scales_rows_exactly(is_pooled: bool, symmetric: bool) -> None:
    before, plain = case(Grid(4, 32, symmetric), (24, 152))
    delta = replace(plain, magnitude=np.random.default_rng(4).uniform(0.2, 3.0, 24))
    adapted = Update(delta, is_pooled).applied(before, 0)
    x = np.random.default_rng(2).standard_normal((5, 152))
    exact = x @ delta.merged(before.dequantize().astype(np.float64)).T
    found = x @ adapted.quantized.dequantize().astype(np.float64).T
    found += block_sums(x, 32) @ adapted.correction.T
    if not is_pooled:
        found += (x @ plain.dense().T) * adapted.factors
    assert np.linalg.norm(found - exact) < 1e-6 * np.linalg.norm(exact)
    assert np.array_equal(adapted.quantized.codes, before.codes)


def kernel(q: Quantized, zeros: np.ndarray, x: np.ndarray) -> np.ndarray:
    """ONNX Runtime's MatMulNBits at float accumulation, with integer (packed) or real zero points."""
    n, k = q.shape
    tensors = [numpy_helper.from_array(a, name) for name, a in (("b", q.packed_codes()), ("s", q.scales), ("z", zeros))]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "b", "s", "z"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=q.storage_bits,
        block_size=q.block_size,
        accuracy_level=0,
    )
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 4])
def test_the_runtime_with_real_zero_points_agrees(bits: int, shape: tuple[int, int], rows: int) -> None:
    """The other exact lowering, real zero points, which the kernel reads (slowly), is an oracle for ours."""
    before, delta = case(Grid(bits, 32, False), shape)
    offset = block_offsets(delta, 32)
    zeros, correction = merge_zero_points(before, offset)
    after = with_zero_points(before, zeros)
    x = np.random.default_rng(2).standard_normal((rows, shape[1]), np.float32)
    found = kernel(after, after.packed_zero_points(), x) + block_sums(x, 32) @ correction.T
    real = real_zero_points(before, offset)
    expected = kernel(before, real.astype(np.float32), x)
    blocks = np.repeat(before.scales == 0, 32, axis=1)[:, : shape[1]]  # a scale of 0 holds no offset
    expected += x @ np.where(blocks, delta.dense(), 0).T.astype(np.float32)
    assert np.linalg.norm(found - expected) < 3e-6 * np.linalg.norm(expected)
