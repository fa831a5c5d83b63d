"""tools/fetch_model: the off-grid rescaling keeps the function, and a directory is written once and whole."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rqc.runtime.errors import InputError

TOOL = Path(__file__).parents[2] / "tools" / "fetch_model"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The script as a module."""
    import sys

    loader = SourceFileLoader("fetch_model", str(TOOL))
    spec = spec_from_loader("fetch_model", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["fetch_model"] = module  # dataclasses look their module up
    write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = write_bytecode
    return module


def llama(heads: int, kv_heads: int, bias: bool) -> tuple[Any, dict[str, Any]]:
    """A random float64 Llama whose norms and biases are not trivial, and its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        attention_bias=bias,
        mlp_bias=bias,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.copy_(torch.randn_like(parameter).abs() + 0.5)
    return model, config.to_dict()


@pytest.mark.parametrize(("heads", "kv_heads", "bias"), [(3, 3, False), (6, 2, False), (4, 1, True)])
def test_rescaling_keeps_the_function(tool: ModuleType, heads: int, kv_heads: int, bias: bool) -> None:
    import torch

    model, config = llama(heads, kv_heads, bias)
    ids = torch.arange(40)[None] * 7 % 97
    with torch.no_grad():
        before = model(ids).logits
        tensors = {name: value.numpy() for name, value in model.state_dict().items()}
        scaled = tool.rescale_channels(tensors, config)
        model.load_state_dict({name: torch.from_numpy(value) for name, value in scaled.items()})
        after = model(ids).logits
    # transformers' norm computes in float32 even in a float64 model
    assert float((after - before).norm() / before.norm()) < 1e-6


def test_rescaling_moves_every_linear_off_its_values(tool: ModuleType) -> None:
    model, config = llama(6, 2, False)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    scaled = tool.rescale_channels(tensors, config)
    for name, value in tensors.items():
        moved = not np.allclose(scaled[name], value, rtol=1e-3)
        assert moved == (".layers." in name), name
        assert scaled[name].dtype == np.float64


def test_rescaling_is_a_function_of_its_seed(tool: ModuleType) -> None:
    model, config = llama(3, 3, False)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    name = "model.layers.1.mlp.up_proj.weight"
    first, again, other = (tool.rescale_channels(tensors, config, seed=seed)[name] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_factors_are_the_ones_that_were_promised(tool: ModuleType) -> None:
    """exp(0.25 N(0,1)) from PCG64(1), the attention norm of the first block first."""
    model, config = llama(3, 3, False)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    name = "model.layers.0.input_layernorm.weight"
    factors = tool.rescale_channels(tensors, config)[name] / tensors[name]
    expected = np.exp(0.25 * np.random.Generator(np.random.PCG64(1)).standard_normal(48))
    np.testing.assert_allclose(factors, expected, rtol=1e-12)


def test_a_directory_with_something_else_is_never_touched(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not this model"):
        tool.fetch(tool.SOURCES["smollm2"], tmp_path, off_grid=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_half_precision_refuses_what_does_not_fit(tool: ModuleType) -> None:
    assert tool.to_half("w", np.array([1.5])).dtype == np.float16
    with pytest.raises(Exception, match="does not fit"):
        tool.to_half("w", np.array([1e6]))
