"""[[layers]] and --bits-budget as options: what they say, what they match, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rqc.compiler.layer_rules import LayerRule, widths_by_rule
from rqc.compiler.recipe import Recipe
from rqc.models.description import EMBEDDING, Architecture, Description
from rqc.runtime.errors import InputError, RqcError, SchemeError

SIZES: dict[str, Any] = {
    "num_hidden_layers": 12,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
KINDS = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]


def described(model_type: str = "llama", **sizes: Any) -> Description:
    architecture = Architecture.from_config({"model_type": model_type, **SIZES, **sizes})
    names = [f"model.layers.{layer}.{kind}.weight" for layer in range(12) for kind in KINDS]
    if model_type == "mixtral":
        names = [name for name in names if "mlp" not in name]
        names += ["model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.1.up_proj.weight"]
    return Description.of(architecture, [*names, EMBEDDING])


def rules(*pairs: tuple[str, int]) -> list[LayerRule]:
    return [LayerRule(match, bits) for match, bits in pairs]


@pytest.mark.parametrize(
    ("match", "count"),
    [
        ("*", 84),
        ("model.layers.1.mlp.down_proj.weight", 1),
        ("layers.1.mlp.down_proj", 1),
        ("model.layers.1.mlp.down_proj", 1),
        ("layers.1.*", 7),
        ("layers.[01].*", 14),
        ("layers.1?.*", 14),
        ("*.down_proj", 12),
        ("*.down_proj.weight", 12),
        ("layers.*.self_attn.[qk]_proj", 24),
    ],
)
def test_a_pattern_matches_names_whole_or_short(match: str, count: int) -> None:
    assert len(widths_by_rule(rules((match, 2)), described())) == count


def test_the_last_rule_that_matches_counts() -> None:
    widths = widths_by_rule(rules(("*", 2), ("*.down_proj", 8), ("layers.3.*", 6)), described())
    assert widths["model.layers.0.mlp.up_proj.weight"] == 2
    assert widths["model.layers.0.mlp.down_proj.weight"] == 8
    assert widths["model.layers.3.mlp.down_proj.weight"] == 6


@pytest.mark.parametrize(
    ("match", "hinted"),
    [
        ("layers.*.mlp.down", "'layers.*.mlp.down_proj'"),
        ("model.layers.*.attn.q_proj.weight", "layers.*.self_attn.q_proj"),
        ("layers.12.mlp.up_proj", "from 0 to 11"),
        ("nothing", "layers.*.self_attn.q_proj, "),
        ("model.embed_tokens.weight", "--embedding-bits"),
        ("lm_head", "--head-bits"),
    ],
)
def test_a_rule_that_matches_nothing_names_the_nearest(match: str, hinted: str) -> None:
    with pytest.raises(InputError, match="matches no linear") as caught:
        widths_by_rule(rules(("*", 4), (match, 2)), described())
    assert hinted in caught.value.hint


def test_a_router_has_no_width() -> None:
    mixture = described("mixtral", num_local_experts=2)
    assert set(widths_by_rule(rules(("*.mlp.*", 8)), mixture)) == {"model.layers.0.mlp.experts.1.up_proj.weight"}
    with pytest.raises(InputError) as caught:
        widths_by_rule(rules(("*.mlp.gate", 8)), mixture)
    assert "routers" in caught.value.hint


def test_a_recipe_file_has_tables_of_layers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'scheme = "w4a16"\nbits-budget = 3\n\n'
        '[[layers]]\nmatch = "*.down_proj"\nbits = 8\n\n[[layers]]\nmatch = "layers.0.*"\nbits = 3\n'
    )
    recipe = Recipe.load(path)
    assert recipe.layers == (LayerRule("*.down_proj", 8), LayerRule("layers.0.*", 3))
    assert recipe.bits_budget == 3.0
    assert Recipe.from_values(recipe.to_json()) == recipe
    assert Recipe.layered(path, {"layers": []}).layers == ()
    assert "widths" not in recipe.to_json()


@pytest.mark.parametrize(
    ("values", "error", "said", "hinted"),
    [
        ({"layers": {"match": "*", "bits": 2}}, InputError, "layers", "[[layers]]"),
        ({"layers": ["*"]}, InputError, "table 1", "match"),
        ({"layers": [{"match": "*", "bits": 2}, {"match": "*"}]}, InputError, "table 2: no bits", "bits = 2"),
        ({"layers": [{"match": "*", "bit": 2}]}, InputError, "'bit'", "'bits'"),
        ({"layers": [{"match": "*", "bits": 5}]}, SchemeError, "5", "2, 3, 4, 6, 8"),
        ({"layers": [{"match": "*", "bits": "2"}]}, InputError, "'2'", "whole number"),
        ({"layers": [{"match": " ", "bits": 2}]}, InputError, "empty", "down_proj"),
        ({"layers": [{"match": 3, "bits": 2}]}, InputError, "match", "text"),
        ({"scheme": "fp16", "layers": [{"match": "*", "bits": 2}]}, SchemeError, "fp16", "w4a16"),
        ({"scheme": "fp32", "bits_budget": 3}, SchemeError, "fp32", "w4a16"),
        ({"scheme": "w2a16", "bits_budget": 3}, SchemeError, "w2a16", "w4a16"),
        ({"scheme": "w8a8", "bits_budget": 3}, SchemeError, "w8a8", "w4a8"),
        ({"scheme": "w6a6", "bits_budget": 3}, SchemeError, "w6a6", "w4a4"),
        ({"bits_budget": "3"}, InputError, "bits_budget", "a number"),
    ],
)
def test_bad_values_name_themselves_and_the_way_out(
    values: dict[str, Any], error: type[RqcError], said: str, hinted: str
) -> None:
    with pytest.raises(error) as caught:
        Recipe.from_values(values)
    assert said in caught.value.message
    assert hinted in caught.value.hint
