"""A model in its own basis whose linears are rounded in a rotated one, through which gradients reach the rotation.

In floats R1 and R2 change nothing, wherever they stand; what they change is the rounding. So the stream stays as it is,
and rounding goes into the rotated basis and back: with weights in floats a linear computes

    y = round(x Q) Qᵀ Wᵀ + b,

and with rounded weights y = round(x Q) round(Pᵀ W Q)ᵀ Pᵀ + b, P being what its output is rotated by. As functions of Q
and P these are what an engine with folded rotations computes, to the last product; SpinQuant (arXiv 2405.16406) states
the objective. The frozen rotations that stay in the graph, R3 and R4, go along.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rqc.models.algebra import signed
from rqc.models.description import Claim, Description
from rqc.models.families import FFN, HEADS, RESIDUAL
from rqc.models.grid import Grid
from rqc.models.online import TorchRotation, before_attention
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.models.straight_through import round_weight

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Roundings:
    """What an engine rounds: inputs, by the weight that reads them; weights (None: floats) by their grid; keys and
    values [..., head size] (None: floats), keys less their mean over all tokens where they are centred."""

    inputs: Mapping[str, Rounding]
    weights: Grid | None = None
    cache: Rounding | None = None
    centred: bool = False


class Basis(nn.Module):
    """The matrices of a model's rotations: R1 and R2 as parameters where they are sites, R3 and R4 as they are.

    dtype: what R1 and R2 are held in; products are computed in the type of what is rotated.
    """

    def __init__(self, rotation: Rotation, description: Description, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.rounds = True
        a = description.architecture
        self.learned = nn.ParameterDict()
        if (r1 := rotation.r1(a.hidden_size)) is not None:
            self.learned["r1"] = nn.Parameter(torch.from_numpy(r1.dense()[None]).to(dtype))
        heads = [rotation.r2(a.head_dim, layer) for layer in range(a.layers)]
        stack = [torch.from_numpy(r2.dense()) for r2 in heads if r2 is not None]
        if stack:
            self.learned["r2"] = nn.Parameter(torch.stack(stack).to(dtype))
        self.fixed = nn.ModuleDict()
        for n in description.ffn_sizes():
            if (r4 := rotation.r4(n)) is not None:
                q = signed(r4, rotation.r4_signs(n))
                self.fixed[f"r4 {n}"] = TorchRotation(q, dtype=dtype)
                self.fixed[f"r4 {n} back"] = TorchRotation(q, inverse=True, dtype=dtype)
        if (r3 := rotation.r3(a.head_dim)) is not None:
            self.fixed["r3"] = TorchRotation(r3, dtype=dtype)
            self.fixed["r3 back"] = TorchRotation(r3, inverse=True, dtype=dtype)

    @contextmanager
    def in_floats(self) -> Iterator[None]:
        """Within, models that round in this basis do not: they compute what they did before."""
        self.rounds = False
        try:
            yield
        finally:
            self.rounds = True

    def turn(self, x: Tensor, space: str, layer: int, *, back: bool = False) -> Tensor:
        """x Q (x Qᵀ if `back`) on the last axis, for x in a space: residual, heads (any number of them), ffn, keys."""
        if space in (FFN, "keys"):
            name = f"r4 {x.shape[-1]}" if space == FFN else "r3"
            return self.fixed[name + " back" * back](x) if name in self.fixed else x
        name = {RESIDUAL: "r1", HEADS: "r2"}[space]
        if name not in self.learned:
            return x
        stack = self.learned[name]
        q = (stack[0] if name == "r1" else stack[layer]).to(x.dtype)
        turned: Tensor = x.reshape(*x.shape[:-1], -1, len(q)) @ (q.mT if back else q)
        return turned.reshape(x.shape)


def turn_linears(reference: Reference, basis: Basis, roundings: Roundings) -> None:
    """Let the blocks' linears of a reference, and its attention, round in a basis. Its norms must be folded where the
    basis has R1. The model's own parameters are frozen."""
    reference.model.requires_grad_(False)
    claims: dict[str, list[Claim]] = defaultdict(list)
    for claim in reference.description.claims:
        if claim.weight in roundings.inputs:
            claims[reference.parts[claim.weight].path].append(claim)
    reader = _Reader(basis)
    for path, own in claims.items():
        linear = reference.model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        rounding = roundings.inputs[own[0].weight]
        if roundings.weights is None:
            linear.register_forward_pre_hook(
                lambda _, args, claim=own[0], rounding=rounding: (reader.back(args[0], claim, rounding), *args[1:])
            )
        else:
            turned = TurnedLinear(linear, own, reference, reader, rounding, roundings.weights)
            reference.model.set_submodule(path, turned)
    if roundings.cache is not None:
        before_attention(reference.model, lambda layer, q, k, v: (q, *_cached(basis, layer, k, v, roundings)))


def _cached(basis: Basis, layer: int, k: Tensor, v: Tensor, roundings: Roundings) -> tuple[Tensor, Tensor]:
    """Keys and values [batch, heads, tokens, size] rounded where a cache holds them: behind R3, and under R2."""
    rounding = roundings.cache
    if rounding is None or not basis.rounds:
        return k, v
    turned = basis.turn(k, "keys", layer)
    mean = turned.mean((0, 2), keepdim=True) if roundings.centred else torch.zeros_like(turned[:1, :, :1])
    keys = basis.turn(rounding(turned - mean) + mean, "keys", layer, back=True)
    return keys, basis.turn(rounding(basis.turn(v, HEADS, layer)), HEADS, layer, back=True)


class _Reader:
    """What linears read, once for all that read the same tensor one after the other (q, k, v; gate, up)."""

    def __init__(self, basis: Basis) -> None:
        self.basis = basis
        self._last: tuple[Tensor, Rounding, bool, Tensor] | None = None

    def turned(self, x: Tensor, claim: Claim, rounding: Rounding) -> Tensor:
        """round(x Q)."""
        return self._once(x, claim, rounding, back=False)

    def back(self, x: Tensor, claim: Claim, rounding: Rounding) -> Tensor:
        """round(x Q) Qᵀ."""
        return self._once(x, claim, rounding, back=True)

    def _once(self, x: Tensor, claim: Claim, rounding: Rounding, *, back: bool) -> Tensor:
        if not self.basis.rounds:
            return x
        last = self._last
        if last is not None and last[0] is x and last[1] is rounding and last[2] == back:
            return last[3]
        space, layer = claim.linear.reads, claim.layer
        value = rounding(self.basis.turn(x, space, layer))
        if back:
            value = self.basis.turn(value, space, layer, back=True)
        self._last = (x, rounding, back, value)
        return value


class TurnedLinear(nn.Module):
    """A linear whose weight is rounded in the rotated basis too.

    R4's signs on the rows of up_proj are left out: on a grid that is as wide to both sides they change nothing, on
    others only which side the one code more is on.
    """

    def __init__(
        self,
        linear: nn.Linear,
        claims: list[Claim],
        reference: Reference,
        reader: _Reader,
        rounding: Rounding,
        grid: Grid,
    ) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._reader, self._claim, self._rounding, self._grid = reader, claims[0], rounding, grid
        self._rows: list[tuple[slice, str]] = []
        for claim in claims:
            start = reference.parts[claim.weight].rows.start
            for kind, rows in reference.description.segments(claim).items():
                if space := {RESIDUAL: RESIDUAL, "value": HEADS}.get(kind):
                    self._rows.append((slice(start + rows.start, start + rows.stop), space))

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] for x [..., in]."""
        basis, claim = self._reader.basis, self._claim
        if not basis.rounds:
            return nn.functional.linear(x, self.weight, self.bias)
        weight = basis.turn(self.weight, claim.linear.reads, claim.layer)
        weight = round_weight(self._through(weight.mT, back=False).mT, self._grid)
        y = nn.functional.linear(self._reader.turned(x, claim, self._rounding), weight)
        y = self._through(y, back=True)
        return y if self.bias is None else y + self.bias

    def _through(self, y: Tensor, *, back: bool) -> Tensor:
        """Output channels (the last axis) into the basis or `back`."""
        if not self._rows:
            return y
        pieces, end = [], 0
        for rows, space in self._rows:
            pieces += [
                y[..., end : rows.start],
                self._reader.basis.turn(y[..., rows], space, self._claim.layer, back=back),
            ]
            end = rows.stop
        return torch.cat([*pieces, y[..., end:]], -1)
