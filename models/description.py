"""A model as the algebra sees it: its sizes, and every linear claimed by its family's description."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from rqc.models.families import FFN, HEADS, RESIDUAL, Family, Linear, family_of
from rqc.runtime.errors import UnsupportedModelError

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder, in elements."""

    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    tied: bool
    experts: int = 0
    expert_size: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Read a Hugging Face config (as a mapping with its defaults filled in)."""
        heads = int(config["num_attention_heads"])
        experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
        return cls(
            model_type=config["model_type"],
            layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            context_length=_context_length(config),
            tied=bool(config.get("tie_word_embeddings")),
            experts=experts,
            expert_size=(config.get("moe_intermediate_size") or config["intermediate_size"]) if experts else 0,
        )

    def to_json(self) -> dict[str, Any]:
        """The architecture as it stands in an engine's manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Claim:
    """One linear of one layer, as its family describes it. `norm` is the full name of the norm weight before it, if it
    folds."""

    weight: str
    layer: int
    linear: Linear
    norm: str | None
    expert: bool

    @property
    def bias(self) -> str:
        """The name that its bias has, if it has one."""
        return self.weight.removesuffix("weight") + "bias"

    @property
    def quantized(self) -> bool:
        """Routers stay in float: they are tiny and choose whole experts."""
        return "router" not in self.linear.writes


@dataclass(frozen=True)
class Description:
    """A model's family, sizes and claimed linears, in the order of its layers."""

    family: Family
    architecture: Architecture
    claims: tuple[Claim, ...]

    @classmethod
    def of(cls, architecture: Architecture, parameters: Iterable[str]) -> Description:
        """Claim every layer weight in `parameters` (graph or state-dict names) that the family describes."""
        family = family_of(architecture.model_type)
        claims = [claim for name in parameters if (claim := _claim(family, name))]
        return cls(family, architecture, tuple(sorted(claims, key=lambda claim: claim.layer)))

    @cached_property
    def by_weight(self) -> dict[str, Claim]:
        """Claims by the name of their weight."""
        return {claim.weight: claim for claim in self.claims}

    def segments(self, claim: Claim) -> dict[str, slice]:
        """The rows of W that each kind of output takes, e.g. {'gate': 0:f, 'up': f:2f} for a packed gate_up_proj."""
        return segments(claim.linear.writes, self.sizes(claim.expert))

    def sizes(self, expert: bool = False) -> dict[str, int]:
        """Rows per kind of output."""
        a = self.architecture
        ffn = a.expert_size if expert else a.intermediate_size
        keys = a.kv_heads * a.head_dim
        return {
            "query": a.heads * a.head_dim,
            "key": keys,
            "value": keys,
            "gate": ffn,
            "up": ffn,
            RESIDUAL: a.hidden_size,
            "router": a.experts,
            HEADS: a.heads * a.head_dim,
            FFN: ffn,
        }

    def shape(self, claim: Claim) -> tuple[int, int]:
        """[out, in] that the config gives this linear."""
        sizes = self.sizes(claim.expert)
        return sum(sizes[kind] for kind in claim.linear.writes), sizes[claim.linear.reads]

    def ffn_sizes(self) -> tuple[int, ...]:
        """The distinct input sizes of the down projections (experts may differ from dense layers)."""
        return tuple(sorted({self.shape(claim)[1] for claim in self.claims if claim.linear.reads == FFN}))


def _context_length(config: Mapping[str, Any]) -> int:
    """Positions for which one set of RoPE frequencies holds: longrope changes them beyond the original context."""
    longest = int(config["max_position_embeddings"])
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        return min(longest, int(rope["original_max_position_embeddings"]))
    return longest


def segments(writes: tuple[str, ...], sizes: Mapping[str, int]) -> dict[str, slice]:
    """Consecutive row ranges of the given kinds of output."""
    rows: dict[str, slice] = {}
    start = 0
    for kind in writes:
        rows[kind] = slice(start, start + sizes[kind])
        start += sizes[kind]
    return rows


def _claim(family: Family, name: str) -> Claim | None:
    match = LAYER.fullmatch(name)
    if not match:
        return None
    layer, path = int(match[1]), match[2]
    generic = re.sub(r"experts\.\d+\.", "experts.{e}.", path)
    for linear in family.linears:
        if linear.path == generic:
            norm = f"model.layers.{layer}.{linear.norm}.weight" if linear.norm else None
            return Claim(name, layer, linear, norm, expert="{e}" in linear.path)
    return None


def require_claim(description: Description, name: str) -> Claim:
    """The claim on a weight. Raises UnsupportedModelError, naming the weight, when no row of the family describes
    it."""
    claim = description.by_weight.get(name)
    if claim is None:
        raise UnsupportedModelError(
            f"{description.architecture.model_type}: no description claims the linear {name!r}",
            hint="rqc compiles only models of which it knows what every linear reads and writes",
        )
    return claim
