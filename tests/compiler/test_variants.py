"""Settings that checkpoints vary within a family: built as transformers builds them, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny import MODELS, TinyModel

from rqc.compiler.api import compile_engine
from rqc.compiler.importer import import_model
from rqc.compiler.probe import drift
from rqc.compiler.variants import EXCEPTIONS, HONOURED, NEUTRAL
from rqc.compiler.verify.engine import verify_engine
from rqc.passes.attention import FuseGroupQueryAttention
from rqc.runtime.engine import Engine
from rqc.runtime.errors import InputError, UnsupportedModelError

IDS = [3 + (7 * i) % 90 for i in range(80)]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
LEGACY_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": parameters}


def rewritten(directory: Path, to: Path, **settings: Any) -> Path:
    """A copy of a model whose config.json has other settings; None removes one."""
    shutil.copytree(directory, to)
    config = json.loads((to / "config.json").read_text()) | settings
    (to / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return to


def expected(directory: Path, ids: list[int]) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def assert_same(directory: Path, engine: Path, ids: list[int], rotate: str = "none") -> None:
    compile_engine(directory, engine, scheme="fp32", rotate=rotate)
    with Engine.load(engine, threads=1) as loaded:
        assert drift(expected(directory, ids), loaded.logits(ids)) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama16", rope(rope_type="linear", factor=4.0, rope_theta=10000.0)),
        ("llama16", rope(rope_type="dynamic", factor=4.0, rope_theta=10000.0)),
        ("qwen2", rope(**YARN)),
        ("qwen3-16", rope(**YARN, attention_factor=0.7)),
        ("qwen3-16", rope(**YARN, beta_fast=16.0, beta_slow=2.0, truncate=False)),
        ("qwen3-16", rope(**YARN, mscale=0.8, mscale_all_dim=0.5)),
        ("phi3", {"partial_rotary_factor": 0.5}),
        (
            "gemma3",
            rope(
                full_attention={"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                sliding_attention={"rope_type": "default", "rope_theta": 100.0},
            ),
        ),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 0]}),
        ("smollm3", {"no_rope_layers": [0, 0, 0, 0]}),
        (
            "smollm3",
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
        ),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3-moe", {"use_sliding_window": True, "sliding_window": 8, "norm_topk_prob": True}),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"], "attn_logit_softcapping": 0.3}),
        ("gemma2", {"query_pre_attn_scalar": 40, "final_logit_softcapping": 0.5}),
        ("granite", {"attention_bias": True, "tie_word_embeddings": True, "attention_multiplier": 0.015625}),
        ("mixtral", {"num_experts_per_tok": 3, "sliding_window": 8, "hidden_act": "relu"}),
        ("olmo2", {"attention_bias": True, "num_key_value_heads": 6}),
    ],
)
def test_variants_are_what_transformers_computes(
    name: str, changes: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    directory = tiny_model(name, **changes)
    assert_same(directory, tmp_path / "engine.plan", IDS)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": None, "rope_theta": 500.0},
        {
            "rope_parameters": None,
            "rope_theta": 5e5,
            "rope_scaling": {**LEGACY_LLAMA3, "original_max_position_embeddings": 64},
        },
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ],
)
def test_rope_in_older_configs(settings: dict[str, Any], tiny_model: TinyModel, tmp_path: Path) -> None:
    assert_same(rewritten(tiny_model("llama16"), tmp_path / "model", **settings), tmp_path / "engine.plan", IDS)


def test_settings_of_other_families_are_ignored_as_transformers_ignores_them(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    foreign = {"logits_scaling": 4.0, "residual_multiplier": 0.5, "sliding_window": 8, "qk_norm": True}
    directory = rewritten(tiny_model("llama16"), tmp_path / "model", **foreign, final_logit_softcapping=1.0)
    assert_same(directory, tmp_path / "engine.plan", IDS)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("gemma3", {"final_logit_softcapping": 0.5}, "final_logit_softcapping = 0.5"),
        ("gemma3", {"attn_logit_softcapping": 0.3}, "attn_logit_softcapping = 0.3"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("llama16", {"partial_rotary_factor": 0.5}, "RoPE turns 16 elements of a head, the graph 8"),
        ("llama16", {"hidden_act": "leaky_relu"}, "leaky_relu"),
    ],
)
def test_what_the_importer_passes_over_is_refused_by_name(
    name: str, changes: dict[str, Any], named: str, tiny_model: TinyModel
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        import_model(tiny_model(name, **changes))


def test_quantized_checkpoints_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = rewritten(tiny_model("llama16"), tmp_path / "model", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModelError, match="quantized"):
        import_model(directory)


def test_a_setting_that_nobody_knows_yet_is_refused(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqc.compiler.variants.HONOURED", HONOURED - {"attention_multiplier"})
    with pytest.raises(UnsupportedModelError, match=r"granite with attention_multiplier = 0\.2"):
        import_model(tiny_model("granite"))


def test_every_setting_of_a_family_is_judged() -> None:
    """A setting that a new transformers adds to a family shows up here, before a checkpoint that uses it does."""
    refused = {"decoder_sparse_step", "mlp_only_layers", "use_bidirectional_attention"}
    declared = {name for config, _ in MODELS.values() for name in getattr(transformers, config)().to_dict()}
    assert declared <= HONOURED | NEUTRAL | refused
    assert not HONOURED & NEUTRAL
    assert {name for _, name in EXCEPTIONS} <= HONOURED


@pytest.mark.parametrize("rotate", ["none", "r1,r2,r3,r4"])
def test_longrope_keeps_to_its_original_context(rotate: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("phi3", rope_parameters=LONG, original_max_position_embeddings=64)
    assert_same(directory, tmp_path / "engine.plan", IDS[:64], rotate)
    with Engine.load(tmp_path / "engine.plan", threads=1) as engine:
        assert engine.context_length == 64
        whole = engine.logits(IDS[:64])
        np.testing.assert_allclose(engine.logits(IDS[:20]), whole[:20], atol=1e-5)
        with pytest.raises(InputError, match="context length is 64"):
            engine.logits(IDS[:65])


def test_rope_by_anything_but_the_position_stays_outside_the_kernel(tiny_model: TinyModel) -> None:
    model = import_model(tiny_model("llama16")).model
    table = model.graph.initializers["model.rotary_emb.cos_cache"]
    token_ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    for gather, _ in list(table.uses()):
        gather.replace_input_with(1, token_ids)
    FuseGroupQueryAttention()(model)
    fused = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert fused
    assert all("do_rotary" not in node.attributes for node in fused)


@pytest.mark.parametrize("name", ["llama-tied", "gemma", "qwen2", "phi3"])
@pytest.mark.parametrize("own", [True, False])
def test_a_stored_head_beside_tied_embeddings(name: str, own: bool, tiny_model: TinyModel, tmp_path: Path) -> None:
    """transformers ties nothing where the checkpoint stores a head that differs from the embedding."""
    directory = rewritten(tiny_model(name, tie_word_embeddings=True), tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1] *= -1 if own else 1
    save_file({**tensors, "lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})
    assert import_model(directory).description.architecture.tied is not own
    assert_same(directory, tmp_path / "engine.plan", IDS, "r1,r2,r4")
    compile_engine(directory, tmp_path / "engine.plan", scheme="w4a16", rotate="r1,r2,r4")
    assert verify_engine(tmp_path / "engine.plan", directory, token_ids=IDS, tokens=60).passed


@pytest.mark.parametrize("name", ["llama-tied", "gemma", "gemma2", "gemma3", "granite", "olmo2", "phi3", "qwen2"])
@pytest.mark.parametrize("scheme", ["fp32", "fp16", "w4a16"])
def test_tied_tables_are_stored_once(name: str, scheme: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model(name, tie_word_embeddings=True, vocab_size=1024)
    kept = compile_engine(directory, tmp_path / "kept.plan", scheme=scheme, rotate="none")
    split = compile_engine(directory, tmp_path / "split.plan", scheme=scheme, rotate="none", tied="untie")
    width = {"fp32": 4, "fp16": 2, "w4a16": 1}[scheme]
    assert split.size_bytes - kept.size_bytes > 0.9 * 1024 * 96 * width
