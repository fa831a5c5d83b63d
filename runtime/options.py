"""What a caller may ask of a generation, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np

from rqc.runtime.backends.base import FloatArray, IntArray
from rqc.runtime.errors import InputError
from rqc.runtime.sampling import Sampler

Prompt: TypeAlias = "str | Sequence[int]"


@dataclass(frozen=True)
class GenerationOptions:
    """Sampling and ending of a generation. Raises InputError for values that make no sense.

    seed: one number for every row (a row gives the same tokens alone and in a batch), or one number per row.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | Sequence[int] | None = None
    stop: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        wanted = self.max_new_tokens
        _check(_is_int(wanted) and wanted >= 1, "max_new_tokens", self, "a whole number from 1")
        _check(_is_finite(self.temperature) and self.temperature >= 0, "temperature", self, "0 (greedy) or more")
        _check(_is_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", self, "above 0 and at most 1 (1: off)")
        _check(_is_int(self.top_k) and self.top_k >= 0, "top_k", self, "a whole number from 0 (0: off)")
        _check(_is_seed(self.seed), "seed", self, "a whole number from 0, or one per prompt")
        stops = self.stops
        _check(all(isinstance(s, str) and s for s in stops), "stop", self, "a text or a list of texts, none empty")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        if isinstance(self.stop, str):
            return (self.stop,)
        _check(isinstance(self.stop, Sequence), "stop", self, "a text or a list of texts")
        return tuple(self.stop)

    def samplers(self, rows: int) -> list[Sampler]:
        """One sampler per row."""
        seeds = list(self.seed) if isinstance(self.seed, Sequence) else [self.seed] * rows
        if len(seeds) != rows:
            raise InputError(f"{len(seeds)} seeds for {rows} prompts", hint="give one seed, or one per prompt")
        return [
            Sampler(
                temperature=float(self.temperature),
                top_k=int(self.top_k),
                top_p=float(self.top_p),
                seed=None if seed is None else int(seed),
            )
            for seed in seeds
        ]


def _check(holds: bool, name: str, options: GenerationOptions, wanted: str) -> None:
    if not holds:
        raise InputError(f"{name} is {getattr(options, name)!r}", hint=f"{name} is {wanted}")


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_seed(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(_is_int(seed) and seed >= 0 for seed in value)
    return _is_int(value) and value >= 0


def split_prompts(prompt: Any) -> tuple[list[Any], bool]:
    """The prompts of a call, and whether it was a single one.

    A text or a sequence of ids is one prompt; a sequence of texts or of id sequences is a batch.
    """
    if isinstance(prompt, str):
        return [prompt], True
    prompt = _listed(prompt)
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Sequence):
        raise InputError(f"a prompt is a text or a list of token ids, not {type(prompt).__name__}")
    if len(prompt) == 0:
        raise InputError("the prompt is empty", hint="give at least one token")
    if not any(isinstance(_listed(item), (str, Sequence)) for item in prompt):
        return [prompt], True
    return list(prompt), False


def _listed(value: Any) -> Any:
    """Arrays and tensors of any library as lists, everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def adapter_gates(adapter: Any, names: Sequence[str], rows: int) -> FloatArray | None:
    """How much of each adapter each row adds, float32 [rows, adapters] of 0 and 1; None where there are none.

    adapter: a name for all rows, one for each in a list, or None (also in the list) for the model alone. Raises
    InputError for a name that the engine does not know.
    """
    each = [adapter] * rows if adapter is None or isinstance(adapter, str) else _listed(adapter)
    if not isinstance(each, Sequence):
        raise InputError(f"adapter is {adapter!r}", hint="adapter is a name, or a list with one for each prompt")
    if len(each) != rows:
        raise InputError(f"{len(each)} adapters for {rows} prompts", hint="give one adapter, or one for each prompt")
    for name in each:
        if name is not None and name not in names:
            raise InputError(f"this engine has no adapter {name!r}", hint=_known(names))
    if not names:
        return None
    return np.asarray([[float(known == name) for known in names] for name in each], np.float32).reshape(rows, -1)


def _known(names: Sequence[str]) -> str:
    if not names:
        return "nothing in it can be switched: leave adapter out"
    return f"it has {', '.join(names)}; without adapter it is the model alone"


def checked_ids(ids: Any, vocab_size: int) -> IntArray:
    """Token ids as int64 [n]. Raises InputError for an empty list and for anything that is no id of the vocabulary."""
    ids = _listed(ids)
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise InputError(f"token ids come as a list of whole numbers, not {type(ids).__name__}")
    if len(ids) == 0:
        raise InputError("the prompt is empty", hint="give at least one token")
    for place, value in enumerate(ids):
        if not _is_int(value):
            raise InputError(f"token {place} of the prompt is {value!r}", hint="token ids are whole numbers")
        if not 0 <= value < vocab_size:
            raise InputError(f"token {place} of the prompt is {value}", hint=f"ids run from 0 to {vocab_size - 1}")
    return np.asarray([int(value) for value in ids], np.int64)
