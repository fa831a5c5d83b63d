"""Which settings of a config.json the graph honours. What transformers would heed and the importer does not is refused
by name: no variant of a family is built wrongly in silence.

Settings that the config class of transformers does not know are dropped before the importer sees them: transformers
ignores them, the importer reads some of any family.
"""

from __future__ import annotations

from typing import Any

from rqc.runtime.errors import CheckpointError, UnsupportedModelError

READ_UNDECLARED = frozenset({"head_dim"})
"""Read by models whose config class does not declare them."""

NEUTRAL = frozenset(
    {
        *("_name_or_path", "architectures", "dtype", "model_type", "transformers_version", "use_cache"),
        *("chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "problem_type", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "initializer_range", "pretraining_tp"),
        *("attention_dropout", "embd_pdrop", "resid_pdrop", "router_aux_loss_coef", "router_jitter_noise"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    }
)
"""Without effect on the logits of a model in evaluation: bookkeeping, training, what is returned beside them."""

HONOURED = frozenset(
    {
        *("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size", "head_dim", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts", "num_experts_per_tok"),
        *("hidden_act", "hidden_activation", "attention_bias", "mlp_bias", "rms_norm_eps", "tie_word_embeddings"),
        *("max_position_embeddings", "original_max_position_embeddings", "rope_parameters", "norm_topk_prob"),
        *("layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "_sliding_window_pattern"),
        *("no_rope_layers", "no_rope_layer_interval", "query_pre_attn_scalar"),
        *("attn_logit_softcapping", "final_logit_softcapping"),
        *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    }
)
"""Heeded in every family that declares them; tests vary each against transformers."""

EXCEPTIONS = frozenset({("gemma3_text", "attn_logit_softcapping"), ("gemma3_text", "final_logit_softcapping")})
"""(model_type, setting) that the importer passes over all the same."""


def heeded(config: Any) -> Any:
    """The config (a transformers PreTrainedConfig) with nothing but the settings that its class knows.

    Raises UnsupportedModelError, naming the setting, where one that is not honoured differs from the default, and for
    quantized checkpoints; CheckpointError where config.json contradicts itself.
    """
    given, defaults = config.to_dict(), type(config)().to_dict()
    if given.get("quantization_config"):
        raise UnsupportedModelError(
            "the checkpoint is quantized (config.json has a quantization_config)",
            hint="give the model that it was made from, in float16, bfloat16 or float32",
        )
    known = {name: value for name, value in given.items() if name in defaults or name in READ_UNDECLARED}
    for name, value in known.items():
        honoured = name in HONOURED and (config.model_type, name) not in EXCEPTIONS
        if name not in NEUTRAL and not honoured and (value or None) != (defaults[name] or None):
            raise UnsupportedModelError(
                f"{config.model_type} with {name} = {value!r} is not supported",
                hint=f"rqc compiles this family with {name} = {defaults[name]!r}",
            )
    try:
        return type(config)(**{name: value for name, value in known.items() if name != "model_type"})
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"config.json is not usable: {error}", hint="download it again") from error
