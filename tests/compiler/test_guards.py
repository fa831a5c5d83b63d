"""What TensorRT cannot build is refused before it sees it: each rule by a graph that breaks it alone, beside what
TensorRT-RTX itself says of it where that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from rqc.compiler.targets.guards import check_graph, violations
from rqc.compiler.targets.settle import settled
from rqc.runtime import build_worker
from rqc.runtime.capabilities import check_gpu, checked_sms, default_sms, sm_obstacles
from rqc.runtime.errors import TargetError

BUILDER = importlib.util.find_spec("tensorrt_rtx") is not None
K, N = 64, 32
FLOAT, HALF, INT4, UINT4, INT8 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT4,
    TensorProto.UINT4,
    TensorProto.INT8,
)
FLOAT8, FLOAT4 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1
Made = tuple[list[Any], list[Any]]


def codes(name: str, kind: int, shape: Sequence[int]) -> Any:
    values = np.arange(int(np.prod(shape))) % 7 + (0 if kind == UINT4 else -3)
    return helper.make_tensor(name, kind, shape, values)


def scales(name: str, *shape: int, value: float = 0.01) -> Any:
    return numpy_helper.from_array(np.full(shape, value, np.float16), name)


def weight(kind: int = INT4, block: int | None = 32, k: int = K, zero: Any = None) -> Made:
    """w [K, N] behind DequantizeLinear, in blocks or with a scale per column."""
    groups = (k + block - 1) // block if block else 1
    attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
    inputs = ["codes", "scales", *(["zero"] if zero is not None else [])]
    node = helper.make_node("DequantizeLinear", inputs, ["w"], name="weight", **attributes)
    stored = scales("scales", groups, N) if block else scales("scales", N)
    return [node], [codes("codes", kind, (k, N)), stored, *([] if zero is None else [zero])]


def graph(nodes: list[Any], initializers: list[Any], *, k: int = K, x: int = HALF, y: int = HALF) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", x, [4, k])],
        [helper.make_tensor_value_info("y", y, None)],
        initializers,
    )
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)], ir_version=12
    )


def product(made: Made, x: str = "x") -> Made:
    nodes, initializers = made
    return [*nodes, helper.make_node("MatMul", [x, "w"], ["y"], name="product")], initializers


def rounded(kind: int = INT8) -> Made:
    """x on a static grid."""
    codes_of = helper.make_node("QuantizeLinear", ["x", "step"], ["q"], name="round", output_dtype=kind)
    back = helper.make_node("DequantizeLinear", ["q", "step"], ["r"], name="back")
    return [codes_of, back], [scales("step")]


def together(first: Made, second: Made) -> onnx.ModelProto:
    return graph([*first[0], *second[0]], [*first[1], *second[1]])


def sound() -> onnx.ModelProto:
    return graph(*product(weight()))


def foreign() -> onnx.ModelProto:
    node = helper.make_node("FastGelu", ["x"], ["y"], domain="com.microsoft", name="odd")
    return graph([node], [])


def integer() -> onnx.ModelProto:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"], name="odd")
    return graph([node], [], x=FLOAT, y=TensorProto.UINT8)


def zero_point() -> onnx.ModelProto:
    return graph(*product(weight(zero=helper.make_tensor("zero", INT4, (2, N), np.ones(2 * N)))))


def unsigned() -> onnx.ModelProto:
    return graph(*product(weight(UINT4)))


def silent(kind: int = INT8) -> onnx.ModelProto:
    return together(rounded(kind), product(weight(), x="r"))


def silent_behind_transpose() -> onnx.ModelProto:
    node = helper.make_node("DequantizeLinear", ["codes", "scales"], ["rows"], name="weight", axis=1, block_size=32)
    turn = helper.make_node("Transpose", ["rows"], ["w"], name="turn", perm=[1, 0])
    made = [node, turn], [codes("codes", INT4, (N, K)), scales("scales", N, K // 32)]
    return together(rounded(), product(made, x="r"))


def bytes_in_blocks() -> onnx.ModelProto:
    return graph(*product(weight(INT8)))


def uneven() -> onnx.ModelProto:
    return graph(*product(weight(k=K + 8)), k=K + 8)


def computed_scales() -> onnx.ModelProto:
    nodes, initializers = product(weight())
    nodes[0].input[1] = "computed"
    return graph([helper.make_node("Abs", ["scales"], ["computed"], name="abs"), *nodes], initializers)


def attention(outputs: int = 1, **attributes: float) -> onnx.ModelProto:
    names = [f"present{index}" for index in range(outputs - 1)]
    flat = [helper.make_node("Reshape", ["x", "shape"], ["q"], name="shape")]
    inputs = ["q", "q", "q", "", "past", "past"] if outputs > 1 else ["q", "q", "q"]
    flat.append(helper.make_node("Attention", inputs, ["y", *names], name="odd", **attributes))
    flat += [helper.make_node("Identity", [name], [f"{name}.read"], name=f"read{name}") for name in names]
    past = numpy_helper.from_array(np.zeros((1, 2, 3, 32), np.float16), "past")
    shape = numpy_helper.from_array(np.asarray([1, 2, 4, 32]), "shape")
    return graph(flat, [shape, *([past] if outputs > 1 else [])])


def float4() -> Made:
    """w [K, N] of 4-bit floats in blocks of 16, under 8-bit float scales with a scale of their own."""
    values = np.resize(np.asarray([0.5, -6, 3, 0, 1.5], np.float32), K * N)
    inner = helper.make_node("DequantizeLinear", ["fine", "unit"], ["scales"], name="scales")
    outer = helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], name="weight", axis=0, block_size=16)
    fine = helper.make_tensor("fine", FLOAT8, (K // 16, N), np.full(K // 16 * N, 1.5))
    return [inner, outer], [helper.make_tensor("codes", FLOAT4, (K, N), values), fine, scales("unit")]


def float8() -> onnx.ModelProto:
    return graph(*product(weight(FLOAT8, None)))


def mixed() -> onnx.ModelProto:
    return together(rounded(FLOAT8), product(weight(block=None), x="r"))


def silent_float4() -> onnx.ModelProto:
    return together(rounded(), product(float4(), x="r"))


def gathered_codes() -> onnx.ModelProto:
    place = helper.make_node("Cast", ["x"], ["i"], name="place", to=TensorProto.INT64)
    gather = helper.make_node("Gather", ["codes", "i"], ["q"], name="gather")
    read = helper.make_node("DequantizeLinear", ["q", "step"], ["y"], name="read")
    return graph([place, gather, read], [codes("codes", INT8, (K, N)), scales("step")])


RULES: list[tuple[Callable[[], onnx.ModelProto], str, str | None]] = [
    (foreign, "FastGelu odd is an operator of com.microsoft", None),
    (integer, "DynamicQuantizeLinear odd is an integer operator", "DynamicQuantizeLinear odd"),
    (zero_point, "DequantizeLinear weight has a zero point", "Non-zero zero point is not supported"),
    (unsigned, "DequantizeLinear weight has unsigned codes", "Failed to import initializer"),
    (silent, "MatMul product multiplies statically rounded activations with weights in blocks", ""),
    (lambda: silent(INT4), "MatMul product multiplies statically rounded activations", ""),
    (silent_behind_transpose, "MatMul product multiplies statically rounded activations", "is_constant"),
    (bytes_in_blocks, "DequantizeLinear weight has 8-bit codes in blocks", None),
    (uneven, "DequantizeLinear weight has blocks of 32 along 72", None),
    (computed_scales, "DequantizeLinear weight has scales that are computed", None),
    (lambda: attention(3), "Attention odd has more than one output", "only supports Attention nodes with one output"),
    (lambda: attention(softcap=30.0), "Attention odd has a softcap", None),
    (mixed, "MatMul product multiplies 8-bit floats with 4-bit integers", "CHECK(opndA->type() == opndB->type())"),
    (silent_float4, "MatMul product multiplies statically rounded activations with weights in blocks", None),
    (
        gathered_codes,
        "Gather gather reads the codes codes, which only DequantizeLinear may",
        "is only allowed before DQ",
    ),
]
IDS = [told.split(" ", 2)[-1][:40] for _, told, _ in RULES]


def refusal(model: onnx.ModelProto, sms: tuple[int, ...] = (86,)) -> TargetError:
    with pytest.raises(TargetError) as raised:
        check_graph(ir.from_proto(model), "tensorrt-rtx", sms)
    return raised.value


@pytest.mark.parametrize(("make", "told"), [rule[:2] for rule in RULES], ids=IDS)
def test_a_rule_that_is_broken_is_told_with_its_node(make: Callable[[], onnx.ModelProto], told: str) -> None:
    error = refusal(make(), (120,))
    assert error.message.startswith("tensorrt-rtx cannot build this graph: ")
    assert told in error.message
    assert error.message.count(";") == 0
    assert error.hint


def test_a_sound_graph_is_not_refused() -> None:
    check_graph(ir.from_proto(sound()), "tensorrt-rtx", (80, 86, 89, 120))
    check_graph(ir.from_proto(sound()), "tensorrt", ())
    for made in (
        together(rounded(), product(weight(INT8, None), x="r")),
        graph(*product(weight(zero=helper.make_tensor("zero", INT4, (2, N), np.zeros(2 * N))))),
        attention(),
        attention(softcap=0.0),
    ):
        assert list(violations(ir.from_proto(made))) == []


def test_everything_is_listed_capabilities_first() -> None:
    """In the order of the graph, each way out once."""
    nodes, initializers = product(weight(UINT4, zero=helper.make_tensor("zero", UINT4, (2, N), np.full(2 * N, 8))))
    first = helper.make_node("FastGelu", ["x"], ["a"], domain="com.microsoft", name="early")
    last = helper.make_node("FastGelu", ["x"], ["b"], domain="com.microsoft", name="late")
    error = refusal(graph([first, *nodes, last], initializers), (75, 86, 90))
    told = error.message.split(": ", 1)[1].split("; ")
    rtx, gelu = "TensorRT-RTX", "FastGelu"
    assert [line.split(" ")[0] for line in told] == [rtx, rtx, gelu, "DequantizeLinear", gelu]
    assert "does not build for SM 90" in told[0]
    assert "no 4-bit weights on SM 75" in told[1]
    assert "early" in told[2]
    assert "late" in told[4]
    assert error.hint.count("--target onnx runs it") == 1


def test_each_capability_that_cannot_be_is_named() -> None:
    from rqc.compiler.recipe import Recipe

    def settle(**options: Any) -> Any:
        class Architecture:
            context_length = 64

        return settled(Recipe.from_values({"target": "tensorrt-rtx", **options}), Architecture(), None)  # type: ignore[arg-type]

    with pytest.raises(TargetError, match=r"does not build for SM 70, SM 90, only for SM 75, SM 80") as raised:
        settle(sm="90,70,86")
    assert "--portable" in raised.value.hint
    with pytest.raises(TargetError, match="no 4-bit weights on SM 75"):
        settle(sm="75", scheme="w4a16")
    assert settle(sm="7.5,sm_86", scheme="w8a16").sm == (75, 86)
    assert settle().sm == (80, 86, 89, 120)
    with pytest.raises(TargetError, match="builds for the GPU at hand"):
        settle(target="tensorrt", sm="86")
    assert settle(target="tensorrt").sm == ()


def built(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, sms: Sequence[int] = (86,)) -> str:
    """What TensorRT-RTX says against a graph, or nothing."""
    import tensorrt_rtx as trt

    monkeypatch.chdir(tmp_path)
    job: dict[str, Any] = {"module": "tensorrt_rtx", "sms": list(sms), "profiles": []}
    try:
        plan = build_worker.Build(trt, job).run(model.SerializeToString())
    except build_worker.Refused as error:
        return str(error) or "refused"
    assert bytes(memoryview(plan))[:4] == b"vtrt"
    return ""


@pytest.mark.skipif(not BUILDER, reason="the module tensorrt_rtx is not installed")
@pytest.mark.parametrize(("make", "said"), [(make, said) for make, _, said in RULES if said])
def test_tensorrt_itself_refuses_it(
    make: Callable[[], onnx.ModelProto], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    assert said in built(make(), monkeypatch, tmp_path, (120,))  # which has all types


@pytest.mark.skipif(not BUILDER, reason="the module tensorrt_rtx is not installed")
@pytest.mark.parametrize("make", [sound, silent])
def test_what_is_wrong_without_a_word_builds_as_well_as_what_is_right(
    make: Callable[[], onnx.ModelProto], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    assert built(make(), monkeypatch, tmp_path) == ""


FLOATS: list[tuple[Callable[[], onnx.ModelProto], str, tuple[int, ...], str]] = [
    (float8, "8-bit float weights on SM 80, SM 86", (80, 86, 89, 120), "fp8_e4m3"),
    (lambda: graph(*product(float4())), "4-bit float weights on SM 80, SM 89", (80, 89, 120), "fp4_e2m1"),
]


@pytest.mark.parametrize(("make", "told", "sms", "said"), FLOATS, ids=["fp8", "fp4"])
def test_small_floats_are_refused_where_there_is_no_such_type(
    make: Callable[[], onnx.ModelProto],
    told: str,
    sms: tuple[int, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    """One that is too old fails the whole build; what is left builds."""
    error = refusal(make(), sms)
    assert error.message.count(" on SM") == 1
    assert told in error.message
    newest = sms[-1:]
    check_graph(ir.from_proto(make()), "tensorrt-rtx", newest)
    if BUILDER:
        assert said in built(make(), monkeypatch, tmp_path, sms)
        assert built(make(), monkeypatch, tmp_path, newest) == ""


def test_every_kind_of_weight_narrows_the_usual_capabilities() -> None:
    assert [default_sms(kinds) for kinds in ((), ("int4",), ("fp8",), ("fp4", "int4"))] == [
        (80, 86, 89, 120),
        (80, 86, 89, 120),
        (89, 120),
        (120,),
    ]
    assert checked_sms("tensorrt", (), {"fp8"}) == ()
    [(told, way)] = sm_obstacles("tensorrt-rtx", (75, 86), {"fp4", "int4"})
    assert told == "TensorRT-RTX has no 4-bit float weights on SM 75, SM 86"
    assert "--sm 120" in way
    check_gpu(100, {"fp4"})
    check_gpu(80, {"int4"})
    with pytest.raises(TargetError, match="8-bit float weights from SM 89 on, the GPU is SM 86"):
        check_gpu(86, {"fp8"})
