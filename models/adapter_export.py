"""An adapter that was trained in a rotated basis, in the model's own: any LoRA loader can then use it."""

from __future__ import annotations

from collections.abc import Mapping

from rqc.models.adapter_frames import to_plain
from rqc.models.algebra import Read
from rqc.models.delta import Delta, without
from rqc.models.description import Description
from rqc.models.rotation import Rotation


def plain_deltas(
    deltas: Mapping[str, Delta],
    repaired: Mapping[str, Delta],
    description: Description,
    rotation: Rotation,
    read: Read,
) -> dict[str, Delta]:
    """Updates in the model's own basis, for its float weights; `read` gives these by name, as `to_plain` reads them.

    repaired: what float weights have already (`Adapter.repaired`). Raises BasisMismatchError, with the reason, for what
    `to_plain` refuses.
    """
    return {
        name: to_plain(name, without(delta, repaired.get(name)), description, rotation, read)
        for name, delta in deltas.items()
    }
