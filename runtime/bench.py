"""How fast an engine is on this machine, and what it takes: load, first token, prefill, decode, memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from rqc.runtime.backends.base import Backend, IntArray
from rqc.runtime.engine import Engine
from rqc.runtime.errors import InputError

PROMPT_TOKENS = 128
NEW_TOKENS = 64
_Result = TypeVar("_Result")


def bench_engine(
    path: str | Path,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repeats: int = 3,
    threads: int | None = None,
    spin: bool = True,
    backend: str = "auto",
) -> dict[str, float | int]:
    """Measure the engine at `path`, greedy, one sequence; the medians of `repeats` runs after one that warms up.

    prompt_tokens, new_tokens: by default 128 and 64, less where the context is short. ttft_s runs from token ids to the
    first new token; prefill is the prompt over that time, decode the tokens after the first over theirs.
    peak_rss_bytes is the process's: measure in a fresh one. Raises InputError for sizes that do not fit.
    """
    engine, load_s = _timed(lambda: Engine.load(path, threads=threads, spin=spin, backend=backend))
    with engine:
        prompt, new = _sizes(engine.context_length, prompt_tokens, new_tokens)
        if repeats < 1:
            raise InputError(f"repeats is {repeats}", hint="measure at least once")
        ids = np.random.Generator(np.random.PCG64(0)).integers(0, engine.vocab_size, prompt)
        runs = [_run(engine.model, ids, new) for _ in range(repeats + 1)][1:]
        ttft_s = statistics.median(first for first, _ in runs)
        decode_s = statistics.median(rest for _, rest in runs)
        return {
            "load_s": load_s,
            "ttft_s": ttft_s,
            "prompt_tokens": prompt,
            "new_tokens": new,
            "prefill_tokens_per_s": prompt / ttft_s,
            "decode_tokens_per_s": (new - 1) / decode_s,
            "peak_rss_bytes": peak_rss_bytes(),
            "threads": engine.threads,
        }


def _run(backend: Backend, ids: IntArray, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and for the rest."""
    (sequences, logits), first_s = _timed(lambda: backend.start([ids]))

    def rest() -> None:
        tokens = np.argmax(logits, axis=-1)
        for _ in range(new_tokens - 1):
            tokens = np.argmax(sequences.step(tokens), axis=-1)

    return first_s, _timed(rest)[1]


def _timed(call: Callable[[], _Result]) -> tuple[_Result, float]:
    begin = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begin


def _sizes(context_length: int, prompt_tokens: int | None, new_tokens: int | None) -> tuple[int, int]:
    """The sizes asked for, or the defaults, shortened to half of a short context each."""
    prompt = min(PROMPT_TOKENS, context_length // 2) if prompt_tokens is None else prompt_tokens
    new = min(NEW_TOKENS, context_length - prompt) if new_tokens is None else new_tokens
    if prompt < 1 or new < 2 or prompt + new > context_length:
        raise InputError(
            f"a prompt of {prompt} and {new} new tokens cannot be measured in a context of {context_length}",
            hint="at least 1 and 2 tokens, together no more than the context",
        )
    return prompt, new


def peak_rss_bytes() -> int:
    """The most resident memory that this process has had, in bytes.

    Linux's VmHWM where there is one: getrusage also counts what the parent had when it started the process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
