"""rqc verify: an engine against PyTorch. What must agree with what, and to which limit, is decided here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rqc.compiler.belonging import Belonging, adopt_weights
from rqc.compiler.gates import Gate, check_limits, judge
from rqc.compiler.linearwise import compare_linears, quantize_activations, worst
from rqc.compiler.parity import Divergence, Ids, Logits, compare, cut, perplexity
from rqc.compiler.scheme import Scheme
from rqc.compiler.stored import StoredGraph
from rqc.compiler.text import parity_text, read_text
from rqc.models.algebra import dimensions
from rqc.models.checkpoint import Checkpoint
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.runtime.container import EngineFile
from rqc.runtime.engine import Engine
from rqc.runtime.errors import BasisMismatchError, InputError

PROBE_TOKENS = 256
"""Tokens on which linears are compared one by one."""


@dataclass(frozen=True)
class ParityReport:
    """How an engine compares with PyTorch. `notes`: what a reader should know besides, one line each."""

    tokens: int
    max_abs: float
    mean_kl: float
    top1_agreement: float
    ppl_engine: float
    ppl_reference: float
    gates: list[Gate]
    notes: list[str] = field(default_factory=list)
    weights: list[Belonging] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every gate that counts passed."""
        return all(gate.passed for gate in self.gates if gate.counts)

    def to_json(self) -> dict[str, Any]:
        """The report with the keys of `rqc verify --json`."""
        return {
            "passed": self.passed,
            "tokens": self.tokens,
            "max_abs": self.max_abs,
            "mean_kl": self.mean_kl,
            "top1_agreement": self.top1_agreement,
            "ppl_engine": self.ppl_engine,
            "ppl_reference": self.ppl_reference,
            "gates": [gate.to_json() for gate in self.gates],
        }


def verify_engine(
    engine: str | Path,
    model_dir: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int = 2048,
    window: int = 1024,
    gates: Mapping[str, float] | None = None,
    threads: int | None = None,
    token_ids: Sequence[int] | None = None,
) -> ParityReport:
    """Compare an engine with the model that it was compiled from.

    fp32 is compared with the model itself; fp16 and weight-only schemes with the model folded and rotated by the same
    algebra that computes with the engine's own stored weights, which must be this model's. Schemes that quantize
    activations are compared linear by linear, and in perplexity with the same fake quantization; their divergence is
    given against the float model.

    text: a .txt, .json or .jsonl file, the text that ships if None; token_ids: ids to use instead. tokens: how many of
    them, in windows of `window` (at most the context). gates: limits by name. Raises InputError (also for an engine of
    another model), BasisMismatchError, EngineFormatError, CheckpointError; a failed gate raises nothing: see `passed`.
    """
    if tokens < 2 or window < 2:
        raise InputError(
            f"{tokens} tokens in windows of {window}", hint="a token is predicted from another: give 2 or more"
        )
    with EngineFile.open(engine, check=True) as file:
        scheme = Scheme.parse(str(file.manifest["scheme"]))
        check_limits(gates or {}, scheme)
        _same_model(file, model_dir)
        with _threads(threads), Engine(file, threads=threads, spin=False) as loaded:
            ids = list(token_ids) if token_ids is not None else loaded.tokenize(_text(text))
            windows = cut(ids, tokens, min(window, loaded.context_length))
            if not windows:
                raise InputError(f"the text has {len(ids)} tokens", hint="name a longer text")
            return _Verification(file, loaded, Reference.load(model_dir), scheme, windows, gates or {}).run(tokens)


@dataclass
class _Verification:
    """One run: the open engine, its reference, and the text in windows."""

    file: EngineFile
    engine: Engine
    reference: Reference
    scheme: Scheme
    windows: list[Ids]
    limits: Mapping[str, float]
    notes: list[str] = field(default_factory=list)

    def run(self, asked: int) -> ParityReport:
        rotation, tied = self._frame()
        used = sum(len(ids) for ids in self.windows)
        if used < asked:
            self.notes.append(f"{used} tokens compared, {asked} asked for: the text is shorter")
        if self.scheme.name == "fp32":
            measured = compare(self.windows, self.reference.logits, self._scores)
            return self._report(used, measured, measured[1], [], {"mean_kl": measured[0].mean_kl})
        if self.scheme.quantizes_activations:
            return self._rounded(used, rotation, tied)
        ppl_reference = perplexity(self.windows, self.reference.logits)
        self.reference.rotate(rotation, tied=tied)
        weights = self._adopt(StoredGraph.read(self.file))
        measured = compare(self.windows, self.reference.logits, self._scores)
        return self._report(used, measured, ppl_reference, weights, {"mean_kl": measured[0].mean_kl})

    def _rounded(self, used: int, rotation: Rotation, tied: bool) -> ParityReport:
        """A scheme that quantizes activations: linear by linear and in perplexity; its logits against the float
        model's."""
        measured = compare(self.windows, self.reference.logits, self._scores)
        stored, bits = StoredGraph.read(self.file), self.scheme.activation_bits
        self.reference.rotate(rotation, tied=tied)
        weights = self._adopt(stored)
        quantize_activations(stored, self.reference, bits)
        checks = compare_linears(stored, self.reference, self.windows[0][:PROBE_TOKENS], bits, self.engine.threads)
        self.notes.extend(worst(checks))
        same = perplexity(self.windows, self.reference.logits)
        elements = sum(check.elements for check in checks)
        faithful = {
            "equal_codes": sum(check.equal * check.elements for check in checks) / elements,
            "code_distance": float(max(check.distance for check in checks)),
            "linear_error": max(check.error for check in checks),
            "kernel_rounding": max(check.rounded for check in checks),
            "ppl_fidelity": max(measured[2] / same, same / measured[2]),
        }
        self.notes.append(f"perplexity of the same fake quantization in PyTorch: {same:.4f}")
        return self._report(used, measured, measured[1], weights, faithful)

    def _scores(self, ids: Ids) -> Iterator[Logits]:
        """The engine's logits for one window, in pieces."""
        return self.engine.iter_logits(ids.tolist())

    def _frame(self) -> tuple[Rotation, bool]:
        """The engine's rotation and whether its tables are one. Raises BasisMismatchError if its basis is not what it
        says."""
        recorded = self.file.manifest["rotation"]
        rotation = Rotation.from_json(recorded)
        description = self.reference.description
        basis = rotation.basis(dimensions(description)) if rotation.sites else None
        if basis != recorded["basis"]:
            raise BasisMismatchError(
                f"{self.file.path} has basis {_short(recorded['basis'])}, {rotation} of this model is {_short(basis)}",
                hint="compile the engine again with this version of rqc",
            )
        return rotation, description.architecture.tied and self.file.manifest["tied"] != "untie"

    def _adopt(self, stored: StoredGraph) -> list[Belonging]:
        rows = self.file.manifest["layers"]
        bits = {row["name"]: int(row["bits"]) for row in rows if "bits" in row}
        return adopt_weights(stored, self.reference, bits)

    def _report(
        self,
        used: int,
        measured: tuple[Divergence, float, float],
        ppl_reference: float,
        weights: list[Belonging],
        faithful: Mapping[str, float],
    ) -> ParityReport:
        divergence, _, ppl_engine = measured
        values = {
            "max_abs": divergence.max_abs,
            "mean_kl": divergence.mean_kl,
            "top1_agreement": divergence.top1_agreement,
            "ppl_engine": ppl_engine,
            "ppl_ratio": ppl_engine / ppl_reference,
        }
        gates = [*self._weight_gates(weights), *judge(self.scheme, faithful, values, self.limits)]
        return ParityReport(
            used,
            divergence.max_abs,
            divergence.mean_kl,
            divergence.top1_agreement,
            ppl_engine,
            ppl_reference,
            gates,
            self.notes,
            weights,
        )

    def _weight_gates(self, weights: list[Belonging]) -> list[Gate]:
        """The worst stored weight, and after rounding to nearest: no code that is not the nearest."""
        if not weights:
            return []
        worst = max(weights, key=lambda found: found.strain)
        self.notes.append(
            f"weights: furthest from the model is {worst.name}, {worst.distance:.3g} of {worst.allowed:.3g} allowed"
        )
        gates = [Gate("weights", worst.distance, worst.allowed)]
        if self.scheme.quantized and self.file.manifest["method"] == "rtn":
            gates.append(Gate("misplaced_codes", float(sum(found.misplaced for found in weights)), 0.0))
        return gates


def _same_model(file: EngineFile, model_dir: str | Path) -> None:
    """Raise InputError, naming both, if an engine was compiled from another model than the one in this directory."""
    recorded = str(file.manifest["provenance"]["model"])
    found = Checkpoint.open(model_dir).fingerprint()
    if recorded != found:
        raise InputError(
            f"{file.path} was compiled from the model {_short(recorded)}, {model_dir} holds {_short(found)}",
            hint="give the directory that the engine was compiled from",
        )


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


def _text(text: str | Path | None) -> str:
    return parity_text() if text is None else read_text(text)


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """PyTorch on as many threads as the engine, for the time being."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
