"""What an adapter was trained on: the rotated basis, the base model and its grid. It travels as rqc_basis.json, with
rqc_rotation.safetensors beside it where the rotation was learned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rqc.models.grid import Grid
from rqc.models.learned import Learned
from rqc.models.rotation import Rotation
from rqc.models.rotation_file import RotationFile
from rqc.runtime.errors import InputError, RqcError

BASIS_FILE, ROTATION_FILE = "rqc_basis.json", "rqc_rotation.safetensors"
FORMAT, VERSION = "rqc-basis", 1
BASE_KINDS = ("float", "w4", "w3", "w2", "nf4")
GRID_KEYS = ("bits", "group_size", "symmetric", "clip")
"""What format 1 says of a grid: another key would make the file unreadable to those that know these."""
ADAPTER_TYPES = ("lora", "dora", "qalora", "qbara", "qahira")
POOLED = ("qalora", "qbara", "qahira")
"""Of those, the ones that pool inputs."""
MERGED_POOLS = ("qalora", "qahira")
"""Of those, the ones that become zero points: their pools are whole groups of the grid."""
_HINT = f"restore {BASIS_FILE} from where the adapter was trained, or train it again"


@dataclass(frozen=True)
class AdapterBasis:
    """The frame of an adapter.

    basis: the rotation's hash at the model's sizes, None without rotated sites. base: the fingerprint of the model
    directory (`Checkpoint.fingerprint`). grid: that of the quantized base, None for a float or NF4 base. activations:
    bits to which inputs were rounded in training, 16 for not at all. residual: the base was the quantized W − E, with E
    in rqc_residual.safetensors (LoftQ, arXiv 2310.08659). start: updates started from what the quantized W lacks, kept
    in rqc_start.safetensors (EoRA, LoftQ's first iteration).
    """

    rotation: Rotation
    basis: str | None
    base: str
    model_type: str
    grid: Grid | None = None
    base_kind: str = "float"
    activations: int = 16
    adapter_type: str = "lora"
    residual: bool = False
    start: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for an unknown kind of base or adapter."""
        if self.base_kind not in BASE_KINDS:
            raise InputError(f"unknown kind of base {self.base_kind!r}", hint=f"known: {', '.join(BASE_KINDS)}")
        if self.adapter_type not in ADAPTER_TYPES:
            raise InputError(f"unknown adapter type {self.adapter_type!r}", hint=f"known: {', '.join(ADAPTER_TYPES)}")
        if (self.basis is None) == bool(self.rotation.sites):
            told = "has no hash" if self.basis is None else "has a hash but rotates nothing"
            raise InputError(f"an adapter's basis ({self.rotation}) {told}", hint=_HINT)

    @property
    def mark(self) -> str:
        """What stands in the metadata of adapter_model.safetensors."""
        return self.basis or "none"

    def to_json(self) -> dict[str, Any]:
        """The contents of rqc_basis.json."""
        return {
            "format": FORMAT,
            "format_version": VERSION,
            "rotation": {**self.rotation.to_json(), "basis": self.basis},
            "base": {"fingerprint": self.base, "model_type": self.model_type},
            "grid": None if self.grid is None else {name: getattr(self.grid, name) for name in GRID_KEYS},
            "base_kind": self.base_kind,
            "activations": self.activations,
            "adapter_type": self.adapter_type,
            "residual": self.residual,
            "start": self.start,
        }

    def to_bytes(self) -> bytes:
        """rqc_basis.json itself; equal bases give equal bytes."""
        return (json.dumps(self.to_json(), indent=2, sort_keys=True) + "\n").encode()

    def rotation_bytes(self) -> bytes | None:
        """rqc_rotation.safetensors itself; None where nothing was learned."""
        return None if self.rotation.learned is None else RotationFile(self.rotation, self.base).to_bytes()

    @classmethod
    def from_json(cls, value: Mapping[str, Any], learned: Learned | None = None) -> AdapterBasis:
        """The inverse of `to_json`; learned matrices are the caller's to bring. Raises InputError for a damaged or
        newer one."""
        if value.get("format") != FORMAT or value.get("format_version") != VERSION:
            found = f"{value.get('format')!r} version {value.get('format_version')!r}"
            raise InputError(f"{BASIS_FILE} is of format {found}", hint=f"this rqc reads {FORMAT!r} version {VERSION}")
        try:
            return cls(
                rotation=Rotation.from_json(value["rotation"], learned),
                basis=_text(value["rotation"]["basis"], optional=True),
                base=str(_text(value["base"]["fingerprint"])),
                model_type=str(_text(value["base"]["model_type"])),
                grid=None if value["grid"] is None else Grid(**value["grid"]),
                base_kind=str(_text(value["base_kind"])),
                activations=int(value["activations"]),
                adapter_type=str(_text(value["adapter_type"])),
                residual=_flag(value["residual"]),
                start=_flag(value.get("start", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{BASIS_FILE} is damaged: {error!r}", hint=_HINT) from error
        except InputError:
            raise
        except RqcError as error:
            raise InputError(f"{BASIS_FILE} is damaged: {error.message}", hint=_HINT) from error

    @classmethod
    def read(cls, directory: Path) -> AdapterBasis | None:
        """The basis of an adapter directory, None where it has none. Raises InputError for a damaged one."""
        path = directory / BASIS_FILE
        if not path.exists():
            return None
        if not path.is_file():  # opening a named pipe would wait forever
            raise InputError(f"{path} is no regular file", hint=_HINT)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {error}", hint=_HINT) from error
        if not isinstance(value, dict):
            raise InputError(f"{path} is not a JSON object", hint=_HINT)
        stored = directory / ROTATION_FILE
        return cls.from_json(value, RotationFile.read(stored).rotation.learned if stored.exists() else None)


def _text(value: Any, *, optional: bool = False) -> str | None:
    if isinstance(value, str) or (optional and value is None):
        return value
    raise TypeError(f"{value!r} is no text")


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value
