"""Learned rotations of tiny models with random matrices, as values and as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rqc.compiler.importer import import_model
from rqc.models.learned import Learned
from rqc.models.rotation import Rotation
from rqc.models.rotation_file import RotationFile


def random_rotation(directory: Path, sites: str = "r1,r2,r4", seed: int = 0) -> Rotation:
    """R1 and a different R2 in each layer, drawn from the seed."""
    a = import_model(directory).description.architecture
    draw = np.random.default_rng(seed)
    stacks = {"r1": draw.standard_normal((1, a.hidden_size, a.hidden_size))}
    stacks["r2"] = draw.standard_normal((a.layers, a.head_dim, a.head_dim))
    learned = Learned({site: np.linalg.qr(stack)[0].astype(np.float32) for site, stack in stacks.items()})
    return Rotation(Rotation.parse(sites).sites, "full", 2, learned)


def write_random(directory: Path, path: Path, sites: str = "r1,r2,r4", seed: int = 0) -> Path:
    """The same as a file."""
    fingerprint = import_model(directory).checkpoint.fingerprint()
    path.write_bytes(RotationFile(random_rotation(directory, sites, seed), fingerprint).to_bytes())
    return path
