"""Contenders as processes that are kept alive and stopped while another one runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benching.machine import busy_seconds
from benching.rounds import Sample
from rqc.runtime.errors import ResourceError

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Contender:
    """What to run: `kind` as worker.py names it, the model at `path`, the Python that has the package."""

    name: str
    kind: str
    path: Path
    python: Path
    note: str

    @property
    def size_bytes(self) -> int:
        """Bytes on disk that the model takes: weights and graph, no tokenizer."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(file.stat().st_size for file in self.path.iterdir() if file.name.startswith("model.onnx"))


@dataclass(frozen=True)
class Workload:
    """Tokens: `new` ones after a prompt of `prompt`, and apart from that a prompt of `prefill`."""

    prompt: int
    new: int
    prefill: int
    vocabulary: int

    @property
    def context(self) -> int:
        return max(self.prompt + self.new, self.prefill + 1)

    def ids(self, count: int) -> list[int]:
        """The same random tokens for everyone."""
        return [int(token) for token in np.random.Generator(np.random.PCG64(0)).integers(0, self.vocabulary, count)]


class Running:
    """A contender's process. Between requests it is stopped (SIGSTOP): threads that spin take no time from others."""

    def __init__(self, contender: Contender, threads: int, context: int, log: Path) -> None:
        """Raises ResourceError, with the end of the log, if the model does not load."""
        self.contender = contender
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [contender.python, "-P", WORKER, contender.kind, contender.path, str(threads), str(context)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        loaded = self._answer()
        self.load_s = float(loaded["load_s"])
        self.versions: dict[str, str] = loaded["versions"]

    def run(self, prompt: Sequence[int], new: int) -> dict[str, Any]:
        """One request. `others` is how many cores other processes kept busy meanwhile."""
        stdin = self._process.stdin
        assert stdin is not None
        busy, begin = busy_seconds(), time.perf_counter()
        self._process.send_signal(signal.SIGCONT)
        stdin.write(json.dumps({"prompt": list(prompt), "new": new}) + "\n")
        stdin.flush()
        answer = self._answer()
        wall, after = time.perf_counter() - begin, busy_seconds()
        own = float(answer["prefill_cpu_s"]) + float(answer["decode_cpu_s"])
        answer["others"] = max(0.0, after - busy - own) / wall if after is not None and busy is not None else 0.0
        return answer

    def measure(self, work: Workload) -> Sample:
        """Tokens per second of decode and prefill, by the clock and by CPU time."""
        decode = self.run(work.ids(work.prompt), work.new)
        prefill = self.run(work.ids(work.prefill), 1)
        return {
            "decode": (work.new - 1) / decode["decode_s"],
            "decode_cpu": (work.new - 1) / decode["decode_cpu_s"],
            "prefill": work.prefill / prefill["prefill_s"],
            "prefill_cpu": work.prefill / prefill["prefill_cpu_s"],
            "peak_rss_bytes": prefill["peak_rss_bytes"],
            "others": (decode["others"] + prefill["others"]) / 2,
        }

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            code = self._process.wait()
            last = " ".join(self._log.read_text(encoding="utf-8", errors="replace").split())[-400:]
            raise ResourceError(f"{self.contender.name} ended with code {code}: {last}", hint=f"the log is {self._log}")
        self._process.send_signal(signal.SIGSTOP)
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
