"""rotation.safetensors: the matrices of a learned rotation, the rotation that they belong to, and the model they fit.

Tensors "r1" [1, d, d] and "r2" [layers, h, h] in float32, row vectors (x ↦ x Q); one key of metadata holds the rest as
JSON. What `rqc rotate` writes holds how it was learned too; what travels in engines and adapters does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rqc.models.adapter_tensors import parse_tensors, tensor_bytes
from rqc.models.learned import LEARNABLE, Learned
from rqc.models.rotation import Rotation
from rqc.runtime.errors import InputError, RotationError, RqcError

KEY, VERSION = "rqc_rotation", 1
ROTATION_FILE = "rotation.safetensors"
"""Its name in an engine."""
_HINT = "give a file that rqc rotate has written, unchanged"


@dataclass(frozen=True)
class RotationFile:
    """A rotation with learned matrices. model: the fingerprint of the model directory that they were learned for
    (`Checkpoint.fingerprint`). training: settings and losses, if they are said. path: where it was read."""

    rotation: Rotation
    model: str
    training: Mapping[str, Any] | None = field(default=None, compare=False)
    path: Path | None = field(default=None, compare=False)

    def to_bytes(self) -> bytes:
        """The file; equal values give equal bytes."""
        learned = self.rotation.learned
        if learned is None:
            raise RotationError(f"a file of {self.rotation}, of which nothing was learned")
        said: dict[str, Any] = {"version": VERSION, "rotation": self.rotation.to_json(), "model": self.model}
        if self.training is not None:
            said["training"] = dict(self.training)
        tensors = {site: stack.astype(np.float64) for site, stack in learned.matrices.items()}
        return tensor_bytes(tensors, {KEY: json.dumps(said, sort_keys=True)})

    @classmethod
    def read(cls, path: str | Path) -> RotationFile:
        """The file at `path`. Raises InputError for one that cannot be read or is none, RotationError for matrices that
        are not orthogonal."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path} is no file", hint="rqc rotate MODEL_DIR -o rotation.safetensors writes one")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}", hint=_HINT) from error
        return cls.of_bytes(content, path)

    @classmethod
    def of_bytes(cls, content: bytes, path: Path) -> RotationFile:
        """The same for its bytes, which errors call `path`."""
        tensors, metadata = parse_tensors(content, path)
        if KEY not in metadata:
            raise InputError(
                f"{path} holds no rotation", hint="rqc rotate MODEL_DIR -o rotation.safetensors writes one"
            )
        try:
            said = json.loads(metadata[KEY])
            if said["version"] != VERSION:
                raise InputError(f"{path} is of version {said['version']!r}", hint=f"this rqc reads version {VERSION}")
            if not tensors or set(tensors) - set(LEARNABLE):
                raise RotationError(f"tensors {sorted(tensors)} in place of {' and '.join(LEARNABLE)}", hint=_HINT)
            learned = Learned({site: stack.astype(np.float32) for site, stack in tensors.items()})
            rotation = Rotation.from_json(said["rotation"], learned)
            if not isinstance(said["model"], str):
                raise TypeError("model is no text")
            return cls(rotation, said["model"], said.get("training"), path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged: {error!r}", hint=_HINT) from error
        except RqcError as error:
            raise type(error)(f"{path}: {error.message.removeprefix(f'{path}: ')}", hint=error.hint) from error

    def check_model(self, fingerprint: str) -> None:
        """Raise RotationError for another model than the one it was learned for."""
        if self.model != fingerprint:
            raise RotationError(
                f"{self.path or 'the rotation'} was learned for the model {self.model[:12]}, this one is "
                f"{fingerprint[:12]}",
                hint="give the model directory that it was learned for, unchanged, or learn it again with rqc rotate",
            )
