"""Examples of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rqc.compiler.finetune.examples import IGNORED


@dataclass(frozen=True)
class Collate:
    """Pads on the right, to a multiple of 8 by default. Padding is known by the mask, not by its token: a model whose
    end of text is its padding token still learns to end."""

    pad_id: int
    multiple: int = 8

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """input_ids, labels and attention_mask (1 = a token), int64 [batch, length]."""
        longest = max(len(example["input_ids"]) for example in examples)
        shape = len(examples), -(-longest // self.multiple) * self.multiple
        ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[row, :length] = torch.as_tensor(example["input_ids"])
            labels[row, :length] = torch.as_tensor(example["labels"])
            mask[row, :length] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}
