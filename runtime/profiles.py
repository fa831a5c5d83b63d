"""The shapes that a TensorRT plan is built for: `--profile batch/prompt/context`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rqc.runtime.errors import TargetError

HINT = "batch/prompt/context as min:opt:max or the largest alone, such as 1:1:4/1:128:512/2048 or 1/512/2048"
DEFAULT_PROMPT, DEFAULT_CONTEXT = (1, 128, 512), 2048
Range = tuple[int, int, int]


@dataclass(frozen=True)
class Profile:
    """batch: rows; prompt: tokens of one piece of a prompt, longer ones are read in pieces; each (min, opt, max).

    context: tokens that a row's cache holds. It is one number: TensorRT updates caches of fixed length in place.
    """

    batch: Range
    prompt: Range
    context: int

    @classmethod
    def of_model(cls, context_length: int) -> Profile:
        """One row, pieces of up to 512 tokens, a cache of up to 2048."""
        context = min(DEFAULT_CONTEXT, context_length)
        least, usual, most = (min(size, context) for size in DEFAULT_PROMPT)
        return cls((1, 1, 1), (least, usual, most), context)

    @classmethod
    def parse(cls, text: str) -> Profile:
        """A profile from the words of the command line. Raises TargetError."""
        parts = [re.findall(r"\d+", part) for part in text.split("/")]
        if not re.fullmatch(r"\d+(:\d+:\d+)?/\d+(:\d+:\d+)?/\d+(:\d+:\d+)?", text) or len(parts) != 3:
            raise TargetError(f"--profile {text!r} is no profile", hint=HINT)
        batch, prompt, context = ([int(size) for size in part] for part in parts)
        return cls(_range(batch), _range(prompt), context[-1])

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Profile:
        """The profile of a manifest, which has been checked."""
        least, usual, most = value["batch"]
        first, second, last = value["prompt"]
        return cls((least, usual, most), (first, second, last), value["context"])

    def __post_init__(self) -> None:
        """Raises TargetError for ranges that no row fits in."""
        for name, (least, usual, most) in (("batch", self.batch), ("prompt", self.prompt)):
            if not 1 == least <= usual <= most:  # prompts are read row by row, and end in a piece of any length
                raise TargetError(f"the profile's {name} is {least}:{usual}:{most}", hint=f"{HINT}; ranges begin at 1")
        if self.prompt[2] > self.context:
            raise TargetError(
                f"the profile's prompt of {self.prompt[2]} tokens is longer than its context of {self.context}",
                hint="longer prompts are read in pieces: make it shorter",
            )

    def check(self, context_length: int) -> None:
        """Raise TargetError for a cache that is longer than the model's context."""
        if self.context > context_length:
            raise TargetError(
                f"the profile's context is {self.context}, the model's {context_length}",
                hint=f"--profile {self} with a context of at most {context_length}",
            )

    def to_json(self) -> dict[str, Any]:
        """The profile as it stands in a manifest."""
        return {"batch": list(self.batch), "prompt": list(self.prompt), "context": self.context}

    def __str__(self) -> str:
        batch, prompt = (":".join(map(str, sizes)) for sizes in (self.batch, self.prompt))
        return f"{batch}/{prompt}/{self.context}"


def _range(sizes: list[int]) -> Range:
    """(min, opt, max) of three numbers, or of the largest alone."""
    if len(sizes) == 1:
        return 1, sizes[0], sizes[0]
    least, usual, most = sizes
    return least, usual, most
