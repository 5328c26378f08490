"""The sizes that are measured. A name is also the argument of `--shape`.

A shape knows its op's inputs, gate and floor; the rest of the machinery asks it and nobody else.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from benchmarks import UnavailableError
from benchmarks.gates import (
    Errors,
    Function,
    Inputs,
    attention_errors,
    cross_entropy_errors,
    linear_cross_entropy_errors,
)
from benchmarks.roofline import (
    CudaCopyFloor,
    CudaMatmulFloor,
    Floor,
    FmaFloor,
    MemoryFloor,
    Roofline,
)
from benchmarks.timing import cache_bytes

PASSES = ("forward", "backward", "full")


class Shape(Protocol):
    """What all ops' shapes have. They are dataclasses: their fields go into the report."""

    op: ClassVar[str]
    unit: ClassVar[str]  # of `work` in a second
    fewest_rounds: ClassVar[int]

    @property
    def passes(self) -> tuple[str, ...]:
        """Those of PASSES in which the providers do the same work."""

    @property
    def goal(self) -> float | None:
        """The ratio to the better of torch's own that is wanted, where there is more than one."""

    @property
    def floor_name(self) -> str: ...

    @property
    def device(self) -> str:
        """The type, "cpu" or "cuda"."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def quick(self) -> bool:
        """Whether it is measured unless asked otherwise."""

    def inputs(self) -> Inputs:
        """The same numbers each time."""

    def bytes_needed(self, functions: int) -> int:
        """About as much as the gate holds at once, of so many functions."""

    def errors(
        self, inputs: Inputs, functions: dict[str, Function]
    ) -> tuple[dict[str, Errors], Errors]:
        """For the gate: each function's errors, and the largest values they are errors of."""

    def work(self) -> tuple[float, float]:
        """What a forward and a backward must do at the least, in bytes or operations."""

    def floor(self) -> Floor:
        """Raises UnavailableError."""


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- cross-entropy ----


@dataclass(frozen=True)
class CrossEntropyShape:
    """Logits of `rows` x `classes` and class-index targets."""

    op: ClassVar = "cross_entropy"
    floor_name: ClassVar = "memory floor"
    unit: ClassVar = "B/s"
    fewest_rounds: ClassVar = 5
    passes: ClassVar = PASSES
    goal: ClassVar = None

    name: str
    rows: int
    classes: int
    dtype: torch.dtype
    why: str
    quick: bool = True  # measured unless asked otherwise
    sequence: int = 0  # if set: logits (B, sequence, classes) seen as (B, C, sequence)
    columns: bool = False  # ... which lie in memory as they are seen, the classes apart
    device: str = "cpu"

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.classes * self.dtype.itemsize

    def inputs(self) -> Inputs:
        """Normal logits, a leaf (B, T, C) or (N, C), of which the loss is given a view."""
        generator = torch.Generator(self.device).manual_seed(0)
        leaf = torch.empty(self.rows, self.classes, dtype=self.dtype, device=self.device)
        leaf.normal_(generator=generator)
        target = torch.randint(self.classes, (self.rows,), generator=generator, device=self.device)
        if self.sequence:
            leaf = leaf.view(-1, self.sequence, self.classes)
            target = target.view(-1, self.sequence)
        if self.columns:
            leaf = leaf.transpose(1, 2).contiguous().transpose(1, 2)
        leaf.requires_grad_()
        return Inputs((leaf.transpose(1, 2) if self.sequence else leaf, target), {}, (leaf,))

    def errors(
        self, inputs: Inputs, functions: dict[str, Function]
    ) -> tuple[dict[str, Errors], Errors]:
        return cross_entropy_errors(inputs, functions)

    def bytes_needed(self, functions: int) -> int:
        """The logits and a gradient of each function, and the six tensors of the naive form."""
        return (functions + 7) * self.logits_bytes

    def work(self) -> tuple[float, float]:
        """Bytes: the logits are read in the forward, read and written in the backward."""
        return self.logits_bytes, 2 * self.logits_bytes

    def floor(self) -> Floor:
        cached = 64 << 20 if self.device == "cpu" else 3 * cache_bytes()
        if self.logits_bytes < cached:
            raise UnavailableError("the logits may stay in a cache")
        floor = MemoryFloor if self.device == "cpu" else CudaCopyFloor
        return floor(self.logits_bytes)

    def __str__(self) -> str:
        size = f"{self.rows}x{self.classes}"
        if self.sequence:
            batch = self.rows // self.sequence
            size = f"{batch}x{self.sequence}x{self.classes} transposed"
            if self.columns:
                size = f"{batch}x{self.classes}x{self.sequence} by columns"
        return f"{_type_name(self.dtype)} {size}"


CROSS_ENTROPY = (
    CrossEntropyShape("gpt2-fp32", 2048, 50304, torch.float32, "GPT-2's vocabulary, padded"),
    CrossEntropyShape("gpt2-bf16", 2048, 50304, torch.bfloat16, "the same in 16 bits"),
    CrossEntropyShape("demo-fp32", 4096, 8192, torch.float32, "the README's example"),
    CrossEntropyShape("char-fp32", 64, 65, torch.float32, "character level: all overhead"),
    CrossEntropyShape("notebook-fp32", 32, 27, torch.float32, "a first model of names"),
    CrossEntropyShape("bytes-fp32", 65536, 256, torch.float32, "byte level: short rows"),
    CrossEntropyShape("chars-fp32", 16384, 65, torch.float32, "character level, a large batch"),
    CrossEntropyShape(
        "view-fp32", 2048, 50257, torch.float32, "logits.transpose(1, 2), K-dim", sequence=256
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


# ---- attention ----


@dataclass(frozen=True)
class AttentionShape:
    """Self-attention: query (B, Hq, L, D), key and value (B, H, S, D)."""

    op: ClassVar = "attention"
    unit: ClassVar = "FLOP/s"
    fewest_rounds: ClassVar = 5
    passes: ClassVar = PASSES
    goal: ClassVar = None

    name: str
    B: int
    Hq: int
    H: int
    L: int
    S: int
    D: int
    causal: bool
    dtype: torch.dtype
    why: str
    quick: bool = True
    fused_qkv: bool = False  # views (B, T, heads, D) -> (B, heads, T, D) of one projection
    device: str = "cpu"

    @property
    def floor_name(self) -> str:
        return "FMA floor" if self.device == "cpu" else "matmul floor"

    def inputs(self) -> Inputs:
        """Normal query, key, value and upstream gradient."""
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            x = torch.empty(size, dtype=self.dtype, device=self.device)
            return x.normal_(generator=generator)

        upstream = normal(self.B, self.Hq, self.L, self.D)
        if self.fused_qkv:
            heads = (self.Hq, self.H, self.H)
            projection = normal(self.B, self.L, sum(heads), self.D)
            qkv = tuple(part.transpose(1, 2) for part in projection.split(heads, 2))
        else:
            key, value = (normal(self.B, self.H, self.S, self.D) for _ in range(2))
            qkv = (normal(self.B, self.Hq, self.L, self.D), key, value)
        qkv = tuple(x.detach().requires_grad_() for x in qkv)
        keywords = {"is_causal": self.causal, "enable_gqa": self.Hq != self.H}
        return Inputs(qkv, keywords, qkv, upstream)

    def errors(
        self, inputs: Inputs, functions: dict[str, Function]
    ) -> tuple[dict[str, Errors], Errors]:
        return attention_errors(inputs, functions)

    def bytes_needed(self, functions: int) -> int:
        """The results of each function, and one head's L x S tensors in float64."""
        tensors = (self.B * self.Hq * self.L + self.B * self.H * self.S) * 2 * self.D
        scores = self.Hq // self.H * self.L * self.S
        return functions * tensors * self.dtype.itemsize + 8 * scores * 8

    def work(self) -> tuple[float, float]:
        """Floating-point operations of the matmuls on the allowed pairs of query and key: two of
        them in the forward (Q K^T and P V), five in the backward (Q K^T again, dO V^T, and those
        that give dQ, dK and dV).
        """
        pairs = sum(min(i + 1, self.S) for i in range(self.L)) if self.causal else self.L * self.S
        matmul = 2 * self.B * self.Hq * pairs * self.D
        return 2 * matmul, 5 * matmul

    def floor(self) -> Floor:
        floor = FmaFloor if self.device == "cpu" else CudaMatmulFloor
        return floor(self.work(), self.dtype)

    def __str__(self) -> str:
        heads = f"{self.Hq}/{self.H}" if self.Hq != self.H else f"{self.Hq}"
        kind = " causal" if self.causal else ""
        view = " view" if self.fused_qkv else ""
        return f"{_type_name(self.dtype)} {self.B}x{heads}x{self.L}x{self.D}{kind}{view}"


_fp32, _bf16, _fp16 = torch.float32, torch.bfloat16, torch.float16

ATTENTION = (
    AttentionShape("attn-fp32", 2, 12, 12, 1024, 1024, 64, True, _fp32, "GPT-2's heads"),
    AttentionShape("attn-bf16", 2, 12, 12, 1024, 1024, 64, True, _bf16, "the same in 16 bits"),
    AttentionShape(
        "attn-fp16", 2, 12, 12, 1024, 1024, 64, True, _fp16, "the other 16-bit type", quick=False
    ),
    AttentionShape("attn-full-fp32", 2, 12, 12, 1024, 1024, 64, False, _fp32, "an encoder's"),
    AttentionShape(
        "attn-full-bf16", 2, 12, 12, 1024, 1024, 64, False, _bf16, "the same in 16 bits"
    ),
    AttentionShape(
        "attn-long-fp32", 1, 8, 8, 4096, 4096, 128, True, _fp32, "long, wide heads", quick=False
    ),
    AttentionShape(
        "attn-long-bf16", 1, 8, 8, 4096, 4096, 128, True, _bf16, "the same in 16 bits", quick=False
    ),
    AttentionShape(
        "attn-demo-fp32", 8, 6, 6, 256, 256, 64, True, _fp32, "as a GPT calls it", fused_qkv=True
    ),
    AttentionShape("attn-demo-bf16", 8, 6, 6, 256, 256, 64, True, _bf16, "short, in 16 bits"),
    AttentionShape("attn-gqa-bf16", 1, 8, 2, 1024, 1024, 64, True, _bf16, "four queries to a key"),
    AttentionShape("attn-1head-fp32", 1, 1, 1, 4096, 4096, 64, True, _fp32, "work for two threads"),
    AttentionShape("attn-512-fp32", 2, 12, 12, 512, 512, 64, True, _fp32, "tiles of the diagonal"),
    AttentionShape("attn-512-full-fp32", 2, 12, 12, 512, 512, 64, False, _fp32, "... and without"),
)

# ---- linear cross-entropy ----


@dataclass(frozen=True)
class LinearCrossEntropyShape:
    """Hidden states (N, D), a matrix (C, D) and class-index targets.

    fastgpt forms the gradients in the forward, torch in the backward: only both together compare.
    """

    op: ClassVar = "linear_cross_entropy"
    unit: ClassVar = "FLOP/s"
    fewest_rounds: ClassVar = 3  # of calls that take seconds

    name: str
    N: int
    D: int
    C: int
    dtype: torch.dtype
    why: str
    goal: float | None = None
    ignored: float = 0.0  # the fraction of the rows whose target is ignored
    training: bool = True  # else the loss alone, of inputs that need no gradient
    quick: bool = True
    device: str = "cpu"

    @property
    def floor_name(self) -> str:
        return "FMA floor" if self.device == "cpu" else "matmul floor"

    @property
    def passes(self) -> tuple[str, ...]:
        return ("full",) if self.training else ("forward",)

    @property
    def input_bytes(self) -> int:
        return (self.N + self.C) * self.D * self.dtype.itemsize

    def inputs(self) -> Inputs:
        """Normal hidden states and a matrix that makes normal logits of them."""
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(rows: int, std: float) -> torch.Tensor:
            x = torch.empty(rows, self.D, dtype=self.dtype, device=self.device)
            return x.normal_(0, std, generator=generator).requires_grad_(self.training)

        x, W = normal(self.N, 1), normal(self.C, self.D**-0.5)
        target = torch.randint(self.C, (self.N,), generator=generator, device=self.device)
        order = torch.randperm(self.N, generator=generator, device=self.device)
        target[order[self._kept :]] = -100
        return Inputs((x, W, target), {}, (x, W) if self.training else ())

    @property
    def _kept(self) -> int:
        return self.N - round(self.N * self.ignored)

    def errors(
        self, inputs: Inputs, functions: dict[str, Function]
    ) -> tuple[dict[str, Errors], Errors]:
        return linear_cross_entropy_errors(inputs, functions)

    def bytes_needed(self, functions: int) -> int:
        """The gradients of each function, the float64 matrix and gradient of the gate, and five
        tensors of the logits' size in a function that has them.
        """
        logits = self.N * self.C * self.dtype.itemsize
        return (functions + 1) * self.input_bytes + 3 * 8 * self.C * self.D + 5 * logits

    def work(self) -> tuple[float, float]:
        """Floating-point operations of the rows that are not ignored: the logits, and the two
        products that make the gradients of them.
        """
        matmul = 2.0 * self._kept * self.D * self.C
        return matmul, 2 * matmul if self.training else 0.0

    def floor(self) -> Floor:
        if self.device == "cpu":
            return Roofline(
                FmaFloor(self.work(), self.dtype), MemoryFloor(self.input_bytes), self.training
            )
        return Roofline(
            CudaMatmulFloor(self.work(), self.dtype),
            CudaCopyFloor(self.input_bytes),
            self.training,
        )

    def __str__(self) -> str:
        kind = f" {self.ignored:.0%} ignored" if self.ignored else ""
        kind += "" if self.training else " loss only"
        return f"{_type_name(self.dtype)} {self.N}x{self.D}x{self.C}{kind}"


_Linear = LinearCrossEntropyShape

# The goals for half the rows are twice those for all of them: what is ignored should cost nothing.
LINEAR_CROSS_ENTROPY = (
    _Linear("linear-gpt2-fp32", 2048, 768, 50304, _fp32, "GPT-2's head", 2.5),
    _Linear("linear-gpt2-bf16", 2048, 768, 50304, _bf16, "the same in 16 bits", 1.4),
    _Linear("linear-half-fp32", 2048, 768, 50304, _fp32, "half prompts", 5.0, ignored=0.5),
    _Linear("linear-half-bf16", 2048, 768, 50304, _bf16, "the same in 16 bits", 2.8, ignored=0.5),
    _Linear("linear-small-fp32", 256, 384, 8192, _fp32, "a small model's"),
    _Linear("linear-wide-bf16", 512, 256, 262144, _bf16, "many classes: all of them logits"),
    _Linear("linear-loss-fp32", 2048, 768, 50304, _fp32, "as in an evaluation", training=False),
)


# ---- on a GPU ----


def _loss_on_gpu(
    name: str, rows: int, classes: int, dtype: torch.dtype, why: str, **options: bool | int
) -> CrossEntropyShape:
    return CrossEntropyShape(name, rows, classes, dtype, why, **options, device="cuda")


def _attention_on_gpu(
    name: str, B: int, Hq: int, H: int, L: int, D: int, dtype: torch.dtype, why: str,
    *, causal: bool = True, quick: bool = False, fused_qkv: bool = False,
) -> AttentionShape:  # fmt: skip
    return AttentionShape(
        name, B, Hq, H, L, L, D, causal, dtype, why, quick, fused_qkv, device="cuda"
    )


# The most telling first: the last ones are left out when the time is up.
CUDA_CROSS_ENTROPY = (
    _loss_on_gpu("gpt2-bf16", 2048, 50304, _bf16, "GPT-2's vocabulary, padded"),
    _loss_on_gpu("llama3-bf16", 16384, 128256, _bf16, "Llama 3's vocabulary, two sequences"),
    _loss_on_gpu("gpt2-fp32", 2048, 50304, _fp32, "the first one in 32 bits", quick=False),
    _loss_on_gpu("gpt2-odd-bf16", 2048, 50257, _bf16, "rows off alignment", quick=False),
    _loss_on_gpu("gemma-bf16", 4096, 262144, _bf16, "Gemma 3's vocabulary", quick=False),
    _loss_on_gpu("llama3-fp32", 4096, 128256, _fp32, "wide rows in 32 bits", quick=False),
    _loss_on_gpu("byte-bf16", 65536, 256, _bf16, "byte level: short rows", quick=False),
    _loss_on_gpu(
        "view-bf16", 4096, 50304, _bf16, "logits.transpose(1, 2)", quick=False, sequence=1024
    ),
    _loss_on_gpu(
        "columns-bf16", 4096, 50304, _bf16, "(B, C, L)", quick=False, sequence=1024, columns=True
    ),
    _loss_on_gpu("llama2-bf16", 8192, 32000, _bf16, "Llama 2's vocabulary", quick=False),
    _loss_on_gpu("labels-fp32", 16384, 1000, _fp32, "labels of images", quick=False),
    _loss_on_gpu("char-bf16", 262144, 65, _bf16, "character level: short rows", quick=False),
    _loss_on_gpu("gpt2-odd-fp32", 2048, 50257, _fp32, "rows off alignment", quick=False),
    _loss_on_gpu("demo-fp32", 4096, 8192, _fp32, "the README's example", quick=False),
)

CUDA_ATTENTION = (
    _attention_on_gpu("attn-long-bf16", 1, 8, 8, 4096, 128, _bf16, "long, wide heads", quick=True),
    _attention_on_gpu("attn-bf16", 2, 12, 12, 1024, 64, _bf16, "GPT-2's heads", quick=True),
    _attention_on_gpu("attn-16k-bf16", 1, 16, 16, 16384, 128, _bf16, "longer"),
    _attention_on_gpu("attn-8k-bf16", 1, 16, 16, 8192, 64, _bf16, "long, narrow heads"),
    _attention_on_gpu("attn-8k-128-bf16", 1, 16, 16, 8192, 128, _bf16, "shorter, wide heads"),
    _attention_on_gpu("attn-16k-64-bf16", 1, 16, 16, 16384, 64, _bf16, "longer, narrow heads"),
    _attention_on_gpu("attn-gqa-bf16", 1, 32, 8, 4096, 128, _bf16, "four queries to a key"),
    _attention_on_gpu("attn-full-bf16", 2, 16, 16, 4096, 128, _bf16, "an encoder's", causal=False),
    _attention_on_gpu(
        "attn-view-bf16", 8, 12, 12, 1024, 64, _bf16, "as a GPT calls it", fused_qkv=True
    ),
    _attention_on_gpu("attn-fp32", 2, 12, 12, 1024, 64, _fp32, "GPT-2's heads in 32 bits"),
)


def _linear_on_gpu(
    name: str, N: int, D: int, C: int, why: str, quick: bool = False
) -> LinearCrossEntropyShape:
    return LinearCrossEntropyShape(name, N, D, C, _bf16, why, quick=quick, device="cuda")


CUDA_LINEAR_CROSS_ENTROPY = (
    _linear_on_gpu("linear-gpt2-bf16", 4096, 2048, 50304, "GPT-2's vocabulary", quick=True),
    _linear_on_gpu("linear-llama3-bf16", 8192, 4096, 128256, "Llama 3's head", quick=True),
    _linear_on_gpu("linear-few-bf16", 128, 4096, 128256, "few rows: the matrix is all"),
    _linear_on_gpu("linear-qwen-bf16", 16384, 2048, 248320, "Qwen 3.5's vocabulary"),
)

SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": CROSS_ENTROPY + ATTENTION + LINEAR_CROSS_ENTROPY,
    "cuda": CUDA_CROSS_ENTROPY + CUDA_ATTENTION + CUDA_LINEAR_CROSS_ENTROPY,
}
