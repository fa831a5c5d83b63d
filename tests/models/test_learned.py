"""Learned rotations as values: orthogonal whatever they are stored in, known by their values, refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import TinyModel

from rqc.models.algebra import check_sites, dimensions
from rqc.models.learned import Learned
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.models.rotation_file import RotationFile
from rqc.runtime.errors import BasisMismatchError, InputError, RotationError


def stack(count: int, n: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed).standard_normal((count, n, n))
    return np.linalg.qr(draw)[0].astype(np.float32)


def learned(seed: int = 0, d: int = 96, h: int = 16, layers: int = 2) -> Learned:
    return Learned({"r1": stack(1, d, seed), "r2": stack(layers, h, seed + 1)})


def rotation(sites: str = "r1,r2,r4", seed: int = 0) -> Rotation:
    return Rotation(Rotation.parse(sites).sites, "full", 3, learned(seed))


@pytest.mark.parametrize("error", [0.0, 1e-7, 1e-4])
def test_what_is_folded_is_orthogonal(error: float) -> None:
    noise = error * np.random.default_rng(1).standard_normal((1, 96, 96)).clip(-1, 1) / 10
    near = Learned({"r1": (stack(1, 96) + noise).astype(np.float32)})
    q = near.matrix("r1", 96)
    assert np.abs(q @ q.T - np.eye(96)).max() < 1e-12
    assert np.abs(q - stack(1, 96)[0]).max() < 1e-6 + error


def test_sites_take_their_own_matrices() -> None:
    value = rotation()
    r1, first, second = value.r1(96), value.r2(16, 0), value.r2(16, 1)
    assert r1 is not None
    assert first is not None
    assert second is not None
    np.testing.assert_allclose(r1.dense(), stack(1, 96)[0], atol=1e-6)
    np.testing.assert_allclose(second.dense(), stack(2, 16, 1)[1], atol=1e-6)
    assert np.abs(first.dense() - second.dense()).max() > 0.1
    assert value.r4(152) is not None
    plain = Rotation.parse("r1,r2,r4", seed=3)
    np.testing.assert_array_equal(value.r4_signs(152), plain.r4_signs(152))
    alone = Rotation(frozenset(("r2", "r4")), "full", 3, learned())
    assert alone.learned is not None
    assert alone.learned.sites == {"r2"}
    assert alone.r1(96) is None


def test_the_basis_is_that_of_the_values() -> None:
    sizes = {"r1": 96, "r2": 16, "r4": 152}
    assert rotation().basis(sizes) == rotation().basis(sizes)
    assert rotation() == rotation()
    assert len({rotation(), rotation(), rotation(seed=5)}) == 2
    others = [rotation(seed=5), rotation("r1,r4"), Rotation.parse("r1,r2,r4", seed=3)]
    assert len({one.basis(sizes) for one in [rotation(), *others]}) == 4


def test_json_needs_the_matrices() -> None:
    said = json.loads(json.dumps(rotation().to_json()))
    assert Rotation.from_json(said, learned()) == rotation()
    for wrong in (None, learned(5), Learned({"r1": stack(1, 96)})):
        with pytest.raises(BasisMismatchError, match="matrices of a stored rotation"):
            Rotation.from_json(said, wrong)
    with pytest.raises(BasisMismatchError, match="were not learned"):
        Rotation.from_json(Rotation.parse("r1").to_json(), learned())


def test_a_file_comes_back_and_is_the_same_each_time(tmp_path: Path) -> None:
    file = RotationFile(rotation(), "abc", {"losses": [1.5]})
    path = tmp_path / "r.safetensors"
    path.write_bytes(file.to_bytes())
    found = RotationFile.read(path)
    assert found == file
    assert (found.training, found.rotation) == ({"losses": [1.5]}, rotation())
    assert found.to_bytes() == file.to_bytes()
    found.check_model("abc")
    with pytest.raises(RotationError, match="learned for the model abc"):
        found.check_model("def")


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ({"r1": 1.01 * stack(1, 96)}, "learned r1 is not orthogonal"),
        (
            {"r2": np.concatenate([stack(1, 16), np.full((1, 16, 16), np.nan, np.float32)])},
            "r2 of layer 1 is not ortho",
        ),
        ({"r1": stack(2, 96)}, "2 matrices for r1"),
        ({"r1": stack(1, 96)[:, :, :90]}, "of shape"),
        ({"r4": stack(1, 96)}, "a learned r4"),
    ],
)
def test_what_is_no_rotation_is_refused(matrices: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(RotationError, match=message):
        Learned(matrices)


def test_files_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    with pytest.raises(InputError, match="is no file"):
        RotationFile.read(path)
    good = RotationFile(rotation(), "abc").to_bytes()
    for content, message in (
        (b"text", "cannot be read"),
        (good[:-8], "cannot be read"),
        (good.replace(b"rqc_rotation", b"xqc_rotation"), "holds no rotation"),
        (good.replace(b'\\"version\\": 1', b'\\"version\\": 9'), "version 9"),
        (good.replace(b'"r1"', b'"r3"', 1), "r3"),
    ):
        path.write_bytes(content)
        with pytest.raises((InputError, RotationError), match=message):
            RotationFile.read(path)
    changed = bytearray(good)
    changed[-8] ^= 1  # the last bit of a float: still orthogonal, another matrix
    path.write_bytes(bytes(changed))
    with pytest.raises(BasisMismatchError, match="another one"):
        RotationFile.read(path)


@pytest.mark.parametrize("sizes", [{"d": 64}, {"h": 20}, {"layers": 3}], ids=str)
def test_another_models_sizes_are_refused(tiny_model: TinyModel, sizes: dict[str, int]) -> None:
    description = Reference.load(tiny_model("llama16")).description
    check_sites(description, rotation())
    assert rotation().basis(dimensions(description))
    wrong = Rotation(frozenset(("r1", "r2")), learned=learned(**sizes))
    with pytest.raises(RotationError, match="the learned r"):
        check_sites(description, wrong)
