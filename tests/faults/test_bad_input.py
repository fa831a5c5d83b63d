"""What a user can get wrong, by the command line: two lines that help, exit code 2, nothing left, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from rqc.compiler.cli import main
from rqc.runtime.engine import Engine

MakeTiny = Callable[..., Path]
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
DEEP = "[" * 100_000


class Refused(NamedTuple):
    """The last two lines on stderr, without their first words."""

    error: str
    hint: str


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Refused]:
    """Run a command that must fail as bad input does, once as it is and once with --json."""

    def call(*args: object) -> Refused:
        told = []
        before = sorted(tmp_path.rglob("*"))
        for more in [[]] if args[0] == "run" else [[], ["--json"]]:
            capsys.readouterr()
            code = main([*map(str, args), *more])
            out, err = capsys.readouterr()
            error, hint = err.splitlines()[-2:]
            assert code == 2, err
            assert "Traceback" not in err
            assert error.startswith("error: ")
            assert hint.startswith("hint: ")
            assert len(hint) > 8
            if more:
                assert set(json.loads(out)["error"]) == {"type", "message", "hint"}
            else:
                assert out == ""
            told.append(Refused(error.removeprefix("error: "), hint.removeprefix("hint: ")))
        assert sorted(tmp_path.rglob("*")) == before
        return told[0]

    return call


@pytest.fixture
def refused_compile(refused: Callable[..., Refused], tmp_path: Path) -> Callable[..., Refused]:
    """Compile a directory that must be refused."""
    return lambda model, *more: refused("compile", model, "-o", tmp_path / "e.plan", "--rotate", "none", *more)


def add_tokenizer(directory: Path) -> None:
    """A tokenizer of single characters."""
    tokenizer = Tokenizer(models.WordLevel({chr(32 + index): index for index in range(95)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture
def model(tiny_model: MakeTiny, tmp_path: Path) -> Path:
    """A tiny Llama of one's own with a tokenizer, to be damaged."""
    directory = Path(shutil.copytree(tiny_model("llama16"), tmp_path / "model"))
    add_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def engine(tiny_model: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound engine with a tokenizer and a context of 256."""
    folder = tmp_path_factory.mktemp("engine")
    directory = Path(shutil.copytree(tiny_model("llama16"), folder / "model"))
    add_tokenizer(directory)
    assert main(["compile", str(directory), "-o", str(folder / "e.plan"), "--rotate", "r1,r4"]) == 0
    return folder / "e.plan"


def set_config(model: Path, **values: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def set_tensor(model: Path, name: str, value: torch.Tensor | None) -> None:
    path = model / "model.safetensors"
    tensors = {**load_file(path), name: value}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def with_nan(*shape: int) -> torch.Tensor:
    values = torch.zeros(shape)
    values.view(-1)[5] = float("nan")
    return values


# config.json


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "head_dim"])
@pytest.mark.parametrize("value", [-96, 0, "96", 96.5, [96], True], ids=str)
def test_sizes_that_no_model_has(model: Path, refused_compile: Callable[..., Refused], key: str, value: object) -> None:
    set_config(model, **{key: value})
    told = refused_compile(model)
    assert key in told.error
    assert "config.json" in told.error


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 5},
        {"hidden_size": None},
        {"head_dim": 15},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 7},
        {"max_position_embeddings": 0},
        {"intermediate_size": -1},
        {"rms_norm_eps": "small"},
        {"hidden_act": "nonsense"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}},
        {"rope_parameters": 3},
        {"query_pre_attn_scalar": -1},
        {"tie_word_embeddings": "yes"},
        {"eos_token_id": [2, "y"]},
        {"dtype": "nonsense"},
        {"model_type": "unheard_of"},
        {"model_type": ["llama"]},
        {"model_type": None},
    ],
    ids=str,
)
def test_configs_of_no_model(model: Path, refused_compile: Callable[..., Refused], values: dict[str, object]) -> None:
    set_config(model, **values)
    refused_compile(model)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", DEEP, '{"a":' * 50_000], ids=lambda text: text[:8])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_files_beside_the_weights_that_are_not_what_they_are_called(
    model: Path, refused_compile: Callable[..., Refused], file: str, text: str
) -> None:
    (model / file).write_text(text)
    assert file in refused_compile(model).error


@pytest.mark.parametrize("file", ["config.json", "special_tokens_map.json", "tokenizer.json", "chat_template.jinja"])
def test_files_that_are_not_utf_8(model: Path, refused_compile: Callable[..., Refused], file: str) -> None:
    (model / file).write_bytes(b"\xff\xfe{}")
    assert file in refused_compile(model).error


@pytest.mark.parametrize("values", [{"eos_token_id": "x"}, {"eos_token_id": [1, None]}, {"bos_token_id": 1.5}], ids=str)
def test_special_tokens_that_are_no_ids(model: Path, refused_compile: Callable[..., Refused], values: object) -> None:
    (model / "generation_config.json").write_text(json.dumps(values))
    assert "special token" in refused_compile(model).error


def test_a_tokenizer_of_another_model(model: Path, refused: Callable[..., Refused], tmp_path: Path) -> None:
    text = (model / "tokenizer.json").read_text().replace('"e": 69,', '"e": 4711,')
    (model / "tokenizer.json").write_text(text)
    assert "4711" in refused("compile", model, "-o", tmp_path / "e.plan").error


def test_a_multiplier_that_is_a_whole_number(tiny_model: MakeTiny, tmp_path: Path) -> None:
    """JSON tells 2 from 2.0 and so does ONNX: both are right here."""
    logits = []
    for value in (2, 2.0):
        path = tmp_path / f"{value}.plan"
        model = tiny_model("granite", attention_multiplier=value)
        assert main(["compile", str(model), "-o", str(path), "--rotate", "none", "--scheme", "fp32"]) == 0
        with Engine.load(path, threads=1) as engine:
            logits.append(engine.logits([3, 1, 4, 1, 5]))
    np.testing.assert_allclose(*logits, rtol=1e-6, atol=1e-6)


# weights


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "w6a6", "w4a8"])
@pytest.mark.parametrize(("name", "shape"), [(UP, (152, 96)), (NORM, (96,)), ("lm_head.weight", (96, 96))])
def test_nan_in_the_weights(
    model: Path, refused_compile: Callable[..., Refused], name: str, shape: tuple[int, ...], scheme: str
) -> None:
    set_tensor(model, name, with_nan(*shape))
    assert name in refused_compile(model, "--scheme", scheme).error


@pytest.mark.parametrize("options", [["--verify-each"], ["--rotate", "auto"], ["--rotate", "r1,r2,r4"]], ids=str)
def test_nan_where_a_weight_is_evaluated_earlier(
    model: Path, refused_compile: Callable[..., Refused], options: list[str]
) -> None:
    set_tensor(model, NORM, with_nan(96))
    assert NORM in refused_compile(model, *options).error


@pytest.mark.parametrize(("scheme", "value"), [("fp16", 1e30), ("fp32", 1e300), ("w4a8", 1e300)])
def test_weights_beyond_the_type_that_stores_them(
    model: Path, refused_compile: Callable[..., Refused], scheme: str, value: float
) -> None:
    set_tensor(model, UP, torch.full((152, 96), value, dtype=torch.float64))
    assert UP in refused_compile(model, "--scheme", scheme).error


@pytest.mark.parametrize("shape", [(), (95,), (1, 96), (0,)], ids=str)
def test_a_norm_of_another_shape(model: Path, refused_compile: Callable[..., Refused], shape: tuple[int, ...]) -> None:
    set_tensor(model, NORM, torch.ones(shape))
    assert "asks for [96]" in refused_compile(model).error


def test_a_missing_tensor_and_a_truncated_file(model: Path, refused_compile: Callable[..., Refused]) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in refused_compile(model).error
    path.write_bytes(whole)
    set_tensor(model, UP, None)
    assert UP in refused_compile(model).error


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_what_is_no_file(model: Path, refused_compile: Callable[..., Refused], file: str, kind: str) -> None:
    (model / file).unlink()
    if kind == "folder":
        (model / file).mkdir()
    elif kind == "pipe":
        os.mkfifo(model / file)
    else:
        (model / file).symlink_to("nowhere")
    assert file in refused_compile(model).error


def test_pickled_weights(model: Path, refused_compile: Callable[..., Refused]) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "save_pretrained" in refused_compile(model).hint


# options and outputs


@pytest.mark.parametrize(
    "options",
    [
        ["--scheme", "w5a5"],
        ["--group-size", "33"],
        ["--rotate", "r5"],
        ["--rotate", "r1,r1"],
        ["--rotate", ""],
        ["--max-memory", "1KiB"],
        ["--max-memory", "9" * 400],
        ["--calibration", "nowhere.txt"],
        ["--recipe", "nowhere.toml"],
    ],
    ids=str,
)
def test_options(model: Path, refused_compile: Callable[..., Refused], options: list[str]) -> None:
    refused_compile(model, *options)


def test_outputs_are_refused_before_anything_is_computed(
    model: Path, refused: Callable[..., Refused], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rqc.compiler.pipeline.import_model", lambda _: pytest.fail("the model was opened"))
    (tmp_path / "notes.txt").write_text("precious")
    (tmp_path / "empty").touch()
    for target in ("notes.txt", "empty", "missing/e.plan", "notes.txt/e.plan", "x" * 256, "."):
        refused("compile", model, "-o", tmp_path / target)
    refused("compile", model, "-o", model)
    refused("compile", model, "-o", model / "config.json")
    assert (tmp_path / "notes.txt").read_text() == "precious"


# engines


def test_files_that_are_no_engines(engine: Path, refused: Callable[..., Refused], tmp_path: Path) -> None:
    whole = engine.read_bytes()
    path = tmp_path / "e.plan"
    zipped = tmp_path / "other.zip"
    with zipfile.ZipFile(zipped, "w") as other:
        other.writestr("notes.txt", "hello")
    cases = {
        "empty": b"",
        "TensorRT": b"ptrt" + bytes(100),
        "cut off": whole[: len(whole) // 2],
        "something was added": whole + b"x",
        "manifest.json": zipped.read_bytes(),
    }
    for said, content in cases.items():
        path.write_bytes(content)
        for command in (["run", path, "-p", "a"], ["inspect", path], ["bench", path], ["extract", path, "-o", "parts"]):
            assert said in refused(*command).error
    assert "no file" in refused("inspect", tmp_path / "nothing.plan").error
    assert "directory" in refused("inspect", tmp_path).error


def test_parts_that_cannot_be_written(engine: Path, refused: Callable[..., Refused], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("new/folder/" + "x" * 256, "new/folder/" + "x" * 250, "file", "file/parts", "."):
        refused("extract", engine, "-o", tmp_path / place)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-p", "a" * 257], "257 tokens"),
        (["-p", ""], "empty"),
        (["-p", "a\udcff"], "Unicode"),
        (["-p", "a", "--chat"], "no chat template"),
        (["-p", "a", "--max-new-tokens", "0"], "max_new_tokens"),
        (["-p", "a", "--temperature", "nan"], "temperature"),
        (["-p", "a", "--threads", "0"], "threads"),
    ],
)
def test_prompts_and_sampling(engine: Path, refused: Callable[..., Refused], options: list[str], said: str) -> None:
    assert said in refused("run", engine, *options).error
