"""Writers that are killed, interrupted or out of space, and targets that are no engine: the old file stays as it is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from rqc.compiler.plan import write_engine
from rqc.runtime import engine_writer
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import EngineFormatError, InputError, ResourceError
from rqc.runtime.replace_file import Replacement, locked_folder, remove_abandoned
from rqc.runtime.zip_layout import GRAPH, WEIGHTS

# a process that begins to write an engine, says so, and waits amid its weights for a line on its standard input
WRITER = """
    import sys
    import numpy as np
    import onnx_ir as ir
    from rqc.compiler.plan import write_engine

    def second():
        print("begun", flush=True)
        sys.stdin.readline()
        return ir.tensor(np.full(1000, 7, np.float32))

    first = ir.tensor(np.full(1000, 6, np.float32))
    lazy = ir.LazyTensor(second, dtype=ir.DataType.FLOAT, shape=ir.Shape([1000]))
    values = [ir.Value(name="first", const_value=first), ir.Value(name="second", const_value=lazy)]
    graph = ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 21})
    write_engine(sys.argv[1], ir.Model(graph, ir_version=10), {"seed": 7}, {})
"""


def model(make: Callable[[], np.ndarray] | None = None, *, seed: int = 0) -> ir.Model:
    """A model of one initializer of 1000 floats, that `make` computes (default: all `seed`)."""
    compute = make or (lambda: np.full(1000, seed, np.float32))
    lazy = ir.LazyTensor(lambda: ir.tensor(compute()), dtype=ir.DataType.FLOAT, shape=ir.Shape([1000]))
    values = [ir.Value(name="t", const_value=lazy)]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 21}), ir_version=10)


def seed_of(path: Path) -> object:
    with EngineFile.open(path, check=True) as engine:
        return engine.manifest["seed"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An engine alone in its folder."""
    file = tmp_path / "engine.plan"
    write_engine(file, model(), {"seed": 0}, {})
    return file


def start_writer(path: Path) -> subprocess.Popen[str]:
    """The process of WRITER, in the middle of its weights."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "begun\n"
    return writer


def temporaries(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path.parent) if name != path.name)


def test_a_killed_writer_leaves_the_old_engine_and_the_next_one_cleans_up(path: Path) -> None:
    before = path.read_bytes()
    writer = start_writer(path)
    writer.kill()
    assert writer.wait() == -signal.SIGKILL
    assert path.read_bytes() == before
    left = temporaries(path)
    assert len(left) == 1
    assert left[0].startswith(".engine.plan.rqc-")
    other = path.with_name("other.plan")
    write_engine(other, model(), {}, {})
    other.unlink()
    assert temporaries(path) == left  # another target's next write is not this one's
    write_engine(path, model(seed=1), {"seed": 1}, {})
    assert temporaries(path) == []
    assert seed_of(path) == 1


def test_a_living_writer_keeps_its_temporary_file(path: Path) -> None:
    writer = start_writer(path)
    left = temporaries(path)
    assert len(left) == 1
    write_engine(path, model(seed=1), {"seed": 1}, {})
    assert temporaries(path) == left
    assert seed_of(path) == 1
    writer.communicate("\n", timeout=60)
    assert writer.returncode == 0
    assert temporaries(path) == []
    assert seed_of(path) == 7


def test_a_terminated_or_interrupted_writer(path: Path) -> None:
    writer = start_writer(path)
    writer.send_signal(signal.SIGINT)
    writer.communicate(timeout=60)
    assert writer.returncode != 0
    assert temporaries(path) == []
    assert seed_of(path) == 0


def test_files_that_only_look_like_temporaries_stay(path: Path) -> None:
    for name in (
        ".engine.plan.rqc-1-0.tmp.bak",
        ".engine.plan.rqc-x-0.tmp",
        ".other.rqc-1-0.tmp",
        "engine.plan.rqc-1-0.tmp",
    ):
        path.with_name(name).write_bytes(b"")
    path.with_name(".engine.plan.rqc-1-1.tmp").mkdir()
    path.with_name(".engine.plan.rqc-1-2.tmp").symlink_to(path)
    before = temporaries(path)
    path.with_name(".engine.plan.rqc-1-0.tmp").write_bytes(b"")
    assert remove_abandoned(str(path)) == [str(path.with_name(".engine.plan.rqc-1-0.tmp"))]
    assert temporaries(path) == before


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, MemoryError, SystemExit])
def test_an_exception_from_a_tensor_passes_through(path: Path, error: type[BaseException]) -> None:
    before = path.read_bytes()

    def fail() -> np.ndarray:
        assert len(temporaries(path)) == 1
        raise error

    with pytest.raises(error):
        write_engine(path, model(fail), {}, {})
    assert temporaries(path) == []
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "wrong", [np.zeros(999, np.float32), np.zeros((10, 100), np.float32), np.zeros(1000, np.int32)]
)
def test_a_tensor_that_is_not_what_it_declares(path: Path, wrong: np.ndarray) -> None:
    before = path.read_bytes()
    with pytest.raises(EngineFormatError, match="'t' declares"):
        write_engine(path, model(lambda: wrong), {}, {})
    assert temporaries(path) == []
    assert path.read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    before = path.read_bytes()

    def fail(*arguments: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ResourceError, match=r"no space for .*engine\.plan"):
        write_engine(path, model(), {}, {})
    monkeypatch.undo()
    assert temporaries(path) == []
    assert path.read_bytes() == before


def test_a_file_size_limit_is_a_full_disk(path: Path) -> None:
    code = (
        textwrap.dedent("""
        import resource, sys
        from rqc.runtime.errors import ResourceError
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
    """)
        + textwrap.indent(textwrap.dedent(WRITER), "    ")
        + "\nexcept ResourceError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, input="\n", capture_output=True, text=True, check=False)
    assert "no space for" in result.stdout, result.stderr
    assert "begun" not in result.stdout  # before a single weight was computed
    assert temporaries(path) == []
    assert seed_of(path) == 0


def test_a_file_system_that_cannot_reserve_space(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    write_engine(path, model(seed=1), {"seed": 1}, {})
    assert seed_of(path) == 1


def test_a_file_system_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("rqc.runtime.replace_file.fcntl.flock", fail)
    abandoned = path.with_name(".engine.plan.rqc-1-0.tmp")
    abandoned.write_bytes(b"")
    write_engine(path, model(seed=1), {"seed": 1}, {})
    assert seed_of(path) == 1
    assert temporaries(path) == [abandoned.name]  # whether its owner lives cannot be known


def test_what_was_written_is_read_back_before_it_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    write = Replacement.write

    def damage(self: Replacement, data: bytes | memoryview, place: int) -> None:
        write(self, bytes(len(data)) if len(data) == 4000 else data, place)

    monkeypatch.setattr(Replacement, "write", damage)
    with pytest.raises(EngineFormatError, match=r"weights\.bin is damaged"):
        write_engine(path, model(seed=1), {}, {})
    assert temporaries(path) == []
    assert path.read_bytes() == before


# targets


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"precious",
        b"PK\3\4",
        b"PK\3\4" + bytes(4092) + b'{\n "format": "other",',
        b"\0" * 4096 + b'{\n "format": "rqc-engine",',
    ],
)
def test_a_target_that_is_no_engine_is_not_touched(tmp_path: Path, content: bytes) -> None:
    target = tmp_path / "notes.txt"
    target.write_bytes(content)
    with pytest.raises(EngineFormatError, match="exists and is not an engine"):
        write_engine(target, model(lambda: pytest.fail("a weight was computed")), {}, {})
    assert target.read_bytes() == content
    assert temporaries(target) == []


def test_a_target_that_appears_while_writing_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "engine.plan"

    def make() -> np.ndarray:
        target.write_bytes(b"precious")
        return np.zeros(1000, np.float32)

    with pytest.raises(EngineFormatError, match="exists and is not an engine"):
        write_engine(target, model(make), {}, {})
    assert target.read_bytes() == b"precious"
    assert temporaries(target) == []


def test_targets_that_are_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/null")):
        with pytest.raises(EngineFormatError, match="exists and is not an engine"):
            write_engine(target, model(), {}, {})
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_damaged_engine_may_be_replaced(path: Path) -> None:
    os.truncate(path, 5000)
    write_engine(path, model(seed=1), {"seed": 1}, {})
    assert seed_of(path) == 1


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.plan"
    link.symlink_to(path)
    write_engine(link, model(seed=1), {"seed": 1}, {})
    assert link.is_symlink()
    assert seed_of(path) == 1


def test_folders_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="No such file or directory"):
        write_engine(tmp_path / "missing" / "engine.plan", model(), {}, {})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="Not a directory"):
        write_engine(tmp_path / "file" / "engine.plan", model(), {}, {})
    opened = os.open

    def denied(name: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(name, flags, *rest)

    monkeypatch.setattr(os, "open", denied)  # root may write everywhere
    with pytest.raises(InputError, match="Permission denied"):
        write_engine(tmp_path / "engine.plan", model(), {}, {})


# what makes no sound engine is refused before a weight is computed


def unused() -> np.ndarray:
    pytest.fail("a weight was computed")


@pytest.mark.parametrize(
    ("manifest", "files", "match"),
    [
        ({}, {"../evil": b""}, "plain relative path"),
        ({}, {"graph.onnx": b""}, r"graph\.onnx cannot be given"),
        ({}, {"A": b"", "a": b""}, "occurs twice"),
        ({"context_length": -1}, {}, "context_length"),
        ({"graph": {"cache": "paged"}}, {}, r"graph\.cache"),
    ],
)
def test_parts_that_make_no_engine(
    tmp_path: Path, manifest: dict[str, Any], files: dict[str, bytes], match: str
) -> None:
    with pytest.raises(EngineFormatError, match=match):
        write_engine(tmp_path / "engine.plan", model(unused), manifest, files)
    assert os.listdir(tmp_path) == []


def test_models_that_make_no_engine(tmp_path: Path) -> None:
    elsewhere = ir.ExternalTensor("f", 0, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name="x")
    constant = model(unused)
    constant.graph.append(ir.node("Constant", [], attributes={"value": elsewhere}))
    shared = model(unused)
    for size in (1000, 1001):
        tensor = ir.tensor(np.zeros(size, np.float32))
        tensor.meta["rqc.storage"] = "one"
        shared.graph.register_initializer(ir.Value(name=f"s{size}", const_value=tensor))
    empty = model(unused)
    empty.graph.initializers["t"].const_value = None
    for given, match in ((constant, "external but no initializer"), (shared, "another size"), (empty, "no value")):
        with pytest.raises(EngineFormatError, match=match):
            write_engine(tmp_path / "engine.plan", given, {}, {})
    assert os.listdir(tmp_path) == []


def test_a_terabyte_is_too_much() -> None:
    with pytest.raises(ResourceError, match="terabyte"):
        engine_writer._lay_out({}, {GRAPH: 1, WEIGHTS: 10**12})
    assert engine_writer._lay_out({}, {GRAPH: 1, WEIGHTS: 10**11})[-1].size == 10**11


def test_a_folder_that_only_begins_like_a_builders_is_left_alone(tmp_path: Path) -> None:
    mine, left = tmp_path / "rqc-build-of-my-own", tmp_path / "rqc-build-a1b2c3d_"
    for folder in (mine, left):
        folder.mkdir()
        (folder / "file").write_text("x")
    with locked_folder("rqc-build-", str(tmp_path)) as folder:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, Path(folder).name])
        with locked_folder("rqc-build-", str(tmp_path)):
            assert Path(folder).is_dir()  # its owner lives
    assert [path.name for path in tmp_path.rglob("*")] == [mine.name, "file"]


def test_a_folder_that_another_owner_removes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = tempfile.mkdtemp, []

    def removed_once(**options: str) -> str:
        made.append(make(**options))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", removed_once)
    with locked_folder("rqc-build-", str(tmp_path)) as folder:
        assert folder == made[1]
        assert Path(folder).is_dir()
