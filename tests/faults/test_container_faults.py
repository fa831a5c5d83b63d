"""Damaged and hostile engines: each is refused with an error that says what is wrong, and with no other exception."""

from __future__ import annotations

import json
import os
import random
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rqc.runtime import engine_writer
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import EngineFormatError, InputError
from rqc.runtime.zip_layout import GRAPH, MANIFEST, WEIGHTS, Entry

from .forged_engine import assemble, join, parts


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return parts(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def file(sound: dict[str, bytes]) -> bytes:
    return assemble(sound)


def refuse(path: Path, data: bytes, match: str, *, check: bool = False) -> EngineFormatError:
    """Open `data` as an engine, expect the error, return it."""
    path.write_bytes(data)
    with pytest.raises(EngineFormatError, match=match) as caught:
        EngineFile.open(path, check=check)
    assert caught.value.message.startswith(str(path))
    assert caught.value.hint
    return caught.value


def spans(path: Path) -> tuple[int, int]:
    """The bytes of weights.bin."""
    with EngineFile.open(path) as engine:
        entry = engine.manifest["entries"][WEIGHTS]
    return entry["offset"], entry["offset"] + entry["size"]


def opens(path: Path, *, check: bool = False) -> bool:
    """Whether the engine opens; if not, it must be an EngineFormatError."""
    try:
        EngineFile.open(path, check=check).close()
    except EngineFormatError:
        return False
    return True


def test_forging_nothing_gives_a_sound_engine(tmp_path: Path, file: bytes) -> None:
    (tmp_path / "e.plan").write_bytes(file)
    assert opens(tmp_path / "e.plan", check=True)


# files that are something else


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "empty"),
        (b"P", "begin as a ZIP"),
        (b"ptrt\0\0\0\1" + bytes(5000), "raw TensorRT plan"),
        (b"ftrt\0\0\0\1" + bytes(5000), "raw TensorRT plan"),
        (b"GGUF" + bytes(5000), "begin as a ZIP"),
        (b"PK\3\4" + bytes(5000), "end record"),
        (b"PK\5\6" + bytes(18), "does not begin with manifest.json"),
    ],
)
def test_other_files_are_named(tmp_path: Path, data: bytes, match: str) -> None:
    refuse(tmp_path / "e.plan", data, match)


def test_another_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.plan"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    refuse(path, path.read_bytes(), "does not begin with manifest.json")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_engine_packed_again_is_refused(tmp_path: Path, sound: dict[str, bytes], method: int) -> None:
    path = tmp_path / "e.plan"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in sound.items():
            archive.writestr(name, data)
    refuse(path, path.read_bytes(), "compressed" if method else "aligned|damaged")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineFormatError, match="directory"):
        EngineFile.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EngineFormatError, match="no regular file"):
        EngineFile.open(tmp_path / "pipe")
    with pytest.raises(InputError, match="no file"):
        EngineFile.open(tmp_path / "missing.plan")
    with pytest.raises(InputError, match="null byte"):
        EngineFile.open("a\0b")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="cannot be opened"):
        EngineFile.open(tmp_path / "loop")


# damage


def test_truncation_anywhere_is_refused(tmp_path: Path, file: bytes) -> None:
    path = tmp_path / "e.plan"
    places = {*range(40), *range(len(file) - 500, len(file)), *random.Random(0).sample(range(len(file)), 300)}
    for size in sorted(places, reverse=True):
        refuse(path, file[:size], "cut off|empty|ends after|begin")


def test_a_flipped_bit_outside_the_weights_is_refused(tmp_path: Path, file: bytes) -> None:
    path = tmp_path / "e.plan"
    path.write_bytes(file)
    first, after = spans(path)
    outside = [*range(first), *range(after, len(file))]
    used = [place for place in outside if file[place]]  # most bytes are padding
    chosen = {
        *random.Random(1).sample(outside, 500),
        *random.Random(2).sample(used, 1200),
        *range(len(file) - 400, len(file)),
    }
    with open(path, "r+b") as damaged:
        for place in chosen:
            for bit in {place % 8, 7}:
                os.pwrite(damaged.fileno(), bytes([file[place] ^ 1 << bit]), place)
                assert not opens(path), f"bit {bit} of byte {place}"
            os.pwrite(damaged.fileno(), file[place : place + 1], place)
    assert opens(path, check=True)


def test_a_flipped_bit_in_the_weights_is_found_by_the_check(tmp_path: Path, file: bytes) -> None:
    path = tmp_path / "e.plan"
    path.write_bytes(file)
    first, after = spans(path)
    with open(path, "r+b") as damaged:
        for place in (first, first + 3601, (first + after) // 2, after - 1):  # 3600 to 3648 is padding between tensors
            os.pwrite(damaged.fileno(), bytes([file[place] ^ 16]), place)
            assert opens(path)
            refuse(path, path.read_bytes(), r"weights\.bin is damaged", check=True)
            with EngineFile.open(path) as engine, pytest.raises(EngineFormatError, match=r"weights\.bin is damaged"):
                engine.check()
            os.pwrite(damaged.fileno(), file[place : place + 1], place)


def test_a_file_that_changes_while_it_is_open_is_noticed(tmp_path: Path, file: bytes) -> None:
    path = tmp_path / "e.plan"
    path.write_bytes(file)
    with EngineFile.open(path) as engine:
        offset = engine.manifest["entries"][GRAPH]["offset"]
        with open(path, "r+b") as damaged:
            os.pwrite(damaged.fileno(), b"\xff", offset + 30)
        with pytest.raises(EngineFormatError, match=r"graph\.onnx is damaged"):
            engine.graph()
        os.truncate(path, offset)
        with pytest.raises(EngineFormatError, match="ends at byte"):
            engine.read(GRAPH)


def test_random_damage_is_never_another_exception(tmp_path: Path, file: bytes) -> None:
    path, rng = tmp_path / "e.plan", random.Random(3)
    path.write_bytes(file)
    first, after = spans(path)
    for _ in range(300):
        data = bytearray(file)
        for _ in range(rng.randrange(1, 4)):
            start = rng.choice([rng.randrange(len(data)), rng.randrange(len(data) - 400, len(data))])
            data[start : start + rng.randrange(12)] = rng.randbytes(rng.randrange(12))
        path.write_bytes(data)
        harmless = len(data) == len(file) and data[:first] == file[:first] and data[after:] == file[after:]
        assert opens(path) == harmless
        assert opens(path, check=True) == (data == file)


# the ZIP


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("../evil", "plain relative path"),
        ("/etc/passwd", "plain relative path"),
        ("a/../../evil", "plain relative path"),
        ("a//b", "plain relative path"),
        ("./a", "plain relative path"),
        ("a/. /b", "plain relative path"),
        ("a\\b", "plain relative path"),
        ("c:evil", "plain relative path"),
        ("a\nb", "plain relative path"),
        ("dir/", "plain relative path"),
        ("...", "plain relative path"),
        ("x" * 201, "plain relative path"),
        ("TOKENIZER.json", "occurs twice"),
        ("tokenizer.json/evil", "as its folder"),
    ],
)
def test_entry_names_that_could_leave_a_folder(tmp_path: Path, sound: dict[str, bytes], name: str, match: str) -> None:
    refuse(tmp_path / "e.plan", assemble({**sound, name: b"evil"}), match)


def placed(content: Mapping[str, bytes]) -> list[Entry]:
    return engine_writer._place([(name, len(data)) for name, data in content.items()])


def test_the_same_name_twice(tmp_path: Path, sound: dict[str, bytes]) -> None:
    entries = placed(sound)
    last = entries[-1]
    twin = replace(last, header=last.end, start=last.start + 4096)
    refuse(tmp_path / "e.plan", join(sound, [*entries, twin]), "occurs twice")


@pytest.mark.parametrize("missing", [MANIFEST, GRAPH, WEIGHTS])
def test_entries_that_must_be_there(tmp_path: Path, sound: dict[str, bytes], missing: str) -> None:
    rest = {name: data for name, data in sound.items() if name != missing}
    data = join(rest, placed(rest)) if missing == MANIFEST else assemble(rest)
    refuse(
        tmp_path / "e.plan", data, "does not begin with manifest.json" if missing == MANIFEST else "its entries are not"
    )


def test_entries_in_another_order(tmp_path: Path, sound: dict[str, bytes]) -> None:
    swapped = {name: sound[name] for name in (MANIFEST, GRAPH, WEIGHTS, "tokenizer.json", "config.json")}
    refuse(tmp_path / "e.plan", assemble(swapped), "its entries are not")


def central(file: bytes, name: str) -> int:
    """Where the directory's record of the entry begins."""
    place: int = file.rindex(name.encode()) - 46
    return place


@pytest.mark.parametrize(
    ("offset", "value", "match"),
    [
        (8, struct.pack("<H", 1), "encrypted"),
        (10, struct.pack("<H", 8), "compressed"),
        (10, struct.pack("<H", 12), "compressed"),
        (20, struct.pack("<I", 1), "two different sizes"),
        (20, struct.pack("<2I", 0xFFFFFFF0, 0xFFFFFFF0), "does not fit"),
        (20, struct.pack("<2I", 1, 1), "config|begins at byte"),
        (28, struct.pack("<H", 0xFFFF), "directory is damaged"),
        (20, struct.pack("<2I", 0xFFFFFFFF, 0xFFFFFFFF), "ZIP64"),
        (32, struct.pack("<H", 3), "directory is damaged"),
        (38, struct.pack("<I", 0o120777 << 16), "ZIP directory at byte"),  # a symbolic link
        (42, struct.pack("<I", 0), "begins at byte 0 instead of"),  # on top of the first
        (42, struct.pack("<I", 0xFFFFFFF0), "begins at byte 4294967280 instead of"),
    ],
)
def test_directory_records(tmp_path: Path, file: bytes, offset: int, value: bytes, match: str) -> None:
    at = central(file, "config.json") + offset
    refuse(tmp_path / "e.plan", file[:at] + value + file[at + len(value) :], match)


def test_bytes_that_belong_to_nothing(tmp_path: Path, sound: dict[str, bytes], file: bytes) -> None:
    path = tmp_path / "e.plan"
    refuse(path, file + b"\0", "end record")
    refuse(path, b"PK" + file, "does not lie right before")
    path.write_bytes(file)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"hello"
    refuse(path, path.read_bytes(), "end record")
    entries = placed(sound)
    last = entries[-1]
    moved = replace(last, header=last.header + 100, start=last.start + 4096)
    hole = join(sound, [*entries[:-1], moved])
    hole = hole[: last.header] + bytes(100) + hole[last.header :]
    refuse(path, hole, "begins at byte")
    directory = sound_directory(file)
    refuse(path, file[:directory] + bytes(100) + file[directory:], "does not lie right before")
    data = bytearray(file[:directory] + bytes(100) + file[directory:])
    struct.pack_into("<I", data, len(data) - 6, directory + 100)
    refuse(path, bytes(data), "the ZIP directory at byte")


def sound_directory(file: bytes) -> int:
    """Where the directory of a file without ZIP64 begins."""
    place: int = struct.unpack_from("<I", file, len(file) - 6)[0]
    return place


def test_a_directory_that_holds_more_than_its_entries(tmp_path: Path, file: bytes) -> None:
    data = bytearray(file[:-22] + bytes(50) + file[-22:])
    struct.pack_into("<I", data, len(data) - 10, len(file) - 22 - sound_directory(file) + 50)
    refuse(tmp_path / "e.plan", bytes(data), "the ZIP directory at byte")


@pytest.mark.parametrize("room", range(6))
def test_a_header_without_room_for_its_padding_field(tmp_path: Path, sound: dict[str, bytes], room: int) -> None:
    for size in range(4096):  # the size of "a" at which "b" gets a padding of 4096 + room bytes
        content = {name: sound[name] for name in (MANIFEST, GRAPH, WEIGHTS)} | {"a": bytes(size), "b": b"b"}
        entries = placed(content)
        if entries[4].start - entries[4].header - 31 == 4096 + room:
            break
    else:
        pytest.fail("there is no such size")
    data = bytearray(join(content, entries))
    struct.pack_into("<H", data, entries[4].header + 28, room)
    # "b" takes in the rest of its padding
    struct.pack_into("<2I", data, central(bytes(data), "b") + 20, 4097, 4097)
    struct.pack_into("<2I", data, entries[4].header + 18, 4097, 4097)
    refuse(tmp_path / "e.plan", bytes(data), "'b' has a wrong header")


def test_entries_that_overlap(tmp_path: Path, sound: dict[str, bytes]) -> None:
    entries = placed(sound)
    config = next(entry for entry in entries if entry.name == "config.json")
    data = bytearray(join(sound, entries))
    record = central(bytes(data), "config.json")
    size = entries[-1].end - config.start  # up to the directory, over the next entry
    struct.pack_into("<2I", data, record + 20, size, size)
    struct.pack_into("<2I", data, config.header + 18, size, size)
    refuse(tmp_path / "e.plan", bytes(data), "begins at byte")


@pytest.mark.parametrize("name", [MANIFEST, GRAPH, "tokenizer.json", WEIGHTS])
def test_a_checksum_that_other_zip_readers_would_refuse(tmp_path: Path, sound: dict[str, bytes], name: str) -> None:
    data = assemble(sound, wrong=name)
    refuse(tmp_path / "e.plan", data, f"{name} is damaged", check=name == WEIGHTS)
    with zipfile.ZipFile(tmp_path / "e.plan") as archive:
        assert archive.testzip() == name


def test_a_bomb_of_entries_is_refused_at_once(tmp_path: Path) -> None:
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 1 << 30, 4, 0)
    refuse(tmp_path / "e.plan", b"PK\3\4" + end, "claims 1073741824 bytes")


# the manifest


def setter(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    """An edit that sets a key; parts of it are separated by '/'."""

    def edit(manifest: dict[str, Any]) -> None:
        *holders, last = key.split("/")
        for holder in holders:
            manifest = manifest[holder]
        if value is None:
            del manifest[last]
        else:
            manifest[last] = value

    return edit


ABSENT = None


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format", "zip", "not an rqc engine"),
        ("format", ABSENT, "not an rqc engine"),
        ("format_version", ABSENT, "format_version"),
        ("format_version", 0, "format_version"),
        ("format_version", True, "format_version"),
        ("format_version", "1", "format_version"),
        ("format_version", 1.0, "format_version"),
        ("context_length", "long", "context_length"),
        ("context_length", 0, "not positive"),
        ("graph", [], "graph is"),
        ("graph/cache", "paged", "shared, concat"),
        ("graph/layers", 1.5, "graph.layers"),
        ("graph/kv_heads", [2, "2"], "graph.kv_heads"),
        ("graph/head_dim", -8, "not positive"),
        ("generation/eos_token_ids", 2, "eos_token_ids"),
        ("generation/eos_token_ids", ["</s>"], "eos_token_ids"),
        ("generation/add_bos", "yes", "add_bos"),
        ("target", 7, "target"),
        ("entries", ABSENT, "entries"),
        ("entries", [], "entries"),
        ("entries/graph.onnx", ABSENT, r"differ in \['graph.onnx'\]"),
        ("entries/extra", {"offset": 0, "size": 0, "sha256": "0" * 64}, r"differ in \['extra'\]"),
        ("entries/graph.onnx", 5, "no offset, size and sha256"),
        ("entries/graph.onnx/sha256", ABSENT, "no offset, size and sha256"),
        ("entries/graph.onnx/sha256", "f" * 64, "graph.onnx is damaged"),
        ("entries/graph.onnx/sha256", "F" * 64, "no valid sha256"),
        ("entries/graph.onnx/size", 1 << 40, "another place or with another size"),
        ("entries/graph.onnx/offset", -4096, "offset and size"),
        ("entries/graph.onnx/offset", 4096.0, "offset and size"),
        ("entries/weights.bin/offset", 0, "another place"),
    ],
)
def test_manifest_keys(tmp_path: Path, sound: dict[str, bytes], key: str, value: object, match: str) -> None:
    refuse(tmp_path / "e.plan", assemble(sound, setter(key, value)), match)


def test_a_newer_format_says_to_update(tmp_path: Path, sound: dict[str, bytes]) -> None:
    newer = {"manifest.json": sound[MANIFEST], "another layout": b"of entries"}
    error = refuse(tmp_path / "e.plan", assemble(newer, setter("format_version", 2)), "format 2; this rqc reads")
    assert "update rqc" in error.hint


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe{}",
        b'{"format": "rqc-engine", "format": "rqc-engine"}',
        b'{"format": NaN}',
        b'{"format_version": ' + b"9" * 100_000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_manifests_that_are_no_json_object(tmp_path: Path, sound: dict[str, bytes], text: bytes) -> None:
    refuse(tmp_path / "e.plan", assemble(sound, lambda manifest: text), "manifest.json: not (valid JSON|a JSON object)")


def test_a_huge_manifest_is_not_read(tmp_path: Path, sound: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqc.runtime.container.MAX_MANIFEST", 300)
    refuse(tmp_path / "e.plan", assemble(sound), "more than 300")


def test_random_manifests_are_never_another_exception(tmp_path: Path, sound: dict[str, bytes]) -> None:
    path, rng = tmp_path / "e.plan", random.Random(4)
    values = [None, True, -1, 0, 1 << 70, 1e300, "", "x" * 100, [], [[]], {}, {"a": {}}, [None]]

    def scramble(value: Any) -> Any:
        if rng.random() < 0.06:
            return rng.choice(values)
        if isinstance(value, dict):
            return {key: scramble(item) for key, item in value.items() if rng.random() > 0.03}
        return value

    refused = 0
    for seed in range(200):

        def edit(manifest: dict[str, Any], seed: int = seed) -> bytes:
            rng.seed(seed)
            return json.dumps(scramble(manifest)).encode()

        path.write_bytes(assemble(sound, edit))
        try:
            EngineFile.open(path).close()
        except EngineFormatError:
            refused += 1
    assert 100 < refused < 200
