"""The texts that ship, text files of users, and windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import add_tokenizer

from rqc.compiler import data_files
from rqc.compiler.model_text import encoded, pieces_of, text_of
from rqc.compiler.records import ALPACA, ALPACA_INPUT
from rqc.compiler.text import calibration_text, parity_text, read_tokenizer, windows
from rqc.runtime.errors import CheckpointError, InputError, RqcError

SHIPPED = [(calibration_text, 200_000, 260_000), (parity_text, 50_000, 70_000)]


@pytest.mark.parametrize(("text", "least", "most"), SHIPPED)
def test_a_shipped_text_is_clean_prose_of_the_promised_size(text: Callable[[], str], least: int, most: int) -> None:
    content = text()
    assert least <= len(content.encode()) <= most
    for word in ("gutenberg", "http", "[illustration", "footnote", "\ufffd", "\r", "\t", "  ", "_", "[", "|", "<"):
        assert word not in content.lower(), word
    for paragraph in content.rstrip("\n").split("\n\n"):
        assert paragraph.strip() == paragraph
        assert "\n" not in paragraph, "wrapped lines"
        assert any(letter.islower() for letter in paragraph), "a heading"


def test_the_parity_text_is_disjoint_from_the_calibration_text() -> None:
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[start : start + 12]) for start in range(len(words) - 11)}

    assert not shingles(calibration_text()) & shingles(parity_text())


@pytest.mark.parametrize(("text", "least", "most"), SHIPPED)
def test_the_beginning_of_a_shipped_text_has_several_authors(text: Callable[[], str], least: int, most: int) -> None:
    beginning = text()[: least // 8]
    assert "Light" in beginning  # Newton
    assert "Anne" in beginning or "Elinor" in beginning  # Austen


def test_records_of_every_form_are_joined_by_blank_lines(tmp_path: Path) -> None:
    records = [
        "plain",
        {"text": "a text"},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "output": "Hello"},
        {"instruction": "Greet.", "input": None, "output": "Höllo\u2028!"},
    ]
    asked = [
        ALPACA_INPUT.format(instruction="Add.", input="1 and 2") + "3",
        ALPACA.format(instruction="Greet.") + "Hello",
        ALPACA.format(instruction="Greet.") + "Höllo\u2028!",
    ]
    expected = "\n\n".join(["plain", "a text", *asked])
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    lines = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + lines + "\n\n").encode())
    assert text_of(tmp_path / "a.json", tmp_path) == expected
    assert text_of(tmp_path / "a.jsonl", tmp_path) == expected


def test_a_text_file_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_text("Héllo\n\n{not json}\n", encoding="utf-8")
    assert text_of(path, tmp_path) == "Héllo\n\n{not json}\n"


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_ends_of_lines_are_one_kind_wherever_they_fall(
    tmp_path: Path, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "PIECE", 4)
    (tmp_path / "a.txt").write_bytes(b"a" * before + b"\r\nbb\rc\r\n\r\nd\r")
    assert text_of(tmp_path / "a.txt", tmp_path) == "a" * before + "\nbb\nc\n\nd\n"


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.txt", b" \n\n", "no text"),
        ("a.json", b"", "no text"),
        ("a.json", b"[]", "no text"),
        ("a.jsonl", b"\n\n", "no text"),
        ("a.jsonl", b'{"text": ""}', 'line 1: "text" is empty'),
        ("a.txt", b"ab\xff", "line 1: not UTF-8"),
        ("a.csv", b"text", "are not read"),
        ("a.json", b'["a",\n"b"', "line 2: not JSON"),
        ("a.json", b'{"text": "a"}', "one object where a list"),
        ("a.json", b'["a", 3]', "line 1: a number where a record"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "line 3: not JSON"),
        ("a.jsonl", b'"a"\n{"body": "a"}', 'line 2: a record of "body" has no known form'),
        ("a.jsonl", b'{"instruction": "a", "input": "b"}', 'line 1: an "instruction" without an "output"'),
        ("a.jsonl", b'{"text": 3}', 'line 1: "text" is a number'),
        ("a.jsonl", b'{"instruction": "a", "output": null}', 'line 1: "output" is a null'),
        ("a.jsonl", b'"lone \\ud800"', "line 1: the text is not valid Unicode"),
    ],
)
def test_a_malformed_file_is_refused_with_place_and_hint(tmp_path: Path, name: str, content: bytes, cause: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        text_of(path, tmp_path)
    assert str(path) in caught.value.message
    assert cause in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["missing.txt", "folder.txt"])
def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match=name) as caught:
        text_of(tmp_path / name, tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize("size", [1, 7, 8, 9, 40, 41])
@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("count", [1, 3, 100])
def test_windows_are_consecutive_of_one_length_and_as_many_as_fit(size: int, length: int, count: int) -> None:
    ids = list(range(size))
    cut = windows(ids, length, count)
    assert [token for window in cut for token in window] == ids[: sum(map(len, cut))]
    assert {len(window) for window in cut} == {min(length, size)}
    assert len(cut) == min(count, max(size // length, 1))


@pytest.mark.parametrize(("ids", "length", "count"), [([], 4, 4), ([1], 0, 4), ([1], 4, 0), ([1], -1, 1)])
def test_windows_refuse_nothing_to_cut(ids: list[int], length: int, count: int) -> None:
    with pytest.raises(InputError):
        windows(ids, length, count)


TEMPLATE = "{{ strftime_now('%Y') }}:{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ tools or '' }}"
HI, HO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}


def test_records_are_what_the_model_makes_of_them(tmp_path: Path) -> None:
    """An instruction is a conversation where the model has a template, as it is in a fine-tune."""
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    records = [
        {"messages": [HI, HO], "text": "no"},
        {"text": "plain"},
        {"messages": [HI, HO], "tools": [{"a": 1}]},
        {"instruction": "Add.", "input": "1", "output": "2"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    turns = "2024:<user>Hi<assistant>Ho"
    assert text_of(path, tmp_path) == f"{turns}\n\nplain\n\n{turns}[{{'a': 1}}]\n\n2024:<user>Add.\n\n1<assistant>2"
    assert text_of(None, tmp_path) == calibration_text()


@pytest.mark.parametrize(
    "config", [{"chat_template": TEMPLATE}, {"chat_template": [{"name": "tool_use", "template": TEMPLATE}]}]
)
def test_a_template_may_stand_in_the_configuration(tmp_path: Path, config: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "a.json").write_text(json.dumps([{"messages": [HI, HO], "tools": [{"a": 1}]}]))
    assert text_of(tmp_path / "a.json", tmp_path) == "2024:<user>Hi<assistant>Ho[{'a': 1}]"


@pytest.mark.parametrize(
    ("name", "content", "error", "cause"),
    [
        ("other", "", InputError, "line 1: the model has no chat template for messages"),
        ("tokenizer_config.json", '{"chat_template": [{"template": "x"}, "y"]}', InputError, "no chat template"),
        ("tokenizer_config.json", "{nope", CheckpointError, "tokenizer_config.json is not valid JSON"),
        ("chat_template.jinja", "{% if %}", InputError, "line 1: .* chat template cannot be read"),
        ("chat_template.jinja", "{{ raise_exception('no') }}", InputError, "line 1: .* refuses these messages: no"),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_named(
    tmp_path: Path, name: str, content: str, error: type[RqcError], cause: str
) -> None:
    (tmp_path / name).write_text(content)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": [HI, HO]}]))
    with pytest.raises(error, match=cause) as caught:
        text_of(path, tmp_path)
    assert "engine" not in caught.value.hint
    assert caught.value.hint


def test_no_more_is_encoded_than_is_wanted(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(add_tokenizer(tmp_path))
    assert tokenizer is not None
    tokenizer.enable_truncation(5)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a" * 1000}) for _ in range(1000)))
    whole = encoded(tokenizer, pieces_of(path, tmp_path), tmp_path, 95)
    assert len(whole) == 1000 * 1000 + 999 * 2
    read: list[str] = []

    def heard() -> Iterator[str]:
        for piece in pieces_of(path, tmp_path):
            read.append(piece)
            yield piece

    part = encoded(tokenizer, heard(), tmp_path, 95, enough=3000)
    assert len(read) == 1
    assert 3000 <= len(part) < len(whole) / 3
    assert part == whole[: len(part)]
