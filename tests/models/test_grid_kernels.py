"""What the kernels make of the bytes: MatMulNBits and GatherBlockQuantized against numpy on the dequantized weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from rqc.compiler.targets.layer_bits import FLOAT_BLOCKS
from rqc.models.grid import Grid, Quantized, activation_codes, fake_quantize_activations, quantize

Array = np.ndarray[Any, np.dtype[Any]]


def session(op: str, inputs: dict[str, Array], data: str, kind: int, **attributes: int) -> Callable[[Array], Array]:
    """One com.microsoft op with constant inputs, in order, around the one that is fed (`data`, of two axes)."""
    names = [*inputs]
    node = helper.make_node(op, names, ["y"], domain="com.microsoft", **attributes)
    constants = [numpy_helper.from_array(value, name) for name, value in inputs.items() if name != data]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(data, kind, [None, None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    run = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: run.run(None, {data: x})[0]


def matmul_nbits(q: Quantized, accuracy_level: int) -> Callable[[Array], Array]:
    n, k = q.shape
    inputs: dict[str, Array] = {"x": np.empty(0), "codes": q.packed_codes(), "scales": q.scales}
    if q.zero_points is not None:
        inputs["zeros"] = q.packed_zero_points()
    sizes = {"N": n, "K": k, "bits": q.storage_bits, "block_size": q.block_size}
    return session("MatMulNBits", inputs, "x", TensorProto.FLOAT, accuracy_level=accuracy_level, **sizes)


def relative(y: Array, expected: Array) -> float:
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


def exact(x: Array, q: Quantized) -> Array:
    """x W^T in float64."""
    return np.asarray(x, np.float64) @ q.dequantize().astype(np.float64).T


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(("k", "group"), [(152, 128), (20, 32), (20, 16), (256, 64), (152, -1), (300, -1), (512, 256)])
def test_matmul_nbits_reads_what_dequantize_says(k: int, group: int, bits: int, symmetric: bool) -> None:
    """accuracy_level 0 is x W^T; 4 is the same on activations rounded per block. Odd N and G are among the cases."""
    rng = np.random.default_rng(k + bits)
    w = (rng.standard_normal((37, k)) + 0.3).astype(np.float32)
    w[5] = 0
    q = quantize(w, Grid(bits, group, symmetric))
    # The kernel's 2-bit int8 path exists for some blocks only; the others compute in float32 whatever is asked for.
    rounds = q.storage_bits > 2 or q.block_size not in FLOAT_BLOCKS
    plain, int8 = matmul_nbits(q, 0), matmul_nbits(q, 4)
    for tokens in (1, 2, 7):
        x = rng.standard_normal((tokens, k)).astype(np.float32) * 3
        x[0, 3] = 40
        assert relative(plain(x), exact(x, q)) <= 1e-6
        rounded = fake_quantize_activations(x, q.block_size) if rounds else x
        assert relative(int8(x), exact(rounded, q)) <= 5e-6


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 5])
def test_kernel_and_reference_round_the_same_activation_codes(bits: int, tokens: int) -> None:
    """An identity weight shows the codes themselves: code = x * (127 / m), halves to even, on values near ties."""
    rng = np.random.default_rng(0)
    zero = 1 << (bits - 1)
    codes = np.full((32, 32), zero, np.uint8)
    np.fill_diagonal(codes, zero + 1)
    run = matmul_nbits(Quantized(codes, np.ones((32, 1), np.float32), None, bits, bits, 32), 4)
    for _ in range(40):
        x = rng.standard_normal((tokens, 32)).astype(np.float32)
        largest = np.abs(x).max(axis=1, keepdims=True)
        x[:, :16] = (rng.integers(-120, 120, (tokens, 16)) + 0.5) * (largest / np.float32(127))
        expected, scales = activation_codes(x, 32)
        np.testing.assert_array_equal(np.rint(run(x) / scales), expected)
    x = np.zeros((tokens, 32), np.float32)
    x[:, :7] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]
    assert run(x)[-1, :7].tolist() == [127, 0, 2, 2, 0, -2, 126]


def test_activation_codes_of_whole_tokens_zeros_and_tails() -> None:
    x = np.zeros((2, 3, 20), np.float32)
    x[0, 0, 0], x[0, 0, 19], x[1, 1, 17] = 14, 3, 1e-40
    codes, scales = activation_codes(x, 16, bits=4)
    assert (codes.shape, scales.shape) == ((2, 3, 20), (2, 3, 2))
    assert (codes[0, 0, 0], codes[0, 0, 19]) == (7, 7)
    assert scales[0, 0].tolist() == [2, np.float32(3) / np.float32(7)]
    np.testing.assert_array_equal(fake_quantize_activations(x, 16, bits=4)[0], x[0])
    assert not fake_quantize_activations(x, 16)[1].any()
    codes, scales = activation_codes(x, -1, bits=4)
    assert (scales.shape, codes[0, 0, 0], codes[0, 0, 19]) == ((2, 3, 1), 7, 2)
    assert np.array_equal(fake_quantize_activations(x, -1, bits=4), codes * scales)


@pytest.mark.filterwarnings("error")
def test_activation_codes_do_not_depend_on_the_unit() -> None:
    x = np.random.default_rng(3).standard_normal((4, 50)).astype(np.float32)
    codes, scales = activation_codes(x, 16)
    for exponent in (-110, 110):
        moved, moved_scales = activation_codes(np.ldexp(x, exponent), 16)
        np.testing.assert_array_equal(moved, codes)
        np.testing.assert_array_equal(moved_scales, np.ldexp(scales, exponent))
    assert not activation_codes(np.ldexp(x, -135), 16)[0].any()  # 127 / m would overflow


@pytest.mark.parametrize("bits", [2, 3, 6, 8])
def test_activation_error_is_at_most_half_a_step(bits: int) -> None:
    x = np.random.default_rng(bits).standard_normal((50, 96)).astype(np.float32)
    codes, scales = activation_codes(x, 32, bits)
    assert np.abs(codes).max() == (1 << (bits - 1)) - 1
    error = np.abs(fake_quantize_activations(x, 32, bits) - x).reshape(50, 3, 32)
    assert (error <= scales[..., None] * 0.50001).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_gather_and_matmul_read_the_same_table(symmetric: bool) -> None:
    """One 8-bit table [V, H] serves the embedding and the head when the block divides H."""
    rng = np.random.default_rng(2)
    q = quantize(rng.standard_normal((53, 192)).astype(np.float32), Grid(8, 64, symmetric))
    table = q.packed_codes()
    assert table.tobytes() == q.codes.tobytes()
    inputs: dict[str, Array] = {"table": table.reshape(53, 192), "ids": np.empty(0), "scales": q.scales}
    if q.zero_points is not None:
        inputs["zeros"] = q.packed_zero_points()
    layout = {"gather_axis": 0, "quantize_axis": 1, "bits": 8, "block_size": 64}
    ids = rng.integers(0, 53, (2, 9))
    rows = session("GatherBlockQuantized", inputs, "ids", TensorProto.INT64, **layout)(ids)
    np.testing.assert_array_equal(rows, q.dequantize()[ids])
    x = rng.standard_normal((3, 192)).astype(np.float32)
    assert relative(matmul_nbits(q, 0)(x), exact(x, q)) <= 1e-6
