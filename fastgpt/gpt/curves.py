"""The rows of metrics.csv as plots over the steps."""

import math
from collections.abc import Sequence
from typing import Any

from .charts import Chart, Theme, legend, reference
from .metrics import Row

Points = list[tuple[int, float]]  # (step, value)


def curves(rows: Sequence[Row], vocab_size: int, bigram: float | None = None) -> list[Chart]:
    """Loss, learning rate, gradient norm and speed; those for which the rows have numbers."""
    train, val = _points(rows, "train_loss"), _points(rows, "val_loss")
    charts = [_loss(train, val, vocab_size, bigram)] if train or val else []
    for name, title, label, column in (
        ("learning-rate", "Learning rate", "learning rate", "lr"),
        ("total-gradient-norm", "Gradient norm", "norm, before clipping", "grad_norm"),
        ("speed", "Speed", "tokens per second", "tokens_per_s"),
    ):
        if points := _points(rows, column):
            charts.append(_single(name, title, label, points))
    return charts


def _loss(train: Points, val: Points, vocab_size: int, bigram: float | None) -> Chart:
    guess = math.log(vocab_size)

    def draw(rows: Sequence[Any], theme: Theme) -> None:
        axes = rows[0]
        reference(axes, theme, guess, f"ln({vocab_size:,}), knowing nothing: {guess:.2f}")
        if bigram is not None:
            reference(axes, theme, bigram, f"bigram model: {bigram:.2f}", "left")
        _plot(axes, train, theme.pale, linewidth=1.2)
        _plot(axes, val, theme.strong, linewidth=1.8, marker="o", markersize=3.5)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.margins(y=0.12)
        legend(axes, theme, [("training", theme.pale), ("validation", theme.strong)])

    parts = [
        f"{which} {_course(p)}" for which, p in (("Training", train), ("Validation", val)) if p
    ]
    beside = f"; ln(vocabulary) is {guess:.2f}"
    beside += f", the bigram model's {bigram:.2f}" if bigram is not None else ""
    return Chart("loss", "Loss", f"Loss in nats per token. {'. '.join(parts)}{beside}.", draw)


def _single(name: str, title: str, label: str, points: Points) -> Chart:
    def draw(rows: Sequence[Any], theme: Theme) -> None:
        _plot(rows[0], points, theme.strong)
        rows[0].set(xlabel="step", ylabel=label)
        rows[0].set_ylim(bottom=0)

    return Chart(name, title, f"{title} over the steps: {_course(points)}.", draw)


def _plot(axes: Any, points: Points, color: str, **style: Any) -> None:
    if points:
        style = {"linewidth": 1.5, "marker": "o" if len(points) == 1 else "", **style}
        axes.plot(*zip(*points, strict=True), color=color, **style)


def _points(rows: Sequence[Row], column: str) -> Points:
    values = ((row.step, getattr(row, column)) for row in rows)
    return [(step, value) for step, value in values if value is not None]


def _course(points: Points) -> str:
    (first, start), (last, end) = points[0], points[-1]
    values = [value for _, value in points]
    return (
        f"from {start:.4g} at step {first:,} to {end:.4g} at step {last:,}, "
        f"between {min(values):.4g} and {max(values):.4g}"
    )
