"""An adapter's update in the model's own basis and in a rotated one: the same function, written in other coordinates.

The folds of `rqc.models.algebra` act on the factors: what multiplies W from the input side multiplies A, what does so
from the output side multiplies B, so rotate(merge(W, BA)) = merge(rotate(W), rotate(BA)). A DoRA's magnitudes hold row
norms, which an input rotation leaves alone and a norm gain changes by a known factor; a rotation of the outputs mixes
rows, and no magnitudes express that.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rqc.models.adapter_names import weight_reader
from rqc.models.algebra import Fold, Read, RotateIn, RotateOut, ScaleIn, ScaleOut, norm_folds, rotation_folds
from rqc.models.delta import Array, Delta, row_norms
from rqc.models.description import HEAD, Description, require_claim
from rqc.models.rotation import Rotation
from rqc.runtime.errors import BasisMismatchError


def to_frame(name: str, delta: Delta, description: Description, rotation: Rotation, read: Read) -> Delta:
    """The update of linear `name` as it is in the rotated basis, given in the model's own.

    `read` gives a norm's weight and, for a DoRA behind a norm, the linear's own weight. `description.architecture.tied`
    tells whether the head shares its table. Raises BasisMismatchError for a DoRA whose output rows the rotation mixes,
    RotationError for a site that the family refuses.
    """
    folds = frame_folds(name, description, rotation)
    _check_rows(name, delta, folds, rotation)
    a, b = delta.a, delta.b
    for fold in folds:
        if isinstance(fold, ScaleIn | RotateIn):
            a = fold.weight(a, 0, read)
        else:
            b = fold.weight(b, 0, read)
    if delta.magnitude is None:
        return replace(delta, a=a, b=b)
    plain, framed = _norms(name, delta, folds, description, read)
    return replace(delta, a=a, b=b, magnitude=_rescaled(delta.magnitude, framed, plain))


def to_plain(name: str, delta: Delta, description: Description, rotation: Rotation, read: Read) -> Delta:
    """The update of linear `name` in the model's own basis, given in the rotated one: the inverse of `to_frame`.

    Raises BasisMismatchError, with reason and way out, where there is none: a norm gain of 0, or a DoRA whose output
    rows the rotation mixed.
    """
    folds = frame_folds(name, description, rotation)
    _check_rows(name, delta, folds, rotation)
    a, b = delta.a, delta.b
    for fold in reversed(folds):
        match fold:
            case ScaleIn():
                a = a / _nonzero(name, fold, read)
            case RotateIn():
                a = fold.rotation.apply_inverse(a)
            case RotateOut():
                b = b.copy()
                b[fold.rows] = fold.rotation.apply_inverse(b[fold.rows].T).T
            case ScaleOut():
                b = b.copy()
                b[fold.rows] /= fold.factors[:, None]
    moved = replace(delta, a=a, b=b)
    if delta.magnitude is None:
        return moved
    plain, framed = _norms(name, moved, folds, description, read)
    return replace(moved, magnitude=_rescaled(delta.magnitude, plain, framed))


def frame_folds(name: str, description: Description, rotation: Rotation) -> list[Fold]:
    """What turns the weight `name` into that of the rotated model, in order. Norm gains move where R1 needs it."""
    own = replace(description, claims=() if name == HEAD else (require_claim(description, name),))
    ends = not description.architecture.tied
    folds = norm_folds(own, head=ends).get(name, []) if "r1" in rotation.sites else []
    return [*folds, *rotation_folds(own, rotation, ends=ends).get(name, [])]


def _check_rows(name: str, delta: Delta, folds: list[Fold], rotation: Rotation) -> None:
    """Raise BasisMismatchError for a DoRA on a linear whose output is rotated."""
    if delta.magnitude is not None and any(isinstance(fold, RotateOut) for fold in folds):
        raise BasisMismatchError(
            f"the DoRA on {name} cannot be carried between the model's own basis and {rotation}: its magnitudes belong "
            "to single outputs, and the rotation mixes these",
            hint="compile with the rotation that the adapter was trained in, or train it as plain LoRA",
        )


def _nonzero(name: str, fold: ScaleIn, read: Read) -> Array:
    """The gain that a fold multiplied with. Raises BasisMismatchError where a channel of it is 0."""
    gain = read(fold.norm) + fold.offset
    if (gain == 0).any():
        channels = np.flatnonzero(gain == 0)
        raise BasisMismatchError(
            f"the adapter on {name} has no counterpart in the model's own basis: {fold.norm} has a gain of 0 in "
            f"{len(channels)} channels (the first is {channels[0]}), which the rotated basis does not have",
            hint="compile with the rotation that the adapter was trained in",
        )
    return gain


def _norms(name: str, plain: Delta, folds: list[Fold], description: Description, read: Read) -> tuple[Array, Array]:
    """‖W + ΔW‖ per row in the model's own basis and in the rotated one, for an update in its own basis.

    Rotations of the input and signs of rows keep row norms, so only a gain counts, and without one W is not read.
    """
    gains = [fold for fold in folds if isinstance(fold, ScaleIn)]
    if not gains:
        ones = np.ones(plain.shape[0])
        return ones, ones
    updated = weight_reader(description, read)(name) + plain.dense()
    scaled = updated
    for fold in gains:
        scaled = fold.weight(scaled, 0, read)
    return row_norms(updated), row_norms(scaled)


def _rescaled(magnitude: Array, wanted: Array, given: Array) -> Array:
    """m · wanted / given: the magnitudes under which m / ‖·‖ is the same. A row of zeros keeps its magnitude."""
    return magnitude * np.divide(wanted, given, out=np.ones_like(given), where=given != 0)
