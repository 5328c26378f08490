"""What a run says to the person who watches it, and what it hears from them."""

import signal
import sys
import time
from types import FrameType
from typing import Any

from .errors import require
from .metrics import Row


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
