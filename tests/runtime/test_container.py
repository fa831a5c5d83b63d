"""Writing an engine and reading it back: ONNX Runtime, zipfile and numpy see what went in, wherever the file lies."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from rqc.compiler.plan import write_engine
from rqc.runtime import engine_writer, zip_layout
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import EngineFormatError, InputError
from rqc.runtime.onnx_walk import external_tensors, pad_location
from rqc.runtime.zip_layout import Entry, local_bytes, read_directory, tail_bytes, verify_structure

FILES = {"tokenizer.json": b"{}", "config.json": b'{"a": 1}', "device/orin nano.plan": b"ptrt" * 3000, "empty": b""}
MANIFEST: dict[str, Any] = {"target": "onnx", "architecture": {"layers": 2, "heads": 4}, "context_length": 128}
X = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "W": rng.standard_normal((32, 48)).astype(np.float32),
        "b": rng.standard_normal(48).astype(np.float32),  # 192 bytes: stays inline
        "V": rng.standard_normal((48, 7)).astype(np.float32),  # 1344 bytes: the next tensor needs a gap
        "U": rng.standard_normal((7, 301)).astype(np.float32),
    }


def model() -> ir.Model:
    """y = ((x W + b) V) U."""
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["i"]),
        helper.make_node("MatMul", ["i", "V"], ["j"]),
        helper.make_node("MatMul", ["j", "U"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 301])]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights().items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def holder(tensors: dict[str, ir.TensorProtocol]) -> ir.Model:
    """A model that only holds tensors."""
    graph = ir.Graph([], [], nodes=[], name="holder", opset_imports={"": 21})
    for name, tensor in tensors.items():
        graph.register_initializer(ir.Value(name=name, const_value=tensor))
    return ir.Model(graph, ir_version=10)


def run(engine: EngineFile) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", engine.directory)
    session = onnxruntime.InferenceSession(engine.graph(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": X})[0]
    return result


def expected() -> np.ndarray:
    w = weights()
    result: np.ndarray = ((X @ w["W"] + w["b"]) @ w["V"]) @ w["U"]
    return result


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("engine") / "first.plan"
    write_engine(path, model(), MANIFEST, FILES)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    file = tmp_path / "engine.plan"
    file.write_bytes(content)
    return file


def test_what_went_in_comes_out(path: Path) -> None:
    with EngineFile.open(path, check=True) as engine:
        assert engine.names() == ["manifest.json", "graph.onnx", "weights.bin", *sorted(FILES)]
        assert {name: engine.read(name) for name in FILES} == FILES
        assert engine.has("empty")
        assert not engine.has("full")
        assert {key: engine.manifest[key] for key in MANIFEST} == MANIFEST
        assert set(engine.tensors) == {"W", "V", "U"}
        for name, entry in engine.tensors.items():
            array = weights()[name]
            np.testing.assert_array_equal(engine.tensor(name), array)
            assert (entry.dtype, entry.shape, entry.nbytes) == ("float32", array.shape, array.nbytes)
            assert path.read_bytes()[entry.offset : entry.offset + entry.nbytes] == array.tobytes()


def test_summary_describes_the_file(tmp_path: Path) -> None:
    summary = write_engine(tmp_path / "e.plan", model(), MANIFEST, FILES)
    data = (tmp_path / "e.plan").read_bytes()
    assert (summary.size_bytes, summary.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    with EngineFile.open(tmp_path / "e.plan") as engine:
        assert (
            summary.weight_bytes == len(engine.read("weights.bin")) == engine.manifest["entries"]["weights.bin"]["size"]
        )
        assert engine.size_bytes == len(data)


def test_other_zip_readers_agree(path: Path) -> None:
    with zipfile.ZipFile(path) as archive, EngineFile.open(path) as engine:
        assert archive.testzip() is None
        assert archive.namelist() == engine.names()
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert archive.read(info) == engine.read(info.filename)


def test_everything_is_aligned(path: Path) -> None:
    with EngineFile.open(path) as engine:
        entries = engine.manifest["entries"]
        assert entries["weights.bin"]["offset"] % 65536 == 0
        assert all(entry["offset"] % 4096 == 0 for entry in entries.values())
        assert all(entry.offset % 64 == 0 for entry in engine.tensors.values())


def test_the_file_depends_on_nothing_but_its_content(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backwards = dict(reversed(MANIFEST.items()))
    backwards["architecture"] = dict(reversed(MANIFEST["architecture"].items()))
    write_engine("another name.plan", model(), backwards, dict(reversed(FILES.items())))
    assert Path("another name.plan").read_bytes() == content
    write_engine("another name.plan", model(), backwards | {"context_length": 129}, FILES)
    assert Path("another name.plan").read_bytes() != content


def test_writing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    given = model()
    before = {name: value.const_value for name, value in given.graph.initializers.items()}
    write_engine(tmp_path / "e.plan", given, MANIFEST, {})
    assert {name: value.const_value for name, value in given.graph.initializers.items()} == before


@pytest.mark.parametrize(
    "name",
    [
        "engine.plan",
        "a",
        "ab",
        "abc.plan",
        "with spaces and ümläute 模型.plan",
        "back\\slash",
        "-x",
        "n" * 254,
        "m" * 253,
    ],
)
def test_onnxruntime_runs_it_under_any_name(path: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a folder mit Umlaut ö"
    folder.mkdir()
    moved = path.rename(folder / name)
    with EngineFile.open(moved) as engine:
        np.testing.assert_allclose(run(engine), expected(), rtol=1e-4, atol=1e-4)


def test_onnxruntime_runs_it_through_links_and_relative_paths(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.plan"
    link.symlink_to(path)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for way in (link, "link.plan", "../engine.plan"):
        with EngineFile.open(way) as engine:
            assert engine.path == str(path)
            np.testing.assert_allclose(run(engine), expected(), rtol=1e-4, atol=1e-4)


def test_a_name_that_cannot_be_bound_is_refused(path: Path, tmp_path: Path) -> None:
    longest = path.rename(tmp_path / ("n" * 255))
    with pytest.raises(InputError, match="255 bytes"):
        EngineFile.open(longest)
    with pytest.raises(InputError, match="255 bytes"):
        write_engine(tmp_path / ("m" * 255), model(), MANIFEST, {})
    with pytest.raises(InputError, match="UTF-8"):
        EngineFile.open(os.fsdecode(b"\xff.plan"))


def test_writing_under_the_longest_name(tmp_path: Path) -> None:
    write_engine(tmp_path / ("n" * 254), model(), MANIFEST, {})
    with EngineFile.open(tmp_path / ("n" * 254), check=True) as engine:
        assert engine.tensors


@pytest.mark.parametrize("length", [1, 2, 3, 100, 252, 253, 254, 256])
def test_padded_locations_mean_the_same_file(length: int) -> None:
    padded = pad_location(b"n" * length)
    assert len(padded) == 256
    assert os.path.normpath(padded) == b"n" * length
    assert not padded.startswith(b"/")


def test_extracted_parts_run_on_their_own(path: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    with EngineFile.open(path) as engine:
        (parts / "graph.onnx").write_bytes(engine.standalone_graph())
        (parts / "weights.bin").write_bytes(b"".join(engine.chunks("weights.bin")))
    session = onnxruntime.InferenceSession(str(parts / "graph.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": X})[0], expected(), rtol=1e-4, atol=1e-4)


def test_tensors_are_read_only_and_outlive_the_file(path: Path) -> None:
    with EngineFile.open(path) as engine:
        array = engine.tensor("W")
    assert not array.flags.writeable
    np.testing.assert_array_equal(array, weights()["W"])


@pytest.mark.parametrize(
    ("array", "seen_as"),
    [
        (np.arange(700, dtype=np.float16), np.float16),
        (np.arange(700).astype(ml_dtypes.bfloat16), np.uint16),
        (np.arange(2000, dtype=np.uint8).reshape(20, 100), np.uint8),
        (np.arange(-1000, 1000).astype(np.int8), np.int8),
        (np.arange(300, dtype=np.int64), np.int64),
        (np.arange(2000) % 3 == 0, np.bool_),
        (np.arange(2000).astype(ml_dtypes.float8_e4m3fn), np.uint8),
    ],
)
def test_types_of_whole_bytes(tmp_path: Path, array: np.ndarray, seen_as: type) -> None:
    write_engine(tmp_path / "e.plan", holder({"t": ir.tensor(array)}), {}, {})
    with EngineFile.open(tmp_path / "e.plan", check=True) as engine:
        read = engine.tensor("t")
        assert read.dtype == seen_as
        np.testing.assert_array_equal(read, array.view(seen_as))
        assert engine.tensors["t"].dtype == str(array.dtype)


@pytest.mark.parametrize(("dtype", "per_byte"), [(ir.DataType.UINT4, 2), (ir.DataType.INT4, 2), (ir.DataType.UINT2, 4)])
def test_packed_types_keep_their_shape_in_the_graph(tmp_path: Path, dtype: ir.DataType, per_byte: int) -> None:
    packed = np.arange(3 * 701, dtype=np.uint8)
    tensor = ir.PackedTensor(packed, dtype, shape=ir.Shape([3, 701 * per_byte]))
    write_engine(tmp_path / "e.plan", holder({"t": tensor}), {}, {})
    with EngineFile.open(tmp_path / "e.plan", check=True) as engine:
        assert engine.tensors["t"].shape == (3, 701 * per_byte)
        np.testing.assert_array_equal(engine.tensor("t"), packed)


def lazy(make: Callable[[], np.ndarray], shape: list[int], storage: object = None) -> ir.LazyTensor:
    tensor = ir.LazyTensor(lambda: ir.tensor(make()), dtype=ir.DataType.FLOAT, shape=ir.Shape(shape))
    if storage is not None:
        tensor.meta["rqc.storage"] = storage
    return tensor


def test_lazy_tensors_are_evaluated_once_and_one_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def make(value: int, size: int) -> np.ndarray:
        assert not any(reference() is not None for reference in alive), "the tensor before is still in memory"
        array = np.full(size, value, np.float32)
        alive.append(weakref.ref(array))
        return array

    sizes = [3 << 20, 1000, 10, 2 << 20]
    heard: list[tuple[str, int, int]] = []
    tensors = {f"t{i}": lazy(lambda i=i: make(i, sizes[i]), [sizes[i]]) for i in range(4)}
    write_engine(tmp_path / "e.plan", holder(dict(tensors)), {}, {}, progress=lambda *step: heard.append(step))
    assert len(alive) == 4
    assert [done for _, done, _ in heard] == [12 << 20, (12 << 20) + 4000, heard[-1][2]]
    with EngineFile.open(tmp_path / "e.plan", check=True) as engine:
        assert set(engine.tensors) == {"t0", "t1", "t3"}
        assert all((engine.tensor(f"t{i}") == i).all() for i in (0, 1, 3))


def test_shared_storage_is_written_once(tmp_path: Path) -> None:
    calls: list[str] = []

    def make(name: str, shape: list[int]) -> np.ndarray:
        calls.append(name)
        return np.arange(4096, dtype=np.float32).reshape(shape)

    table, head = ("table", 8), ("table", 8)  # equal keys, not the same object
    tensors = {
        "gather": lazy(lambda: make("gather", [64, 64]), [64, 64], table),
        "other": lazy(lambda: make("other", [64, 64]), [64, 64]),
        "head": lazy(lambda: make("head", [64, 4, 16]), [64, 4, 16], head),
    }
    summary = write_engine(tmp_path / "e.plan", holder(dict(tensors)), {}, {})
    assert summary.weight_bytes == 2 * 4096 * 4
    assert calls == ["gather", "other"]
    with EngineFile.open(tmp_path / "e.plan", check=True) as engine:
        assert engine.tensors["gather"].offset == engine.tensors["head"].offset != engine.tensors["other"].offset
        assert engine.tensor("head").shape == (64, 4, 16)
        np.testing.assert_array_equal(engine.tensor("head").ravel(), engine.tensor("gather").ravel())


def test_a_graph_without_large_tensors_makes_an_engine(tmp_path: Path) -> None:
    summary = write_engine(tmp_path / "e.plan", holder({"t": ir.tensor(np.zeros(3, np.float32))}), {}, {})
    assert summary.weight_bytes == 0
    with EngineFile.open(tmp_path / "e.plan", check=True) as engine:
        assert engine.tensors == {}
    assert zipfile.ZipFile(tmp_path / "e.plan").testzip() is None


def test_tensors_of_another_file_move_into_the_engine(tmp_path: Path) -> None:
    arrays = {"small": np.arange(3, dtype=np.float32), "large": np.arange(3000, dtype=np.float32)}
    (tmp_path / "other").write_bytes(arrays["small"].tobytes() + arrays["large"].tobytes())
    tensors: dict[str, ir.TensorProtocol] = {}
    for name, offset in (("small", 0), ("large", 12)):
        array = arrays[name]
        shape = ir.Shape(array.shape)
        tensors[name] = ir.ExternalTensor(
            "other", offset, array.nbytes, ir.DataType.FLOAT, shape=shape, name=name, base_dir=tmp_path
        )
    write_engine(tmp_path / "e.plan", holder(tensors), {}, {})
    with EngineFile.open(tmp_path / "e.plan", check=True) as engine:
        np.testing.assert_array_equal(engine.tensor("large"), arrays["large"])
        inline = next(t for t in onnx.load_from_string(engine.graph()).graph.initializer if t.name == "small")
    np.testing.assert_array_equal(numpy_helper.to_array(inline), arrays["small"])


def test_zip64_structures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        zip_layout, "ZIP64_LIMIT", 3000
    )  # weights.bin, a file, most headers and the directory are "large"
    path = tmp_path / "large.plan"
    write_engine(path, model(), MANIFEST, FILES)
    with EngineFile.open(path, check=True) as engine:
        np.testing.assert_allclose(run(engine), expected(), rtol=1e-4, atol=1e-4)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.getinfo("weights.bin").extract_version == 45
        assert archive.getinfo("manifest.json").extract_version == 20
    monkeypatch.undo()
    with pytest.raises(EngineFormatError):  # 64-bit fields where 32 bits suffice are not what this format writes
        EngineFile.open(path)


def test_sizes_and_places_beyond_4_gib(tmp_path: Path) -> None:
    sizes = [("manifest.json", 900), ("graph.onnx", 7000), ("weights.bin", (5 << 30) + 13), ("a", 10), ("b", 5 << 30)]
    entries = [replace(entry, crc=crc32(bytes(10))) for entry in engine_writer._place(sizes)]  # the right one for "a"
    end = entries[-1].end
    with open(tmp_path / "sparse", "w+b") as file:
        for entry in entries:
            os.pwrite(file.fileno(), local_bytes(entry), entry.header)
        os.pwrite(file.fileno(), tail_bytes(entries), end)
        size = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            seen = [(info.filename, info.file_size, info.header_offset) for info in archive.infolist()]
            assert archive.read("a") == bytes(10)  # zipfile accepts the local header behind 4 GiB
        assert seen == [(entry.name, entry.size, entry.header) for entry in entries]

        def read(place: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, place)

        assert read_directory(read, size) == entries
        verify_structure(read, entries, size)


def test_paddings_always_fit_in_a_header() -> None:
    paddings = set()
    for size in range(65536 - 4096 - 41 - 12, 65536 - 4096 - 41 + 12):
        entries = engine_writer._place(
            [("manifest.json", 900), ("graph.onnx", size - 4096), ("weights.bin", 10), ("a", 1)]
        )
        for before, entry in zip([Entry("", 0, 0, 0, 0), *entries], entries, strict=False):
            assert entry.header == before.end
            assert entry.start % zip_layout.alignment(entry.name) == 0
            assert len(local_bytes(entry)) == entry.start - entry.header
        paddings.add(entries[2].start - entries[2].header - 41)
    assert max(paddings) > 60000
    assert min(paddings) < 12


def test_the_walk_finds_what_onnx_finds(path: Path) -> None:
    with EngineFile.open(path) as engine:
        data = engine.read("graph.onnx")
    proto = onnx.load_from_string(data)
    seen = {
        tensor.name: (tuple(tensor.dims), {entry.key: entry.value for entry in tensor.external_data})
        for tensor in proto.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }
    refs = external_tensors(data)
    assert {ref.name for ref in refs} == set(seen) == {"W", "V", "U"}
    for ref in refs:
        shape, entries = seen[ref.name]
        assert ref.shape == shape
        assert (ref.offset, ref.length) == (int(entries["offset"]), int(entries["length"]))
        assert data[slice(*ref.location_span)] == entries["location"].encode()
        assert data[slice(*ref.offset_span)] == entries["offset"].encode()


def test_a_replaced_file_is_noticed(path: Path, tmp_path: Path, content: bytes) -> None:
    with EngineFile.open(path) as engine:
        engine.confirm_path()
        (tmp_path / "new").write_bytes(content)
        os.replace(tmp_path / "new", path)
        with pytest.raises(EngineFormatError, match="replaced"):
            engine.confirm_path()
        path.unlink()
        with pytest.raises(EngineFormatError, match="replaced"):
            engine.confirm_path()


def test_asking_for_what_is_not_there(path: Path) -> None:
    with EngineFile.open(path) as engine:
        with pytest.raises(EngineFormatError, match=r"no 'merges\.txt'"):
            engine.read("merges.txt")
        with pytest.raises(EngineFormatError, match="no external tensor 'b'"):
            engine.tensor("b")


def test_reading_needs_neither_onnx_nor_torch() -> None:
    code = "import sys, rqc.runtime.container; print({'onnx', 'onnx_ir', 'torch', 'onnxruntime'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
