"""Reading a model directory: exact values, and an error of ours with a way out for everything that is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rqc.compiler.importer import import_model
from rqc.models.checkpoint import Checkpoint, read_config
from rqc.runtime.errors import CheckpointError, UnsupportedModelError

MakeTiny = Callable[..., Path]
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tiny_model: MakeTiny, tmp_path: Path) -> Path:
    """A tiny Llama of one's own, to be damaged."""
    return shutil.copytree(tiny_model("llama16"), tmp_path / "model")


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same in two shards with an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {"one.safetensors": {}, "two.safetensors": {}}
    for position, name in enumerate(sorted(tensors)):
        shards[sorted(shards)[position % 2]][name] = tensors[name]
    for file, part in shards.items():
        save_file(part, model / file)
    write_index(model, {name: file for file, part in shards.items() for name in part})
    return model


def write_index(model: Path, weight_map: object) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def index_of(model: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    return weight_map


def change(model: Path, **tensors: torch.Tensor) -> None:
    """Replace tensors, whose names are given with __ for dots."""
    path = model / "model.safetensors"
    save_file({**load_file(path), **{name.replace("__", "."): value for name, value in tensors.items()}}, path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_are_read_exactly(model: Path, dtype: torch.dtype) -> None:
    values = torch.randn(70, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    change(model, x=values)
    checkpoint = Checkpoint.open(model)
    expected = values.double().numpy()
    np.testing.assert_array_equal(checkpoint.read("x"), expected)
    np.testing.assert_array_equal(checkpoint.read("x", 7, 41), expected[7:41])
    np.testing.assert_array_equal(checkpoint.read("x", 60, 99), expected[60:])
    assert checkpoint.read("x").dtype == np.float64


def test_every_bfloat16_is_read_exactly(model: Path) -> None:
    """All 2^16 patterns but infinities and NaN."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    bits = bits[(bits & 0x7F80) != 0x7F80]
    patterns = torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    change(model, x=patterns)
    np.testing.assert_array_equal(Checkpoint.open(model).read("x"), (bits << 16).view(np.float32).astype(np.float64))


def test_a_scalar_is_read(model: Path) -> None:
    change(model, x=torch.tensor(2.5))
    assert Checkpoint.open(model).read("x") == 2.5


def test_shards_make_the_model_that_one_file_makes(sharded: Path, tiny_model: MakeTiny) -> None:
    single, checkpoint = Checkpoint.open(tiny_model("llama16")), Checkpoint.open(sharded)
    assert checkpoint.tensors.keys() == single.tensors.keys()
    for name in single.tensors:
        np.testing.assert_array_equal(checkpoint.read(name), single.read(name))
    assert checkpoint.fingerprint() == single.fingerprint()


def test_the_fingerprint_tells_models_apart(model: Path) -> None:
    before = Checkpoint.open(model).fingerprint()
    change(model, model__norm__weight=torch.full((96,), 2.0))
    assert Checkpoint.open(model).fingerprint() != before


@pytest.mark.parametrize("opened", [Checkpoint.open, read_config, import_model])
def test_no_directory(tmp_path: Path, opened: Callable[[Path], object]) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "nowhere", tmp_path / "nowhere.gguf"):
        with pytest.raises(CheckpointError, match="is not a model directory"):
            opened(path)


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        import_model(model)


@pytest.mark.parametrize(("text", "reason"), [("{", "not valid JSON"), ("[1]", "not a JSON object"), ("\xff", "JSON")])
def test_no_usable_config(model: Path, text: str, reason: str) -> None:
    (model / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=reason):
        import_model(model)


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        import_model(model)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickled_weights_are_refused_with_the_way_out(model: Path, file: str) -> None:
    (model / "model.safetensors").rename(model / file)
    with pytest.raises(CheckpointError, match="pickled") as refused:
        import_model(model)
    assert file in refused.value.message
    assert "save_pretrained" in refused.value.hint


def test_pickles_beside_safetensors_are_left_alone(model: Path) -> None:
    (model / "optimizer.pt").write_bytes(b"never opened")
    assert NAME in Checkpoint.open(model)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard two\.safetensors is missing"):
        import_model(sharded)


def test_a_tensor_that_the_index_promises_is_named(sharded: Path) -> None:
    write_index(sharded, {**index_of(sharded), "model.extra.weight": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"one\.safetensors lacks tensor 'model\.extra\.weight'"):
        import_model(sharded)


@pytest.mark.parametrize("file", ["../one.safetensors", "/etc/one.safetensors", "sub/one.safetensors"])
def test_an_index_cannot_leave_its_directory(sharded: Path, file: str) -> None:
    shutil.copy(sharded / "one.safetensors", sharded.parent)
    write_index(sharded, dict.fromkeys(index_of(sharded), file))
    with pytest.raises(CheckpointError, match="outside of its directory"):
        import_model(sharded)


@pytest.mark.parametrize("weight_map", [None, 3, [1, 2], {"x": 3}, {"x": None}, {"x": ""}])
def test_an_index_that_is_none(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        import_model(sharded)


def test_a_missing_tensor_is_named(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors[NAME]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=NAME):
        import_model(model)


@pytest.mark.parametrize("shape", [(152, 95), (151, 96), (153, 96), (152,), (1, 152, 96)])
def test_a_tensor_of_another_shape_than_the_config_asks_for(model: Path, shape: tuple[int, ...]) -> None:
    change(model, **{NAME.replace(".", "__"): torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=r"asks for \[152, 96\]") as refused:
        import_model(model)
    assert NAME in refused.value.message
    assert str(list(shape)) in refused.value.message


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_named(model: Path, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        import_model(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_are_no_numbers_are_named(model: Path, value: float, dtype: torch.dtype) -> None:
    values = torch.zeros(152, 96, dtype=dtype)
    values[77, 5] = value
    change(model, **{NAME.replace(".", "__"): values})
    checkpoint = Checkpoint.open(model)
    checkpoint.read(NAME, 0, 77)
    with pytest.raises(CheckpointError, match=f"'{NAME}' in model.safetensors holds NaN or infinite"):
        checkpoint.read(NAME, 77, 78)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_quantized_already_are_refused(model: Path, dtype: torch.dtype) -> None:
    change(model, **{NAME.replace(".", "__"): torch.zeros(152, 96).to(dtype)})
    with pytest.raises(UnsupportedModelError, match=NAME) as refused:
        import_model(model)
    assert "float" in refused.value.hint
