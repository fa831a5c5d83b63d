"""Text that grows token by token equals the text of all tokens, whatever the tokenizer's decoder does."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rqc.runtime.errors import EngineFormatError
from rqc.runtime.generation import StopFilter
from rqc.runtime.text import TextCodec


def byte_level() -> Tokenizer:
    """Every byte a token, and some that hold parts of characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<|end|>", *alphabet])}
    merges = []
    to_token = dict(zip(range(256), _byte_alphabet(), strict=True))
    for text in ("é", "漢", "🎉", "ab"):
        left, right = (to_token[byte] for byte in text.encode()[:2])
        vocab.setdefault(left + right, len(vocab))
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["<plain>"])
    return tokenizer


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in of each byte."""
    tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    shown = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {byte: chr(byte) for byte in shown} | {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    assert tokenizer.pre_tokenize_str("é")[0][0] == "".join(table[byte] for byte in "é".encode())
    return [table[byte] for byte in range(256)]


def sentencepiece_like(strip: bool) -> Tokenizer:
    """Llama's and Gemma's decoders: ▁ for spaces, raw bytes as a fallback, a leading space dropped or not."""
    words = ["▁", "▁a", "▁cat", "a", "cat", "é", "漢", ".", "▁▁", "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*chain, decoders.Strip(" ", 1, 0)] if strip else chain)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def metaspace() -> Tokenizer:
    tokens = ["<unk>", "<s>", "▁", "▁a", "▁cat", "a", "cat", ".", "▁▁"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level,
    "llama": lambda: sentencepiece_like(strip=True),
    "gemma": lambda: sentencepiece_like(strip=False),
    "metaspace": metaspace,
}


def pieces_of(codec: TextCodec, ids: list[int]) -> list[str]:
    stream = codec.stream()
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_add_up_to_the_text_of_any_tokens(name):
    tokenizer = TOKENIZERS[name]()
    codec = TextCodec(tokenizer.to_str().encode())
    rng = np.random.default_rng(0)
    size = tokenizer.get_vocab_size() + 3  # some models can say ids that their tokenizer does not know
    for _ in range(400):
        ids = rng.integers(0, size, rng.integers(1, 30)).tolist()
        assert "".join(pieces_of(codec, ids)) == codec.decode(ids)


@pytest.mark.parametrize("name", ["byte-level", "llama", "gemma"])
def test_pieces_never_split_a_character(name):
    codec = TextCodec(TOKENIZERS[name]().to_str().encode())
    text = "a é 漢字 🎉👩‍👩‍👧 cat. Ω"
    ids = codec.encode(text.replace(" ", "▁") if name != "byte-level" else text)
    assert len(ids) > len(text)
    pieces = pieces_of(codec, ids)
    assert "".join(pieces) == codec.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_piece_comes_as_soon_as_it_is_certain():
    codec = TextCodec(byte_level().to_str().encode())
    ids = codec.encode("a🎉b")
    pieces = pieces_of(codec, ids)
    assert pieces[0] == "a"
    assert pieces[-3:] == ["🎉", "b", ""]


def test_special_tokens_do_not_show():
    codec = TextCodec(byte_level().to_str().encode())
    ids = codec.encode("a<|end|>b")
    assert codec.decode(ids) == "ab" == "".join(pieces_of(codec, ids))
    assert codec.decode(ids, skip_special=False) == "a<|end|>b"


def test_the_cost_of_a_token_does_not_grow_with_the_text():
    codec = TextCodec(byte_level().to_str().encode())
    stream = codec.stream()
    for token in codec.encode("the cat sat on the mat é 🎉 " * 50):
        stream.push(token)
        assert len(stream._window) <= 12


def test_truncation_and_padding_of_the_tokenizer_are_off():
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=10)
    assert len(TextCodec(tokenizer.to_str().encode()).encode("hello")) == 5


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", json.dumps({"model": {"type": "??"}}).encode()])
def test_a_damaged_tokenizer_is_named(data):
    with pytest.raises(EngineFormatError, match=r"tokenizer\.json"):
        TextCodec(data)


def test_stop_filter_does_not_depend_on_the_pieces():
    rng = np.random.default_rng(0)
    for _ in range(500):
        text = "".join(rng.choice(list("ab"), 12))
        stops = ["".join(rng.choice(list("ab"), rng.integers(1, 5))) for _ in range(rng.integers(0, 4))]
        results = set()
        for _ in range(4):
            cuts = sorted(rng.integers(0, 13, 4).tolist())
            borders = [0, *cuts, 12]
            stop_filter = StopFilter(stops)
            out = "".join(stop_filter.push(text[a:b]) for a, b in itertools.pairwise(borders))
            out += stop_filter.finish()
            results.add((out, stop_filter.stopped))
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert results == {(text[: min(found)[1]] if found else text, bool(found))}
