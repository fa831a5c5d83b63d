"""Text to tokens and back: the engine's tokenizer, and text that grows token by token without ever being taken back."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer

from rqc.runtime.errors import EngineFormatError, InputError

_REPLACEMENT = "\ufffd"


class TextCodec:
    """A Hugging Face fast tokenizer (tokenizer.json), as it stands in the engine."""

    def __init__(self, tokenizer_json: bytes, *, bos_token_id: int | None = None) -> None:
        """bos_token_id: put this token before every prompt that does not start with it.

        Raises EngineFormatError if tokenizer.json cannot be read.
        """
        try:
            self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
            decoder = json.loads(tokenizer_json).get("decoder")
        except Exception as error:  # tokenizers raises bare Exception
            raise EngineFormatError(f"the engine's tokenizer.json cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos = bos_token_id
        raw_bytes = "ByteFallback" in json.dumps(decoder)
        added = self._tokenizer.get_added_tokens_decoder()
        self._hidden = frozenset(index for index, token in added.items() if token.special)
        self._byte_tokens = _byte_fallback_ids(self._tokenizer) if raw_bytes else frozenset()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text. special: add what the tokenizer (and bos_token_id) puts around a prompt."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError("the text is not valid Unicode", hint="give UTF-8 text") from error
        if special and self._bos is not None and ids[:1] != [self._bos]:
            ids.insert(0, self._bos)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; an unfinished character becomes U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def is_hidden(self, token: int) -> bool:
        """Whether `decode` passes over this token: a special one, or one of a padded vocabulary."""
        return token in self._hidden or self._tokenizer.id_to_token(token) is None

    def is_byte(self, token: int) -> bool:
        """Whether this token is one raw byte (<0x0A>), whose text depends on the bytes that follow."""
        return token in self._byte_tokens

    def stream(self) -> TextStream:
        """A decoder for one continuation."""
        return TextStream(self)


def _byte_fallback_ids(tokenizer: Tokenizer) -> frozenset[int]:
    ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(index for index in ids if index is not None)


class TextStream:
    """Incremental decoding: the pieces of all `push` calls and `finish` add up to decode(all ids).

    A piece is only given out when later tokens cannot change it: not inside a character (the text so far
    ends in U+FFFD) nor inside a run of raw bytes, which ByteFallback decodes as a whole. Each step decodes a short
    window that starts at an earlier safe border, so that context-dependent decoders (a leading space that is dropped
    at the start of a text) see the same context before and after; the cost of a token is constant.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._window: list[int] = []
        self._known = 0  # tokens of the window whose text has been given out
        self._known_text = ""

    def push(self, token: int) -> str:
        """The text that became certain with this token; often a word, sometimes nothing."""
        if self._codec.is_hidden(token):
            return ""
        self._window.append(token)
        if self._codec.is_byte(token):
            return ""
        text = self._codec.decode(self._window)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._known_text):
            return ""
        piece = text[len(self._known_text) :]
        self._window = self._window[self._known :]
        self._known = len(self._window)
        self._known_text = self._codec.decode(self._window)
        return piece

    def finish(self) -> str:
        """What is left at the end; an unfinished character comes out as U+FFFD."""
        text = self._codec.decode(self._window)
        piece = text[len(self._known_text) :]
        self._window, self._known, self._known_text = [], 0, ""
        return piece
