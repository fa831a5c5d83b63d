"""Reading adapters: what plain peft wrote is what peft computes; every other convention is converted or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file, save_file
from tiny import TinyModel
from tiny_adapters import save_peft
from torch import nn
from transformers import AutoModelForCausalLM

from rqc.models.adapter import Adapter
from rqc.models.checkpoint import Checkpoint
from rqc.models.description import HEAD, Description
from rqc.models.reference import Reference
from rqc.runtime.errors import InputError, RqcError, UnsupportedModelError

Q0 = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."
PATTERNS = {
    "rank_pattern": {"down_proj": 7, "layers.1.self_attn.o_proj": 2},
    "alpha_pattern": {"o_proj": 5, r"^model\.layers\.0\..*gate_proj": 3},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "dora, rslora, patterns": {"use_dora": True, "use_rslora": True, **PATTERNS},
    "subset": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*layers\.0\.mlp\..*proj"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
}


def description_of(directory: Path) -> Description:
    return Reference.load(directory).description


def merged_by_peft(directory: Path, adapter: Path) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return Reference(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload())


def check_against_peft(directory: Path, path: Path) -> Adapter:
    """Every weight of the model with the adapter's update is the one that peft merges, to 1e-6."""
    base, expected = Reference.load(directory), merged_by_peft(directory, path)
    adapter = Adapter.open(path, base.description)
    changed = 0
    for claim in base.description.claims:
        plain, wanted = base.read(claim.weight), expected.read(claim.weight)
        delta = adapter.deltas.get(claim.weight)
        found = plain if delta is None else delta.merged(plain)
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max(), claim.weight
        changed += bool(np.abs(wanted - plain).max() > 1e-3 * np.abs(plain).max())
    assert changed == len(adapter.deltas)
    assert adapter.basis is None
    adapter.check(base.description, "any: an ordinary adapter knows no base")
    return adapter


@pytest.mark.parametrize("config", CONFIGS)
def test_an_adapter_of_plain_peft_is_what_peft_merges(config: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    path = save_peft(directory, tmp_path / "adapter", **CONFIGS[config])
    if config == "mica":  # it trains A from zero, with B fixed
        retensored(path, path, lambda t: t.update({k: torch.randn_like(v) for k, v in t.items() if "lora_A" in k}))
    adapter = check_against_peft(directory, path)
    assert adapter.kind == ("dora" if "dora" in config else "lora")


@pytest.mark.parametrize("config", ["lora", "dora"])
@pytest.mark.parametrize("name", ["phi3", "qwen2", "llama-bias", "llama-tied", "gemma", "qwen3-moe", "mixtral"])
def test_families(name: str, config: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Experts, which transformers packs in tensors of three dimensions, are no linears to peft."""
    directory = tiny_model(name)
    settings = {"target_modules": r".*self_attn\..*_proj"} if name in ("mixtral", "qwen3-moe") else {}
    check_against_peft(directory, save_peft(directory, tmp_path / "adapter", **CONFIGS[config], **settings))


def test_packed_projections_share_a(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("phi3")
    adapter = check_against_peft(directory, save_peft(directory, tmp_path / "a", target_modules=["qkv_proj"]))
    q, k, v = (adapter.deltas[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qkv")
    assert q.a is k.a is v.a
    assert [part.shape[0] for part in (q, k, v)] == [96, 32, 32]


@pytest.mark.parametrize("name", ["llama16", "llama-tied"])
def test_an_adapter_on_the_head(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """peft saves the head's own table along with it: it must be the base's. A tied head is refused, with the way
    out."""
    reference = Reference.load(tiny_model(name))
    path = save_peft(tiny_model(name), tmp_path / "a", target_modules=["lm_head", "q_proj"])
    description, read = reference.description, Checkpoint.open(tiny_model(name)).read
    if name == "llama-tied":
        with pytest.raises(UnsupportedModelError, match="lm_head") as caught:
            Adapter.open(path, description, read)
        assert "--tied untie" in caught.value.hint
        description = replace(description, architecture=replace(description.architecture, tied=False))
    adapter = Adapter.open(path, description, read)
    found = adapter.deltas[HEAD].merged(reference.read(HEAD))
    wanted = merged_by_peft(tiny_model(name), path).read(HEAD)
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    table = f"{PREFIX}lm_head.base_layer.weight"
    rounded = retensored(path, tmp_path / "16", lambda t: t.update({table: t[table].bfloat16()}))
    assert HEAD in Adapter.open(rounded, description, read).deltas
    for i, changed in enumerate((lambda t: t[table][3].mul_(1.01), lambda t: t.update({table: t[table][:90]}))):
        trained = retensored(path, tmp_path / f"trained{i}", changed)
        with pytest.raises(UnsupportedModelError, match="a table of its own"):
            Adapter.open(trained, description, read)
    with pytest.raises(UnsupportedModelError, match="a table of its own"):
        Adapter.open(path, description)


# --- conventions of other tools


def rewritten(source: Path, target: Path, *, drop: tuple[str, ...] = (), **config: Any) -> Path:
    """A copy of an adapter with keys of its configuration changed or dropped."""
    shutil.copytree(source, target)
    values = json.loads((target / "adapter_config.json").read_text())
    values = {key: value for key, value in (values | config).items() if key not in drop}
    (target / "adapter_config.json").write_text(json.dumps(values))
    return target


def retensored(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of an adapter with its tensors changed in place."""
    if source != target:
        shutil.copytree(source, target)
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, target / "adapter_model.safetensors")
    return target


def renamed(rename: Callable[[str], str]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        items = {rename(key): value for key, value in tensors.items()}
        tensors.clear()
        tensors.update(items)

    return change


def pool(group: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            if "lora_A" in key:
                tensors[key] = tensors[key][:, ::group] * 1.0

    return change


@pytest.fixture(scope="module")
def plain(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_peft(tiny_model("llama16"), tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture(scope="module")
def attention(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linears whose inputs are whole blocks of 16 and 32."""
    path = tmp_path_factory.mktemp("attention") / "adapter"
    return save_peft(tiny_model("llama16"), path, target_modules=["q_proj", "o_proj"])


@pytest.fixture(scope="module")
def llama(tiny_model: TinyModel) -> Description:
    return description_of(tiny_model("llama16"))


def test_pefts_qalora_is_a_mean_times_the_number_of_groups(attention: Path, tmp_path: Path, llama: Description) -> None:
    """Oracle: the forward pass of peft's own variant, which exists for GPTQ layers only."""
    path = rewritten(attention, tmp_path / "a", use_qalora=True, qalora_group_size=32)
    tensors = load_file(retensored(path, path, pool(32)) / "adapter_model.safetensors")
    adapter = Adapter.open(path, llama)
    delta = adapter.deltas[f"{Q0}.weight"]
    linears = {}
    for kind in ("lora_A", "lora_B"):
        weight = tensors[f"{PREFIX}{Q0}.{kind}.weight"]
        linears[kind] = nn.ModuleDict({"default": nn.Linear(weight.shape[1], weight.shape[0], bias=False)})
        linears[kind]["default"].weight.data = weight
    module = SimpleNamespace(
        **linears,
        lora_dropout={"default": nn.Identity()},
        scaling={"default": 2.0},
        qalora_group_size={"default": 32},
        training=False,
        in_features=96,
    )
    x = torch.randn(5, 96)
    expected = QALoraLinearVariant.forward(module, "default", x, torch.zeros(5, 96)).detach().numpy()
    assert adapter.kind == "qalora"
    assert delta.pooled(32) is not None
    assert np.abs(x.double().numpy() @ delta.dense().T - expected).max() <= 1e-6 * np.abs(expected).max()


def test_a_compact_a_without_a_flag_is_a_mean(attention: Path, tmp_path: Path, llama: Description) -> None:
    """The QA-LoRA repository: y += c B A AvgPool1d(g)(x)."""
    path = retensored(attention, tmp_path / "a", pool(16))
    tensors = {key: value.double() for key, value in load_file(path / "adapter_model.safetensors").items()}
    adapter = Adapter.open(path, llama)
    delta = adapter.deltas[f"{Q0}.weight"]
    x = torch.randn(5, 96, dtype=torch.float64)
    pooled = nn.AvgPool1d(16)(x[:, None])[:, 0]
    expected = 2.0 * pooled @ tensors[f"{PREFIX}{Q0}.lora_A.weight"].T @ tensors[f"{PREFIX}{Q0}.lora_B.weight"].T
    assert adapter.kind == "qalora"
    assert np.abs(x.numpy() @ delta.dense().T - expected.numpy()).max() <= 1e-12
    compact = delta.pooled(16)
    assert compact is not None
    assert compact.shape == (4, 6)


def test_use_qalora_on_an_ordinary_linear_is_ignored_as_peft_ignores_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = tiny_model("llama16")
    path = save_peft(directory, tmp_path / "a", use_qalora=True, qalora_group_size=8, target_modules=["q_proj"])
    assert check_against_peft(directory, path).kind == "lora"


def test_another_pool_than_the_configuration_says_is_refused(
    attention: Path, tmp_path: Path, llama: Description
) -> None:
    path = rewritten(attention, tmp_path / "a", use_qalora=True, qalora_group_size=32)
    with pytest.raises(InputError, match=r"\[4, 6\]"):
        Adapter.open(retensored(path, path, pool(16)), llama)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "compiled": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "fsdp": lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "the bare decoder": lambda key: key.replace(f"{PREFIX}model.", PREFIX),
    "wrapped twice": lambda key: PREFIX + key,
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "magnitudes as modules": lambda key: key.replace("magnitude_vector", "magnitude_vector.default.weight"),
    "magnitudes as weights": lambda key: key.replace("magnitude_vector", "magnitude_vector.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_the_same_keys(spelling: str, tiny_model: TinyModel, llama: Description, tmp_path: Path) -> None:
    source = save_peft(tiny_model("llama16"), tmp_path / "source", use_dora=True)
    path = retensored(source, tmp_path / "a", renamed(SPELLINGS[spelling]))
    found, expected = Adapter.open(path, llama), Adapter.open(source, llama)
    assert found.deltas.keys() == expected.deltas.keys()
    for name, delta in expected.deltas.items():
        assert np.array_equal(found.deltas[name].dense(), delta.dense())
        assert np.array_equal(found.deltas[name].magnitude, delta.magnitude)


def test_mixtrals_older_names_of_experts(tiny_model: TinyModel, tmp_path: Path, plain: Path) -> None:
    description = description_of(tiny_model("mixtral"))
    path = f"{PREFIX}model.layers.1.block_sparse_moe.experts.3.w2"
    factors = {f"{path}.lora_A.weight": torch.randn(4, 152), f"{path}.lora_B.weight": torch.randn(96, 4)}
    adapter = Adapter.open(retensored(plain, tmp_path / "a", lambda t: (t.clear(), t.update(factors))), description)
    assert list(adapter.deltas) == ["model.layers.1.mlp.experts.3.down_proj.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats(dtype: torch.dtype, plain: Path, llama: Description, tmp_path: Path) -> None:
    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: value.to(dtype) for key, value in tensors.items()})

    path = retensored(plain, tmp_path / "a", cast)
    wanted = load_file(path / "adapter_model.safetensors")[f"{PREFIX}{Q0}.lora_A.weight"].double().numpy()
    assert np.array_equal(Adapter.open(path, llama).deltas[f"{Q0}.weight"].a, wanted)


def test_the_fingerprint_covers_every_file(plain: Path, tmp_path: Path, llama: Description) -> None:
    copy = shutil.copytree(plain, tmp_path / "copy")
    other = rewritten(plain, tmp_path / "other", lora_alpha=9)
    assert Adapter.open(copy, llama).fingerprint == Adapter.open(plain, llama).fingerprint
    assert Adapter.open(other, llama).fingerprint != Adapter.open(plain, llama).fingerprint


# --- what is refused

FEATURES: dict[str, tuple[dict[str, Any], str, str]] = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save", "merge_and_unload"),
    "bias": ({"bias": "all"}, "bias='all'", "merge_and_unload"),
    "lora_bias": ({"lora_bias": True}, "lora_bias", "merge_and_unload"),
    "layer_replication": ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication", "written out"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens", "plain LoRA"),
    "target_parameters": ({"target_parameters": ["experts.down_proj"]}, "target_parameters", "merge_and_unload"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices", "merge_and_unload"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4", "path_initial_model_for_weight_conversion"),
    "olora": ({"init_lora_weights": "olora"}, "olora", "path_initial_model_for_weight_conversion"),
    "corda": ({"init_lora_weights": "corda"}, "corda", "path_initial_model_for_weight_conversion"),
    "loftq": ({"init_lora_weights": "loftq"}, "loftq", "--init loftq"),
    "loha": ({"peft_type": "LOHA"}, "peft_type 'LOHA'", "convert_to_lora"),
    "prompt": ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING", "train a LoRA"),
    "no type": ({"peft_type": None}, "peft_type None", "convert_to_lora"),
    "blocks": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora", "convert_to_lora"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config", "merge_and_unload"),
    "unknown": ({"use_telepathy": True}, "'use_telepathy'", "remove it"),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_are_refused_by_name(feature: str, plain: Path, tmp_path: Path, llama: Description) -> None:
    config, reason, way_out = FEATURES[feature]
    with pytest.raises(UnsupportedModelError) as caught:
        Adapter.open(rewritten(plain, tmp_path / "a", **config), llama)
    assert reason in caught.value.message
    assert way_out in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


EXTRA_TENSORS = {
    "model.embed_tokens.lora_embedding_A": "an update of an embedding",
    "lm_head.modules_to_save.weight": "modules_to_save",
    "model.layers.0.mlp.up_proj.lora_B.bias": "lora_bias",
    "model.layers.0.mlp.up_proj.bias": "a bias",
    "model.layers.0.mlp.experts.base_layer.lora_A.weight": "base model",
    "model.layers.0.mlp.up_proj.lora_E": "no factor",
    "model.layers.0.self_attn.q_proj.lora_a": "MLX",
    "model.layers.0.mlp.wide_proj.lora_A.weight": "no linear of a llama",
    "model.embed_tokens.lora_A.weight": "the embedding",
}


@pytest.mark.parametrize("key", EXTRA_TENSORS)
def test_tensors_of_other_kinds_are_refused_by_name(key: str, plain: Path, tmp_path: Path, llama: Description) -> None:
    path = retensored(plain, tmp_path / "a", lambda tensors: tensors.update({PREFIX + key: torch.ones(4, 96)}))
    with pytest.raises(UnsupportedModelError, match=EXTRA_TENSORS[key]) as caught:
        Adapter.open(path, llama)
    assert key.split(".lora_A")[0] in caught.value.message
    assert caught.value.hint


def damaged(change: str, path: Path) -> None:
    weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    match change:
        case "no config":
            config.unlink()
        case "no weights":
            weights.unlink()
        case "pickled":
            weights.rename(path / "adapter_model.bin")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "empty file":
            weights.write_bytes(b"")
        case "half a config":
            config.write_text(config.read_text()[:40])
        case "a list":
            config.write_text("[]")
        case "a directory of adapters":
            (path / "default").mkdir()
            config.rename(path / "default" / config.name)
        case "a model":
            config.rename(path / "config.json")


FILES = {
    "no config": ("has no adapter_config.json", "save_pretrained"),
    "no weights": ("has no adapter_model.safetensors", "save"),
    "pickled": ("pickled weights", "safe_serialization=True"),
    "truncated": ("cannot be read", "truncated or damaged"),
    "empty file": ("cannot be read", "truncated or damaged"),
    "half a config": ("cannot be read", "save the adapter again"),
    "a list": ("not a JSON object", "save the adapter again"),
    "a directory of adapters": ("has no adapter_config.json", "default"),
    "a model": ("has no adapter_config.json", "it is a model"),
}


@pytest.mark.parametrize("change", FILES)
def test_damaged_directories(change: str, plain: Path, tmp_path: Path, llama: Description) -> None:
    path = shutil.copytree(plain, tmp_path / "a")
    damaged(change, path)
    with pytest.raises(InputError) as caught:
        Adapter.open(path, llama)
    assert FILES[change][0] in caught.value.message
    assert FILES[change][1] in caught.value.hint
    assert "\n" not in caught.value.message


def test_no_directory(tmp_path: Path, llama: Description) -> None:
    with pytest.raises(InputError, match="not an adapter directory"):
        Adapter.open(tmp_path / "nowhere", llama)


A, B, M = (f"{PREFIX}{Q0}.lora_{kind}" for kind in ("A.weight", "B.weight", "magnitude_vector"))
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "inputs": (lambda t: t.update({A: torch.ones(4, 95)}), rf"'{A}' has shape \[4, 95\].* ask for \[4, 96\]"),
    "outputs": (lambda t: t.update({B: torch.ones(90, 4)}), rf"'{B}' has shape \[90, 4\].* ask for \[96, 4\]"),
    "rank": (lambda t: t.update({A: torch.ones(5, 96)}), rf"'{A}' has shape \[5, 96\].* ask for \[4, 96\]"),
    "flat": (lambda t: t.update({A: torch.ones(384)}), rf"'{A}' has shape \[384\]"),
    "transposed": (lambda t: t.update({A: torch.ones(96, 4)}), rf"'{A}' has shape \[96, 4\]"),
    "nothing": (lambda t: t.update({A: torch.ones(0, 96)}), rf"'{A}' has shape \[0, 96\]"),
    "nan": (lambda t: t[B].fill_(torch.nan), f"'{B}'.* NaN or infinite"),
    "infinite": (lambda t: t[B].fill_(torch.inf), f"'{B}'.* NaN or infinite"),
    "no A": (lambda t: t.pop(A), f"lacks lora_A of {Q0}"),
    "no B": (lambda t: t.pop(B), f"lacks lora_B of {Q0}"),
    "empty": (lambda t: t.clear(), "holds no updates"),
    "magnitudes": (lambda t: t.update({M: torch.ones(96)}), "use_dora=False"),
    "layers": (lambda t: renamed(lambda key: key.replace("layers.1.", "layers.7."))(t), "the model has 2 layers"),
    "twice": (lambda t: t.update({A.replace(PREFIX, ""): torch.ones(4, 96)}), "lora_A of .* twice"),
}


@pytest.mark.parametrize("change", TENSORS)
def test_damaged_tensors(change: str, plain: Path, tmp_path: Path, llama: Description) -> None:
    path = retensored(plain, tmp_path / "a", TENSORS[change][0])
    with pytest.raises(InputError, match=TENSORS[change][1]) as caught:
        Adapter.open(path, llama)
    assert caught.value.hint


def test_integers_are_no_updates(plain: Path, tmp_path: Path, llama: Description) -> None:
    path = retensored(plain, tmp_path / "a", lambda t: t.update({A: torch.ones(4, 96, dtype=torch.int8)}))
    with pytest.raises(UnsupportedModelError, match="of type I8"):
        Adapter.open(path, llama)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0},
        {"r": "4"},
        {"r": None},
        {"lora_alpha": None},
        {"lora_alpha": float("inf")},
        {"use_dora": "yes"},
        {"rank_pattern": {"(": 3}},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": {"q_proj": "x"}},
        {"rank_pattern": [3]},
        {"use_dora": True},
        {"use_rslora": 1},
    ],
    ids=repr,
)
def test_configurations_that_cannot_be(config: dict[str, Any], plain: Path, tmp_path: Path, llama: Description) -> None:
    with pytest.raises(InputError) as caught:
        Adapter.open(rewritten(plain, tmp_path / "a", **config), llama)
    assert caught.value.hint


def test_an_old_configuration_of_few_keys_is_enough(plain: Path, tmp_path: Path, llama: Description) -> None:
    path = shutil.copytree(plain, tmp_path / "a")
    few = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(few))
    assert Adapter.open(path, llama).deltas[f"{Q0}.weight"].scale == 2.0


def test_pools_of_different_sizes_are_another_models_adapter(
    attention: Path, tmp_path: Path, llama: Description
) -> None:
    def uneven(tensors: dict[str, torch.Tensor]) -> None:
        tensors[A] = tensors[A][:, ::32] * 1.0

    with pytest.raises(InputError, match="pool different numbers of inputs"):
        Adapter.open(retensored(attention, tmp_path / "a", uneven), llama)


def test_any_byte_cut_off_is_one_clear_error(attention: Path, tmp_path: Path, llama: Description) -> None:
    path = shutil.copytree(attention, tmp_path / "a")
    weights = path / "adapter_model.safetensors"
    content = weights.read_bytes()
    for length in [*range(64), *range(64, len(content), 997)]:
        weights.write_bytes(content[:length])
        with pytest.raises(RqcError, match="cannot be read"):
            Adapter.open(path, llama)


def test_the_model_is_not_needed_only_its_names(tiny_model: TinyModel, plain: Path) -> None:
    """A description of checkpoint names reads the same adapter as one of graph names."""
    directory = tiny_model("llama16")
    by_names = Description.of(description_of(directory).architecture, Checkpoint.open(directory).tensors)
    assert Adapter.open(plain, by_names).deltas.keys() == Adapter.open(plain, description_of(directory)).deltas.keys()
