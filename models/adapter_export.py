"""An adapter that was trained in a rotated basis, written in the model's own: any LoRA loader can then use it."""

from __future__ import annotations

from pathlib import Path

from rqc.models.adapter import Adapter
from rqc.models.adapter_frames import to_plain
from rqc.models.adapter_names import torch_names
from rqc.models.adapter_write import write_adapter
from rqc.models.algebra import Read
from rqc.models.description import Description
from rqc.models.rotation import Rotation
from rqc.runtime.errors import BasisMismatchError


def export_plain(
    adapter: Adapter | str | Path, description: Description, read: Read, directory: str | Path, *, base_model: str = ""
) -> None:
    """Write an adapter as a plain PEFT directory for the model in its own basis.

    `read` gives the model's weights by name, as `to_plain` reads them. Pooled adapters become the LoRA that they are.
    Raises BasisMismatchError, with the reason, for an adapter that has no counterpart there: a LoftQ adapter, whose
    updates hold the quantization error of its base, and what `to_plain` refuses.
    """
    opened = adapter if isinstance(adapter, Adapter) else Adapter.open(adapter, description, read)
    if opened.basis is not None and opened.basis.residual:
        raise BasisMismatchError(
            f"{opened.directory} is a LoftQ adapter: it holds what quantization took from its base, and would put that "
            "on top of float weights that lost nothing",
            hint="compile it with --adapter, which makes its base again, or train with --init default",
        )
    rotation = Rotation.parse("none") if opened.basis is None else opened.basis.rotation
    deltas = {name: to_plain(name, delta, description, rotation, read) for name, delta in opened.deltas.items()}
    write_adapter(directory, deltas, None, torch_names=torch_names(description), base_model=base_model)
