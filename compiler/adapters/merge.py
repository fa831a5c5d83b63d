"""What a compile does with its adapters: passes in front of the frame, behind it and behind the grid."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rqc.models.adapter import Adapter
from rqc.models.adapter_frames import to_frame
from rqc.models.algebra import Read
from rqc.models.delta import Delta, composed
from rqc.models.description import Description
from rqc.models.rotation import Rotation
from rqc.passes.adapters import FoldAdapter
from rqc.passes.base import Pass
from rqc.passes.branches import AddBranches
from rqc.passes.switches import SwitchBranches
from rqc.passes.zero_points import MergeZeroPoints

FOLD, ZERO_POINT, BRANCH = "fold", "zero-point", "branch"
Deltas = Mapping[str, Delta]


@dataclass(frozen=True, eq=False)
class AdapterPart:
    """One of the adapters. plain: `deltas` are in the model's own basis, otherwise in that of the engine's frame.

    name: what it is chosen by at run time, None where it is merged for good.
    """

    adapter: Adapter
    deltas: Deltas
    plain: bool
    name: str | None = None


@dataclass(frozen=True, eq=False)
class Merge:
    """What a compile does with adapters: their sum is merged, or each can be switched on if they have names.

    how: fold, zero-point or branch. Linears that no grid rounds (a router, the head under an adapter of its own) take
    their part by folding, whatever `how` is.
    """

    parts: tuple[AdapterPart, ...]
    how: str
    description: Description
    read: Read
    _frames: dict[Rotation, tuple[Deltas, ...]] = field(default_factory=dict)
    _sums: dict[Rotation, Deltas] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """What the adapters are chosen by at run time, in order; none where they are merged for good."""
        return tuple(part.name for part in self.parts if part.name is not None)

    @cached_property
    def weights(self) -> Mapping[str, Sequence[Delta]]:
        """The updates of every weight that has some, in the order of the adapters."""
        found: dict[str, list[Delta]] = {}
        for part in self.parts:
            for name, delta in part.deltas.items():
                found.setdefault(name, []).append(delta)
        return found

    def is_beside(self, name: str) -> bool:
        """Whether a weight is one that a grid rounds, so that something can run beside it."""
        claim = self.description.by_weight.get(name)
        return claim is not None and claim.quantized

    def _is_folded(self, name: str) -> bool:
        return self.how == FOLD or not self.is_beside(name)

    @cached_property
    def folded(self) -> Mapping[str, Sequence[Delta]]:
        """What is added to float weights."""
        return {name: deltas for name, deltas in self.weights.items() if self._is_folded(name)}

    def before_frame(self) -> list[Pass]:
        """Passes in the model's own basis."""
        return self._folds(plain=True)

    def after_frame(self) -> list[Pass]:
        """Passes in the engine's basis, before the grid: LoftQ's base is the grid of W − E."""
        residuals = [part.adapter.residual for part in self.parts if part.adapter.residual]
        return [*(FoldAdapter(residual, -1.0) for residual in residuals), *self._folds(plain=False)]

    def after_grid(self, rotation: Rotation) -> list[Pass]:
        """Passes behind the grid; `rotation` is the frame, into which a plain adapter's branches are carried."""
        deltas = self.in_frame(rotation)
        if not deltas:
            return []
        return [MergeZeroPoints(deltas) if self.how == ZERO_POINT else AddBranches(deltas)]

    def after_packing(self) -> list[Pass]:
        """Passes behind the packing of side paths: the switch of adapters that have names."""
        if not self.names:
            return []
        owners = {
            name: [index for index, part in enumerate(self.parts) if name in part.deltas for _ in _ranks(part, name)]
            for name in self.weights
        }
        return [SwitchBranches(self.names, owners)]

    def in_frame(self, rotation: Rotation) -> Deltas:
        """What goes into zero points or branches, summed, in the engine's basis; the same values each time."""
        if rotation not in self._sums:
            parts = self.parts_in_frame(rotation)
            names = [name for name in self.weights if not self._is_folded(name)]
            self._sums[rotation] = {
                name: composed([deltas[name] for deltas in parts if name in deltas]) for name in names
            }
        return self._sums[rotation]

    def parts_in_frame(self, rotation: Rotation) -> Sequence[Deltas]:
        """The same of each adapter by itself."""
        if rotation not in self._frames:
            self._frames[rotation] = tuple(
                {name: self._carried(name, part, rotation) for name in part.deltas if not self._is_folded(name)}
                for part in self.parts
            )
        return self._frames[rotation]

    def record(self, survival: Mapping[str, float]) -> dict[str, Any]:
        """What the manifest says of the adapters; survival is that of the linear in which least is left."""
        merged = {"merge": self.how, "survival": min(survival.values(), default=None)}
        if len(self.parts) == 1 and not self.names:
            return {**_said(self.parts[0]), **merged}
        each = [_said(part) for part in self.parts]
        kinds = dict.fromkeys(one["kind"] for one in each)
        prints = "+".join(one["fingerprint"] for one in each)
        return {
            "kind": "+".join(kinds),
            **merged,
            "modules": sorted({module for one in each for module in one["modules"]}),
            "linears": len(self.weights),
            "rank": max((sum(delta.rank for delta in deltas) for deltas in self.weights.values()), default=0),
            "fingerprint": hashlib.sha256(prints.encode()).hexdigest(),
            "basis": next((one["basis"] for one in each if one["basis"] is not None), None),
            "adapters": each,
            **({"names": list(self.names)} if self.names else {}),
        }

    def _folds(self, *, plain: bool) -> list[Pass]:
        parts = [part for part in self.parts if part.plain == plain]
        folded = [{name: delta for name, delta in part.deltas.items() if self._is_folded(name)} for part in parts]
        return [FoldAdapter(deltas) for deltas in folded if deltas]

    def _carried(self, name: str, part: AdapterPart, rotation: Rotation) -> Delta:
        delta = part.deltas[name]
        if not part.plain or not rotation.sites:
            return delta
        return to_frame(name, delta, self.description, rotation, self.read)


def _ranks(part: AdapterPart, name: str) -> range:
    return range(part.deltas[name].rank)


def _said(part: AdapterPart) -> dict[str, Any]:
    """What the manifest says of one adapter."""
    adapter = part.adapter
    return {
        **({} if part.name is None else {"name": part.name}),
        "kind": adapter.kind,
        "modules": sorted({name.split(".", 3)[-1].removesuffix(".weight") for name in part.deltas}),
        "linears": len(part.deltas),
        "rank": max((delta.rank for delta in part.deltas.values()), default=0),
        "fingerprint": adapter.fingerprint,
        "basis": None if adapter.basis is None else adapter.basis.basis,
    }
