"""The engine as users see it: load a file, generate, stream, chat, score."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rqc.runtime.backends.base import Backend, FloatArray, IntArray
from rqc.runtime.backends.choice import open_backend
from rqc.runtime.chat import ChatTemplate, Message, load_chat_template
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import EngineFormatError, InputError
from rqc.runtime.generation import FinishReason, Generation, Row
from rqc.runtime.options import GenerationOptions, adapter_gates, checked_ids, split_prompts
from rqc.runtime.text import TextCodec

_log = logging.getLogger("rqc.runtime")
_CHAT_FILES = ("chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json")


class Engine:
    """A loaded engine.plan. Use it as a context manager, or call `close` to give its memory back.

    `adapters`: the names that `adapter` takes, in engines that were compiled with adapters by name.
    `backend`: what runs it, "onnxruntime" or "tensorrt"; `fallback_reason`: one sentence why an engine for TensorRT
    runs on ONNX Runtime, or None (also logged, as a warning).
    `context_length`: tokens of prompt and continuation together; a TensorRT plan may have less than the model.
    Continuations share no state: one that is interrupted (KeyboardInterrupt) or abandoned leaves the engine usable.
    A generation that reaches the context length ends with the finish reason "context" and a warning in the log
    `rqc.runtime` (which Python prints on stderr unless logging is configured otherwise).
    """

    def __init__(
        self, file: EngineFile, *, threads: int | None = None, spin: bool = True, backend: str = "auto"
    ) -> None:
        """file: an open engine file; it can be closed afterwards. Raises TargetError if it is for other hardware."""
        self.path = str(file.path)
        manifest = file.manifest
        self.manifest: dict[str, Any] = manifest
        longest = _context_length(manifest)
        generation = manifest.get("generation") or {}
        self._eos = frozenset(int(token) for token in generation.get("eos_token_ids", []))
        self._codec = _codec(file, generation)
        self._chat_files = {name: file.read(name) for name in _CHAT_FILES if file.has(name)}
        self._templates: dict[bool, ChatTemplate] = {}
        opened = open_backend(file, backend, threads=threads, spin=spin)
        self._backend: Backend = opened.backend
        self.backend, self.fallback_reason = opened.name, opened.fallback_reason
        self.context_length = min(longest, self._backend.context_length)
        if self.fallback_reason:
            _log.warning("%s", self.fallback_reason)
        self.adapters = _adapters(file, self._backend)
        self._finish_reasons: list[FinishReason | None] = []

    @classmethod
    def load(
        cls,
        path: str | Path,
        threads: int | None = None,
        check: bool = False,
        *,
        spin: bool = True,
        backend: str = "auto",
    ) -> Engine:
        """Open an engine.plan.

        threads: threads per operator, by default the physical cores. check: hash the weights as well.
        spin: idle threads wait actively; False saves power and helps on a machine shared with other work.
        backend: "auto" runs the engine's TensorRT plan where one runs, or else ONNX Runtime; "onnxruntime", "tensorrt".
        Raises EngineFormatError for a damaged file, TargetError for one that this machine cannot run.
        """
        with EngineFile.open(path, check=check) as file:
            return cls(file, threads=threads, spin=spin, backend=backend)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._backend.vocab_size

    @property
    def threads(self) -> int:
        """Threads that one operator may use."""
        return self._backend.threads

    @property
    def model(self) -> Backend:
        """The loaded model beneath, for measuring."""
        return self._backend

    @property
    def last_finish_reasons(self) -> list[FinishReason | None]:
        """Why each row of the last generation ended: "stop" (end of text or stop string), "length" or "context".

        None while a stream is running and after one that was abandoned.
        """
        return list(self._finish_reasons)

    @property
    def last_finish_reason(self) -> FinishReason | None:
        """Why the (first row of the) last generation ended."""
        return self._finish_reasons[0] if self._finish_reasons else None

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> Any:
        """Continue a text or token ids: a str for one prompt, a list of str for a batch.

        Ends at the model's end-of-text ids, at a stop string (cut off), after max_new_tokens, or where the context is
        full; `last_finish_reasons` says which. adapter: one of `adapters`, or a list with one (or None) for each
        prompt; None is the model alone. Raises InputError for a prompt or an option that cannot be used.
        """
        options = GenerationOptions(max_new_tokens, temperature, top_p, top_k, seed, stop)
        prompts, single = split_prompts(prompt)
        generation = self._generation(prompts, options, adapter, self._need_codec())
        texts = [""] * len(prompts)
        for row, piece in self._events(generation):
            texts[row] += piece
        return texts[0] if single else texts

    def generate_ids(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | Sequence[int] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> Any:
        """As `generate`, but the new token ids: list[int] for one prompt, a list of them for a batch."""
        options = GenerationOptions(max_new_tokens, temperature, top_p, top_k, seed)
        prompts, single = split_prompts(prompt)
        generation = self._generation(prompts, options, adapter, None)
        for _ in self._events(generation):
            pass
        tokens = [row.tokens for row in generation.rows]
        return tokens[0] if single else tokens

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        adapter: str | None = None,
    ) -> Iterator[str]:
        """The same text as `generate`, piece by piece as it becomes certain; a piece never splits a character.

        Prompt and options are checked here, before the first piece is asked for. One prompt only.
        """
        options = GenerationOptions(max_new_tokens, temperature, top_p, top_k, seed, stop)
        prompts, single = split_prompts(prompt)
        if not single:
            raise InputError("stream takes one prompt", hint="use generate for a batch")
        generation = self._generation(prompts, options, adapter, self._need_codec())
        return (piece for _, piece in self._events(generation))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """The model's answer to a conversation, by its own chat template. options: those of `generate`."""
        text: str = self.generate(self.chat_ids(messages, tools=tools, template_options=template_options), **options)
        return text

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """As `chat`, piece by piece. options: those of `stream`."""
        return self.stream(self.chat_ids(messages, tools=tools, template_options=template_options), **options)

    def chat_text(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation. template_options: further variables, such as {"enable_thinking": False}.

        Raises InputError if the model has no chat template or its template refuses the messages.
        """
        with_tools = bool(tools)
        if with_tools not in self._templates:
            self._templates[with_tools] = load_chat_template(self._chat_files, with_tools=with_tools)
        return self._templates[with_tools].render(messages, tools=tools, **(template_options or {}))

    def chat_ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt ids of a conversation; the template writes the special tokens itself."""
        text = self.chat_text(messages, tools=tools, template_options=template_options)
        return self._need_codec().encode(text, special=False)

    def logits(self, ids: Sequence[int], *, adapter: str | None = None) -> FloatArray:
        """Logits at every position, float32 [n, vocab], with one of `adapters` or of the model alone.

        Raises InputError for bad ids, more than the context, or an adapter that is not known.
        """
        checked = self._fitting(checked_ids(ids, self.vocab_size))
        logits = np.empty((len(checked), self.vocab_size), np.float32)
        done = 0
        for piece in self._backend.score(checked, adapter_gates(adapter, self.adapters, 1)):
            logits[done : done + len(piece)] = piece
            done += len(piece)
        return logits

    def iter_logits(self, ids: Sequence[int], *, adapter: str | None = None) -> Iterator[FloatArray]:
        """`logits` in pieces [m, vocab] of at most 64 MiB, for long texts."""
        gates = adapter_gates(adapter, self.adapters, 1)
        return self._backend.score(self._fitting(checked_ids(ids, self.vocab_size)), gates)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; special: with what the model wants around a prompt (bos)."""
        return self._need_codec().encode(text, special=special)

    def detokenize(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids."""
        return self._need_codec().decode(checked_ids(ids, self.vocab_size).tolist(), skip_special=skip_special)

    def close(self) -> None:
        """Give the memory back. A closed engine raises InputError when it is used."""
        self._backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Engine({self.path!r}, scheme={self.manifest.get('scheme')!r}, context_length={self.context_length})"

    def _generation(
        self,
        prompts: Sequence[Any],
        options: GenerationOptions,
        adapter: str | Sequence[str | None] | None,
        codec: TextCodec | None,
    ) -> Generation:
        gates = adapter_gates(adapter, self.adapters, len(prompts))
        ids = [self._fitting(self._ids(prompt)) for prompt in prompts]
        return Generation(
            self._backend,
            ids,
            options,
            eos=self._eos,
            context_length=self.context_length,
            codec=codec,
            gates=gates,
        )

    def _events(self, generation: Generation) -> Iterator[tuple[int, str]]:
        """Run a generation, and keep and tell why its rows ended."""
        self._finish_reasons = [None] * len(generation.rows)
        yield from generation
        self._finish_reasons = [row.finish_reason for row in generation.rows]
        for row in generation.rows:
            if row.finish_reason == "context":
                self._tell_context(row)

    def _tell_context(self, row: Row) -> None:
        _log.warning(
            "generation ended at the context length of %d tokens (prompt %d, new %d)",
            self.context_length,
            row.prompt_tokens,
            len(row.tokens),
        )

    def _ids(self, prompt: Any) -> IntArray:
        if not isinstance(prompt, str):
            return checked_ids(prompt, self.vocab_size)
        ids = self._need_codec().encode(prompt)
        if not ids:
            raise InputError("the prompt is empty", hint="this model has no start token: give at least one character")
        return checked_ids(ids, self.vocab_size)

    def _fitting(self, ids: IntArray) -> IntArray:
        if len(ids) > self.context_length:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the context length is {self.context_length}",
                hint=f"shorten the prompt by at least {len(ids) - self.context_length} tokens",
            )
        return ids

    def _need_codec(self) -> TextCodec:
        if self._codec is None:
            raise InputError("this engine has no tokenizer", hint="give token ids and use generate_ids")
        return self._codec


def _context_length(manifest: Mapping[str, Any]) -> int:
    value = manifest.get("context_length")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise EngineFormatError(f"the manifest's context_length is {value!r}, which is no length")
    return value


def _adapters(file: EngineFile, backend: Backend) -> tuple[str, ...]:
    """The names of the adapters that can be switched on. Raises EngineFormatError where the graph has others."""
    names = tuple((file.manifest.get("adapter") or {}).get("names", []))
    if len(names) != backend.adapters:
        raise EngineFormatError(
            f"{file.path} names {len(names)} adapters, its graph switches {backend.adapters}",
            hint="copy or compile the engine again",
        )
    return names


def _codec(file: EngineFile, generation: Mapping[str, Any]) -> TextCodec | None:
    if not file.has("tokenizer.json"):
        return None
    bos = generation.get("bos_token_id") if generation.get("add_bos") else None
    return TextCodec(file.read("tokenizer.json"), bos_token_id=bos)
