"""A model in a GGUF file is the model that its safetensors hold: tensors, function, engine, tokenizer; and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from as_gguf import KINDS, stored_tensors, write_gguf
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rqc.compiler.api import compile_engine
from rqc.compiler.importer import import_model
from rqc.compiler.verify.engine import verify_engine
from rqc.models.checkpoint import Checkpoint, model_directory, read_config
from rqc.models.gguf_source import GgufTensor, read_gguf
from rqc.models.torch_model import load_torch_model
from rqc.passes.base import weight_of
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import CheckpointError, RqcError, UnsupportedModelError

MakeTiny = Callable[..., Path]
GEMMA3_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bias": {},
    "llama-tied": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"sliding_window": 16},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "layer_types": GEMMA3_LAYERS},
}
"""Tiny models of tests/tiny.py, changed where a GGUF cannot say what they have there."""


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, tiny_model: MakeTiny, tmp_path: Path) -> tuple[Path, Path]:
    """The same model as safetensors and as a float32 GGUF."""
    model = tiny_model(request.param, **MODELS[request.param])
    return model, write_gguf(model, tmp_path / "gguf" / "model.gguf").parent


@pytest.fixture
def llama(tiny_model: MakeTiny) -> Path:
    return tiny_model("llama16", vocab_size=260)


def logits(model: Path) -> NDArray[np.float32]:
    with torch.inference_mode():
        values: NDArray[np.float32] = load_torch_model(model)(torch.arange(60)[None] * 7 % 96).logits.numpy()
    return values


def test_tensors_are_those_of_the_safetensors(pair: tuple[Path, Path]) -> None:
    model, converted = map(Checkpoint.open, pair)
    assert converted.tensors.keys() == model.tensors.keys()
    for name in model.tensors:
        rounding = 1e-7 if "norm" in name else 0.0  # 1 + w of Gemma was rounded to float32
        np.testing.assert_allclose(converted.read(name), model.read(name), rtol=0, atol=rounding, err_msg=name)


def test_function_is_that_of_the_safetensors(pair: tuple[Path, Path]) -> None:
    """In PyTorch, with the weights of transformers' own GGUF loader and the config that rqc made."""
    model, converted = map(logits, pair)
    np.testing.assert_allclose(converted, model, atol=2e-6 * np.abs(model).max())


def test_weights_of_pytorch_and_of_the_graph_are_the_same(pair: tuple[Path, Path]) -> None:
    loaded = load_torch_model(pair[1]).state_dict()
    checkpoint = Checkpoint.open(pair[1])
    for name in checkpoint.tensors:
        np.testing.assert_allclose(
            checkpoint.read(name), loaded[name].double().numpy(), rtol=0, atol=1e-7, err_msg=name
        )


def test_graph_is_that_of_the_safetensors(pair: tuple[Path, Path]) -> None:
    model, converted = (import_model(directory).model.graph for directory in pair)
    assert [node.op_type for node in converted] == [node.op_type for node in model]
    assert converted.initializers.keys() == model.initializers.keys()
    assert converted.name == model.name
    for name, value in model.initializers.items():
        assert (weight_of(value) is None) == (weight_of(converted.initializers[name]) is None)
        if weight_of(value) is None:
            np.testing.assert_array_equal(value.const_value.numpy(), converted.initializers[name].const_value.numpy())


@pytest.mark.parametrize("kind", [KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_1], ids=str)
def test_rows_are_dequantized_apart(llama: Path, tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    checkpoint = Checkpoint.open(write_gguf(llama, tmp_path / "model.gguf", kind))
    stored = stored_tensors(llama)["blk.1.attn_q.weight"]
    values = gguf.dequantize(gguf.quantize(stored, kind), kind)
    whole = values.reshape(6, 8, 2, 96).swapaxes(1, 2).reshape(96, 96)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert checkpoint.info(name).dtype == kind.name
    np.testing.assert_array_equal(checkpoint.read(name), whole)
    for start, stop in ((0, 1), (5, 6), (7, 41), (16, 32), (95, 96), (3, 3)):
        np.testing.assert_array_equal(checkpoint.read(name, start, stop), whole[start:stop])


def test_a_bias_of_q_is_interleaved_too(tiny_model: MakeTiny, tmp_path: Path) -> None:
    model = tiny_model("llama-bias")
    name = "model.layers.0.self_attn.k_proj.bias"
    expected = Checkpoint.open(model).read(name)
    found = Checkpoint.open(write_gguf(model, tmp_path / "model.gguf"))
    np.testing.assert_array_equal(found.read(name), expected)
    np.testing.assert_array_equal(found.read(name, 3, 21), expected[3:21])


def test_engine_is_the_same_on_every_run_and_holds_what_a_device_needs(llama: Path, tmp_path: Path) -> None:
    first = write_gguf(llama, tmp_path / "a" / "model.gguf", pre="smollm")
    second = write_gguf(llama, tmp_path / "b" / "other.gguf", pre="smollm")
    digests = {
        compile_engine(model, tmp_path / "engine.plan", scheme="w4a16", rotate="r1,r4").sha256
        for model in (first.parent, first, second)
    }
    assert len(digests) == 1
    with EngineFile.open(tmp_path / "engine.plan", check=True) as engine:
        assert engine.manifest["generation"]["eos_token_ids"] == [2, 3]
        assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= set(engine.names())
        assert json.loads(engine.read("config.json"))["model_type"] == "llama"
        said = b"".join(engine.read(name) for name in engine.names() if name != "weights.bin")
    assert str(tmp_path).encode() not in said
    assert b"rqc-gguf-" not in said


def test_weights_of_the_engine_are_those_of_the_safetensors(llama: Path, tmp_path: Path) -> None:
    converted = write_gguf(llama, tmp_path / "model.gguf").parent
    reports = [
        compile_engine(model, tmp_path / f"{index}.plan", scheme="w4a8", rotate="r1,r2")
        for index, model in enumerate((llama, converted))
    ]
    weights = []
    for report in reports:
        with EngineFile.open(str(report.engine)) as engine:
            weights.append(engine.manifest["entries"]["weights.bin"]["sha256"])
    assert weights[0] == weights[1]


def test_an_engine_is_verified_against_the_gguf_that_it_came_from(llama: Path, tmp_path: Path) -> None:
    model = write_gguf(llama, tmp_path / "model.gguf", KINDS.Q8_0).parent
    compile_engine(model, tmp_path / "engine.plan", scheme="w4a16", rotate="r1,r4")
    ids = [int(token) for token in np.random.default_rng(0).integers(0, 260, 64)]
    report = verify_engine(tmp_path / "engine.plan", model, token_ids=ids, tokens=64, gates={"ppl_ratio": 1e9})
    assert report.passed


def test_token_ids_are_those_of_the_file_alone(tiny_model: MakeTiny, tmp_path: Path) -> None:
    """Not the defaults of the config's class, and none that the embedding lacks."""
    extra = {"tokenizer.ggml.padding_token_id": 96, "tokenizer.ggml.bos_token_id": 95}
    config = read_config(write_gguf(tiny_model("phi3"), tmp_path / "model.gguf", extra=extra))
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [95, None, None]


def test_the_pre_tokenizer_of_smollm_splits_digits(llama: Path, tmp_path: Path) -> None:
    def ids(pre: str) -> list[int]:
        directory = model_directory(write_gguf(llama, tmp_path / f"{pre}.gguf", pre=pre))
        found: list[int] = Tokenizer.from_file(str(directory / "tokenizer.json")).encode("a12").ids
        return found

    assert len(ids("gpt-2")) == 2  # "a", "12"
    assert len(ids("smollm")) == 3


def test_an_unknown_pre_tokenizer_is_refused_unless_the_tokenizer_lies_beside(llama: Path, tmp_path: Path) -> None:
    known = model_directory(write_gguf(llama, tmp_path / "known" / "model.gguf", pre="smollm"))
    path = write_gguf(llama, tmp_path / "model.gguf", pre="of-tomorrow")
    with pytest.raises(UnsupportedModelError, match="of-tomorrow") as refused:
        model_directory(path)
    assert "tokenizer.json beside" in refused.value.hint
    shutil.copy(known / "tokenizer.json", tmp_path)
    assert (model_directory(path) / "tokenizer.json").read_bytes() == (known / "tokenizer.json").read_bytes()


def test_safetensors_win(llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "both")
    (model / "broken.gguf").write_bytes(b"no GGUF at all")
    assert Checkpoint.open(model).directory == model


def test_of_several_files_one_is_to_be_named(llama: Path, tmp_path: Path) -> None:
    one, two = write_gguf(llama, tmp_path / "one.gguf"), tmp_path / "two.gguf"
    shutil.copy(one, two)
    with pytest.raises(CheckpointError, match=r"one\.gguf, two\.gguf"):
        Checkpoint.open(tmp_path)
    assert Checkpoint.open(two).fingerprint() == Checkpoint.open(one).fingerprint()


def test_a_file_is_read_again_when_it_changes(llama: Path, tiny_model: MakeTiny, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf")
    before = read_config(path)
    path.unlink()
    write_gguf(tiny_model("qwen2"), path)
    assert (before["model_type"], read_config(path)["model_type"]) == ("llama", "qwen2")


@pytest.mark.parametrize(
    ("architecture", "extra", "reason"),
    [
        ("qwen3moe", {}, "architecture 'qwen3moe'"),
        ("bert", {}, "architecture 'bert'"),
        (None, {"llama.rope.scaling.type": "yarn"}, "rope.scaling.type = yarn"),
        (None, {"llama.expert_count": 8}, "expert_count = 8"),
        (None, {"llama.attention.sliding_window": 32}, "sliding_window = 32"),
        (None, {"split.count": 3}, "one part of several"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    llama: Path, tmp_path: Path, architecture: str | None, extra: dict[str, Any], reason: str
) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf", architecture=architecture, extra=extra)
    with pytest.raises(UnsupportedModelError, match=reason) as refused:
        import_model(path)
    assert refused.value.hint


def test_scaled_rotary_frequencies_want_the_models_own_config(tiny_model: MakeTiny, tmp_path: Path) -> None:
    model = tiny_model("llama3-rope")
    path = write_gguf(model, tmp_path / "model.gguf", more={"rope_freqs.weight": np.ones(8, np.float32)})
    with pytest.raises(UnsupportedModelError, match="rope_freqs") as refused:
        import_model(path)
    assert "config.json beside" in refused.value.hint
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as many GGUF repositories have it: no config
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        import_model(path)
    path.touch()
    shutil.copy(model / "config.json", tmp_path)
    assert "rope_freqs.weight" not in Checkpoint.open(path)
    np.testing.assert_allclose(logits(path), logits(model), atol=1e-6)


def test_a_tensor_that_the_graph_does_not_use_is_refused(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf", more={"blk.0.attn_gate.weight": np.ones((3, 5), np.float32)})
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_gate\.weight"):
        import_model(path)


def test_a_type_that_gguf_cannot_dequantize_is_refused(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf")
    data = path.read_bytes()
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "output_norm.weight")
    place = tensor.field.offset + sum(part.nbytes for part in tensor.field.parts[:-2])
    path.write_bytes(data[:place] + int(KINDS.I32).to_bytes(4, "little") + data[place + 4 :])
    with pytest.raises(UnsupportedModelError, match=r"'output_norm\.weight'.* I32"):
        read_gguf(path)


def test_nan_is_named(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf", more={"output_norm.weight": np.full(96, np.nan, np.float32)})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' in model\.gguf holds NaN"):
        Checkpoint.open(path).read("model.norm.weight")


def test_heads_that_do_not_divide_the_rows_are_named(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf", more={"blk.0.attn_q.weight": np.ones((95, 96), np.float32)})
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight has 95 rows for 6 heads"):
        Checkpoint.open(path)


def test_a_file_cut_off_anywhere_is_named_damaged(llama: Path, tmp_path: Path) -> None:
    data = write_gguf(llama, tmp_path / "model.gguf", pre="smollm").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 23, 24, 100, 1000, 3000, len(data) // 2, len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf cannot be read"):
            Checkpoint.open(cut)


def test_a_file_that_shrinks_after_it_was_opened_is_named_damaged(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf")
    opened = Checkpoint.open(path)
    last = max(opened.tensors, key=lambda name: opened.tensors[name].offset)  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="become shorter"):
        opened.read(last)


def test_flipped_bytes_end_in_an_error_of_ours(llama: Path, tmp_path: Path) -> None:
    """Never in a traceback or a loop without end; most flips in names and values pass unseen."""
    data = bytearray(write_gguf(llama, tmp_path / "model.gguf").read_bytes())
    head = data.index(b"output_norm.weight") + 60
    rng = np.random.default_rng(0)
    flipped = tmp_path / "flipped.gguf"
    failed = 0
    for place in rng.integers(4, head, 60):
        changed = data.copy()
        changed[place] ^= int(rng.integers(1, 256))
        flipped.write_bytes(changed)
        try:
            Checkpoint.open(flipped)
        except RqcError:
            failed += 1
    assert failed > 10


def test_row_order_is_a_permutation_within_heads() -> None:
    tensor = GgufTensor(Path("x"), (24, 5), "F32", 0, interleaved=3)
    order = tensor._stored(np.arange(24))
    assert sorted(order) == list(range(24))
    assert order[:8].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
