"""Hostile graph.onnx: references that ONNX Runtime would take without a word, or that leave the engine, are refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import AttributeProto, ModelProto, TensorProto, helper

from rqc.runtime.container import EngineFile
from rqc.runtime.errors import EngineFormatError
from rqc.runtime.onnx_walk import MAX_DEPTH, bind, external_tensors, pad_location
from rqc.runtime.zip_layout import GRAPH

from .forged_engine import assemble, parts

BASE = 65536  # where weights.bin begins in the forged engine


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return parts(tmp_path_factory.mktemp("sound"))


def refuse(path: Path, sound: dict[str, bytes], graph: bytes, match: str) -> None:
    path.write_bytes(assemble({**sound, GRAPH: graph}))
    with pytest.raises(EngineFormatError, match=match):
        EngineFile.open(path)


def edited(sound: dict[str, bytes], edit: Callable[[ModelProto], object]) -> bytes:
    proto = onnx.load_from_string(sound[GRAPH])
    edit(proto)
    data: bytes = proto.SerializeToString()
    return data


def entry(proto: ModelProto, key: str, name: str = "W") -> onnx.StringStringEntryProto:
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    return next(item for item in tensor.external_data if item.key == key)


def test_the_forged_graph_is_sound_without_an_edit(tmp_path: Path, sound: dict[str, bytes]) -> None:
    (tmp_path / "e.plan").write_bytes(assemble({**sound, GRAPH: edited(sound, lambda proto: None)}))
    with EngineFile.open(tmp_path / "e.plan", check=True) as engine:
        assert {name: tensor.offset for name, tensor in engine.tensors.items()} == {"W": BASE, "b": BASE + 3648}


@pytest.mark.parametrize(
    ("name", "offset", "match"),
    [
        ("W", "-00000000064", "instead of 12 digits"),
        ("W", "0x0000010000", "instead of 12 digits"),
        ("W", "65536", "instead of 12 digits"),
        ("W", "٠٠٠٠٠٠٠٦٥٥٣٦", "instead of 12 digits"),
        ("W", "00000000000000065536", "instead of 12 digits"),
        ("W", "", "instead of 12 digits"),
        ("W", f"{0:012}", "outside weights.bin"),
        ("W", f"{BASE - 64:012}", "outside weights.bin"),
        ("W", f"{BASE + 1:012}", "not aligned"),
        ("W", f"{BASE + 64:012}", "overlaps|gap"),
        ("b", f"{BASE:012}", "overlaps"),
        ("b", f"{BASE + 3584:012}", "overlaps"),
        ("b", f"{BASE + 3712:012}", "outside weights.bin"),
        ("b", f"{1 << 39:012}", "outside weights.bin"),
    ],
)
def test_offsets(tmp_path: Path, sound: dict[str, bytes], name: str, offset: str, match: str) -> None:
    graph = edited(sound, lambda proto: setattr(entry(proto, "offset", name), "value", offset))
    refuse(tmp_path / "e.plan", sound, graph, match)


@pytest.mark.parametrize("length", ["0", "-1", "", "03600", "3599", "3601", "4800", "9" * 13, "3600 "])
def test_lengths(tmp_path: Path, sound: dict[str, bytes], length: str) -> None:
    graph = edited(sound, lambda proto: setattr(entry(proto, "length"), "value", length))
    refuse(tmp_path / "e.plan", sound, graph, "has length|bytes instead of 3600")


@pytest.mark.parametrize(
    "location", ["", "weights.bin", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "./" * 123 + "engine.plan"]
)
def test_locations_that_cannot_be_bound(tmp_path: Path, sound: dict[str, bytes], location: str) -> None:
    graph = edited(sound, lambda proto: setattr(entry(proto, "location"), "value", location))
    refuse(tmp_path / "e.plan", sound, graph, "instead of 256")


def test_a_location_elsewhere_is_never_followed(tmp_path: Path, sound: dict[str, bytes]) -> None:
    evil = "../" * 82 + "etc/passwd"
    assert len(evil) == 256
    graph = edited(sound, lambda proto: setattr(entry(proto, "location"), "value", evil))
    (tmp_path / "e.plan").write_bytes(assemble({**sound, GRAPH: graph}))
    with EngineFile.open(tmp_path / "e.plan") as engine:
        assert b"passwd" not in engine.graph() + engine.standalone_graph()


@pytest.mark.parametrize("key", ["location", "offset", "length"])
def test_references_with_a_part_missing_or_twice(tmp_path: Path, sound: dict[str, bytes], key: str) -> None:
    def remove(proto: ModelProto) -> None:
        proto.graph.initializer[0].external_data.remove(entry(proto, key))

    def repeat(proto: ModelProto) -> None:
        proto.graph.initializer[0].external_data.append(entry(proto, key))

    refuse(tmp_path / "e.plan", sound, edited(sound, remove), f"has no external {key}")
    refuse(tmp_path / "e.plan", sound, edited(sound, repeat), "unknown, empty or repeated")


def initializer(proto: ModelProto) -> TensorProto:
    tensor: TensorProto = proto.graph.initializer[0]
    return tensor


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda p: initializer(p).external_data.add(key="checksum", value="0"), "unknown, empty or repeated"),
        (lambda p: initializer(p).external_data.add(key="offset2"), "unknown, empty or repeated"),
        (lambda p: setattr(initializer(p), "raw_data", bytes(3600)), "both external and inline"),
        (lambda p: initializer(p).float_data.extend([1.0]), "both external and inline"),
        (lambda p: setattr(initializer(p), "data_location", TensorProto.DEFAULT), "both external and inline"),
        (lambda p: initializer(p).ClearField("data_location"), "both external and inline"),
        (lambda p: initializer(p).ClearField("external_data"), "no external location"),
        (lambda p: setattr(initializer(p), "data_type", 0), "data type 0"),
        (lambda p: setattr(initializer(p), "data_type", TensorProto.STRING), "data type 8"),
        (lambda p: setattr(initializer(p), "data_type", 99), "data type 99"),
        (lambda p: setattr(initializer(p), "data_type", -1), "data type"),
        (lambda p: setattr(initializer(p), "data_type", TensorProto.FLOAT16), "bytes instead of 1800"),
        (lambda p: initializer(p).dims.append(2), "bytes instead of 7200"),
        (lambda p: initializer(p).dims.append(0), "bytes instead of 0"),
        (lambda p: initializer(p).dims.extend([-1, -1]), "has shape"),
        (lambda p: initializer(p).dims.extend([1] * 15), "has shape"),
        (lambda p: initializer(p).dims.extend([1 << 62] * 10_000), "has shape"),
        (lambda p: setattr(initializer(p), "name", "b"), "same name"),
        (lambda p: p.graph.initializer.pop(), "bytes after its last tensor"),
        (lambda p: p.graph.initializer.pop(0), "leaves a gap"),
        (lambda p: p.ClearField("graph"), "0 main graphs"),
    ],
)
def test_tensors(tmp_path: Path, sound: dict[str, bytes], edit: Callable[[ModelProto], object], match: str) -> None:
    refuse(tmp_path / "e.plan", sound, edited(sound, edit), match)


def outside() -> TensorProto:
    """A tensor whose bytes lie in another file."""
    tensor = TensorProto(name="stolen", data_type=TensorProto.UINT8, dims=[16], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="secret.txt")
    return tensor


def in_attribute(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Constant", [], ["c"], value=outside()))


def in_attribute_list(proto: ModelProto) -> None:
    attribute = AttributeProto(name="many", type=AttributeProto.TENSORS, tensors=[outside()])
    proto.graph.node[0].attribute.append(attribute)


def subgraph() -> onnx.GraphProto:
    return onnx.GraphProto(name="inner", initializer=[outside()])


def in_subgraph(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("If", ["x"], ["c"], then_branch=subgraph()))


def in_nested_subgraphs(proto: ModelProto) -> None:
    middle = onnx.GraphProto(name="middle", node=[helper.make_node("If", ["x"], ["c"], then_branch=subgraph())])
    attribute = AttributeProto(name="graphs", type=AttributeProto.GRAPHS, graphs=[onnx.GraphProto(), middle])
    proto.graph.node[0].attribute.append(attribute)


def in_sparse_initializer(proto: ModelProto) -> None:
    proto.graph.sparse_initializer.add(values=outside(), dims=[16])


def in_sparse_attributes(proto: ModelProto) -> None:
    sparse = onnx.SparseTensorProto(indices=outside())
    proto.graph.node[0].attribute.append(AttributeProto(name="s", type=12, sparse_tensors=[sparse]))


def in_function(proto: ModelProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=outside())
    proto.functions.append(onnx.FunctionProto(name="f", domain="d", node=[node]))


def in_function_default(proto: ModelProto) -> None:
    default = AttributeProto(name="a", type=AttributeProto.TENSOR, t=outside())
    proto.functions.append(onnx.FunctionProto(name="f", domain="d", attribute_proto=[default]))


def in_training_info(proto: ModelProto) -> None:
    proto.training_info.add(initialization=subgraph())


PLACES = [
    in_attribute,
    in_attribute_list,
    in_subgraph,
    in_nested_subgraphs,
    in_sparse_initializer,
    in_sparse_attributes,
    in_function,
    in_function_default,
    in_training_info,
]


@pytest.mark.parametrize("place", PLACES)
def test_external_data_elsewhere(tmp_path: Path, sound: dict[str, bytes], place: Callable[[ModelProto], None]) -> None:
    refuse(
        tmp_path / "e.plan", sound, edited(sound, place), "'stolen' is external but no initializer of the main graph"
    )


@pytest.mark.parametrize("place", PLACES)
def test_inline_tensors_elsewhere_are_fine(
    tmp_path: Path, sound: dict[str, bytes], place: Callable[[ModelProto], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = onnx.numpy_helper.from_array(np.zeros(16, np.uint8), "own")
    monkeypatch.setitem(globals(), "outside", lambda: inline)
    (tmp_path / "e.plan").write_bytes(assemble({**sound, GRAPH: edited(sound, place)}))
    EngineFile.open(tmp_path / "e.plan").close()


def test_two_main_graphs(tmp_path: Path, sound: dict[str, bytes]) -> None:
    refuse(tmp_path / "e.plan", sound, sound[GRAPH] * 2, "2 main graphs")


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def test_field_numbers_that_other_parsers_cut_short(tmp_path: Path, sound: dict[str, bytes]) -> None:
    in_function(model := ModelProto())
    function = model.functions[0]
    hidden = varint((25 << 3 | 2) + (1 << 32)) + varint(function.ByteSize()) + function.SerializeToString()
    refuse(tmp_path / "e.plan", sound, sound[GRAPH] + hidden, "invalid field number")


@pytest.mark.parametrize(
    ("tail", "match"),
    [
        (b"\x3a", "no valid protobuf number"),  # a graph without a length
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "does not fit"),  # one of 2^64 - 1 bytes
        (b"\x08" + b"\x80" * 9, "no valid protobuf number"),
        (b"\x08" + b"\x80" * 10 + b"\x01", "no valid protobuf number"),
        (b"\x38\x01", "field 7 of a model has wire type 0"),
        (b"\x3d\0\0\0\0", "field 7 of a model has wire type 5"),
        (b"\x3b\x3c", "wire type 3"),  # groups, which ONNX does not use
        (b"\x02\x00", "invalid field number"),
        (b"\xff", "no valid protobuf number"),
    ],
)
def test_bytes_that_are_no_message(tmp_path: Path, sound: dict[str, bytes], tail: bytes, match: str) -> None:
    refuse(tmp_path / "e.plan", sound, sound[GRAPH] + tail, match)


@pytest.mark.parametrize(
    ("key", "value"), [(2 << 3 | 5, bytes(4)), (8 << 3, b"\1"), (14 << 3 | 2, b"\0"), (1 << 3 | 5, bytes(4))]
)
def test_tensor_fields_of_another_wire_type(sound: dict[str, bytes], key: int, value: bytes) -> None:
    tensor = field(5, outside().SerializeToString() + varint(key) + value)
    with pytest.raises(EngineFormatError, match="wire type"):
        external_tensors(field(7, tensor))


def test_deep_nesting(tmp_path: Path, sound: dict[str, bytes]) -> None:
    graph = b""
    for _ in range(MAX_DEPTH):
        graph = field(1, field(5, field(6, graph)))  # a graph in an attribute of a node of a graph
    refuse(tmp_path / "e.plan", sound, sound[GRAPH] + field(25, field(7, field(5, field(6, graph)))), "nested deeper")


def test_the_walk_agrees_with_protobuf_on_damaged_graphs(sound: dict[str, bytes]) -> None:
    """Whatever the walk lets pass, protobuf sees the same external tensors in it, or does not parse it at all."""
    rng = random.Random(0)
    passed = 0
    for _ in range(4000):
        data = bytearray(sound[GRAPH])
        for _ in range(rng.randrange(1, 3)):
            data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), 1 << rng.randrange(8)])
        try:
            refs = external_tensors(bytes(data))
        except EngineFormatError:
            continue
        proto = ModelProto()
        try:
            proto.ParseFromString(bytes(data))
        except DecodeError:  # ONNX Runtime will refuse it as well
            continue
        passed += 1
        seen = [tensor for tensor in proto.graph.initializer if tensor.external_data or tensor.data_location]
        assert [ref.shape for ref in refs] == [tuple(tensor.dims) for tensor in seen]
        assert [ref.data_type for ref in refs] == [tensor.data_type for tensor in seen]
        for ref, tensor in zip(refs, seen, strict=True):
            parts = {item.key: item.value for item in tensor.external_data}
            assert set(parts) == {"location", "offset", "length"}
            assert (f"{ref.offset:012}", str(ref.length)) == (parts["offset"], parts["length"])
    assert passed > 500


def test_binding_touches_nothing_but_the_references(sound: dict[str, bytes]) -> None:
    refs = external_tensors(sound[GRAPH])
    bound = bind(sound[GRAPH], refs, b"other.plan", 640)
    before, after = onnx.load_from_string(sound[GRAPH]), onnx.load_from_string(bound)
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        parts = {item.key: item.value for item in new.external_data}
        assert parts["location"] == pad_location(b"other.plan").decode()
        assert int(parts["offset"]) == int(next(i.value for i in old.external_data if i.key == "offset")) + 640
        new.CopyFrom(old)
    assert after == before
