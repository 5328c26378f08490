"""The demonstration: `python -m fastgpt.gpt.demo`, at most five minutes on two CPU cores.

Trains a GPT on the source of the Python standard library, with as many steps as fit the time on
this machine; prints what the fused losses and attention are worth in a training step, how far the
validation loss falls below a bigram model's, and a sample.
"""

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import fastgpt
from fastgpt.files import cache_dir

from .compare import FUSED, compare_variants, table
from .config import PRESETS, GPTConfig, TrainConfig
from .data import Dataset, load_dataset
from .errors import UsageError, run_command
from .sample import print_stream, stream_text
from .train import Trainer

SETTINGS = TrainConfig(
    preset="demo", batch_size=8, lr=4e-3, min_lr=0.0, weight_decay=0.1, warmup=100,
    eval_interval=250, eval_batches=40, log_interval=25, device="cpu",
)  # fmt: skip
PROMPT = "def "
SHARE = 0.95  # of the time is for training and what comes before it; the sample has the rest


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.gpt.demo", description="Train a small GPT here and now."
    )
    parser.add_argument("--minutes", type=float, default=4.75, help="in all (default: 4.75)")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/demo-<time>)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        raise UsageError(f"--minutes must be above 0, got {options.minutes}")
    if options.threads:
        torch.set_num_threads(options.threads)
    out = options.out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"

    _title("One training step, other losses, other attentions", begin)
    model_config = PRESETS[SETTINGS.preset]
    _print_kernels(model_config, SETTINGS.batch_size)
    measurements = compare_variants(model_config, SETTINGS.batch_size)
    print(table(measurements))

    _title("The corpus", begin)
    data = load_dataset(SETTINGS.data, SETTINGS.tokenizer, SETTINGS.vocab_size)
    vocab_size = data.tokenizer.vocab_size
    print(
        f"{data.corpus}: {len(data.train):,} tokens to train on, {len(data.val):,} held out; "
        f"bpe vocabulary {vocab_size:,} (cached in {cache_dir()})"
    )

    _title("Training", begin)
    deadline = begin + 60 * options.minutes
    until = begin + SHARE * 60 * options.minutes
    left = until - time.monotonic()
    guess = plan(SETTINGS, 0, left, measurements[FUSED].step_ms / 1e3)
    trainer = TimedTrainer(guess, out, data, until)
    print(
        f"{trainer.model.num_parameters():,} parameters, {torch.get_num_threads()} threads; "
        f"{max(left, 0):.0f} s, or about {guess.steps:,} steps of {guess.tokens_per_step:,} "
        "tokens; the plan follows the pace"
    )
    status = trainer.run(deadline)
    if status:
        return status

    _title("A sample", begin)
    text = stream_text(trainer.model, data.tokenizer, PROMPT, 150, top_p=0.95)
    print_stream(PROMPT, itertools.takewhile(lambda piece: time.monotonic() < deadline, text))

    _title("The result", begin)
    val = trainer.metrics.rows[-1].val_loss or trainer.evaluate()
    bigram = trainer.bigram_loss or math.nan
    print(
        f"validation loss, nats per token:  ln({vocab_size:,}) {math.log(vocab_size):.3f}  ->  "
        f"bigram model {bigram:.3f}  ->  this GPT {val:.3f}\n"
        f"perplexity:                       {vocab_size:,}  ->  {math.exp(bigram):.1f}  ->  "
        f"{math.exp(val):.1f}\n\n{table(measurements)}\n\n"
        f"curve: {out / 'loss.png'}; more text: python -m fastgpt.gpt.sample --run {out}\n"
        f"{time.monotonic() - begin:.0f} s in all"
    )
    return 0


class TimedTrainer(Trainer):
    """A run that plans its steps anew at every row, so as to end at `until` (of time.monotonic).

    A plan made once would be wrong by as much as the machine's other work changes. The learning
    rate follows the plan: it ends at its lowest when the time does.
    """

    def __init__(self, config: TrainConfig, out: Path, data: Dataset, until: float) -> None:
        super().__init__(config, out, data=data)
        self.begin, self.until = time.monotonic(), until

    def record(self, evaluate: bool) -> None:
        super().record(evaluate)
        now = time.monotonic()
        if 0 < self.step < self.config.steps:
            pace = (now - self.begin) / self.step  # with the evaluations
            config = plan(SETTINGS, self.step, self.until - now, pace)
            self.set_steps(config.steps, config.warmup)


def plan(settings: TrainConfig, done: int, seconds: float, pace: float) -> TrainConfig:
    """The settings with the steps done and as many more as fit the time at `pace` seconds each."""
    steps = max(done + int(seconds / pace), done + 1, 2 * settings.log_interval)
    return replace(settings, steps=steps, warmup=min(settings.warmup, steps // 10))


def _print_kernels(config: GPTConfig, batch_size: int) -> None:
    """Say which kernels the fused losses and attention run here."""
    rows, head_dim = batch_size * config.block_size, config.n_embd // config.n_head
    x = torch.zeros(rows, config.n_embd, requires_grad=True)
    weight = torch.zeros(config.vocab_size, config.n_embd, requires_grad=True)
    logits = torch.zeros(rows, config.vocab_size, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    print(fastgpt.explain(fastgpt.linear_cross_entropy, x, weight, targets))
    print(fastgpt.explain(fastgpt.cross_entropy, logits, targets))
    q = torch.zeros(batch_size, config.n_head, config.block_size, head_dim, requires_grad=True)
    print(fastgpt.explain(fastgpt.scaled_dot_product_attention, q, q, q, is_causal=True))


def _title(text: str, begin: float) -> None:
    print(f"\n--- {text} ({time.monotonic() - begin:.0f} s) " + "-" * (60 - len(text)), flush=True)


if __name__ == "__main__":
    run_command(main)
