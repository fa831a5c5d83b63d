"""Carrying updates between bases: rotate(merge(W, BA)) = merge(rotate(W), rotate(BA)), and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from tiny import MODELS, TinyModel

from rqc.models import adapter_frames
from rqc.models.adapter_frames import frame_folds, to_frame, to_plain
from rqc.models.adapter_names import expected_shape, weight_reader
from rqc.models.algebra import Fold, RotateOut, ScaleIn
from rqc.models.checkpoint import Checkpoint, read_config
from rqc.models.delta import Delta
from rqc.models.description import HEAD, Architecture, Description
from rqc.models.merges import AddDelta
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.models.weights import Source, Weight
from rqc.runtime.errors import BasisMismatchError, RotationError

POST_NORM = ("olmo2", "gemma2", "gemma3")
TOLERANCE = 1e-12
QKV = ("q_proj", "k_proj", "v_proj")


def sites_of(name: str) -> str:
    return "r2,r3,r4" if name in POST_NORM else "r1,r2,r3,r4"


def draw_for(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(sum(name.encode())))


def random_delta(shape: tuple[int, int], name: str, *, dora: bool = False, rank: int = 5) -> Delta:
    """An update as large as the weights themselves, so that nothing hides in them."""
    draw = draw_for(name)
    a, b = draw.normal(size=(rank, shape[1])), 0.02 * draw.normal(size=(shape[0], rank))
    return Delta(a, b, 0.7, 0.5 + draw.random(shape[0]) if dora else None)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def folded(source: Source, name: str, shape: tuple[int, int], *folds: Fold) -> tuple[np.ndarray, np.ndarray | None]:
    """A weight and its bias, where it has one, with folds on top."""
    weight = Weight(source, name, shape, folds=folds).read()
    try:
        bias = Weight(source, name.removesuffix("weight") + "bias", (shape[0],), folds=folds).read()
    except (AttributeError, AssertionError):
        return weight, None
    return weight, bias


def linears(description: Description) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of one linear of each kind, and the head if it is free."""
    seen = set()
    for claim in description.claims:
        kind = claim.linear.path
        if claim.layer == 1 and kind not in seen:
            seen.add(kind)
            yield claim.weight, description.shape(claim)
    if not description.architecture.tied:
        yield HEAD, expected_shape(description, HEAD)


@pytest.mark.parametrize("hadamard", ["full", "block"])
@pytest.mark.parametrize("name", MODELS)
def test_merging_and_rotating_commute(name: str, hadamard: str, tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model(name))
    description = reference.description
    rotation = Rotation.parse(sites_of(name), hadamard, 3)
    for weight, shape in linears(description):
        delta = random_delta(shape, weight)
        folds = frame_folds(weight, description, rotation)
        framed = to_frame(weight, delta, description, rotation, reference.read)
        merged_first, bias_first = folded(reference, weight, shape, AddDelta(delta), *folds)
        rotated_first, bias_last = folded(reference, weight, shape, *folds, AddDelta(framed))
        assert error(rotated_first, merged_first) <= TOLERANCE, weight
        assert (bias_first is None) == (bias_last is None)
        assert bias_first is None or np.array_equal(bias_first, bias_last), weight
        back = to_plain(weight, framed, description, rotation, reference.read)
        assert error(back.dense(), delta.dense()) <= TOLERANCE, weight
        assert max(error(back.a, delta.a), error(back.b, delta.b)) <= TOLERANCE, weight


@pytest.mark.parametrize("name", ["llama-bias", "phi3", "gemma", "qwen3-moe"])
def test_leaving_any_fold_out_breaks_it(name: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference.load(tiny_model(name))
    description, rotation = reference.description, Rotation.parse(sites_of(name))
    tried = 0
    for weight, shape in linears(description):
        delta = random_delta(shape, weight)
        folds = frame_folds(weight, description, rotation)
        expected = folded(reference, weight, shape, AddDelta(delta), *folds)[0]
        for i in range(len(folds)):
            rest = folds[:i] + folds[i + 1 :]
            with monkeypatch.context() as patch:
                patch.setattr(adapter_frames, "frame_folds", lambda *_, rest=rest: rest)
                short = to_frame(weight, delta, description, rotation, reference.read)
                assert (
                    error(to_plain(weight, short, description, rotation, reference.read).dense(), delta.dense())
                    < TOLERANCE
                )
            assert error(folded(reference, weight, shape, *folds, AddDelta(short))[0], expected) > 0.05, (weight, i)
            tried += 1
    assert tried >= 12


def test_a_packed_linear_is_carried_as_a_whole(tiny_model: TinyModel) -> None:
    """By the checkpoint's own names phi3 has one qkv_proj and one gate_up_proj; rotations act on segments of rows."""
    checkpoint = Checkpoint.open(tiny_model("phi3"))
    architecture = Architecture.from_config(read_config(checkpoint.directory) | {"head_dim": 16})
    description = Description.of(architecture, checkpoint.tensors)
    rotation = Rotation.parse("r1,r2,r4")
    assert any("qkv_proj" in claim.weight for claim in description.claims)
    for weight, shape in linears(description):
        delta = random_delta(shape, weight)
        folds = frame_folds(weight, description, rotation)
        framed = to_frame(weight, delta, description, rotation, checkpoint.read)
        merged = Weight(checkpoint, weight, shape, folds=(AddDelta(delta), *folds)).read()
        assert error(Weight(checkpoint, weight, shape, folds=(*folds, AddDelta(framed))).read(), merged) <= TOLERANCE
        back = to_plain(weight, framed, description, rotation, checkpoint.read)
        assert error(back.dense(), delta.dense()) <= TOLERANCE


def test_a_tied_head_leaves_the_ends_alone_and_an_untied_one_takes_gain_and_rotation(tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model("llama-tied"))
    rotation = Rotation.parse("r1")
    tied = reference.description
    assert frame_folds(HEAD, tied, rotation) == []
    untied = replace(tied, architecture=replace(tied.architecture, tied=False))
    assert [type(fold).__name__ for fold in frame_folds(HEAD, untied, rotation)] == ["ScaleIn", "RotateIn"]


def test_no_site_is_no_change(tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model("gemma"))
    name, shape = next(linears(reference.description))
    delta = random_delta(shape, name, dora=True)
    found = to_frame(name, delta, reference.description, Rotation.parse("none"), reference.read)
    assert np.array_equal(found.a, delta.a)
    assert np.array_equal(found.b, delta.b)
    assert np.array_equal(found.magnitude, delta.magnitude)


@pytest.mark.parametrize("sites", ["r1", "r4", "r2", "r1,r2,r3,r4"])
@pytest.mark.parametrize("name", ["llama-bias", "phi3", "gemma", "qwen3-moe", "mixtral"])
def test_dora_is_carried_exactly_or_refused(name: str, sites: str, tiny_model: TinyModel) -> None:
    """An input rotation keeps row norms, a gain changes them by a known factor, an output rotation mixes rows."""
    reference = Reference.load(tiny_model(name))
    description, rotation = reference.description, Rotation.parse(sites)
    for weight, shape in linears(description):
        delta = random_delta(shape, weight, dora=True)
        folds = frame_folds(weight, description, rotation)
        if any(isinstance(fold, RotateOut) for fold in folds):
            for carry in (to_frame, to_plain):
                with pytest.raises(BasisMismatchError, match="magnitudes belong to single outputs") as caught:
                    carry(weight, delta, description, rotation, reference.read)
                assert "plain LoRA" in caught.value.hint
            continue
        framed = to_frame(weight, delta, description, rotation, reference.read)
        merged = folded(reference, weight, shape, AddDelta(delta), *folds)[0]
        assert error(folded(reference, weight, shape, *folds, AddDelta(framed))[0], merged) <= TOLERANCE, weight
        back = to_plain(weight, framed, description, rotation, reference.read)
        assert error(back.magnitude, delta.magnitude) <= TOLERANCE, weight
        assert error(back.merged(reference.read(weight)), delta.merged(reference.read(weight))) <= TOLERANCE
        if any(isinstance(fold, ScaleIn) for fold in folds):  # leaving the magnitudes as they are would be wrong
            stale = replace(framed, magnitude=delta.magnitude)
            assert error(folded(reference, weight, shape, *folds, AddDelta(stale))[0], merged) > 0.01
        else:
            assert np.array_equal(framed.magnitude, delta.magnitude)


def test_dora_reads_packed_weights_from_a_checkpoint(tiny_model: TinyModel) -> None:
    directory = tiny_model("phi3")
    reference, checkpoint = Reference.load(directory), Checkpoint.open(directory)
    description, rotation = reference.description, Rotation.parse("r1")
    for kind in QKV:
        name = f"model.layers.1.self_attn.{kind}.weight"
        assert np.array_equal(weight_reader(description, checkpoint.read)(name), reference.read(name))
        delta = random_delta(description.shape(description.by_weight[name]), name, dora=True)
        found = to_plain(name, delta, description, rotation, checkpoint.read)
        expected = to_plain(name, delta, description, rotation, reference.read)
        assert np.array_equal(found.magnitude, expected.magnitude)


def test_dora_on_an_untied_head(tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model("llama"))
    rotation, shape = Rotation.parse("r1"), expected_shape(reference.description, HEAD)
    delta = random_delta(shape, HEAD, dora=True)
    framed = to_frame(HEAD, delta, reference.description, rotation, reference.read)
    folds = frame_folds(HEAD, reference.description, rotation)
    merged = Weight(reference, HEAD, shape, folds=(AddDelta(delta), *folds)).read()
    assert error(Weight(reference, HEAD, shape, folds=(*folds, AddDelta(framed))).read(), merged) <= TOLERANCE


def test_a_gain_of_zero_has_no_way_back(tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model("gemma"))
    description, rotation = reference.description, Rotation.parse("r1")
    reference.model.get_parameter("model.layers.1.input_layernorm.weight").data[[7, 30]] = -1.0  # a gain of 1 + w
    for kind in ("q_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{kind}.weight"
        delta = random_delta(description.shape(description.by_weight[name]), name)
        framed = to_frame(name, delta, description, rotation, reference.read)
        assert np.isfinite(framed.a).all()
        with pytest.raises(
            BasisMismatchError, match=r"input_layernorm.weight has a gain of 0 in 2 channels \(the first is 7"
        ):
            to_plain(name, framed, description, rotation, reference.read)
    other = "model.layers.0.self_attn.q_proj.weight"
    delta = random_delta(description.shape(description.by_weight[other]), other)
    to_plain(other, delta, description, rotation, reference.read)


def test_a_pooled_update_stays_pooled_only_where_its_inputs_do_not_turn(tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model("llama16"))
    description = reference.description
    name = "model.layers.0.self_attn.q_proj.weight"
    out, inputs = description.shape(description.by_weight[name])
    compact = draw_for(name).normal(size=(3, inputs // 16))
    delta = Delta(np.repeat(compact, 16, axis=1), draw_for("b").normal(size=(out, 3)))
    turned = to_frame(name, delta, description, Rotation.parse("r1"), reference.read)
    assert delta.pooled(16) is not None
    assert turned.pooled(16) is None
    folds = frame_folds(name, description, Rotation.parse("r1"))
    merged = Weight(reference, name, (out, inputs), folds=(AddDelta(delta), *folds)).read()
    assert error(Weight(reference, name, (out, inputs), folds=(*folds, AddDelta(turned))).read(), merged) <= TOLERANCE
    kept = to_frame(name, delta, description, Rotation.parse("r2,r4"), reference.read).pooled(16)
    assert kept is not None
    assert np.array_equal(kept, compact)


def test_a_refused_site_is_refused(tiny_model: TinyModel) -> None:
    reference = Reference.load(tiny_model("gemma2"))
    name, shape = next(linears(reference.description))
    with pytest.raises(RotationError, match="r1 cannot be folded"):
        to_frame(name, random_delta(shape, name), reference.description, Rotation.parse("r1"), reference.read)
