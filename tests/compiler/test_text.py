"""The texts that ship, text files of users, and windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rqc.compiler.model_text import text_of
from rqc.compiler.text import calibration_text, parity_text, read_text, windows
from rqc.runtime.errors import InputError

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
        {"instruction": "Greet.", "input": "", "output": "Höllo\u2028!"},
    ]
    expected = "plain\n\na text\n\nAdd.\n1 and 2\n3\n\nGreet.\nHello\n\nGreet.\nHöllo\u2028!"
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    lines = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + lines + "\n\n").encode())
    assert read_text(tmp_path / "a.json") == expected
    assert read_text(str(tmp_path / "a.jsonl")) == expected


def test_a_text_file_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_text("Héllo\n\n{not json}\n", encoding="utf-8")
    assert read_text(path) == "Héllo\n\n{not json}\n"


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.txt", b" \n\n", "no text"),
        ("a.json", b"", "no text"),
        ("a.json", b"[]", "no text"),
        ("a.jsonl", b"\n\n", "no text"),
        ("a.jsonl", b'{"text": ""}', "no text"),
        ("a.txt", b"ab\xff", "line 1: not UTF-8"),
        ("a.csv", b"text", "are not read"),
        ("a.json", b'["a",\n"b"', "line 2: not JSON"),
        ("a.json", b'{"text": "a"}', "one object where a list"),
        ("a.json", b'["a", 3]', "line 1: a int"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "line 3: not JSON"),
        ("a.jsonl", b'"a"\n{"body": "a"}', 'line 2: neither "text" nor "instruction"'),
        ("a.jsonl", b'{"instruction": "a", "input": "b"}', 'line 1: neither "text" nor "output"'),
        ("a.jsonl", b'{"text": 3}', "line 1: text must be strings"),
        ("a.jsonl", b'{"instruction": "a", "output": null}', "line 1: instruction, input, output must be strings"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', 'line 1: "messages" where there is no model'),
    ],
)
def test_a_malformed_file_is_refused_with_place_and_hint(tmp_path: Path, name: str, content: bytes, cause: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_text(path)
    assert str(path) in caught.value.message
    assert cause in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["missing.txt", "folder.txt"])
def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match=name) as caught:
        read_text(tmp_path / name)
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


def test_conversations_are_what_the_model_makes_of_them(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    records = [{"messages": turns, "text": "no"}, {"text": "plain"}, {"messages": turns[:1], "tools": [{"a": 1}]}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    assert text_of(path, tmp_path) == "2024:<user>Hi<assistant>Ho\n\nplain\n\n2024:<user>Hi[{'a': 1}]"
    assert text_of(None, tmp_path) == calibration_text()


@pytest.mark.parametrize(
    ("template", "messages", "cause"),
    [
        (None, [{"role": "user", "content": "Hi"}], "no chat template for messages"),
        ("{{ messages }}", [{"content": "Hi"}], "message 0 has no role"),
        ("{{ messages }}", "Hi", "a chat is a list of messages"),
        ("{{ raise_exception('no') }}", [{"role": "user", "content": "Hi"}], "refuses these messages: no"),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_named(
    tmp_path: Path, template: str | None, messages: object, cause: str
) -> None:
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["first", {"messages": messages}]))
    with pytest.raises(InputError, match=cause) as caught:
        text_of(path, tmp_path)
    assert f"{path}, line 1: " in caught.value.message
    assert caught.value.hint
