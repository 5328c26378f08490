"""What a run leaves to look at: metrics.csv and loss.png."""

import csv
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastgpt.files import atomic_path

from .errors import require


@dataclass(frozen=True)
class Row:
    """One row of metrics.csv. Losses are in nats per token; None where nothing was measured."""

    step: int  # optimiser steps done
    tokens: int  # tokens trained on
    train_loss: float | None  # the mean since the last row
    val_loss: float | None
    lr: float  # of the last step
    grad_norm: float | None  # before clipping, the mean since the last row
    tokens_per_s: float | None  # since the last row
    seconds: float  # of training, over all sessions
    mfu: float | None = None  # since the last row, of the peak of all GPUs; None if unknown
    skipped: int = 0  # steps left out as spikes, in all


class MetricsFile:
    """A CSV file with one `Row` a line, each on the disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    def start(self, last_step: int | None = None) -> None:
        """Begin a new file, or continue the one that is there after `last_step`.

        Rows past it are of steps that no checkpoint kept, and will be done again.
        """
        old = read_metrics(self.path) if last_step is not None and self.path.exists() else []
        self.rows = [row for row in old if last_step is not None and row.step <= last_step]
        with atomic_path(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in fields(Row))
            writer.writerows(asdict(row).values() for row in self.rows)

    def append(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(asdict(row).values())


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.csv; a last line that a crash cut short is left out.

    A column that the file does not have, being older than it, is as if nothing was measured.
    """
    rows = []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        names = [field.name for field in fields(Row) if field.name in (reader.fieldnames or ())]
        for record in reader:
            if any(record[name] is None for name in names):
                continue
            values = {name: _number(name, record[name]) for name in names}
            rows.append(Row(**values))
    return rows


def _number(column: str, text: str) -> Any:
    if column in ("step", "tokens", "skipped"):
        return int(text)
    return float(text) if text else None


def draw_loss(path: Path, rows: list[Row], vocab_size: int, bigram: float | None = None) -> None:
    """Draw the training and the validation loss over the steps as a PNG.

    Two lines to compare with: ln(vocab_size), a guess that knows nothing, and the bigram model's
    validation loss if it is given.
    """
    figure_class = require("matplotlib.figure").Figure  # no pyplot: no display, no global state
    figure = figure_class(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    train = [(row.step, row.train_loss) for row in rows if row.train_loss is not None]
    val = [(row.step, row.val_loss) for row in rows if row.val_loss is not None]
    last = max([1, *(row.step for row in rows)])
    lines = [(math.log(vocab_size), f"ln({vocab_size:,}), knowing nothing")]
    if bigram is not None:
        lines.append((bigram, "bigram model"))
    for (loss, label), side in zip(lines, ("right", "left"), strict=False):
        axes.axhline(loss, color="0.55", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(  # where the curve, which falls, is not
            f"{label}: {loss:.2f}", (side == "right", loss), xycoords=("axes fraction", "data"),
            xytext=(-4 if side == "right" else 4, 4), textcoords="offset points", ha=side,
            fontsize=9, color="0.35",
        )  # fmt: skip
    if train:
        axes.plot(*zip(*train, strict=True), color="#9ecae1", linewidth=1.2, label="training")
    if val:
        label = f"validation, now {val[-1][1]:.3f}"
        axes.plot(
            *zip(*val, strict=True), color="#08519c", linewidth=2, marker="o", markersize=4,
            clip_on=False, zorder=3, label=label,
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats per token)", xlim=(0, last))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if train or val:
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
