"""Sizes and settings: the model's, with the published size tables, and the training run's."""

from dataclasses import dataclass, field, fields
from typing import Any

from .errors import UsageError

# In the order of the demonstration's table: ours without logits and with them, torch's, written out
LOSSES = ("linear_cross_entropy", "cross_entropy", "torch", "naive")
SCHEDULES = ("cosine", "step", "wsd")


def _check(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise UsageError(f"{name} must be {expected}, got {value!r}")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Raises UsageError (a ValueError) for a shape that can't be built."""

    vocab_size: int = 50257
    block_size: int = 1024  # the longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # GPT-2 was trained with 0.1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _check(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        if self.n_embd % self.n_head:
            raise UsageError(
                f"n_embd must be a multiple of n_head, got n_embd={self.n_embd} and "
                f"n_head={self.n_head}, which leaves {self.n_embd % self.n_head}"
            )


def _gpt2(n_layer: int, n_embd: int, n_head: int) -> GPTConfig:
    return GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head)


def _gpt3(n_layer: int, n_embd: int, n_head: int) -> GPTConfig:
    return GPTConfig(block_size=2048, n_layer=n_layer, n_embd=n_embd, n_head=n_head)


PRESETS: dict[str, GPTConfig] = {
    # For a CPU; the vocabulary is the tokeniser's.
    "tiny": GPTConfig(vocab_size=8192, block_size=64, n_layer=2, n_head=2, n_embd=64),
    "demo": GPTConfig(vocab_size=8192, block_size=128, n_layer=4, n_head=4, n_embd=128),
    "small": GPTConfig(vocab_size=8192, block_size=256, n_layer=6, n_head=6, n_embd=384),
    # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2.
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    # Brown et al. 2020, "Language Models are Few-Shot Learners", table 2.1. Two of its rows don't
    # divide: XL has 24 heads of 128 for a width of 2048, and 13B a width of 5140 for 40 heads.
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
}


def _setting(default: Any, help: str, **argparse_keywords: Any) -> Any:
    return field(default=default, metadata={"help": help, **argparse_keywords})


@dataclass(frozen=True)
class TrainConfig:
    """A training run's settings; each is an option of `python -m fastgpt.gpt.train`.

    Raises UsageError (a ValueError) that gives the value and what was expected.
    """

    preset: str = _setting("tiny", "model size", choices=tuple(PRESETS))
    data: str | None = _setting(
        None, "text file or folder (default: the Python standard library's source)", type=str
    )
    tokenizer: str = _setting("bpe", "how text becomes tokens", choices=("bpe", "byte", "char"))
    vocab_size: int = _setting(8192, "tokens of the bpe vocabulary")
    block_size: int | None = _setting(None, "context in tokens (default: the preset's)", type=int)
    dropout: float = _setting(0.0, "dropout probability")
    steps: int = _setting(1000, "optimiser steps")
    batch_size: int = _setting(16, "sequences per micro-batch, of all processes together")
    grad_accum: int = _setting(1, "micro-batches per step")
    lr: float = _setting(1e-3, "peak learning rate")
    min_lr: float | None = _setting(None, "last learning rate (default: lr / 10)", type=float)
    warmup: int = _setting(100, "steps of linear warm-up")
    schedule: str = _setting("cosine", "the learning rate after that", choices=SCHEDULES)
    decay_every: int | None = _setting(
        None, "step: steps between decays (default: a third of the steps)", type=int
    )
    decay_factor: float = _setting(0.1, "step: what a decay multiplies the learning rate by")
    decay_share: float = _setting(0.2, "wsd: the part of the steps that the decay takes")
    weight_decay: float = _setting(0.1, "decay of the matrices")
    betas: tuple[float, float] = _setting((0.9, 0.95), "AdamW's betas", nargs=2, type=float)
    grad_clip: float = _setting(1.0, "largest norm of the gradient; 0 turns clipping off")
    skip_spikes: float = _setting(
        0.0,
        "leave out steps whose loss or gradient norm is not finite, or this many standard "
        "deviations above its recent mean (without a number: 6)",
        nargs="?", const=6.0, type=float,
    )  # fmt: skip
    eval_interval: int = _setting(250, "steps between evaluations and checkpoints")
    eval_batches: int = _setting(20, "batches per evaluation")
    log_interval: int = _setting(10, "steps between rows of metrics.csv")
    keep: int = _setting(1, "checkpoints to keep: the last one, or the last so many")
    sample_tokens: int = _setting(100, "tokens to write at each evaluation, for samples.jsonl")
    diagnostics: int = _setting(0, "steps between looks at layers, which take time; 0: none")
    tensorboard: bool = _setting(False, "write what diagnostics see for TensorBoard, too")
    seed: int = _setting(1337, "seed of the weights, the batches and the dropout")
    loss: str = _setting(LOSSES[0], "which cross-entropy", choices=LOSSES)
    dtype: str = _setting("float32", "autocast type", choices=("float32", "bfloat16"))
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    compile: bool = _setting(False, "compile the model with torch.compile")
    checkpoint_activations: bool = _setting(
        False, "keep each block's input alone for the backward pass, and compute it again there"
    )
    keep_products: bool = _setting(
        False, "with --checkpoint-activations: but keep the results of products and of attention"
    )
    fsdp: bool = _setting(False, "share out parameters and optimiser over the processes")
    tensor_parallel: bool = _setting(
        False, "share out the token embedding and output layer by vocabulary"
    )
    threads: int = _setting(0, "CPU threads; 0 leaves torch's choice")

    def __post_init__(self) -> None:
        # From JSON the betas arrive as a list.
        object.__setattr__(self, "betas", tuple(self.betas))
        for setting in fields(self):
            value = getattr(self, setting.name)
            if choices := setting.metadata.get("choices"):
                _check(value in choices, setting.name, f"one of {', '.join(choices)}", value)
        counts = "vocab_size batch_size grad_accum eval_interval eval_batches log_interval keep"
        for name in counts.split():
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        others = "steps warmup weight_decay grad_clip skip_spikes threads seed"
        for name in [*others.split(), "sample_tokens", "diagnostics"]:
            _check(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _check(0 < self.decay_factor <= 1, "decay_factor", "in (0, 1]", self.decay_factor)
        _check(0 <= self.decay_share <= 1, "decay_share", "in [0, 1]", self.decay_share)
        if self.decay_every is not None:
            _check(self.decay_every >= 1, "decay_every", "at least 1", self.decay_every)
        if not self.checkpoint_activations:
            only = "False without checkpoint_activations"
            _check(not self.keep_products, "keep_products", only, True)
        _check(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        _check(self.lr > 0, "lr", "above 0", self.lr)
        _check(0 <= self.last_lr <= self.lr, "min_lr", f"in [0, lr={self.lr}]", self.min_lr)
        ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _check(ok, "betas", "two numbers in [0, 1)", self.betas)
        if self.block_size is not None:
            _check(self.block_size >= 1, "block_size", "at least 1", self.block_size)
        if self.tokenizer == "bpe":
            _check(self.vocab_size >= 256, "vocab_size", "at least 256, the bytes", self.vocab_size)

    @property
    def last_lr(self) -> float:
        """The learning rate at the end of the schedule."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def steps_to_decay(self) -> int:
        """Steps between decays of the schedule "step"."""
        return self.decay_every or max(self.steps // 3, 1)

    @property
    def context(self) -> int:
        """Tokens per sequence: block_size, or the preset's."""
        return self.block_size or PRESETS[self.preset].block_size

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.grad_accum * self.context
