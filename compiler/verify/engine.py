"""rqc verify: an engine against PyTorch. What must agree with what, and to which limit, is decided here.

With an adapter, PyTorch means the PEFT model: plain peft on the model, or on the model folded into the adapter's basis.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rqc.compiler.adapters.bases import short
from rqc.compiler.adapters.merge import FOLD
from rqc.compiler.adapters.sources import RESERVED, AdapterOption, AdapterSource, parse_sources
from rqc.compiler.float4_on_cpu import Float4File
from rqc.compiler.model_text import text_of
from rqc.compiler.scheme import Scheme
from rqc.compiler.text import parity_text
from rqc.compiler.verify.adapted import Adapted, check_presence
from rqc.compiler.verify.belonging import Belonging, Beside, adopt_weights
from rqc.compiler.verify.cachewise import cache_gates, worst_cache
from rqc.compiler.verify.gates import FAITHFUL_KL, Gate, Terms, check_limits, judge
from rqc.compiler.verify.linearwise import compare_linears, linear_gates, worst
from rqc.compiler.verify.parity import Divergence, Ids, Logits, compare, cut, perplexity
from rqc.compiler.verify.rounding import Rounding
from rqc.compiler.verify.side_modules import compute_as_stored, wrap_sides
from rqc.compiler.verify.stored import StoredGraph
from rqc.compiler.verify.stored_caches import read_caches
from rqc.compiler.verify.stored_frame import stored_frame
from rqc.compiler.verify.stored_sides import StoredSide, read_sides
from rqc.models.cache_grid import quantize_cache
from rqc.models.checkpoint import Checkpoint, model_directory
from rqc.models.delta import Delta
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.runtime.container import EngineFile
from rqc.runtime.engine import Engine
from rqc.runtime.errors import InputError, TargetError

PROBE_TOKENS = 256
"""Tokens on which linears are compared one by one."""


@dataclass(frozen=True)
class ParityReport:
    """How an engine compares with PyTorch. `notes`: what a reader should know besides, one line each.

    each: the reports of an engine whose adapters can be switched, by name, `base` that of the model alone.
    """

    tokens: int
    max_abs: float
    mean_kl: float
    top1_agreement: float
    ppl_engine: float
    ppl_reference: float
    gates: list[Gate]
    notes: list[str] = field(default_factory=list)
    weights: list[Belonging] = field(default_factory=list)
    each: Mapping[str, ParityReport] = field(default_factory=dict)

    @classmethod
    def of_each(cls, each: Mapping[str, ParityReport]) -> ParityReport:
        """What was found with each adapter switched on, and without (`base`), as one: the worst figures, all gates."""
        found = list(each.values())
        worst_ppl = max(found, key=lambda one: one.ppl_engine / one.ppl_reference)
        return cls(
            min(one.tokens for one in found),
            max(one.max_abs for one in found),
            max(one.mean_kl for one in found),
            min(one.top1_agreement for one in found),
            worst_ppl.ppl_engine,
            worst_ppl.ppl_reference,
            [replace(gate, name=f"{name}:{gate.name}") for name, one in each.items() for gate in one.gates],
            [f"{name}: {note}" for name, one in each.items() for note in one.notes],
            [belonging for one in found for belonging in one.weights],
            each,
        )

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
            **({"adapters": {name: one.to_json() for name, one in self.each.items()}} if self.each else {}),
        }


def verify_engine(
    engine: str | Path,
    model_dir: str | Path,
    *,
    adapter: AdapterOption = None,
    text: str | Path | None = None,
    tokens: int = 2048,
    window: int = 1024,
    gates: Mapping[str, float] | None = None,
    threads: int | None = None,
    token_ids: Sequence[int] | None = None,
) -> ParityReport:
    """Compare an engine with the model that it was compiled from, and with `adapter`, the directory of the adapter that
    it was compiled with; a list if there are several. Adapters by name are switched on one after the other, each
    compared by itself, and then all off.

    fp32 is compared with the model itself, or with the PEFT model that the adapter makes of it; fp16 and weight-only
    schemes with the same, folded and rotated by the algebra of the graph, that computes with the engine's own stored
    weights, which must be this model's. Schemes that quantize activations are compared linear by linear, and in
    perplexity with the same fake quantization; their divergence is given against the float model. An engine for
    TensorRT in half precision is held to what that costs, and without a plan that runs here it is its ONNX part.

    text: a .txt, .json or .jsonl file, the text that ships if None; token_ids: ids to use instead. tokens: how many of
    them, in windows of `window` (at most the context). gates: limits by name. Raises InputError (also for an engine of
    another model or adapter), BasisMismatchError, EngineFormatError, CheckpointError, TargetError; a failed gate raises
    nothing: see `passed`.
    """
    if tokens < 2 or window < 2:
        raise InputError(
            f"{tokens} tokens in windows of {window}", hint="a token is predicted from another: give 2 or more"
        )
    with EngineFile.open(engine, check=True) as file:
        terms = Terms.of(file.manifest)
        check_limits(gates or {}, terms)
        _same_model(file, model_dir)
        sources = parse_sources(adapter)
        check_presence(file, sources)
        with _threads(threads), _loaded(file, threads) as loaded:
            ids = list(token_ids) if token_ids is not None else loaded.tokenize(_text(text, model_dir))
            windows = cut(ids, tokens, min(window, loaded.context_length))
            if not windows:
                raise InputError(f"the text has {len(ids)} tokens", hint="name a longer text")

            reference = Reference.load(model_dir)

            def opened(chosen: Sequence[AdapterSource]) -> Adapted:
                return Adapted.open(file, model_dir, chosen, reference.description)

            def run(adapted: Adapted | None, name: str | None = None) -> ParityReport:
                return _Verification(file, loaded, reference, terms, windows, gates or {}, adapted, name).run(tokens)

            if not loaded.adapters:
                return run(opened(sources) if sources else None)
            switched = {str(source.name): opened([source]) for source in sources}  # all, before one is compared
            each = {name: run(adapted, name) for name, adapted in switched.items()}
            return ParityReport.of_each({RESERVED[0]: run(None), **each})  # that of the model alone changes `reference`


@dataclass
class _Verification:
    """One run: the open engine, its reference, and the text in windows. chosen: the adapter that is switched on."""

    file: EngineFile
    engine: Engine
    reference: Reference
    terms: Terms
    windows: list[Ids]
    limits: Mapping[str, float]
    adapted: Adapted | None = None
    chosen: str | None = None
    notes: list[str] = field(default_factory=list)
    weights: list[Belonging] = field(default_factory=list)
    frame_gates: list[Gate] = field(default_factory=list)

    @property
    def scheme(self) -> Scheme:
        return self.terms.scheme

    @property
    def _compensated(self) -> bool:
        """Whether the engine has branches of its own, which make up for rounding."""
        return self.file.manifest.get("compensation") is not None

    @property
    def _as_stored(self) -> bool:
        """Whether the reference is to compute what stands beside linears as the engine does."""
        return self.terms.rounds or self._compensated

    def run(self, asked: int) -> ParityReport:
        rotation, tied = stored_frame(self.file, self.reference.description)
        if self.file.manifest["target"] != "onnx":
            self.notes.append(_told(self.engine.backend, self.scheme))
        used = sum(len(ids) for ids in self.windows)
        if used < asked:
            self.notes.append(f"{used} tokens compared, {asked} asked for: the text is shorter")
        if self.adapted is not None:
            self.reference = self.adapted.trained()
            self.notes.extend(self.adapted.notes)
        if self.terms.rounds:
            return self._rounded(used, rotation, tied)
        if self.scheme.name == "fp32":
            measured = compare(self.windows, self.reference.logits, self._scores)
            return self._report(used, measured, measured[1], {"mean_kl": measured[0].mean_kl})
        ppl_reference = perplexity(self.windows, self.reference.logits)
        self._adopt(StoredGraph.read(self.file, self.chosen), rotation, tied)
        measured = compare(self.windows, self.reference.logits, self._scores)
        return self._report(used, measured, ppl_reference, {"mean_kl": measured[0].mean_kl})

    def _rounded(self, used: int, rotation: Rotation, tied: bool) -> ParityReport:
        """An engine that rounds activations or its cache: linear by linear, attention by attention and in perplexity;
        its logits against the float model's."""
        if self.file.manifest.get("dtype") == "bf16":  # a plan runs, but not its linears by themselves
            raise TargetError(
                f"{self.file.path} computes in bf16, whose linears ONNX Runtime does not run one by one on a CPU",
                hint="compile it with --dtype fp16 to compare it",
            )
        measured = compare(self.windows, self.reference.logits, self._scores)
        stored = StoredGraph.read(self.file, self.chosen)
        rounding, caches = Rounding.of(stored, self.scheme.activation_bits), read_caches(stored)
        self._adopt(stored, rotation, tied)
        rounding.let_round(stored, self.reference)
        errors = (
            quantize_cache(self.reference.model, {cache.layer: cache.grids for cache in caches}) if caches else None
        )
        probe = self.windows[0][:PROBE_TOKENS]
        checks, attentions = compare_linears(stored, self.reference, probe, rounding, self.engine.threads, caches)
        self.notes.extend([*worst(checks, rounded=self.scheme.quantizes_activations), *worst_cache(attentions)])
        same = perplexity(self.windows, self.reference.logits)
        faithful = {
            **linear_gates(checks),
            **(cache_gates(attentions, errors) if errors is not None else {}),
            "ppl_fidelity": max(measured[2] / same, same / measured[2]),
        }
        self.notes.append(f"perplexity of the same fake quantization in PyTorch: {same:.4f}")
        return self._report(used, measured, measured[1], faithful)

    def _scores(self, ids: Ids) -> Iterator[Logits]:
        """The engine's logits for one window, in pieces."""
        return self.engine.iter_logits(ids.tolist(), adapter=self.chosen)

    def _adopt(self, stored: StoredGraph, rotation: Rotation, tied: bool) -> None:
        """Bring the reference into the engine's frame and let it compute with the engine's weights, which are judged.

        With rounded activations it computes what stands beside them as stored too: errors must not be spread over two
        linears. So it does with what makes up for rounding. Else that is left to peft.
        """
        sides = read_sides(stored, {name: len(part.weight) for name, part in self.reference.parts.items()})
        manifest, deltas = self.file.manifest, {}
        if self.adapted is None:
            self.reference.fold(rotation, tied=tied)
            self._turn_online(sides, rotation, tied)
        else:
            deltas = self._into_frame(self.adapted, sides, rotation, tied)
        grid = {name: manifest[name] for name in ("group_size", "symmetric", "clip")}
        grid["positive"] = manifest.get("positive_scales", False)
        as_stored = self._as_stored
        bits = {row["name"]: int(row["bits"]) for row in manifest["layers"] if "bits" in row}
        method = manifest["compensation"]["method"] if self._compensated else "none"
        crossed = self.scheme.coarse_activations and (manifest["method"] == "gptq" or method == "eora")
        claims = self.reference.description.claims if manifest.get("sparsity") is not None else ()
        sparse = {claim.weight for claim in claims if claim.quantized}
        precision = self.terms.precision
        together = method == "loftq"
        beside = Beside(sides, deltas, grid, as_stored, precision, self._compensated, together, crossed, sparse)
        self.weights = adopt_weights(stored, self.reference, bits, beside)
        if as_stored:
            compute_as_stored(stored, self.reference, sides)

    def _into_frame(
        self, adapted: Adapted, sides: Mapping[str, StoredSide], rotation: Rotation, tied: bool
    ) -> dict[str, Delta]:
        """Take the PEFT model into the engine's frame, with a gate on it; what it adds beside its linears there."""
        folded = self.file.manifest["adapter"]["merge"] == FOLD  # what is beside then is the grid's own correction
        beside: Collection[str] = () if folded else sides.keys()
        ids = self.windows[0][:PROBE_TOKENS]
        trained = self.reference.logits(ids)
        self.reference = adapted.framed(rotation, tied=tied, beside=beside)
        deltas = adapted.beside(self.reference, beside)
        self._turn_online(sides, rotation, tied)
        if adapted.base_is_float:
            divergence, _, _ = compare([ids], lambda _: trained, lambda ids: iter([self.reference.logits(ids)]))
            self.frame_gates.append(Gate("adapter_kl", divergence.mean_kl, FAITHFUL_KL))
        return deltas

    def _turn_online(self, sides: Mapping[str, StoredSide], rotation: Rotation, tied: bool) -> None:
        """The online half of the rotation, in front of what runs beside linears too."""
        if self._as_stored:
            wrap_sides(self.reference, sides, branches=self._compensated)
        self.reference.rotate_online(rotation, tied=tied)

    def _report(
        self,
        used: int,
        measured: tuple[Divergence, float, float],
        ppl_reference: float,
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
        gates = [*self.frame_gates, *self._weight_gates(), *judge(self.terms, faithful, values, self.limits)]
        return ParityReport(
            used,
            divergence.max_abs,
            divergence.mean_kl,
            divergence.top1_agreement,
            ppl_engine,
            ppl_reference,
            gates,
            self.notes,
            self.weights,
        )

    def _weight_gates(self) -> list[Gate]:
        """The worst stored weight, and after rounding to nearest: no code that is not the nearest."""
        if not self.weights:
            return []
        worst = max(self.weights, key=lambda found: found.strain)
        self.notes.append(
            f"weights: furthest from the model is {worst.name}, {worst.distance:.3g} of {worst.allowed:.3g} allowed"
        )
        gates = [Gate("weights", worst.distance, worst.allowed)]
        if self.scheme.quantized and self.file.manifest["method"] == "rtn":
            gates.append(Gate("misplaced_codes", float(sum(found.misplaced for found in self.weights)), 0.0))
        if self.file.manifest.get("sparsity") is not None:
            gates.append(Gate("sparsity", float(sum(found.crowded for found in self.weights)), 0.0))
        return gates


def _loaded(file: EngineFile, threads: int | None) -> Engine:
    """The engine; ONNX Runtime looks up 4-bit floats."""
    if file.manifest.get("weights") != "nvfp4":
        return Engine(file, threads=threads, spin=False)
    with Float4File.open(file.path) as lookup:
        return Engine(lookup, threads=threads, spin=False)


def _same_model(file: EngineFile, model_dir: str | Path) -> None:
    """Raise InputError, naming both, if an engine was compiled from another model than the one in this directory."""
    recorded = str(file.manifest["provenance"]["model"])
    found = Checkpoint.open(model_dir).fingerprint()
    if recorded != found:
        raise InputError(
            f"{file.path} was compiled from the model {short(recorded)}, {model_dir} holds {short(found)}",
            hint="give the directory that the engine was compiled from",
        )


def _told(backend: str, scheme: Scheme) -> str:
    """What of an engine for TensorRT was compared."""
    if backend != "tensorrt":
        return "the engine's ONNX part was compared, run by ONNX Runtime: not a TensorRT plan"
    linears = ", its linears in the ONNX part, run by ONNX Runtime" if scheme.quantizes_activations else ""
    return f"the engine's TensorRT plan was compared{linears}"


def _text(text: str | Path | None, model_dir: str | Path) -> str:
    return parity_text() if text is None else text_of(Path(text), model_directory(model_dir))


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
