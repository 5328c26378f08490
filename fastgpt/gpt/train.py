"""Train a GPT: `python -m fastgpt.gpt.train --help`.

    python -m fastgpt.gpt.train --preset small --steps 5000 --out runs/small
    python -m fastgpt.gpt.train --resume runs/small
    torchrun --standalone --nproc_per_node=8 -m fastgpt.gpt.train --preset gpt2 --fsdp ...

The run folder holds config.json, about.json, tokenizer.json, metrics.csv, loss.png, samples.jsonl,
with --diagnostics what was seen of the layers, and two checkpoints: latest.safetensors, to resume
from, and best.safetensors, the weights of the lowest validation loss; with --keep also
step-<step>.safetensors of the last evaluations, to go back to. A page of it all is made by
`python -m fastgpt.gpt.report`.
A resumed run computes what the uninterrupted one would have, bit for bit on a CPU. On another
number of processes, or with parameters shared out another way, it does so to rounding.
"""

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .about import about
from .bigram import Bigram
from .checkpoint import keep_checkpoint, kept_checkpoints
from .config import PRESETS, TrainConfig
from .data import Dataset, load_dataset, random_batch
from .device import pick_device
from .diagnostics import Diagnostics
from .distributed import Parallel, World, join, leave
from .errors import UsageError, require, run_command
from .flops import flops_per_token, peak_of
from .folder import (
    LATEST,
    find_checkpoint,
    load_config,
    load_tokenizer,
    remove_unfinished,
    write_json,
)
from .metrics import MetricsFile, Row, draw_loss
from .model import GPT, loss_function
from .optim import learning_rate, make_optimizer
from .options import parse_arguments
from .progress import Report, StopSignals, heading
from .samples import Samples
from .spikes import Spikes
from .state import restore, save_best, save_latest
from .vocabulary import vocabulary_loss

TRAIN, VAL = 0, 1  # parts of the key that a batch is drawn with
LARGEST_BIGRAM = 20_000_000  # tokens; counting the pairs of more takes too long
SHAPE = ("preset", "tokenizer", "vocab_size", "block_size")  # what a resumed run can't change


class Trainer:
    """A training run in the folder `out`: a new one, or one continued from the checkpoint `resume`.

    `data` is what `config` asks for, where the caller has it already; `world` the processes that
    share the work, by default those that torchrun started.
    Raises UsageError for settings that can't work, and CheckpointError for a checkpoint to resume
    from that is missing, damaged, or of another text.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        resume: Path | None = None,
        data: Dataset | None = None,
        world: World | None = None,
    ) -> None:
        for library in ("safetensors.torch", "matplotlib.figure", "tqdm"):
            require(library)  # now rather than at the first checkpoint
        self.config, self.out = config, out
        self.device = pick_device(config.device)
        self.world = world or join(self.device)
        if resume is None and ((out / LATEST).exists() or kept_checkpoints(out)):
            raise UsageError(
                f"{out} already holds a run; continue it with --resume {out}, "
                "or give another folder with --out"
            )
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)

        if data is None:
            tokenizer = load_tokenizer(out) if resume else None
            with self.world.first():
                data = load_dataset(config.data, config.tokenizer, config.vocab_size, tokenizer)
        self.data = data
        for tokens in (self.data.train, self.data.val):
            random_batch(tokens, 1, config.context, (0,))  # too short a text is an error now
        model_config = replace(
            PRESETS[config.preset],
            vocab_size=self.data.tokenizer.vocab_size,
            block_size=config.context,
            dropout=config.dropout,
        )
        self.model = GPT(model_config).to(self.device)
        self.num_parameters = self.model.num_parameters()
        self.model.checkpoint_activations(
            config.checkpoint_activations, keep_products=config.keep_products
        )
        if config.tensor_parallel and self.world.group is not None:
            self.loss_fn = vocabulary_loss(config.loss, self.world.group)
        else:
            self.loss_fn = loss_function(config.loss)
        self.parallel = Parallel(self.model, config, self.world)
        self.optimizer = make_optimizer(self.model, config)
        self.spikes = Spikes(config.skip_spikes)
        small = len(self.data.train) <= LARGEST_BIGRAM
        self.bigram_loss: float | None = None
        if small and self.world.main:
            bigram = Bigram(self.data.train, model_config.vocab_size)
            self.bigram_loss = bigram.loss(self.data.val)
        self.peak, self.peak_is_of = peak_of(self.device, config.dtype)

        self.step = 0  # steps done, with those left out as spikes
        self.best_val = math.inf
        self.seconds = 0.0  # of training, without the evaluations
        # Since the last row of metrics.csv: the sums of loss and gradient norm, and over what.
        self.sums = torch.zeros(2, device=self.device)
        self.interval_steps = 0
        self.interval_skipped = 0
        self.interval_seconds = 0.0
        self.metrics = MetricsFile(out / "metrics.csv")
        self.samples = Samples(out, self.data, config.sample_tokens)
        self.diagnostics = Diagnostics(
            self.model, self.optimizer, config.diagnostics if self.world.main else 0, out,
            tensorboard=config.tensorboard, say=lambda text: self._report.line(text),
        )  # fmt: skip
        if self.world.rank:
            torch.manual_seed(config.seed + self.world.rank)  # for dropout of its own
        if resume:
            restore(self, resume)
        if self.world.main:
            out.mkdir(parents=True, exist_ok=True)
            remove_unfinished(out)
            if resume and resume.name == LATEST:  # a kill may have come before this
                keep_checkpoint(resume, self.step, config.keep)
            for history in (self.metrics, self.samples, self.diagnostics):
                history.start(last_step=self.step if resume else None)
            own = replace(config, batch_size=config.batch_size // self.world.size)
            about_run = about(
                own, model_config, self.num_parameters, self.data, self.device, self.bigram_loss
            )
            write_json(out / "about.json", about_run)
            write_json(out / "tokenizer.json", self.data.tokenizer.to_json())
            write_json(out / "config.json", asdict(config))

    def run(self, deadline: float = math.inf) -> int:
        """Train to the last step, or to a signal, a closed pipe, or `deadline` (of time.monotonic).

        Saves in each case. Returns the exit status: 0, or 128 + the number of the signal.
        """
        self._report = Report(self.config.steps, self.step, quiet=not self.world.main)
        with self._report as report, StopSignals() as stop:
            if self.step == 0 and self.config.steps > 0:
                self.record(evaluate=True)
            self.mark = time.perf_counter()
            while self.step < self.config.steps and not self._stopped_by(stop):
                self.train_step()
                last = self.step == self.config.steps
                evaluate = last or self.step % self.config.eval_interval == 0
                if evaluate or self.step % self.config.log_interval == 0:
                    self.record(evaluate)
                if evaluate:
                    self.save()
                    self.draw()
                if deadline < math.inf and self.world.largest(time.monotonic() > deadline):
                    break
            if self.step < self.config.steps:
                self.save()
                self.draw()
                report.line(
                    f"stopped after step {self.step:,} of {self.config.steps:,}, and saved; "
                    f"continue with: python -m fastgpt.gpt.train --resume {self.out}"
                )
            number = self._stopped_by(stop)
        return 128 + number if number else 0

    def _stopped_by(self, stop: StopSignals) -> int:
        """The number of a signal that any process got, or 0: all stop after the same step."""
        own = stop.signal or (signal.SIGPIPE if self._report.closed else 0)
        return int(self.world.largest(own))

    def set_steps(self, steps: int, warmup: int) -> None:
        """Change the number of steps, and with it the learning rates of those to come."""
        self.config = replace(self.config, steps=steps, warmup=warmup)
        write_json(self.out / "config.json", asdict(self.config))
        self._report.set_steps(steps)

    def train_step(self) -> None:
        """One step of the optimiser on `grad_accum` batches, unless they turn out to be a spike."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        self.model.train()
        losses = []
        with self.diagnostics.observe(self.step + 1) as observation:
            for micro in range(config.grad_accum):
                with self.parallel.micro_batch(last=micro == config.grad_accum - 1):
                    loss = self._loss(TRAIN, self.step * config.grad_accum + micro)
                    loss = loss / config.grad_accum
                    loss.backward()
                losses.append(loss.detach())
            loss = self._mean(torch.stack(losses).sum())
            observation.gradients()  # before they are clipped
            norm = self.parallel.clip_gradients(config.grad_clip or math.inf)
            if self._is_spike(loss, norm):
                self.interval_skipped += 1
            else:
                self.sums += torch.stack([loss, norm])
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.interval_steps += 1

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over `eval_batches` batches of held-out text, the same ones every time."""
        self.model.eval()
        losses = [self._loss(VAL, i) for i in range(self.config.eval_batches)]
        self.parallel.reshard()
        return self._mean(torch.stack(losses).mean()).item()

    def save(self) -> None:
        """Write latest.safetensors."""
        self._count_time()
        save_latest(self)
        self.mark = time.perf_counter()

    def draw(self) -> None:
        """Write loss.png."""
        if self.world.main:
            vocab_size = self.model.config.vocab_size
            draw_loss(self.out / "loss.png", self.metrics.rows, vocab_size, self.bigram_loss)
            self.diagnostics.draw()
        self.mark = time.perf_counter()

    def _loss(self, split: int, index: int) -> Tensor:
        """The mean over this process's part of a batch."""
        config = self.config
        tokens = self.data.train if split == TRAIN else self.data.val
        key, part = (config.seed, split, index), (self.world.rank, self.world.size)
        x, y = random_batch(tokens, config.batch_size, config.context, key, part)
        if self.device.type == "cuda":  # pinned memory lets the copy overlap with work
            x, y = x.pin_memory(), y.pin_memory()
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        bf16 = config.dtype == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self.parallel.forward(x, y, self.loss_fn)[1]

    def _mean(self, loss: Tensor) -> Tensor:
        """The mean over the processes, whose batches are of one size."""
        return self.world.sum(loss) / self.world.size

    def _is_spike(self, loss: Tensor, norm: Tensor) -> bool:
        if not self.config.skip_spikes:  # without waiting for a GPU
            return False
        reason = self.spikes.check(loss.item(), norm.item())
        if reason:
            self._report.line(f"step {self.step + 1:>6,} left out: {reason}")
        return reason is not None

    def record(self, evaluate: bool) -> None:
        """Add a row to metrics.csv and tell the terminal."""
        n = self.interval_steps
        applied = n - self.interval_skipped
        loss_sum, norm_sum = self.sums.tolist()  # waits for a GPU, so that the time is right
        if n:
            self._count_time()
        if not math.isfinite(loss_sum):
            raise UsageError(
                f"the loss is {loss_sum} by step {self.step:,} (lr {self.config.lr}, loss "
                f"{self.config.loss}, dtype {self.config.dtype}); try a smaller --lr. "
                f"{self.out} keeps the last good checkpoint, if one was due"
            )
        val_loss = self.evaluate() if evaluate else None
        speed = n * self.config.tokens_per_step / self.interval_seconds if n else None
        mfu = None
        if speed and self.peak:
            mfu = speed * flops_per_token(self.model.config) / (self.peak * self.world.size)
        row = Row(
            step=self.step,
            tokens=self.step * self.config.tokens_per_step,
            train_loss=loss_sum / applied if applied else None,
            val_loss=val_loss,
            lr=learning_rate(max(self.step - 1, 0), self.config),
            grad_norm=norm_sum / applied if applied else None,
            tokens_per_s=speed,
            seconds=self.seconds,
            mfu=mfu,
            skipped=self.spikes.skipped,
        )
        if self.world.main:
            self.metrics.append(row)
        self._report.row(row)
        if evaluate and self.world.main and not self.parallel.shares_parameters:
            self.samples.write(self.model, self.step)
        self.sums.zero_()
        self.interval_steps, self.interval_skipped, self.interval_seconds = 0, 0, 0.0
        if val_loss is not None and val_loss < self.best_val:
            self.best_val = val_loss
            save_best(self)
        self.mark = time.perf_counter()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.interval_seconds += now - self.mark
        self.seconds += now - self.mark
        self.mark = now


def make_trainer(options: dict[str, Any]) -> Trainer:
    """The run that the options ask for: fields of TrainConfig, and `out` or `resume`."""
    out, resume = options.pop("out", None), options.pop("resume", None)
    if resume is None:
        if options.get("data") is not None:  # to be found again from another folder
            options["data"] = str(Path(options["data"]).resolve())
        config = TrainConfig(**options)
        world = join(pick_device(config.device))
        now = time.localtime(world.largest(time.time()))  # the same on all machines
        name = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S', now)}"
        return Trainer(config, out or Path("runs") / name, world=world)
    if out is not None:
        raise UsageError(f"--resume {resume} continues in that folder; leave out --out {out}")
    checkpoint = find_checkpoint(resume)
    run = checkpoint.parent
    config = load_config(run)
    for name in SHAPE:
        if name in options and options[name] != getattr(config, name):
            raise UsageError(
                f"the run in {run} has {name} {getattr(config, name)}, which can't become "
                f"{options[name]}; start a new run for that"
            )
    return Trainer(replace(config, **options), run, resume=checkpoint)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    trainer = make_trainer(vars(parse_arguments(arguments)))
    if trainer.world.main:
        print(heading(trainer), flush=True)
    status = trainer.run() if trainer.step < trainer.config.steps else 0
    leave(trainer.world)
    return status


if __name__ == "__main__":
    run_command(main)
