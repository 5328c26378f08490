"""The look of a run's plots, on light and on dark paper; `curves` and `panels` draw with it."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastgpt.files import atomic_path

from .errors import require

Item = TypeVar("Item")


@dataclass(frozen=True)
class Theme:
    """Colours: of writing, of what is in the background, and of the lines."""

    paper: str
    text: str
    faint: str  # lines to compare with; readable as text, too
    grid: str
    strong: str  # the line that matters
    pale: str  # and one beside it
    scale: tuple[float, float]  # the part of the colour map viridis that shows on the paper


LIGHT = Theme("#ffffff", "#1c2128", "#5f6771", "#e4e7eb", "#08519c", "#74a9cf", (0.0, 0.85))
DARK = Theme("#14181d", "#e6e9ed", "#a3abb5", "#2f363e", "#7cc0ff", "#3f7fb5", (0.25, 1.0))


@dataclass(frozen=True)
class Chart:
    """A plot that can be drawn in either theme, and what it shows in words."""

    name: str  # of its file
    title: str
    alt: str  # for those who can't see it: axes and the numbers that matter
    draw: Callable[[Sequence[Any], Theme], None]  # into matplotlib's axes, one for each row
    rows: int = 1


def png(chart: Chart, theme: Theme = LIGHT, titled: bool = False) -> bytes:
    """The chart as a PNG file that can be read on a phone; `titled` writes its title, too."""
    # No pyplot: no display, and no state that other plots share.
    figure = require("matplotlib.figure").Figure(
        figsize=(4.6, 2.9 if chart.rows == 1 else 4.2), dpi=150, layout="constrained",
        facecolor=theme.paper,
    )  # fmt: skip
    rows = figure.subplots(chart.rows, squeeze=False, sharex=True)[:, 0]
    for axes in rows:
        axes.set_facecolor(theme.paper)
        axes.grid(color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(theme.faint)
        axes.tick_params(which="both", colors=theme.faint, labelsize=8.5)
        axes.tick_params(which="minor", length=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set(color=theme.text, fontsize=9)
    chart.draw(rows, theme)
    if titled:
        figure.suptitle(chart.title, color=theme.text, fontsize=10.5)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def save(chart: Chart, path: Path) -> None:
    """Write the chart, with its title, as a PNG file."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png(chart, titled=True))


def legend(axes: Any, theme: Theme, entries: Sequence[tuple[str, Any]]) -> None:
    """A legend above the axes, of (label, colour), a few of them if there are many."""
    line = require("matplotlib.lines").Line2D
    entries = some(entries, 5)
    axes.legend(
        [line([], [], color=color, linewidth=2) for _, color in entries],
        [label for label, _ in entries],
        loc="lower left", bbox_to_anchor=(0, 1), ncols=len(entries), frameon=False, fontsize=8,
        labelcolor=theme.text, handlelength=1, handletextpad=0.4, columnspacing=1, borderpad=0.1,
    )  # fmt: skip


def gradation(theme: Theme, count: int) -> list[Any]:
    """`count` colours from dark to bright, for things in an order."""
    low, high = theme.scale
    viridis = require("matplotlib").colormaps["viridis"]
    return [viridis(low + (high - low) * i / max(count - 1, 1)) for i in range(count)]


def reference(axes: Any, theme: Theme, y: float, label: str, side: str = "right") -> None:
    """A dashed line to compare with."""
    axes.axhline(y, color=theme.faint, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        label, (side == "right", y), xycoords=("axes fraction", "data"),
        xytext=(-3 if side == "right" else 3, 3), textcoords="offset points", ha=side,
        fontsize=8, color=theme.faint,
    )  # fmt: skip


def some(items: Sequence[Item], most: int) -> list[Item]:
    """Up to `most` of them, evenly spaced, the first and the last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
