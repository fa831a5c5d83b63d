"""Rotations as values: which sites of a model are rotated, by which matrices, and the hash that names that basis.

Row vectors: a rotation Q takes an activation x to x Q. The sites are SpinQuant's (Liu et al., 2024): r1 the residual
stream, r2 the value heads, r3 queries and keys after RoPE, r4 the input of the down projection. r1 and r2 are folded
into weights and carry random signs; r3 and r4 stay in the graph as plain Hadamards, since signs would cost time there.
Those of r4 are free in the up projection: `Rotation.r4_signs`. The matrices of r1 and r2 may be learned ones instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from rqc.models.hadamard import constructible, hadamard, hartley
from rqc.models.learned import Learned
from rqc.runtime.errors import BasisMismatchError, RotationError

Array = npt.NDArray[np.float64]

SITES = ("r1", "r2", "r3", "r4")
KINDS = ("full", "block")
_CHUNK = 1 << 20  # elements that a fold mixes at a time: 8 MiB of float64
LARGEST_BLOCK = 256  # 16 x 16: entries 1/4, exact in any float; the kernels that exist for GPUs take blocks up to 1024


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """Q = diag(signs) (I_repeat kron F_1 kron F_2 ...): orthogonal [n, n], kept as its small factors.

    factors: orthogonal float64 [a_k, a_k]; signs: float64 [n] of +-1, or None for all ones. Raises RotationError if the
    shapes disagree.
    """

    factors: tuple[Array, ...]
    repeat: int = 1
    signs: Array | None = None

    def __post_init__(self) -> None:
        if self.repeat < 1 or any(f.ndim != 2 or f.shape[0] != f.shape[1] for f in self.factors):
            shapes = [f.shape for f in self.factors]
            raise RotationError(f"a rotation of factors {shapes}, {self.repeat} times", hint="square, 1 or more times")
        if self.signs is not None and self.signs.shape != (self.n,):
            raise RotationError(f"{self.signs.shape} signs for a rotation of order {self.n}", hint="one a channel")

    @property
    def n(self) -> int:
        """Order of Q."""
        order = self.repeat
        for factor in self.factors:
            order *= len(factor)
        return order

    def apply(self, x: npt.ArrayLike) -> Array:
        """x Q on the last axis: [..., n] -> float64 [..., n]."""
        y = self._channels(x)
        return self._mix(y if self.signs is None else y * self.signs, self.factors)

    def apply_inverse(self, x: npt.ArrayLike) -> Array:
        """x Q^T on the last axis: [..., n] -> float64 [..., n]."""
        y = self._mix(self._channels(x), tuple(f.T for f in self.factors))
        return y if self.signs is None else y * self.signs

    def dense(self) -> Array:
        """Q itself, float64 [n, n]: for tests and for small orders."""
        return self.apply(np.eye(self.n))

    def with_repeat(self, m: int) -> Orthogonal:
        """I_m kron Q: the same rotation on each of m heads side by side."""
        return replace(self, repeat=m * self.repeat, signs=None if self.signs is None else np.tile(self.signs, m))

    def _channels(self, x: npt.ArrayLike) -> Array:
        y = np.asarray(x, np.float64)
        if y.ndim < 1 or y.shape[-1] != self.n:
            raise RotationError(f"a rotation of order {self.n} met shape {y.shape}", hint="the last axis is rotated")
        return y

    def _mix(self, x: Array, factors: Sequence[Array]) -> Array:
        """x (I kron F_1 kron F_2 ...), in pieces that stay in the cache."""
        block = self.n // self.repeat
        flat = x.reshape(-1, block)
        out = np.empty_like(flat)
        step = max(1, _CHUNK // block)
        for start in range(0, len(flat), step):
            out[start : start + step] = _mixed(flat[start : start + step], factors)
        return out.reshape(x.shape)


def _mixed(x: Array, factors: Sequence[Array]) -> Array:
    """x (F_1 kron F_2 ...) for x [m, n]: X [a, right] becomes F^T X, one matmul over all columns; right ends at 1."""
    rows, right = x.shape
    y = x
    for factor in factors:
        order = len(factor)
        right //= order
        if right == 1:
            y = y.reshape(-1, order) @ factor
        else:
            columns = y.reshape(-1, order, right).transpose(0, 2, 1).reshape(-1, order)
            y = (columns @ factor).reshape(-1, right, order).transpose(0, 2, 1)
    return y.reshape(rows, -1)


@dataclass(frozen=True)
class Rotation:
    """The rotated sites of a model and how their matrices are made. Equal values give equal matrices, in any process.

    sites: a subset of SITES. hadamard: 'full' mixes all n channels of a site, 'block' those in blocks of a power of two
    up to 256. seed: selects the signs of r1, r2 and r4. learned: matrices in place of those of r1 and r2; what is there
    of other sites is left out. Raises RotationError for anything else.
    """

    sites: frozenset[str]
    hadamard: str = "full"
    seed: int = 0
    learned: Learned | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.sites) - set(SITES)):
            raise RotationError(f"unknown rotation {', '.join(map(repr, unknown))}", hint=f"none or {', '.join(SITES)}")
        if self.hadamard not in KINDS:
            raise RotationError(f"unknown kind of Hadamard {self.hadamard!r}", hint=f"known: {', '.join(KINDS)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise RotationError(f"bad rotation seed {self.seed!r}", hint="an integer, 0 or more")
        if self.learned is not None:
            object.__setattr__(self, "learned", self.learned.only(frozenset(self.sites)))

    def r1(self, n: int) -> Orthogonal | None:
        """The residual stream's rotation at hidden size n, with random signs or learned; None if r1 is off."""
        if (matrix := self._learned("r1", n)) is not None:
            return Orthogonal((matrix,))
        return _orthogonal("r1", self.hadamard, n, self.seed) if "r1" in self.sites else None

    def r2(self, d: int, layer: int) -> Orthogonal | None:
        """The rotation of one value head of size d: with random signs, the same in every layer, or learned for this
        one; None if r2 is off."""
        if (matrix := self._learned("r2", d, layer)) is not None:
            return Orthogonal((matrix,))
        return _orthogonal("r2", self.hadamard, d, self.seed) if "r2" in self.sites else None

    def r3(self, d: int) -> Orthogonal | None:
        """The rotation of one query or key head of size d after RoPE, without signs; None if r3 is off."""
        return _orthogonal("r3", self.hadamard, d, None) if "r3" in self.sites else None

    def r4(self, n: int) -> Orthogonal | None:
        """The rotation before a down projection with n inputs, without signs; None if r4 is off."""
        return _orthogonal("r4", self.hadamard, n, None) if "r4" in self.sites else None

    def r4_signs(self, n: int) -> Array:
        """Random signs s, float64 [n] of +-1, for the rows of up in front of `r4(n)`; all ones if r4 is off.

        The product act(gate) * up lets them through: up <- diag(s) up gives the whole rotation diag(s) Q, which
        down <- down diag(s) Q undoes, at no cost in the graph.
        """
        return _signs("r4", n, self.seed) if "r4" in self.sites else np.ones(n)

    def basis(self, dims: Mapping[str, int | Sequence[int]]) -> str:
        """sha256 (hex) of the matrices of the active sites at their orders, e.g. {"r1": 576, "r2": 64, "r4": [1536]}.

        Two artefacts fit together if and only if it agrees. Orders of inactive sites don't count, nor do the sequence
        and the multiplicity of orders. Raises RotationError if an active site's order is missing.
        """
        digest = hashlib.sha256(b"rqc rotation 1")
        for site in sorted(self.sites):
            if site not in dims:
                raise RotationError(f"no order given for the rotation {site}", hint="give every rotated site's size")
            sizes = dims[site]
            if self.learned is not None and site in self.learned.sites:
                digest.update(f"{site} learned {self.learned.hashes[site]}".encode())
                continue
            for n in sorted({sizes} if isinstance(sizes, int) else set(sizes)):
                signs = _signs(site, n, self.seed) if site != "r3" else np.ones(n)
                digest.update(f"{site} {n}".encode())
                _update(digest, _orthogonal(site, self.hadamard, n, None), signs)
        return digest.hexdigest()

    @staticmethod
    def parse(text: str | Iterable[str], hadamard: str = "full", seed: int = 0) -> Rotation:
        """From "none", "r1,r4" or a list of names. RotationError for unknown and repeated names."""
        names = [name.strip() for name in text.split(",")] if isinstance(text, str) else list(text)
        if names == ["none"]:
            names = []
        if len(set(names)) < len(names):
            raise RotationError(f"a rotation is named twice: {','.join(names)}", hint="name each of them once")
        return Rotation(frozenset(names), hadamard, seed)

    @property
    def made(self) -> str:
        """How its matrices are made, in words: "full Hadamard, seed 0"."""
        words = f"{self.hadamard} Hadamard, seed {self.seed}"
        return words if self.learned is None else f"{' and '.join(sorted(self.learned.sites))} learned, {words}"

    def __str__(self) -> str:
        """What `parse` reads: "r1,r4" or "none"."""
        return ",".join(sorted(self.sites)) or "none"

    def to_json(self) -> dict[str, Any]:
        """{"sites": [...], "hadamard": ..., "seed": ...}, and of learned sites the hashes: {"learned": {"r1": ...}}"""
        plain = {"sites": sorted(self.sites), "hadamard": self.hadamard, "seed": self.seed}
        return plain if self.learned is None else {**plain, "learned": self.learned.hashes}

    @staticmethod
    def from_json(value: Mapping[str, Any], learned: Learned | None = None) -> Rotation:
        """The inverse of `to_json`; a "basis" stored beside it is the caller's to compare, learned matrices the
        caller's to bring.

        Raises RotationError if a key is missing or its value wrong, BasisMismatchError for other matrices than those
        that it names.
        """
        if missing := [key for key in ("sites", "hadamard", "seed") if key not in value]:
            raise RotationError(f"a stored rotation lacks {', '.join(missing)}", hint="write it with Rotation.to_json")
        sites = value["sites"]
        if not isinstance(sites, (list, tuple)) or not all(isinstance(site, str) for site in sites):
            raise RotationError(f"a stored rotation has bad sites {sites!r}", hint=f"a list of {', '.join(SITES)}")
        rotation = replace(Rotation.parse(sites, value["hadamard"], value["seed"]), learned=learned)
        named, brought = value.get("learned"), None if rotation.learned is None else rotation.learned.hashes
        if named != brought:
            told = "are missing" if brought is None else "were not learned" if named is None else "are of another one"
            raise BasisMismatchError(
                f"the matrices of a stored rotation {told}", hint="restore the file beside it, or learn it again"
            )
        return rotation

    def _learned(self, site: str, n: int, layer: int = 0) -> Array | None:
        """The matrix of a learned site, None for another."""
        if self.learned is None or site not in self.learned.sites:
            return None
        return self.learned.matrix(site, n, layer)


@cache
def _orthogonal(site: str, kind: str, n: int, seed: int | None) -> Orthogonal:
    """The matrix of one site at order n; `seed` None leaves the signs out."""
    if n < 1:
        raise RotationError(f"a rotation of order {n} does not exist", hint="the order is a size and at least 1")
    repeat, factors = _block(n) if kind == "block" else (1, _full(n))
    return Orthogonal(factors, repeat, None if seed is None else _signs(site, n, seed))


@cache
def _full(n: int) -> tuple[Array, ...]:
    """Factors of a rotation that mixes all n channels: the most balanced n = a b, a >= b, both orders Hadamard.

    The product costs a + b per channel, so 1536 is 48 x 32. Where no such pair exists (n odd or 2 mod 4, say), a
    Hartley matrix takes the first place beside a Hadamard.
    """
    pairs = sorted(((a, n // a) for a in range(1, n + 1) if n % a == 0), key=sum)
    for a, b in pairs:
        if a >= b and constructible(a) and constructible(b):
            return (_normalized(a), _normalized(b)) if b > 1 else (_normalized(a),)
    a, b = next((a, b) for a, b in pairs if constructible(b))
    return (hartley(a), _normalized(b)) if b > 1 else (hartley(a),)


def _block(n: int) -> tuple[int, tuple[Array, ...]]:
    """(m, factors) of I_m kron H_b, b the largest power of two that divides n, at most 256, as a balanced pair."""
    block = min(n & -n, LARGEST_BLOCK)
    if block < 2:
        raise RotationError(f"no block Hadamard of order {n}: it is odd", hint="use hadamard='full'")
    return n // block, _full(block)


@cache
def _normalized(n: int) -> Array:
    """hadamard(n) / sqrt(n), float64 [n, n]."""
    matrix: Array = hadamard(n) / np.sqrt(n)
    matrix.flags.writeable = False
    return matrix


@cache
def _signs(site: str, n: int, seed: int) -> Array:
    """Float64 [n] of +-1 that depend on the arguments and on nothing else: bit i, low bits first, of
    sha256("rqc SITE N SEED 0") sha256("rqc SITE N SEED 1") ... gives sign i; a set bit is -1.
    """
    stream = b"".join(hashlib.sha256(f"rqc {site} {n} {seed} {k}".encode()).digest() for k in range(-(-n // 256)))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")[:n]
    signs: Array = 1.0 - 2.0 * bits.astype(np.float64)
    signs.flags.writeable = False
    return signs


def _update(digest: hashlib._Hash, q: Orthogonal, signs: Array) -> None:
    """Hash diag(signs) Q by its factors, rounded to 2^-24: the last bit of some libm's sine must not matter."""
    digest.update(f"repeat {q.repeat}".encode())
    for factor in q.factors:
        digest.update(f"factor {len(factor)}".encode())
        digest.update(np.rint(factor * 2**24).astype("<i4").tobytes())
    digest.update(signs.astype("<i1").tobytes())
