"""The text that ships, to calibrate on and to compare on; a tokenizer; windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer

from rqc.runtime.errors import CheckpointError, InputError


def calibration_text() -> str:
    """The public-domain prose that a compile calibrates on unless told otherwise (about 240 kB; data/README.md)."""
    return _shipped("calibration.txt")


def parity_text() -> str:
    """The public-domain prose that parity is measured on (about 60 kB), disjoint from `calibration_text`."""
    return _shipped("parity.txt")


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer.json of a model directory, None where there is none. Raises CheckpointError if it is damaged."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path} is no tokenizer: {error}", hint="download it again") from error


def windows(ids: Sequence[int], length: int, count: int) -> list[list[int]]:
    """Cut token ids into at most `count` consecutive windows of `length`, without overlap.

    A text shorter than one window gives a single window of all of it; otherwise the tokens that do not fill a last
    window are left out, so all windows have one length. Raises InputError for a length or count below 1 or no ids.
    """
    if length < 1 or count < 1:
        raise InputError(
            f"{count} windows of {length} tokens: both must be at least 1", hint="ask for 1 or more of each"
        )
    if not ids:
        raise InputError("the text has no tokens to cut into windows", hint="name a longer text")
    length = min(length, len(ids))
    count = min(count, len(ids) // length)
    return [list(ids[start : start + length]) for start in range(0, count * length, length)]


def _shipped(name: str) -> str:
    return files("rqc.compiler").joinpath("data", name).read_text(encoding="utf-8")
