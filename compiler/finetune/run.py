"""`rqc.finetune`: a model directory and data in, an adapter that knows its basis and its grid out."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_callback import TrainerState

from rqc.compiler.finetune.checkpoints import DAY, TRAINING, Run, check_new
from rqc.compiler.finetune.data import Examples, load_examples, read_training_tokenizer, split
from rqc.compiler.finetune.report import FinetuneReport, log_of, memory_text, training_json
from rqc.compiler.finetune.settings import Settings
from rqc.compiler.finetune.stage import Stage, build_stage
from rqc.compiler.finetune.train import AdapterTrainer, check_device, processes
from rqc.compiler.instruments import Progress, Silent
from rqc.models.adapter import Adapter, AdapterBasis, write_adapter
from rqc.models.adapter_export import plain_deltas
from rqc.models.adapter_names import torch_names
from rqc.models.algebra import dimensions
from rqc.models.checkpoint import Checkpoint
from rqc.models.description import Architecture, Description
from rqc.models.json_files import read_object
from rqc.models.reference import Reference
from rqc.runtime.bench import peak_rss_bytes
from rqc.runtime.doctor import require_compile


def finetune(
    model_dir: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> FinetuneReport:
    """Train an adapter of a Hugging Face model directory on a data file and write it to the directory `output`.

    options: the fields of `Settings` by name (rank=16, base="w4", rotate="r1,r4", ...). resume: go on from the last
    checkpoint in `output`; start where there is none, and do nothing where the adapter is finished. In a process that
    torchrun started this is one of several: the first alone writes and tells progress. Raises an RqcError: unusable
    input, settings that do not fit the model, a loss that is no number, a full disk.
    """
    require_compile()
    settings = Settings.from_values(options)
    check_device(settings)
    first = int(os.environ.get("RANK", "0")) == 0
    run = Run(Path(output))
    told: Progress = progress if progress is not None and first else Silent()
    if first:
        run.check_place(resume=resume)
        if settings.export_plain is not None:
            run.check_apart(settings.export_plain)
            check_new(settings.export_plain)
    with _quiet():
        today = (run.day() if resume else None) or datetime.combine(date.today(), datetime.min.time())
        material = Material.read(model_dir, Path(data), settings, told, today)
        identity = material.identity(settings)
        if resume:
            run.compare(identity)
            if run.finished and not run.unfinished:
                return _finished(run, material, settings, told, first=first)
        return _train(run, material, settings, identity, told, resume=resume, first=first)


@dataclass(frozen=True, eq=False)
class Material:
    """What an adapter is trained from: model, and examples to train and to evaluate on."""

    model: Path
    checkpoint: Checkpoint
    fingerprint: str
    train: Examples
    held_out: Examples | None
    pad_id: int
    hashes: Mapping[str, str | None]
    day: datetime

    @classmethod
    def read(
        cls, model_dir: str | Path, data: Path, settings: Settings, progress: Progress, today: datetime
    ) -> Material:
        """Read and tokenize. today: the time that chat templates are told. Raises CheckpointError and InputError."""
        checkpoint = Checkpoint.open(model_dir)
        tokenizer = read_training_tokenizer(model_dir, today)
        config = transformers.AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
        architecture = Architecture.from_config(config.to_dict())
        length = min(settings.seq_len, architecture.context_length)
        if length < settings.seq_len:
            progress.line(f"records are cut after {length} tokens: the model's context")
        sizes = {"seq_len": length, "vocab_size": architecture.vocab_size}
        examples = load_examples(data, tokenizer, **sizes)
        progress.line(f"data: {examples.summary()}")
        train, held_out = split(examples, settings.eval_split, settings.seed)
        if settings.eval_data is not None:
            held_out = load_examples(settings.eval_data, tokenizer, **sizes)
        if held_out is not None:
            progress.line(f"evaluation: {held_out.summary()}")
        hashes = {"training data": _hash(train), "evaluation data": None if held_out is None else _hash(held_out)}
        fingerprint = checkpoint.fingerprint()
        if settings.rotation_file is not None:
            settings.rotation_file.check_model(fingerprint)
        return cls(Path(model_dir), checkpoint, fingerprint, train, held_out, tokenizer.pad_id, hashes, today)

    def identity(self, settings: Settings) -> dict[str, Any]:
        """What has to agree for a run to go on."""
        found = {"settings": settings.to_json(), "model": self.fingerprint, **self.hashes, "processes": processes()}
        return {**found, DAY: self.day.date().isoformat()}


def _train(
    run: Run,
    material: Material,
    settings: Settings,
    identity: Mapping[str, Any],
    progress: Progress,
    *,
    resume: bool,
    first: bool,
) -> FinetuneReport:
    started = time.perf_counter()
    stage = build_stage(material.model, settings, progress)
    _tell(stage, settings, progress)
    if settings.export_plain is not None:  # refused now rather than after hours
        read = material.checkpoint.read
        plain_deltas(stage.deltas(), stage.repaired, stage.reference.description, settings.rotation, read)
    with run.opened(identity, resume=resume) if first else contextlib.nullcontext():
        trainer = AdapterTrainer(stage, run, settings, (material.train, material.held_out), material.pad_id, progress)
        state = _run(trainer, run.latest() if resume else None, progress)
        log = log_of(state.log_history)
        losses = [entry["loss"] for entry in log if "loss" in entry]
        report = FinetuneReport(
            adapter=str(run.output),
            steps=state.global_step,
            seconds=time.perf_counter() - started,
            train_loss=sum(losses) / len(losses),
            eval_loss=next((entry["eval_loss"] for entry in reversed(log) if "eval_loss" in entry), None),
            trainable_parameters=stage.trainable_parameters,
            base_bytes=stage.base_bytes,
            float_bytes=stage.float_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            dropped=material.train.dropped,
            plain=None if settings.export_plain is None else str(settings.export_plain),
        )
        if first:
            training = training_json(identity, report, log)
            _write(run, stage, material, settings, training)
        return report


def _run(trainer: AdapterTrainer, checkpoint: Path | None, progress: Progress) -> TrainerState:
    """Train, or go on, to the end; the state after it."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        progress.line(f"going on after step {state.global_step} of {state.max_steps}")
        if state.global_step >= state.max_steps:  # Trainer would take one step more
            trainer.load(checkpoint)
            return state
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer.state


def _write(run: Run, stage: Stage, material: Material, settings: Settings, training: Mapping[str, Any]) -> None:
    """The adapter, in the model's own basis too if that is wanted, and what the training was."""
    description = stage.reference.description
    rotation = settings.rotation
    basis = AdapterBasis(
        rotation=rotation,
        basis=rotation.basis(dimensions(description)) if rotation.sites else None,
        base=material.fingerprint,
        model_type=description.architecture.model_type,
        grid=settings.grid,
        base_kind=settings.base,
        activations=settings.activations,
        adapter_type=settings.adapter_type,
        residual=bool(stage.residuals),
        start=bool(stage.starts),
    )
    options = _written_as(description, material, settings)
    write_adapter(run.output, stage.deltas(), basis, residual=stage.residuals, start=stage.starts, **options)
    if settings.export_plain is not None:
        plain = plain_deltas(stage.deltas(), stage.repaired, description, rotation, material.checkpoint.read)
        write_adapter(settings.export_plain, plain, None, **options)
        run.describe(settings.export_plain, training)
    run.finish(training)


def _finished(run: Run, material: Material, settings: Settings, progress: Progress, *, first: bool) -> FinetuneReport:
    """The report of a finished adapter, which is exported if that is wanted now."""
    training = read_object(run.output / TRAINING)
    report = FinetuneReport.from_json(training["report"])
    if settings.export_plain is None:
        progress.line(f"{run.output} is finished: nothing to do")
        return report
    if first:
        description = Reference.load(material.model).description
        adapter = Adapter.open(run.output, description, material.checkpoint.read)
        plain = plain_deltas(adapter.deltas, adapter.repaired, description, settings.rotation, material.checkpoint.read)
        write_adapter(settings.export_plain, plain, None, **_written_as(description, material, settings))
        run.describe(settings.export_plain, training)
        progress.line(f"{run.output} is finished: exported to {settings.export_plain}")
    return replace(report, plain=str(settings.export_plain))


def _written_as(description: Description, material: Material, settings: Settings) -> dict[str, Any]:
    """How `write_adapter` is to write an adapter of these settings."""
    named = {"torch_names": torch_names(description), "base_model": material.model.name}
    return {"rslora": settings.rslora, "dropout": settings.dropout, **named}


def _tell(stage: Stage, settings: Settings, progress: Progress) -> None:
    progress.line(
        f"{settings.adapter_type} on {len(stage.targets)} linears in the basis {settings.rotation}: "
        f"{stage.trainable_parameters:,} trainable parameters"
    )
    progress.line(f"base {settings.base}: {memory_text(stage.base_bytes, stage.float_bytes)} (linears of the blocks)")


def _hash(examples: Examples) -> str:
    """sha256 over the tokens and labels of all examples, which tokenizer and template made as much as the file did."""
    digest = hashlib.sha256()
    for place in range(len(examples)):
        example = examples[place]
        digest.update(len(example["input_ids"]).to_bytes(8, "little"))
        digest.update(example["input_ids"].numpy().tobytes() + example["labels"].numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries' own log lines, bars and announcements off; what goes wrong is raised."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.enable_progress_bar()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
