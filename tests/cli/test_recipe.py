"""Recipes: defaults, layering of flag over file over default, and errors that name the key and the way out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rqc.compiler.recipe import Recipe, parse_size
from rqc.compiler.scheme import SCHEMES, Scheme
from rqc.runtime.errors import InputError, RotationError, RqcError, SchemeError, TargetError

FP8 = {"scheme": "fp8a16", "target": "tensorrt-rtx"}
NVFP4 = {"scheme": "nvfp4a16", "target": "tensorrt-rtx"}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_are_those_of_the_interface() -> None:
    recipe = Recipe()
    assert (recipe.target, recipe.scheme.name, recipe.group_size, recipe.symmetric) == ("onnx", "w4a8", 32, True)
    assert (recipe.clip, recipe.method, recipe.rotate, recipe.tied) == ("mse", "rtn", "auto", "keep")
    assert (recipe.calibration_samples, recipe.calibration_length) == (64, 512)
    assert recipe.rotation is None


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().group_size = 64  # type: ignore[misc]


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, 'scheme = "w4a16"\ngroup-size = 64\nrotate = ["r1", "r4"]\nmax_memory = "2GiB"\n')
    recipe = Recipe.layered(path, {"group_size": 128, "scheme": None, "symmetric": False})
    assert recipe.scheme == SCHEMES["w4a16"]
    assert recipe.group_size == 128
    assert not recipe.symmetric
    assert recipe.rotate == frozenset({"r1", "r4"})
    assert recipe.max_memory == 2 << 30
    assert recipe.clip == "mse"


@pytest.mark.parametrize("name", ["symmetric", "activation-symmetric"])
def test_keys_are_named_as_flags_are_also_for_the_opposite(name: str, tmp_path: Path) -> None:
    field, opposite = name.replace("-", "_"), name.replace("symmetric", "asymmetric")
    path = write(tmp_path, f'scheme = "w4a4"\n{opposite} = true\n')
    assert getattr(Recipe.load(path), field) is False
    assert getattr(Recipe.layered(path, {field: True}), field) is True
    assert getattr(Recipe.from_values({"scheme": "w4a4", opposite.replace("-", "_"): False}), field) is True
    with pytest.raises(InputError, match=r"asymmetric is 1"):
        Recipe.from_values({"scheme": "w4a4", opposite: 1})
    with pytest.raises(InputError, match="given twice"):
        Recipe.from_values({"scheme": "w4a4", opposite: True, name: False})


def test_a_calibration_path_in_a_file_starts_from_the_file(tmp_path: Path) -> None:
    assert Recipe.load(write(tmp_path, 'calibration = "text.txt"')).calibration == tmp_path / "text.txt"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"scheme": "w2a16", "group_size": -1, "symmetric": False, "rotate": "r4,r1"},
        {"rotate": "none", "head_bits": 4},
    ],
)
def test_json_gives_the_same_recipe_back(values: dict[str, Any]) -> None:
    recipe = Recipe.from_values(values)
    assert Recipe.from_values(recipe.to_json()) == recipe


def test_json_of_no_rotation_has_no_kind_of_it() -> None:
    """As an adapter's basis may leave it: the sites of none beside the kind of another."""
    recipe = Recipe(rotate=frozenset(), hadamard="block", rotation_seed=3)
    assert Recipe.from_values(recipe.to_json()).rotate == frozenset()


def test_a_flag_that_leaves_rotations_out_leaves_their_kind_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'rotate = "r1,r4"\nhadamard = "block"\nrotation-seed = 3\n')
    assert Recipe.load(path).rotation_seed == 3
    recipe = Recipe.layered(path, {"rotate": "none"})
    assert (recipe.rotate, recipe.hadamard, recipe.rotation_seed) == (frozenset(), "full", 0)
    with pytest.raises(InputError, match="--rotation-seed 4 with --rotate none"):
        Recipe.layered(path, {"rotate": "none", "rotation_seed": 4})


@pytest.mark.parametrize(
    ("values", "error", "said", "hinted"),
    [
        ({"target": "coreml"}, TargetError, "coreml", "tensorrt-rtx"),
        ({"scheme": "w4a9"}, SchemeError, "w4a9", "w4a8"),
        ({"group_size": 48}, SchemeError, "48", "32, 64"),
        ({"method": "awq"}, SchemeError, "awq", "gptq"),
        ({"clip": "max"}, SchemeError, "max", "mse"),
        ({"tied": "no"}, SchemeError, "no", "untie"),
        ({"embedding_bits": 5}, SchemeError, "5", "16"),
        ({"rotate": "r1,r5"}, RotationError, "r5", "r4"),
        ({"rotate": "r1,r1"}, RotationError, "twice", "once"),
        ({"rotate": ["none", "r1"]}, RotationError, "none", "auto"),
        ({"hadamard": "random"}, RotationError, "random", "block"),
        ({"rotation_seed": -1}, InputError, "-1", "0 or more"),
        ({"rotation_seed": True}, InputError, "True", "whole number"),
        ({"group_size": "32"}, InputError, "'32'", "whole number"),
        ({"symmetric": 1}, InputError, "symmetric", "true or false"),
        ({"calibration_samples": 0}, InputError, "0", "1 or more"),
        ({"max_memory": "plenty"}, InputError, "plenty", "4GiB"),
        ({"groupsize": 32}, InputError, "groupsize", "group_size"),
        ({"rotate": "none", "hadamard": "block"}, InputError, "--hadamard block", "r1,r2"),
        ({"rotate": "none", "rotation_seed": 3}, InputError, "--rotation-seed 3", "leave it out"),
        ({"kv_cache": "int6"}, SchemeError, "int6", "int8, int4"),
        ({"kv_cache": 8}, InputError, "kv_cache", "text"),
        ({"group_size": 32, "group-size": 64}, InputError, "twice", "same"),
    ],
)
def test_bad_values_name_themselves_and_the_way_out(
    values: dict[str, Any], error: type[RqcError], said: str, hinted: str
) -> None:
    with pytest.raises(error) as caught:
        Recipe.from_values(values)
    assert said in caught.value.message
    assert hinted in caught.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scheme = ", "not valid TOML"),
        ("schema = 'w4a8'", "schema"),
        ("group_size = 33", "33"),
        ("rotate = 3", "rotate"),
    ],
)
def test_errors_of_a_file_name_the_file(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RqcError) as caught:
        Recipe.layered(path, {"group_size": 32, "rotate": "none"})
    assert str(path) in caught.value.message
    assert said in caught.value.message


def test_a_missing_recipe_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Recipe.load(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    ("values", "tied", "bits"),
    [
        ({}, True, (8, 8)),
        ({"scheme": "fp32"}, False, (32, 32)),
        ({"scheme": "fp16"}, True, (16, 16)),
        ({"embedding_bits": 4}, True, (4, 4)),
        ({"head_bits": 16}, True, (16, 16)),
        ({"head_bits": 16}, False, (8, 16)),
        ({"embedding_bits": 4, "head_bits": 4}, True, (4, 4)),
        ({"embedding_bits": 4, "head_bits": 16, "tied": "untie"}, True, (4, 16)),
    ],
)
def test_tables_that_are_one_have_one_width(values: dict[str, Any], tied: bool, bits: tuple[int, int]) -> None:
    assert Recipe.from_values(values).table_bits(tied=tied) == bits


def test_two_widths_for_one_table_are_refused() -> None:
    with pytest.raises(SchemeError, match="one tied table"):
        Recipe(embedding_bits=4, head_bits=8).table_bits(tied=True)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("512 MiB", 512 << 20), ("1.5gb", 1_500_000_000), ("123", 123), ("8k", 8000), ("7B", 7)],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_scheme_names_say_their_bits() -> None:
    for name, scheme in SCHEMES.items():
        assert Scheme.parse(name) is scheme
        if name.startswith("w"):
            assert name == f"w{scheme.weight_bits}a{scheme.activation_bits}"
            assert scheme.quantized
            assert not scheme.small_floats
    assert [name for name, scheme in SCHEMES.items() if scheme.small_floats] == ["fp8a16", "nvfp4a16"]
    assert not SCHEMES["fp16"].quantized
    assert [name for name, scheme in SCHEMES.items() if scheme.quantizes_activations] == [
        "w8a8",
        "w6a6",
        "w4a8",
        "w4a4",
    ]


@pytest.mark.parametrize(
    ("values", "error", "said", "hinted"),
    [
        ({"compensate": "lora"}, SchemeError, "lora", "eora"),
        ({"scheme": "fp8a16"}, SchemeError, "fp8a16 on onnx", "w8a16"),
        ({"scheme": "nvfp4a16"}, SchemeError, "nvfp4a16 on onnx", "w4a16"),
        ({**FP8, "group_size": 32}, SchemeError, "one scale per output channel", "--group-size -1"),
        ({**NVFP4, "group_size": 32}, SchemeError, "one scale per block of 16", "--group-size 16"),
        ({**NVFP4, "symmetric": False}, SchemeError, "--asymmetric with --scheme nvfp4a16", "w4a16"),
        ({**FP8, "method": "gptq"}, SchemeError, "--method gptq with --scheme fp8a16", "w8a16"),
        ({**FP8, "compensate": "eora"}, SchemeError, "--compensate eora", "leave it out"),
        ({**NVFP4, "sparsity": "2:4"}, SchemeError, "--sparsity 2:4", "leave it out"),
        ({**NVFP4, "bits_budget": 3.0}, SchemeError, "--bits-budget", "w4a16"),
        ({**NVFP4, "layers": [{"match": "*", "bits": 8}]}, SchemeError, "layers with --scheme nvfp4a16", "w4a16"),
        ({**FP8, "adapter": "a", "merge": "zero-point"}, SchemeError, "--merge zero-point", "leave it out"),
        ({"sparsity": "1:4"}, SchemeError, "1:4", "2:4"),
        ({"sparsity": "2:4", "prune": "random"}, SchemeError, "random", "magnitude"),
        ({"prune": "wanda"}, SchemeError, "--prune wanda without --sparsity", "--sparsity 2:4"),
        ({"compensate": "eora", "compensate_rank": 0}, InputError, "compensate_rank is 0", "1 or more"),
        ({"compensate": "eora", "compensate_budget": 0.0}, InputError, "compensate_budget is 0", "0.25"),
        ({"compensate": "eora", "compensate_budget": float("inf")}, InputError, "inf", "0.25"),
        ({"compensate": "eora", "compensate_rank": 8, "compensate_budget": 0.1}, InputError, "rank", "one of them"),
        ({"compensate_rank": 8}, InputError, "compensate_rank", "--compensate eora"),
        ({"compensate_budget": 0.5}, InputError, "compensate_budget", "--compensate eora"),
        ({"compensate": "eora", "scheme": "fp16"}, SchemeError, "rounds no weights", "w4a16"),
        ({"sparsity": "2:4", "scheme": "fp32"}, SchemeError, "--sparsity 2:4", "w4a16"),
        ({"compensate": "loftq", "method": "gptq"}, SchemeError, "--method gptq", "eora"),
        ({"compensate": "loftq", "sparsity": "2:4"}, SchemeError, "--sparsity 2:4", "eora"),
    ],
)
def test_compensation_that_makes_no_sense_is_refused(
    values: dict[str, Any], error: type[RqcError], said: str, hinted: str
) -> None:
    with pytest.raises(error) as caught:
        Recipe.from_values(values)
    assert said in caught.value.message
    assert hinted in caught.value.hint


@pytest.mark.parametrize(
    "values",
    [
        {"compensate": "eora", "compensate_budget": 0.25, "sparsity": "2:4", "prune": "magnitude"},
        {"compensate": "loftq", "compensate_rank": 16},
    ],
)
def test_compensation_survives_json(values: dict[str, Any]) -> None:
    recipe = Recipe.from_values(values)
    assert Recipe.from_values(recipe.to_json()) == recipe


def test_a_grid_for_floats_is_refused() -> None:
    with pytest.raises(SchemeError, match="group_size and clip with --scheme fp16, which rounds no weights"):
        Recipe.layered(None, {"scheme": "fp16", "group_size": 64, "clip": "none"})
    assert Recipe.layered(None, {"scheme": "fp16", "group_size": 64, "embedding_bits": 8}).group_size == 64
