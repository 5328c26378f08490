"""Train a GPT: `python -m fastgpt.gpt.train --help`.

    python -m fastgpt.gpt.train --preset small --steps 5000 --out runs/small
    python -m fastgpt.gpt.train --resume runs/small

The run folder holds config.json, about.json, tokenizer.json, metrics.csv, loss.png, samples.jsonl,
with --diagnostics what was seen of the layers, and two checkpoints: latest.safetensors, to resume
from, and best.safetensors, the weights of the lowest validation loss. A page of it all is made by
`python -m fastgpt.gpt.report`.
A resumed run computes what the uninterrupted one would have, bit for bit on a CPU.
"""

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastgpt.files import atomic_path

from .about import about
from .bigram import Bigram
from .checkpoint import (
    load_checkpoint,
    model_tensors,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
    restore_rng,
    rng_tensors,
    save_checkpoint,
)
from .config import PRESETS, TrainConfig
from .data import Dataset, load_dataset, random_batch
from .diagnostics import Diagnostics
from .errors import CheckpointError, UsageError, require, run_command
from .metrics import MetricsFile, Row, draw_loss
from .model import GPT, loss_function
from .optim import learning_rate, make_optimizer
from .samples import Samples
from .tokenizer import from_json

TRAIN, VAL = 0, 1  # parts of the key that a batch is drawn with
LARGEST_BIGRAM = 20_000_000  # tokens; counting the pairs of more takes too long
SHAPE = ("preset", "tokenizer", "vocab_size", "block_size")  # what a resumed run can't change


class Trainer:
    """A training run in the folder `out`: a new one, or the one that is there, continued.

    `data` is what `config` asks for, where the caller has it already.
    Raises UsageError for settings that can't work, and CheckpointError for a checkpoint to resume
    from that is missing, damaged, or of another text.
    """

    def __init__(
        self, config: TrainConfig, out: Path, resume: bool = False, data: Dataset | None = None
    ) -> None:
        for library in ("safetensors.torch", "matplotlib.figure", "tqdm"):
            require(library)  # now rather than at the first checkpoint
        if not resume and (out / "latest.safetensors").exists():
            raise UsageError(
                f"{out} already holds a run; continue it with --resume {out}, "
                "or give another folder with --out"
            )
        self.config, self.out = config, out
        self.device = pick_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)

        if data is None:
            tokenizer = load_tokenizer(out) if resume else None
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
        self.forward: Callable[..., tuple[None, Tensor]] = (
            torch.compile(self.model) if config.compile else self.model
        )
        self.optimizer = make_optimizer(self.model, config)
        self.loss_fn = loss_function(config.loss)
        small = len(self.data.train) <= LARGEST_BIGRAM
        self.bigram_loss: float | None = None
        if small:
            bigram = Bigram(self.data.train, model_config.vocab_size)
            self.bigram_loss = bigram.loss(self.data.val)

        self.step = 0  # optimiser steps done
        self.best_val = math.inf
        self.seconds = 0.0  # of training, without the evaluations
        # Since the last row of metrics.csv: the sums of loss and gradient norm, and over what.
        self.sums = torch.zeros(2, device=self.device)
        self.interval_steps = 0
        self.interval_seconds = 0.0
        self.metrics = MetricsFile(out / "metrics.csv")
        self.samples = Samples(out, self.data, config.sample_tokens)
        self.diagnostics = Diagnostics(
            self.model, self.optimizer, config.diagnostics, out,
            tensorboard=config.tensorboard, say=lambda text: self._report.line(text),
        )  # fmt: skip
        if resume:
            self._restore()
        out.mkdir(parents=True, exist_ok=True)
        for history in (self.metrics, self.samples, self.diagnostics):
            history.start(last_step=self.step if resume else None)
        about_run = about(config, self.model, self.data, self.device, self.bigram_loss)
        _write_json(out / "about.json", about_run)
        _write_json(out / "tokenizer.json", self.data.tokenizer.to_json())
        _write_json(out / "config.json", asdict(config))

    def run(self, deadline: float = math.inf) -> int:
        """Train to the last step, or to a signal, a closed pipe, or `deadline` (of time.monotonic).

        Saves in each case. Returns the exit status: 0, or 128 + the number of the signal.
        """
        self._report = Report(self.config.steps, self.step)
        with self._report as report, StopSignals() as stop:
            if self.step == 0 and self.config.steps > 0:
                self.record(evaluate=True)
            self.mark = time.perf_counter()
            while self.step < self.config.steps and not (stop.signal or report.closed):
                self.train_step()
                last = self.step == self.config.steps
                evaluate = last or self.step % self.config.eval_interval == 0
                if evaluate or self.step % self.config.log_interval == 0:
                    self.record(evaluate)
                if evaluate:
                    self.save()
                    self.draw()
                if time.monotonic() > deadline:
                    break
            if self.step < self.config.steps:
                self.save()
                self.draw()
                report.line(
                    f"stopped after step {self.step:,} of {self.config.steps:,}, and saved; "
                    f"continue with: python -m fastgpt.gpt.train --resume {self.out}"
                )
        status = stop.signal or (signal.SIGPIPE if report.closed else 0)
        return 128 + status if status else 0

    def set_steps(self, steps: int, warmup: int) -> None:
        """Change the number of steps, and with it the learning rates of those to come."""
        self.config = replace(self.config, steps=steps, warmup=warmup)
        _write_json(self.out / "config.json", asdict(self.config))
        self._report.set_steps(steps)

    def train_step(self) -> None:
        """One step of the optimiser on `grad_accum` batches."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        self.model.train()
        with self.diagnostics.observe(self.step + 1) as observation:
            for micro in range(config.grad_accum):
                loss = self._loss(TRAIN, self.step * config.grad_accum + micro) / config.grad_accum
                loss.backward()
                self.sums[0] += loss.detach()
            observation.gradients()  # before they are clipped
            limit = config.grad_clip or math.inf
            self.sums[1] += torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.interval_steps += 1

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over `eval_batches` batches of held-out text, the same ones every time."""
        self.model.eval()
        losses = [self._loss(VAL, i) for i in range(self.config.eval_batches)]
        return torch.stack(losses).mean().item()

    def save(self) -> None:
        """Write latest.safetensors."""
        self._count_time()
        tensors = {
            **model_tensors(self.model),
            **optimizer_tensors(self.model, self.optimizer),
            **rng_tensors(self.device),
            "progress": self.sums,
        }
        metadata = {
            **self._metadata(),
            "best_val": self.best_val,
            "seconds": self.seconds,
            "interval_steps": self.interval_steps,
            "interval_seconds": self.interval_seconds,
        }
        save_checkpoint(self.out / "latest.safetensors", tensors, metadata)
        self.mark = time.perf_counter()

    def draw(self) -> None:
        """Write loss.png."""
        vocab_size = self.model.config.vocab_size
        draw_loss(self.out / "loss.png", self.metrics.rows, vocab_size, self.bigram_loss)
        self.diagnostics.draw()
        self.mark = time.perf_counter()

    def _loss(self, split: int, index: int) -> Tensor:
        config = self.config
        tokens = self.data.train if split == TRAIN else self.data.val
        key = (config.seed, split, index)
        x, y = random_batch(tokens, config.batch_size, config.context, key)
        if self.device.type == "cuda":  # pinned memory lets the copy overlap with work
            x, y = x.pin_memory(), y.pin_memory()
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        bf16 = config.dtype == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self.forward(x, y, self.loss_fn)[1]

    def record(self, evaluate: bool) -> None:
        """Add a row to metrics.csv and tell the terminal."""
        n = self.interval_steps
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
        row = Row(
            step=self.step,
            tokens=self.step * self.config.tokens_per_step,
            train_loss=loss_sum / n if n else None,
            val_loss=val_loss,
            lr=learning_rate(max(self.step - 1, 0), self.config),
            grad_norm=norm_sum / n if n else None,
            tokens_per_s=n * self.config.tokens_per_step / self.interval_seconds if n else None,
            seconds=self.seconds,
        )
        self.metrics.append(row)
        self._report.row(row)
        if evaluate:
            self.samples.write(self.model, self.step)
        self.sums.zero_()
        self.interval_steps, self.interval_seconds = 0, 0.0
        if val_loss is not None and val_loss < self.best_val:
            self.best_val = val_loss
            path = self.out / "best.safetensors"
            save_checkpoint(path, model_tensors(self.model), self._metadata())
        self.mark = time.perf_counter()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.interval_seconds += now - self.mark
        self.seconds += now - self.mark
        self.mark = now

    def _metadata(self) -> dict[str, Any]:
        return {
            "model": asdict(self.model.config),
            "corpus": self.data.digest,
            "step": self.step,
        }

    def _restore(self) -> None:
        path = self.out / "latest.safetensors"
        tensors, saved = load_checkpoint(path)
        if saved["corpus"] != self.data.digest:
            raise CheckpointError(
                f"{path} was trained on another text than {self.data.corpus} is now; give the same "
                "with --data (the default corpus changes with the Python version)"
            )
        restore_model(path, self.model, tensors)
        restore_optimizer(self.model, self.optimizer, tensors)
        restore_rng(tensors, self.device)
        self.sums.copy_(tensors["progress"])
        self.step, self.best_val, self.seconds = saved["step"], saved["best_val"], saved["seconds"]
        self.interval_steps = saved["interval_steps"]
        self.interval_seconds = saved["interval_seconds"]


class Report:
    """Progress for a person: a bar on a terminal, and a line per row elsewhere."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps, self.first = steps, done
        self.closed = False  # whoever read the output has gone
        self.bar = require("tqdm").tqdm(
            total=steps, initial=done, disable=not sys.stdout.isatty(), file=sys.stdout,
            unit="step", dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left",
        )  # fmt: skip
        self.start = time.perf_counter()

    def set_steps(self, steps: int) -> None:
        self.steps = self.bar.total = steps

    def row(self, row: Row) -> None:
        speed = f"{row.tokens_per_s:,.0f} tokens/s" if row.tokens_per_s else "start"
        loss = f"loss {row.train_loss:.4f}" if row.train_loss is not None else ""
        self.bar.set_postfix_str(", ".join(filter(None, (loss, speed))), refresh=False)
        self.bar.update(row.step - self.bar.n)
        if self.bar.disable or row.val_loss is not None:
            val = f"val {row.val_loss:.4f}" if row.val_loss is not None else ""
            done = row.step - self.first
            pace = (time.perf_counter() - self.start) / done if done else 0.0
            left = pace * (self.steps - row.step)
            eta = f"{_duration(left)} left" if left else ""
            self.line(
                f"step {row.step:>6,}/{self.steps:,}  {loss:11}  {val:10}  lr {row.lr:.2e}  "
                f"{speed:>16}  {eta}".rstrip()
            )

    def line(self, text: str) -> None:
        try:
            self.bar.clear()
            print(text, flush=True)
            self.bar.refresh()
        except BrokenPipeError:
            self.closed = True

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()


class StopSignals:
    """Inside the block the first Ctrl-C or SIGTERM is noted in `signal`; the next acts at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread, where signals arrive
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each, handler in self._before.items():
            signal.signal(each, handler)


def pick_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is a GPU where there is one. Raises UsageError."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: torch can't use it here: {reason}") from None
    return device


def load_config(run: Path) -> TrainConfig:
    """The settings of a run folder. Raises CheckpointError if there are none."""
    settings = _read_json(run / "config.json")
    if settings.get("loss") == "fused":  # its name in runs from before linear_cross_entropy
        settings["loss"] = "cross_entropy"
    return TrainConfig(**settings)


def load_tokenizer(run: Path) -> Any:
    """The tokeniser of a run folder. Raises CheckpointError if there is none."""
    return from_json(_read_json(run / "tokenizer.json"))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; is {path.parent} the folder of a run?")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options given, and no others: `out`, `resume`, and fields of TrainConfig."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.gpt.train",
        description="Train a GPT on text.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--out", type=Path, help="run folder (default: runs/<preset>-<time>)")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="continue the run in this folder"
    )
    for setting in fields(TrainConfig):
        keywords = dict(setting.metadata)
        if setting.default not in (None, False) or "type" not in keywords:
            shown = setting.default
            keywords["help"] += f" (default: {shown})" if shown is not False else ""
        if setting.default is False:
            keywords["action"] = "store_true"
        elif "choices" not in keywords:
            keywords.setdefault("type", type(setting.default))
            keywords.setdefault("metavar", {int: "N", float: "X", str: "NAME"}[keywords["type"]])
        parser.add_argument("--" + setting.name.replace("_", "-"), **keywords)
    return parser.parse_args(arguments)


def make_trainer(options: dict[str, Any]) -> Trainer:
    """The run that the options ask for: fields of TrainConfig, and `out` or `resume`."""
    out, resume = options.pop("out", None), options.pop("resume", None)
    if resume is None:
        if options.get("data") is not None:  # to be found again from another folder
            options["data"] = str(Path(options["data"]).resolve())
        config = TrainConfig(**options)
        name = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        return Trainer(config, out or Path("runs") / name)
    if out is not None:
        raise UsageError(f"--resume {resume} continues in that folder; leave out --out {out}")
    config = load_config(resume)
    for name in SHAPE:
        if name in options and options[name] != getattr(config, name):
            raise UsageError(
                f"the run in {resume} has {name} {getattr(config, name)}, which can't become "
                f"{options[name]}; start a new run for that"
            )
    return Trainer(replace(config, **options), resume, resume=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    trainer = make_trainer(vars(parse_arguments(arguments)))
    config, data = trainer.config, trainer.data
    bigram = trainer.bigram_loss
    print(
        f"{data.corpus}: {len(data.train):,} tokens to train on and {len(data.val):,} held out, "
        f"{data.tokenizer.kind} vocabulary {data.tokenizer.vocab_size:,}\n"
        f"model {config.preset}: {trainer.model.num_parameters():,} parameters on "
        f"{trainer.device}; {config.tokens_per_step:,} tokens a step; loss {config.loss}; "
        f"{config.dtype}\n"
        f"to compare with: ln(vocabulary) {math.log(data.tokenizer.vocab_size):.4f}"
        + (f", bigram model {bigram:.4f} (validation loss)" if bigram is not None else "")
        + f"\nrun folder: {trainer.out}",
        flush=True,
    )
    if trainer.step >= config.steps:
        print(f"nothing to do: {trainer.step:,} steps are done; give more with --steps")
        return 0
    return trainer.run()


if __name__ == "__main__":
    run_command(main)
