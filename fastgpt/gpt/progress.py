"""What a run says to the person who watches it, and what it hears from them."""

import math
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from .errors import require
from .metrics import Row

if TYPE_CHECKING:
    from .train import Trainer


def heading(trainer: "Trainer") -> str:
    """What a run is, before it begins."""
    config, data, bigram = trainer.config, trainer.data, trainer.bigram_loss
    size = trainer.world.size
    many = f"{size} x " if size > 1 else ""
    peak = f"{trainer.peak / 1e12:,.1f} TFLOP/s" if trainer.peak else "unknown, so no MFU"
    text = (
        f"{data.corpus}: {len(data.train):,} tokens to train on and {len(data.val):,} held out, "
        f"{data.tokenizer.kind} vocabulary {data.tokenizer.vocab_size:,}\n"
        f"model {config.preset}: {trainer.num_parameters:,} parameters on {many}{trainer.device}; "
        f"{config.tokens_per_step:,} tokens a step; loss {config.loss}; {config.dtype}\n"
        f"peak of {trainer.peak_is_of}: {peak}\n"
        f"to compare with: ln(vocabulary) {math.log(data.tokenizer.vocab_size):.4f}"
        + (f", bigram model {bigram:.4f} (validation loss)" if bigram is not None else "")
        + f"\nrun folder: {trainer.out}"
    )
    if trainer.step >= config.steps:
        text += f"\nnothing to do: {trainer.step:,} steps are done; give more with --steps"
    return text


class Report:
    """Progress for a person: a bar on a terminal, and a line per row elsewhere.

    Nothing if `quiet`, as all processes of a run are but one.
    """

    def __init__(self, steps: int, done: int, quiet: bool = False) -> None:
        self.steps, self.first = steps, done
        self.quiet = quiet
        self.closed = False  # whoever read the output has gone
        self.bar = require("tqdm").tqdm(
            total=steps, initial=done, disable=quiet or not sys.stdout.isatty(), file=sys.stdout,
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
            mfu = f"  MFU {row.mfu:.1%}" if row.mfu is not None else ""
            skipped = f"  {row.skipped} skipped" if row.skipped else ""
            done = row.step - self.first
            pace = (time.perf_counter() - self.start) / done if done else 0.0
            left = pace * (self.steps - row.step)
            eta = f"{_duration(left)} left" if left else ""
            self.line(
                f"step {row.step:>6,}/{self.steps:,}  {loss:11}  {val:10}  lr {row.lr:.2e}  "
                f"{speed:>16}{mfu}{skipped}  {eta}".rstrip()
            )

    def line(self, text: str) -> None:
        if self.quiet:
            return
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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
