"""What tools/schemes measures, each figure once: kept in a folder, whatever is killed or runs beside."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from rqc.compiler.data_files import json_values
from rqc.compiler.model_text import text_of
from rqc.compiler.text import read_tokenizer
from rqc.compiler.verify.parity import Ids, cut, perplexity
from rqc.runtime.container import EngineFile
from rqc.runtime.engine import Engine
from rqc.runtime.errors import InputError, RqcError
from rqc.runtime.inspection import inspect_engine, token_bytes
from rqc.runtime.replace_file import scratch_folder
from scoring.rows import CALIBRATION, LEARNED, Row

TEXTS = ("wikitext", "c4")
C4_SPLIT = 200
"""Documents before this one calibrate, the others are evaluated on."""

Measured = dict[str, Any]


class FailedError(Exception):
    """A command of rqc that ended with an error."""


@dataclass(frozen=True)
class Place:
    """Where model, texts and results lie, and on how many tokens is measured. learned: the file of a rotation."""

    model: Path
    data: Path
    work: Path
    text: str = "wikitext"
    tokens: int = 20480
    window: int = 1024
    learned: Path | None = None

    @property
    def about(self) -> Measured:
        """What all figures of a folder have in common."""
        return {"model": str(self.model.resolve()), "text": self.text, "tokens": self.tokens, "window": self.window}

    @cached_property
    def calibration(self) -> Path:
        """The text that engines are calibrated on."""
        if self.text == "wikitext":
            return self.data / "wikitext-2" / "valid.txt"
        path = self.work / "c4-calibration.json"
        write(path, self._documents()[:C4_SPLIT])
        return path

    @cached_property
    def windows(self) -> list[Ids]:
        """The tokens that are evaluated on. Raises InputError where the text has fewer than asked for."""
        if self.text == "wikitext":
            text = text_of(self.data / "wikitext-2" / "test.txt", self.model)
        else:
            text = "\n\n".join(record["text"] for record in self._documents()[C4_SPLIT:])
        tokenizer = read_tokenizer(self.model)
        if tokenizer is None:
            raise InputError(f"{self.model} has no tokenizer.json", hint="add the tokenizer's files to it")
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) < self.tokens:
            raise InputError(f"the text has {len(ids)} tokens, {self.tokens} asked for", hint=f"--tokens {len(ids)}")
        return cut(ids, self.tokens, self.window)

    def check(self) -> None:
        """Read the texts before hours are spent on the first row. Raises InputError, CheckpointError."""
        text_of(self.calibration, self.model)
        _ = self.windows

    def _documents(self) -> list[dict[str, str]]:
        path = self.data / "c4" / "c4_demo.json"
        if not path.is_file():
            raise InputError(f"{path} is not there", hint="name the folder with c4 in it: --data-dir DATA")
        return [value for _, value in json_values(path)]

    @cached_property
    def fingerprint(self) -> str:
        """Of the learned rotation: a file that was trained again is another one."""
        return "" if self.learned is None else hashlib.sha256(self.learned.read_bytes()).hexdigest()[:16]


def write(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def kept(path: Path, options: list[str], make: Callable[[], Measured]) -> Measured:
    """What is kept under `path` if it was measured with these options, else what `make` measures, which is kept.

    One process at a time: another one that wants the same waits, and finds it done.
    """
    with _locked(path):
        if path.is_file():
            found: Measured = json.loads(path.read_text(encoding="utf-8"))
            if found["options"] == options:
                return found
        made = {"options": options, "commit": commit(), **make()}
        write(path, made)
        return made


@cache
def commit() -> str:
    """The checkout's commit, with a + where files differ from it; empty where there is no git to ask."""
    here = ("git", "-C", str(Path(__file__).parent))
    try:
        named = subprocess.run([*here, "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return named.stdout.strip()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with a path; the system ends the lock of a process that is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def float_perplexity(place: Place) -> float:
    """The model itself in PyTorch, float32, on the same windows."""

    def make() -> Measured:
        from rqc.models.reference import Reference  # torch: seconds to import, and only where it is compared with

        reference = Reference.load(place.model)
        return {"perplexity": perplexity(place.windows, reference.logits)}

    return float(kept(place.work / "float.json", [], make)["perplexity"])


def scored(row: Row, place: Place) -> Measured:
    """A row of the table. Raises FailedError where it does not compile, RqcError where its engine does not run."""
    return kept(row_file(place.work, row), _asked(row, place), lambda: _score(row, place))


def compared(row: Row, place: Place) -> Measured:
    """Perplexity of an engine and of PyTorch's fake quantization on the same grids. Raises as `scored`."""
    path = place.work / "faithful" / f"{row.name}.json"
    return kept(path, _asked(row, place), lambda: _compare(row, place))


def row_file(work: Path, row: Row) -> Path:
    """Where a row of the table is kept."""
    return work / "rows" / f"{row.name}.json"


def _asked(row: Row, place: Place) -> list[str]:
    """What has to be the same for a figure that is kept to be that of the row."""
    return [*row.options(place.learned), *([place.fingerprint] if row.rotation == LEARNED else [])]


def _score(row: Row, place: Place) -> Measured:
    with _compiled(row, place) as (engine, report):
        began = time.monotonic()
        with Engine.load(engine) as loaded:
            value = perplexity(place.windows, lambda ids: loaded.logits(ids.tolist()))
        found = inspect_engine(engine)
        return {
            "perplexity": value,
            "compile_seconds": report["seconds"],
            "score_seconds": time.monotonic() - began,
            "peak_rss_bytes": report["peak_rss_bytes"],
            "size_bytes": found.size_bytes,
            "bits_per_weight": found.bits_per_weight,
            "cache_bytes_per_token": token_bytes(found.manifest["graph"]),
            "objective": _objective(engine),
        }


def _objective(engine: Path) -> dict[str, float]:
    """‖(W − Ŵ) X‖ of each linear that was fitted to text, over the same after rounding to nearest."""
    with EngineFile.open(engine) as file:
        linears = (json.loads(file.read("report.json")).get("calibration") or {}).get("linears", {})
    return {name: fit["error"] / fit["nearest"] for name, fit in linears.items() if fit.get("nearest")}


def _compare(row: Row, place: Place) -> Measured:
    from rqc.compiler.verify.engine import verify_engine

    with _compiled(row, place) as (engine, _):
        ids = [int(token) for part in place.windows for token in part]
        report = verify_engine(engine, place.model, token_ids=ids, tokens=len(ids), window=place.window)
    same = [note for note in report.notes if note.startswith("perplexity of the same fake quantization")]
    return {
        "tokens": report.tokens,
        "engine": report.ppl_engine,
        "pytorch": float(same[0].rpartition(" ")[2]),
        "failed": [gate.name for gate in report.gates if gate.counts and not gate.passed],
    }


@contextmanager
def _compiled(row: Row, place: Place) -> Iterator[tuple[Path, Measured]]:
    """A row's engine, which is there for as long as it is looked at, and what the compile said."""
    shared = ("--calibration", place.calibration, *CALIBRATION)
    with scratch_folder("row") as folder:  # its own: others may want this row
        engine = Path(folder) / f"{row.name}.plan"
        yield engine, rqc("compile", place.model, "-o", engine, *shared, *row.options(place.learned))


def rqc(command: str, *arguments: object) -> Measured:
    """One command; what it says as JSON. Raises FailedError with its error."""
    words = [str(word) for word in arguments]
    print(f"== rqc {command} {' '.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run(["rqc", command, *words, "--json"], stdout=subprocess.PIPE, check=False)
    try:
        said: Measured = json.loads(done.stdout)
    except json.JSONDecodeError:
        said = {"error": {"message": f"rqc {command} ended with {done.returncode} and said nothing"}}
    if done.returncode:
        raise FailedError(said["error"]["message"] if "error" in said else f"exit code {done.returncode}")
    return said


FAILURES = (FailedError, RqcError)
"""What a row may fail with and the table goes on without it."""
