"""Every error that rqc raises on purpose: one line of cause and place, one line with the way out."""

from __future__ import annotations


class RqcError(Exception):
    """Base of rqc's errors. `message` names cause and place, `hint` the way out; the command line exits with
    `exit_code`."""

    exit_code = 2
    way_out = "rqc --help"
    """The hint of errors that have no better one."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.way_out


class UnsupportedModelError(RqcError):
    """The model's architecture, or a part of it, is one that rqc cannot compile exactly."""

    way_out = "rqc compiles only what it can compile exactly: choose another model"


class CheckpointError(RqcError):
    """The model directory is incomplete, damaged or in a form that is not read."""

    way_out = "download the model again"


class BasisMismatchError(RqcError):
    """Two artefacts were made in different rotated bases."""


class SchemeError(RqcError):
    """An unknown or impossible quantization scheme, bit width or group size."""


class RotationError(RqcError):
    """A rotation that is unknown or would change the model's function."""

    way_out = "rotate less, or --rotate none"


class TargetError(RqcError):
    """The target cannot run what was asked for."""


class EngineFormatError(RqcError):
    """A file is not an engine, is damaged, or is of a newer format."""

    way_out = "copy or compile the engine again"


class InputError(RqcError):
    """A prompt, token id, option or data file that cannot be used."""

    way_out = "see the command's --help"


class ResourceError(RqcError):
    """Memory, disk or another resource does not suffice."""


class TrainingError(RqcError):
    """A training that came to no good end: its loss or gradient is no number."""

    exit_code = 1


class ParityError(RqcError):
    """A parity gate failed."""

    exit_code = 1


class PassError(RqcError):
    """A graph pass that claims to be exact changed the function of the graph."""

    way_out = "this is a fault of rqc: please report it with the model's config.json"
    exit_code = 1
