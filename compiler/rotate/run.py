"""`rqc.rotate`: learn R1 and R2 of a model for what its engine rounds, against the loss of the rounded model.

SpinQuant's way (arXiv 2405.16406) by Cayley steps: weights frozen, R1 one matrix and R2 one a layer, started from
Hadamards; R3 and R4, which stay in the graph, stay as they are. Its loss is the cross-entropy of the text (`ce`). The
divergence from the model in floats (`kl`; OSTQuant, arXiv 2501.13987, has it over the likeliest tokens) says the same
with less noise: a whole distribution for each token, not one draw.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rqc.compiler.instruments import Progress, Silent
from rqc.compiler.model_text import encoded, pieces_of
from rqc.compiler.rotate.settings import RotateSettings
from rqc.compiler.rotate.state import Place, State
from rqc.compiler.text import read_tokenizer, windows
from rqc.models.algebra import check_sites, dimensions
from rqc.models.cayley import CayleySGD
from rqc.models.checkpoint import Checkpoint
from rqc.models.description import Description
from rqc.models.fake_quant import fake_quantize_ste, training_grids
from rqc.models.learned import Learned
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.models.rotation_file import RotationFile
from rqc.models.straight_through import round_tokens
from rqc.models.token_grid import TokenGrid
from rqc.models.turned import Basis, Rounding, Roundings, turn_linears
from rqc.passes.token_cache import groups_of
from rqc.runtime.doctor import require_compile
from rqc.runtime.errors import InputError, ResourceError, TrainingError

STEP = "α = lr / ‖Y‖₁"
"""What --lr means, kept with a run: one that was started when it was another bound does not go on."""
NOISE = {"fp32": 1e-4, "bf16": 3e-2}
"""Of gradients by what they are computed in: how much lies along the manifold by rounding alone (`CayleySGD`)."""
HELD_OUT = 4
"""Windows at the end of the text, at most, that nothing is learned from and the gain is told by."""


@dataclass(frozen=True)
class RotateReport:
    """A rotation that was learned. loss: kl or ce; losses: before each step, on what it was taken on; held_out: mean
    loss on other text, before the first step and after the last. basis: the hash of the rotation."""

    rotation: str
    sites: str
    basis: str
    steps: int
    seconds: float
    loss: str
    losses: list[float]
    held_out: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """The report with the keys of `rqc rotate --json`."""
        return {
            "rotation": self.rotation,
            "sites": self.sites,
            "basis": self.basis,
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "loss": self.loss,
            "losses": self.losses,
            "held_out": list(self.held_out),
        }

    def to_text(self) -> str:
        """The report for people."""
        before, after = self.held_out
        told = f" (perplexity {math.exp(before):.2f}, {math.exp(after):.2f})" if self.loss == "ce" else ""
        return (
            f"{self.rotation}: {self.sites} after {self.steps} steps, basis {self.basis[:12]}\n"
            f"{self.loss} on text that was held out: {before:.4f} before, {after:.4f} after{told}"
        )


def rotate(
    model_dir: str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> RotateReport:
    """Learn the rotation of a Hugging Face model directory and write it to the file `output`, for `compile` and
    `finetune` with rotation=FILE.

    options: the fields of `RotateSettings` by name (scheme="w4a4", steps=100, ...). resume: go on from where a run into
    the same file was stopped; start where there is none, and do nothing where it is finished. Raises an RqcError:
    unusable input, settings that do not fit the model, a loss that is no number, a full disk.
    """
    require_compile()
    settings, told = RotateSettings.from_values(options), progress or Silent()
    device = _device(settings)
    place = Place(output)
    place.check(resume=resume)
    checkpoint = Checkpoint.open(model_dir)
    reference = Reference.load(model_dir)
    check_sites(reference.description, settings.rotation)
    text = _text(checkpoint.directory, settings, reference.description, told)
    fingerprint = checkpoint.fingerprint()
    text_hash = hashlib.sha256(text.tobytes()).hexdigest()
    identity = {"settings": settings.to_json(), "model": fingerprint, "text": text_hash, "step": STEP}
    if resume and (found := place.finished(identity)) is not None:
        told.line(f"{output} is finished: nothing to do")
        return _report(place.output, found, reference.description, 0.0)
    started = time.perf_counter()
    run = _Run(reference, settings, text, device, told)
    stored = place.load(identity) if resume else None
    learned, losses, held_out = run.learn(stored, lambda state: place.save(state, identity))
    rotation = Rotation(settings.rotate, settings.hadamard, settings.rotation_seed, learned)
    training = {"run": identity, "losses": losses, "held_out": held_out}
    file = RotationFile(rotation, fingerprint, training)
    place.finish(file)
    if held_out[1] >= held_out[0]:
        told.line("no better than the start on text that was held out: a lower --lr, a larger --batch-size, more steps")
    return _report(place.output, file, reference.description, time.perf_counter() - started)


def _report(output: Path, file: RotationFile, description: Description, seconds: float) -> RotateReport:
    training = file.training or {}
    losses, (before, after) = training["losses"], training["held_out"]
    basis = file.rotation.basis(dimensions(description))
    loss = training["run"]["settings"]["loss"]
    return RotateReport(str(output), str(file.rotation), basis, len(losses), seconds, loss, losses, (before, after))


class _Run:
    """The model, rounded in a basis that is learned, and the text that it is learned on."""

    def __init__(
        self, reference: Reference, settings: RotateSettings, text: NDArray[np.int64], device: str, progress: Progress
    ) -> None:
        self.settings, self.device, self.progress = settings, device, progress
        if "r1" in settings.rotate:
            reference.fold_norms(tied=reference.description.architecture.tied)
        self.model = reference.model.to(device, torch.bfloat16 if settings.dtype == "bf16" else torch.float32)
        self.basis = Basis(settings.rotation, reference.description).to(device)
        turn_linears(reference, self.basis, roundings(settings, reference))
        if settings.gradient_checkpointing:
            _checkpoint(self.model)
        held = min(HELD_OUT, -(-len(text) // 4)) if len(text) > 1 else 0
        self.text = text[: len(text) - held]
        self.held_out = text[-max(held, 1) :]  # of a single window, that one

    def learn(self, state: State | None, save: Callable[[State], None]) -> tuple[Learned, list[float], list[float]]:
        """All steps, or those that a stored state lacks: what was learned, the losses, and those on the text held out
        before and after. `save` hears the state after every few steps."""
        settings = self.settings
        if state is None:
            matrices = {name: one.detach().double().clone() for name, one in sorted(self.basis.learned.items())}
            moments = {name: torch.zeros_like(stack) for name, stack in matrices.items()}
            state = State(matrices, moments, [], self._loss_held_out())
        else:
            self.progress.line(f"going on after step {state.step} of {settings.steps}")
            state = state.on(self.device)
        descent = CayleySGD(
            list(state.matrices.values()), list(state.moments.values()), settings.momentum, NOISE[settings.dtype]
        )
        while state.step < settings.steps:
            self._hold(state)
            loss, gradients = self._gradients(state.step)
            rate = settings.lr * (1 + math.cos(math.pi * state.step / settings.steps)) / 2
            descent.step(gradients, rate)
            state.losses.append(loss)
            label = f"step {state.step} of {settings.steps}, loss {loss:.3f},"
            self.progress.advance(label, state.step, settings.steps)
            if state.step % settings.save_steps == 0 and state.step < settings.steps:
                save(state)
        self._hold(state)
        learned = Learned({name: stack.float().cpu().numpy() for name, stack in state.matrices.items()})
        return learned, state.losses, [state.held_out, self._loss_held_out()]

    @torch.no_grad()
    def _hold(self, state: State) -> None:
        """Let the model compute with the matrices of a state."""
        for name, parameter in self.basis.learned.items():
            parameter.copy_(state.matrices[name])

    def _gradients(self, step: int) -> tuple[float, list[Tensor]]:
        parameters = [self.basis.learned[name] for name in sorted(self.basis.learned)]
        loss = self._loss(self._batch(step))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(f"the loss of step {step + 1} is {value}", hint="a lower --lr, or --dtype fp32")
        gradients = torch.autograd.grad(loss, parameters)
        if not all(bool(torch.isfinite(one).all()) for one in gradients):
            raise TrainingError(f"the gradient of step {step + 1} is not finite", hint="--dtype fp32")
        return value, [one.double() for one in gradients]

    def _batch(self, step: int) -> NDArray[np.int64]:
        """The windows of a step: every window once in an order drawn from the seed, then all in another."""
        size, count = self.settings.batch_size, len(self.text)
        places = range(step * size, (step + 1) * size)
        epochs = {place // count for place in places}
        order = {epoch: np.random.default_rng([self.settings.seed, epoch]).permutation(count) for epoch in epochs}
        return self.text[[order[place // count][place % count] for place in places]]

    def _loss(self, ids: NDArray[np.int64]) -> Tensor:
        """Mean loss over the tokens of windows [count, length] that another follows."""
        batch = torch.from_numpy(ids).to(self.device)
        if self.settings.loss == "ce":
            return nn.functional.cross_entropy(self._logits(batch), batch[:, 1:].flatten())
        with torch.no_grad(), self.basis.in_floats():
            wanted = self._logits(batch).log_softmax(-1)
        found = self._logits(batch).log_softmax(-1)
        return nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)

    def _logits(self, batch: Tensor) -> Tensor:
        """float32 [tokens, vocab], without those of the last token of each window."""
        logits: Tensor = self.model(input_ids=batch, use_cache=False).logits
        return logits[:, :-1].flatten(0, 1).float()

    @torch.no_grad()
    def _loss_held_out(self) -> float:
        return sum(float(self._loss(window[None])) for window in self.held_out) / len(self.held_out)


def roundings(settings: RotateSettings, reference: Reference) -> Roundings:
    """What the settings' engine rounds, in PyTorch; of keys, the mean of the batch stands for that of the text."""
    description, bits = reference.description, settings.scheme.activation_bits
    made: dict[object, Rounding] = {}
    if bits == 8:
        grids = training_grids(description, bits, settings.group_size)
        inputs = {name: made.setdefault(grid, partial(fake_quantize_ste, grid=grid)) for name, grid in grids.items()}
    else:
        tokens = TokenGrid(bits, settings.activation_symmetric, settings.activation_clip)
        every: Rounding = partial(round_tokens, grid=tokens) if bits < 16 else _identity
        inputs = {claim.weight: every for claim in description.claims if claim.quantized}
    if settings.kv_cache == "float":
        return Roundings(inputs, settings.grid)
    cache = partial(_round_cache, grid=TokenGrid(4, symmetric=False))
    return Roundings(inputs, settings.grid, cache, not getattr(reference.model.config, "attn_logit_softcapping", None))


def _round_cache(x: Tensor, grid: TokenGrid) -> Tensor:
    """x [..., head size] per token and group of channels, as `TokenCache` has it."""
    groups = x.reshape(*x.shape[:-1], groups_of(x.shape[-1]), -1)
    return round_tokens(groups, grid).reshape(x.shape)


def _identity(x: Tensor) -> Tensor:
    return x


def _text(directory: Path, settings: RotateSettings, description: Description, progress: Progress) -> NDArray[np.int64]:
    """The text as windows [count, length]. Raises InputError without a tokenizer or tokens to predict."""
    tokenizer = read_tokenizer(directory)
    if tokenizer is None:
        raise InputError(
            f"{directory} has no tokenizer.json, and a rotation is learned on text", hint="add the tokenizer's files"
        )
    a = description.architecture
    ids = encoded(tokenizer, pieces_of(settings.calibration, directory), directory, a.vocab_size)
    cut = np.asarray(windows(ids, min(settings.seq_len, a.context_length), len(ids)), np.int64)
    if cut.shape[1] < 2:
        raise InputError("the text has a single token, and a token is predicted from another", hint="a longer text")
    if cut.shape[1] < settings.seq_len:
        progress.line(f"windows have {cut.shape[1]} tokens: the {'text' if len(cut) == 1 else 'context'} is no longer")
    if len(cut) == 1:
        progress.line("the text is a single window: none is held out")
    progress.line(f"text: {len(cut)} windows of {cut.shape[1]} tokens")
    return cut


def _device(settings: RotateSettings) -> str:
    """cpu or cuda. Raises ResourceError for a device that is not there."""
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise ResourceError("device cuda: PyTorch sees no GPU", hint="--device cpu, or auto")
    return "cuda" if cuda and settings.device != "cpu" else "cpu"


def _checkpoint(model: Any) -> None:
    """Keep activations at the borders of blocks alone. transformers does so in training alone: nothing may drop out."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
