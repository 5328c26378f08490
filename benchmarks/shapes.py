"""The sizes that are measured. A name is also the argument of `--shape`."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CrossEntropyShape:
    """Logits of `rows` x `classes` and class-index targets."""

    name: str
    rows: int
    classes: int
    dtype: torch.dtype
    why: str
    quick: bool = True  # measured unless asked otherwise
    sequence: int = 0  # if set: logits (B, sequence, classes) seen as (B, C, sequence)

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.classes * self.dtype.itemsize

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """A leaf (B, T, C) or (N, C) of normal logits, its view that the loss is given, and the
        targets; the same numbers each time.
        """
        generator = torch.Generator().manual_seed(0)
        leaf = torch.empty(self.rows, self.classes, dtype=self.dtype)
        leaf.normal_(generator=generator)
        target = torch.randint(self.classes, (self.rows,), generator=generator)
        if self.sequence:
            leaf = leaf.view(-1, self.sequence, self.classes)
            target = target.view(-1, self.sequence)
        leaf.requires_grad_()
        return leaf, leaf.transpose(1, 2) if self.sequence else leaf, target

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = f"{self.rows}x{self.classes}"
        if self.sequence:
            size = f"{self.rows // self.sequence}x{self.sequence}x{self.classes} transposed"
        return f"{dtype} {size}"


CROSS_ENTROPY = (
    CrossEntropyShape("gpt2-fp32", 2048, 50304, torch.float32, "GPT-2's vocabulary, padded"),
    CrossEntropyShape("gpt2-bf16", 2048, 50304, torch.bfloat16, "the same in 16 bits"),
    CrossEntropyShape("demo-fp32", 4096, 8192, torch.float32, "the README's example"),
    CrossEntropyShape("char-fp32", 64, 65, torch.float32, "character level: all overhead"),
    CrossEntropyShape(
        "view-fp32", 1024, 50304, torch.float32, "logits.transpose(1, 2), K-dim", sequence=256
    ),
    CrossEntropyShape(
        "llama3-bf16", 1024, 128256, torch.bfloat16, "Llama 3's vocabulary", quick=False
    ),
    CrossEntropyShape(
        "gpt2-fp16", 2048, 50304, torch.float16, "the other 16-bit type", quick=False
    ),
    CrossEntropyShape(
        "gpt2-odd-fp32", 2048, 50257, torch.float32, "GPT-2's own: rows off alignment", quick=False
    ),
    CrossEntropyShape(
        "gpt2-long-fp32", 8192, 50304, torch.float32, "a micro-batch of 8 x 1024", quick=False
    ),
)
