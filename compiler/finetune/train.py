"""The training itself: transformers' Trainer with batches of like lengths, whole checkpoints and an end to NaNs."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput

from rqc.compiler.finetune.checkpoints import Run
from rqc.compiler.finetune.data import Collate, Examples
from rqc.compiler.finetune.examples import IGNORED
from rqc.compiler.finetune.optimizers import make_optimizer
from rqc.compiler.finetune.settings import Settings
from rqc.compiler.finetune.stage import Stage
from rqc.compiler.instruments import Progress
from rqc.runtime.errors import InputError, ResourceError, TrainingError

WEIGHTS = "trained.safetensors"
"""The adapters' parameters in a checkpoint, by their names in the model."""
_POOLED_BATCHES = 50
"""Batches that are sorted by length together."""


class LengthBuckets(Sampler[int]):
    """Places of examples in an order that changes with the epoch: shuffled, but so that neighbours are of like length.

    The order is a function of seed and epoch alone, so that a resumed run sees the batches that it would have seen.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        """batch: examples that are padded together, or one after the other."""
        self.lengths, self.batch, self.seed = lengths, batch, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.batch * _POOLED_BATCHES
        batches = []
        for start in range(0, len(shuffled), pool):
            pooled = sorted(shuffled[start : start + pool], key=lambda place: -self.lengths[place])
            batches += [pooled[first : first + self.batch] for first in range(0, len(pooled), self.batch)]
        full = [batch for batch in batches if len(batch) == self.batch]
        rest = [batch for batch in batches if len(batch) < self.batch]  # stays at the end: batches keep their bounds
        order = torch.randperm(len(full), generator=generator).tolist()
        for batch in [*(full[place] for place in order), *rest]:
            yield from batch


class _Told(TrainerCallback):  # type: ignore[misc]
    """Progress, and the epoch for the sampler."""

    def __init__(self, sampler: LengthBuckets, progress: Progress) -> None:
        self.sampler, self.progress = sampler, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)  # a resumed state holds the old save_steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.epoch = int(state.epoch or 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            label = f"training: step {state.global_step} of {state.max_steps}, loss {logs['loss']:.4f}"
            self.progress.advance(label, state.global_step, state.max_steps)
        if "eval_loss" in logs:
            self.progress.line(f"evaluation after step {state.global_step}: loss {logs['eval_loss']:.4f}")


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """A Trainer of adapters whose checkpoints hold these alone and appear whole or not at all.

    Raises TrainingError at the step whose loss or gradient is no number, before it changes a parameter, and
    ResourceError where a checkpoint cannot be written.
    """

    def __init__(
        self,
        stage: Stage,
        run: Run,
        settings: Settings,
        data: tuple[Examples, Examples | None],
        pad_id: int,
        progress: Progress,
    ) -> None:
        """data: examples to train on, and to evaluate on if there are any."""
        train, held_out = data
        self.run = run
        self.settings = settings
        self._saving = False
        arguments = training_arguments(run, settings, evaluates=held_out is not None)
        together = settings.batch_size * settings.grad_accum * arguments.world_size
        self.sampler = LengthBuckets(train.lengths, together, settings.seed)
        super().__init__(
            stage.model,
            arguments,
            data_collator=Collate(pad_id),
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[_Told(self.sampler, progress)],
        )
        self.remove_callback(PrinterCallback)
        if held_out is not None:  # in steps, for Trainer saves the state of an epoch before it evaluates it
            per_epoch = math.ceil(len(self.get_train_dataloader()) / settings.grad_accum)
            self.args.eval_steps = settings.eval_steps or per_epoch

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The adapters' numbers by name, those that stay as they were drawn too."""
        return {name: each for name, each in self.model.named_parameters() if "lora_" in name}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, or one that knows of A and B."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer: Any = make_optimizer(self.model, self.settings, kind, options)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Cosine behind whole steps of warm-up: Trainer would round them up, and a short run lose its first step."""
        self.args.warmup_steps = int(self.settings.warmup_ratio * num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """The loss of one batch, and its gradients."""
        loss: Tensor = super().training_step(*arguments, **options)
        if not torch.isfinite(loss):
            raise self._lost(f"the loss is {loss.item()}")
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.args.fp16 or norm is None:  # the scaler of float16 leaves such a step out and lowers its scale
            return norm
        if not math.isfinite(float(norm)):
            raise self._lost("the gradient is not finite")
        return norm

    def _lost(self, what: str) -> TrainingError:
        kept = f"; step {self.run.step()} is kept in {self.run.folder}" if self.run.unfinished else ""
        return TrainingError(
            f"{what} at step {self.state.global_step + 1}{kept}",
            hint="a lower --lr, another --seed, or --dtype fp32; and look at the data",
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run.writing if self._saving else self.run.folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write under another name, then rename; with several processes, when all of them have written."""
        self._saving = True
        try:
            with _written(self.state.global_step):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.run.commit()
            self.accelerator.wait_for_everyone()
        finally:
            self._saving = False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            values = {name: each.detach().cpu().contiguous() for name, each in self.parameters.items()}
            save_file(values, folder / WEIGHTS)

    def load(self, checkpoint: Path) -> None:
        """Take the adapters of a checkpoint."""
        self._load_from_checkpoint(str(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _read(resume_from_checkpoint):
            saved = load_file(Path(resume_from_checkpoint) / WEIGHTS)
            for name, parameter in self.parameters.items():
                parameter.data.copy_(saved[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _read(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _read(checkpoint):
            super()._load_rng_state(checkpoint)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss of the predicted tokens of all examples, each counted once, whatever the batch or the number of
        processes."""
        self.model.eval()
        examples: Examples = self.eval_dataset
        places = sorted(range(len(examples)), key=lambda place: -examples.lengths[place])
        own = places[self.args.process_index :: self.args.world_size]
        total = torch.zeros(2, dtype=torch.float64)
        with torch.inference_mode():
            for first in range(0, len(own), self.args.eval_batch_size):
                batch = [examples[place] for place in own[first : first + self.args.eval_batch_size]]
                inputs = self._prepare_inputs(self.data_collator(batch))
                tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
                loss = float(self.model(**inputs).loss)
                total += torch.tensor([loss * tokens, tokens], dtype=torch.float64)
        total = self.accelerator.reduce(total.to(self.args.device)).cpu()
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": float(total[0] / total[1])}, len(examples))


def processes() -> int:
    """How many processes torchrun (or accelerate) started for this training."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_device(settings: Settings) -> str:
    """cpu or cuda. Raises ResourceError for a device that is not there or cannot train in the type asked for."""
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise ResourceError("device cuda: PyTorch sees no GPU", hint="--device cpu, or auto")
    on_cpu = settings.device == "cpu" or not cuda
    if settings.dtype == "fp16" and on_cpu:
        raise ResourceError("dtype fp16 on a CPU: its gradients would vanish", hint="--dtype bf16 or fp32")
    return "cpu" if on_cpu else "cuda"


def training_arguments(run: Run, settings: Settings, *, evaluates: bool) -> TrainingArguments:
    """What a Trainer is to be told."""
    on_cpu = check_device(settings) == "cpu"
    arguments = TrainingArguments(
        output_dir=str(run.folder),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay,
        max_grad_norm=0.0 if settings.optimizer == "lora-rite" else settings.max_grad_norm,  # which has its own
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=1,
        seed=settings.seed,
        optim="adamw_torch",
        use_cpu=on_cpu,
        bf16=settings.dtype == "bf16",
        fp16=settings.dtype == "fp16",
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        ddp_backend="gloo" if on_cpu and processes() > 1 else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:  # several GPUs by torchrun, one process each: DataParallel would copy the hooks wrongly
        arguments._n_gpu = 1
    return arguments


@contextlib.contextmanager
def _written(step: int) -> Iterator[None]:
    """Tell what PyTorch and safetensors say of a full disk as one error."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ResourceError(
            f"the checkpoint of step {step} cannot be written: {reason}", hint="free some space, then --resume"
        ) from error


@contextlib.contextmanager
def _read(checkpoint: str | None) -> Iterator[None]:
    """Tell what PyTorch and safetensors say of a damaged checkpoint as one error."""
    try:
        yield
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{checkpoint} is damaged: {reason}", hint="remove it, and --resume goes on from the one before"
        ) from error
