"""Model families as data: which linears read and write the residual stream, through which norms, and what is refused.

A family is a few rows of a table. Passes, importer and training ask these rows; no model has a class of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from rqc.runtime.errors import UnsupportedModelError

RESIDUAL, HEADS, FFN = "residual", "heads", "ffn"


@dataclass(frozen=True)
class Linear:
    """One kind of linear: y = x Wᵀ + b with W [out, in].

    `path` is the module path inside a layer ({e} stands for any expert); `reads` is the space of x (residual, heads,
    ffn); `writes` names the consecutive row segments of W (query, key, value, gate, up, residual, router); `norm` is
    the layer's norm whose output is x, if its gain can be folded.
    """

    path: str
    reads: str
    writes: tuple[str, ...]
    norm: str | None = None


@dataclass(frozen=True)
class Family:
    """How the decoder layers of some model types are put together.

    `offset_norms`: norm gains are 1 + w (Gemma). `refusals` maps a rotation site to the reason why it would change the
    function. `sources` maps a parameter path in the graph to the checkpoint path and the segments packed there, where
    they differ.
    """

    model_types: tuple[str, ...]
    linears: tuple[Linear, ...]
    offset_norms: bool = False
    refusals: tuple[tuple[str, str], ...] = ()
    sources: tuple[tuple[str, str, tuple[str, ...]], ...] = ()


def _attention(norm: str | None) -> tuple[Linear, ...]:
    return (
        Linear("self_attn.q_proj", RESIDUAL, ("query",), norm),
        Linear("self_attn.k_proj", RESIDUAL, ("key",), norm),
        Linear("self_attn.v_proj", RESIDUAL, ("value",), norm),
        Linear("self_attn.o_proj", HEADS, (RESIDUAL,)),
    )


def _mlp(norm: str | None, scope: str = "mlp") -> tuple[Linear, ...]:
    return (
        Linear(f"{scope}.gate_proj", RESIDUAL, ("gate",), norm),
        Linear(f"{scope}.up_proj", RESIDUAL, ("up",), norm),
        Linear(f"{scope}.down_proj", FFN, (RESIDUAL,)),
    )


def _experts(norm: str) -> tuple[Linear, ...]:
    return (Linear("mlp.gate", RESIDUAL, ("router",), norm), *_mlp(norm, "mlp.experts.{e}"))


PRE, POST = "input_layernorm", "post_attention_layernorm"
POST_NORMS = (
    "a norm stands between o_proj/down_proj and the residual stream, and its gain cannot be folded through a rotation"
)

FAMILIES = (
    Family(("llama", "smollm3", "mistral", "qwen2", "qwen3", "granite"), _attention(PRE) + _mlp(POST)),
    Family(
        ("phi3",),
        (
            *_attention(PRE),
            Linear("self_attn.qkv_proj", RESIDUAL, ("query", "key", "value"), PRE),
            Linear("mlp.gate_up_proj", RESIDUAL, ("gate", "up"), POST),
            Linear("mlp.down_proj", FFN, (RESIDUAL,)),
        ),
        sources=(
            ("self_attn.q_proj", "self_attn.qkv_proj", ("query", "key", "value")),
            ("self_attn.k_proj", "self_attn.qkv_proj", ("query", "key", "value")),
            ("self_attn.v_proj", "self_attn.qkv_proj", ("query", "key", "value")),
        ),
    ),
    Family(("gemma",), _attention(PRE) + _mlp(POST), offset_norms=True),
    Family(("olmo2",), _attention(None) + _mlp(None), refusals=(("r1", POST_NORMS),)),
    Family(
        ("gemma2", "gemma3_text"),
        _attention(PRE) + _mlp("pre_feedforward_layernorm"),
        offset_norms=True,
        refusals=(("r1", POST_NORMS),),
    ),
    Family(
        ("mixtral",),
        _attention(PRE) + _experts(POST),
        sources=(
            ("mlp.gate", "block_sparse_moe.gate", ()),
            ("mlp.experts.{e}.gate_proj", "block_sparse_moe.experts.{e}.w1", ()),
            ("mlp.experts.{e}.down_proj", "block_sparse_moe.experts.{e}.w2", ()),
            ("mlp.experts.{e}.up_proj", "block_sparse_moe.experts.{e}.w3", ()),
        ),
    ),
    Family(("qwen3_moe",), _attention(PRE) + _mlp(POST) + _experts(POST)),
)


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face model_type. Raises UnsupportedModelError when rqc has no description of it."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(t for family in FAMILIES for t in family.model_types))
    raise UnsupportedModelError(f"model_type {model_type!r} is not supported", hint=f"supported: {known}")
