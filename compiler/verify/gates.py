"""Gates: which measured values make an engine pass. Faithful ones always count, quality ones if the user sets them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rqc.compiler.scheme import Scheme
from rqc.compiler.verify.precision import PRECISIONS, Precision
from rqc.runtime.errors import InputError

FAITHFUL_KL = PRECISIONS["fp32"].kl
"""Nats per token up to which two models in float32 count as the same function."""
CODE_DISTANCE = 1.0
KERNEL_ROUNDING = 2e-3
"""Error of a linear that rounds its 8-bit input: a thousandth of the codes off by one gives 6e-4, no rounding 6e-3."""
PPL_FIDELITY = {8: 1.03, 6: 1.05, 4: 1.10}
"""By activation bits: perplexity of engine and fake quantization, larger over smaller; chaos of rounding moves it."""
CACHE = {"equal_cache_codes": 0.999, "cache_code_distance": CODE_DISTANCE, "attention_error": 1e-5}
"""Limits for a cache of codes: its codes, and each attention on equal codes."""
CACHE_ERROR = {"int8": 0.1, "int4": 0.25}
"""Limit for ‖x̂ − x‖ / ‖x‖ of a layer's keys, or values, in a window: a grid that does not fit is further off."""
CACHE_FIDELITY = {"int8": 1.01, "int4": 1.05}
"""As PPL_FIDELITY, by how the cache is kept."""
QUALITY = {
    "fp16": 1.005,
    "w8a16": 1.02,
    "w8a8": 1.02,
    "w6a6": 1.05,
    "w4a16": 1.25,
    "w4a8": 1.25,
    "fp8a16": 1.02,
    "nvfp4a16": 1.25,
}
"""ppl_engine / ppl_reference to be expected of a scheme; fp32 is gated by KL, the others are for the user to judge."""
AT_LEAST = ("top1_agreement", "equal_codes", "equal_cache_codes")
"""Values that must not be below their limit; all others must not be above it."""
MEASURES = ("ppl_ratio", "mean_kl", "max_abs", "top1_agreement", "ppl_engine")
"""What the user may gate for any scheme."""


def measure(name: str) -> str:
    """What a gate measures: its name without that of the adapter in front (`poet:mean_kl`)."""
    return name.rpartition(":")[2]


@dataclass(frozen=True)
class Gate:
    """One verdict. counts: whether it decides, or only informs. limit None: there is nothing to hold the value to."""

    name: str
    value: float
    limit: float | None
    counts: bool = True

    @property
    def passed(self) -> bool:
        """Whether the value is within its limit; a value that is no number never is."""
        if self.limit is None:
            return True
        return self.value >= self.limit if measure(self.name) in AT_LEAST else self.value <= self.limit

    def to_json(self) -> dict[str, object]:
        """The gate as it stands in `rqc verify --json`; values that JSON cannot hold become null."""
        value = self.value if math.isfinite(self.value) else None
        return {"name": self.name, "value": value, "limit": self.limit, "passed": self.passed}


@dataclass(frozen=True)
class Terms:
    """What the faithful gates of an engine depend on: scheme, float type, where 8-bit activations are rounded, in
    kernels out of sight or by the graph, and how its cache is kept."""

    scheme: Scheme
    precision: Precision
    in_kernels: bool
    cache: str = "float"

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Terms:
        """Those of the engine with that manifest."""
        scheme = Scheme.parse(str(manifest["scheme"]))
        precision = PRECISIONS[str(manifest.get("dtype") or "fp32")]
        return cls(scheme, precision, manifest["target"] == "onnx", str(manifest["kv_cache"]))

    @property
    def rounds(self) -> bool:
        """Whether the engine rounds what it computes, activations or its cache: that amplifies any last bit."""
        return self.scheme.quantizes_activations or self.cache != "float"

    def limits(self) -> dict[str, float]:
        """The gates that always count and have one limit (that of `weights` depends on the layer's grid)."""
        if not self.rounds:
            return {"mean_kl": self.precision.kl}
        bits = self.scheme.activation_bits
        codes = {"equal_codes": self.precision.codes[bits], "code_distance": CODE_DISTANCE} if bits < 16 else {}
        return {
            **codes,
            "linear_error": self.precision.linear,
            **({"kernel_rounding": KERNEL_ROUNDING} if bits == 8 and self.in_kernels else {}),
            **({**CACHE, "cache_error": CACHE_ERROR[self.cache]} if self.cache != "float" else {}),
            "ppl_fidelity": max(PPL_FIDELITY.get(bits, 1.0), CACHE_FIDELITY.get(self.cache, 1.0)),
        }


def check_limits(limits: Mapping[str, float], terms: Terms) -> None:
    """Refuse gates that no such engine has. Raises InputError naming the known ones."""
    scheme, faithful = terms.scheme, terms.limits()
    known = [*MEASURES, *(name for name in faithful if name not in MEASURES)]
    for name, limit in limits.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"gates of {scheme}: {', '.join(known)}"
            raise InputError(f"unknown gate {name!r} for scheme {scheme}", hint=hint)
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or math.isnan(limit):
            raise InputError(f"gate {name} has the limit {limit!r}", hint="a limit is a number")
        fixed = faithful.get(name)
        if fixed is not None and (limit < fixed if name in AT_LEAST else limit > fixed):
            raise InputError(
                f"gate {name}={limit:g} is looser than the fixed {fixed:g}", hint="it can only be tightened"
            )


def judge(
    terms: Terms, faithful: Mapping[str, float], measured: Mapping[str, float], limits: Mapping[str, float]
) -> list[Gate]:
    """Verdicts on the faithful values (the scheme's limits, or the user's tighter ones), then on what else is gated.

    `ppl_ratio` is always there: with the user's limit, which counts, or with the scheme's expectation, which does not.
    """
    fixed = terms.limits()
    gates = [Gate(name, faithful[name], limits.get(name, limit)) for name, limit in fixed.items()]
    expected = limits.get("ppl_ratio", QUALITY.get(terms.scheme.name))
    gates.append(Gate("ppl_ratio", measured["ppl_ratio"], expected, counts="ppl_ratio" in limits))
    extra = [name for name in limits if name not in fixed and name != "ppl_ratio"]
    return gates + [Gate(name, measured[name], limits[name]) for name in extra]
