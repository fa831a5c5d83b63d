"""Every error that rqc raises on purpose: one line of cause and place, one line with the way out."""

from __future__ import annotations


class RqcError(Exception):
    """Base of rqc's errors. `message` names cause and place, `hint` the way out; the command line exits with
    `exit_code`."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UnsupportedModelError(RqcError):
    """The model's architecture, or a part of it, is one that rqc cannot compile exactly."""


class CheckpointError(RqcError):
    """The model directory is incomplete, damaged or in a form that is not read."""


class BasisMismatchError(RqcError):
    """Two artefacts were made in different rotated bases."""


class SchemeError(RqcError):
    """An unknown or impossible quantization scheme, bit width or group size."""


class RotationError(RqcError):
    """A rotation that is unknown or would change the model's function."""


class TargetError(RqcError):
    """The target cannot run what was asked for."""


class EngineFormatError(RqcError):
    """A file is not an engine, is damaged, or is of a newer format."""


class InputError(RqcError):
    """A prompt, token id, option or data file that cannot be used."""


class ResourceError(RqcError):
    """Memory, disk or another resource does not suffice."""


class ParityError(RqcError):
    """A parity gate failed."""

    exit_code = 1


class PassError(RqcError):
    """A graph pass that claims to be exact changed the function of the graph."""

    exit_code = 1
