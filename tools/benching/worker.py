"""One contender in a process of its own: load a model, then measure on request, one JSON object a line.

    python worker.py KIND PATH THREADS CONTEXT

First line out: {"load_s", "versions"}. A request is {"prompt": token ids, "new": count}; the answer has wall and CPU
seconds of the prompt up to the first new token, and of the tokens after it. Every loop is greedy and does not stop at
an end token. Runs under the Python that has the contender's package, so it imports nothing of rqc but for rqc's engine.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[[], None]
Start = Callable[[list[int], int], Step]
"""Read a prompt (ids, count of tokens that will follow) up to the first new token; returns what makes the next one."""


def rqc_engine(path: str, threads: int, _context: int) -> tuple[Start, tuple[str, ...]]:
    """An engine in rqc's runtime."""
    from rqc.runtime.engine import Engine

    backend = Engine.load(path, threads=threads).model

    def start(ids: list[int], _new: int) -> Step:
        sequences, logits = backend.start([np.asarray(ids, np.int64)])
        tokens = np.argmax(logits, axis=-1)

        def step() -> None:
            nonlocal tokens
            tokens = np.argmax(sequences.step(tokens), axis=-1)

        return step

    return start, ("rqc", "onnxruntime")


def genai(path: str, threads: int, _context: int) -> tuple[Start, tuple[str, ...]]:
    """A directory of onnxruntime-genai's builder in its own loop; `min_length` keeps it from stopping early."""
    og: Any = importlib.import_module("onnxruntime_genai")
    config = og.Config(path)
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)

    def start(ids: list[int], new: int) -> Step:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + new, min_length=len(ids) + new, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.asarray(ids, np.int32))
        generator.generate_next_token()
        step: Step = generator.generate_next_token
        return step

    return start, ("onnxruntime-genai", "onnxruntime")


def llama_cpp(path: str, threads: int, context: int) -> tuple[Start, tuple[str, ...]]:
    """A GGUF file in llama.cpp; the arg max is numpy's, as in rqc's loop."""
    module: Any = importlib.import_module("llama_cpp")
    llama = module.Llama(
        path, n_ctx=context, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    vocabulary = llama.n_vocab()

    def best() -> int:
        return int(np.argmax(np.ctypeslib.as_array(module.llama_get_logits_ith(llama.ctx, -1), (vocabulary,))))

    def start(ids: list[int], _new: int) -> Step:
        llama.reset()
        llama.eval(ids)
        token = best()

        def step() -> None:
            nonlocal token
            llama.eval([token])
            token = best()

        return step

    return start, ("llama-cpp-python",)


KINDS: dict[str, Callable[[str, int, int], tuple[Start, tuple[str, ...]]]] = {
    "rqc": rqc_engine,
    "genai": genai,
    "llama.cpp": llama_cpp,
}


def measure(start: Start, prompt: list[int], new: int) -> dict[str, float]:
    """Seconds by the clock and of all threads' CPU time: prompt to first token, and the rest."""
    wall, cpu = [time.perf_counter()], [time.process_time()]

    def lap() -> None:
        cpu.append(time.process_time())
        wall.append(time.perf_counter())

    step = start(prompt, new)
    lap()
    for _ in range(new - 1):
        step()
    lap()
    return {
        "prefill_s": wall[1] - wall[0],
        "prefill_cpu_s": cpu[1] - cpu[0],
        "decode_s": wall[2] - wall[1],
        "decode_cpu_s": cpu[2] - cpu[1],
    }


def peak_rss_bytes() -> int:
    """The most resident memory so far; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def die_with_parent() -> None:
    """On Linux, be killed when the benchmark ends, however it ends: a stopped process notices no closed pipe."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    die_with_parent()
    kind, path, threads, context = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints on stdout must not get between the answers

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    begin = time.perf_counter()
    start, packages = KINDS[kind](path, threads, context)
    versions = {name: importlib.metadata.version(name) for name in packages}
    answer({"load_s": time.perf_counter() - begin, "versions": versions})
    for line in sys.stdin:
        request = json.loads(line)
        answer({**measure(start, request["prompt"], request["new"]), "peak_rss_bytes": peak_rss_bytes()})


if __name__ == "__main__":
    main()
