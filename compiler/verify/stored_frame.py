"""The basis in which an engine's weights are, by what its manifest and its files say."""

from __future__ import annotations

from pathlib import Path

from rqc.compiler.adapters.bases import short
from rqc.models.algebra import dimensions
from rqc.models.description import Description
from rqc.models.learned import Learned
from rqc.models.rotation import Rotation
from rqc.models.rotation_file import ROTATION_FILE, RotationFile
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import BasisMismatchError


def stored_frame(file: EngineFile, description: Description) -> tuple[Rotation, bool]:
    """An engine's rotation and whether its tables are one. Raises BasisMismatchError if its basis is not what it
    says."""
    recorded = file.manifest["rotation"]
    rotation = Rotation.from_json(recorded, _learned(file))
    basis = rotation.basis(dimensions(description)) if rotation.sites else None
    if basis != recorded["basis"]:
        raise BasisMismatchError(
            f"{file.path} has basis {short(recorded['basis'])}, {rotation} of this model is {short(basis)}",
            hint="compile the engine again with this version of rqc",
        )
    return rotation, description.architecture.tied and file.manifest["tied"] != "untie"


def _learned(file: EngineFile) -> Learned | None:
    """The matrices in the engine, if it has some."""
    if not file.has(ROTATION_FILE):
        return None
    return RotationFile.of_bytes(file.read(ROTATION_FILE), Path(ROTATION_FILE)).rotation.learned
