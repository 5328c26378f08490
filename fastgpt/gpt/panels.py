"""The records of `diagnostics` as plots over the depth of a model and over the steps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .charts import Chart, Theme, gradation, legend, reference, save, some
from .diagnostics import EDGES
from .errors import require
from .findings import DEAD, group_of, is_numbered
from .history import Record

GOOD_RATIO = 1e-3  # of update to data: about this, says experience, is neither slow nor rash
SNAPSHOTS = 5  # steps that a plot over the depth shows


def draw_panels(folder: Path, records: Sequence[Record]) -> None:
    """Write every panel for which the records have numbers as a PNG file."""
    for panel in panels(records):
        save(panel, folder / f"{panel.name}.png")


def panels(records: Sequence[Record]) -> list[Chart]:
    """A chart of each subject for which the records have numbers."""
    made = (make(records) for make in _PANELS) if records else ()
    return [panel for panel in made if panel is not None]


def short(name: str) -> str:
    """A layer's name without what all those of a GPT begin with, and a parameter's ending."""
    return name.removeprefix("transformer.").removesuffix(".weight")


def _activations(records: Sequence[Record]) -> Chart | None:
    names = list(records[-1]["activations"])
    names = [name for name in names if is_numbered(name)] or names  # the blocks, if there are any
    shown = some(records, SNAPSHOTS)
    std = {name: records[-1]["activations"][name]["std"] for name in names}
    if not names:
        return None

    def draw(rows: Sequence[Any], theme: Theme) -> None:
        colors = gradation(theme, len(shown))
        for key, axes in zip(("std", "mean"), rows, strict=True):
            for record, color in zip(shown, colors, strict=True):
                values = [record["activations"].get(name, {}).get(key) for name in names]
                _line(axes, range(len(names)), values, color, marker="o", markersize=3)
            axes.set_ylabel(key)
        _log_scale(rows[0], std.values())
        legend(rows[0], theme, _steps(shown, colors))
        _depth_ticks(rows[1], names)

    return Chart(
        "activations", "Activations by depth",
        f"Standard deviation and mean of each layer's output at steps {_list_steps(shown)}. "
        f"At the last, the standard deviation goes from {_say(std[names[0]])} ({short(names[0])}) "
        f"to {_say(std[names[-1]])} ({short(names[-1])}).",
        draw, rows=2,
    )  # fmt: skip


def _units(records: Sequence[Record]) -> Chart | None:
    names = [n for n, seen in records[-1]["activations"].items() if "dead" in seen]
    if not names:
        return None
    worst = {
        key: max((_share(records[-1], name, key) or 0.0) for name in names)
        for key in ("dead", "saturated")
    }
    bounded = any("saturated" in records[-1]["activations"][name] for name in names)

    def draw(rows: Sequence[Any], theme: Theme) -> None:
        colors = gradation(theme, len(names))
        highest = 0.05
        for key, style in (("dead", "-"), ("saturated", "--")):
            for name, color in zip(names, colors, strict=True):
                values = [_share(record, name, key) for record in records]
                highest = max(highest, *(value or 0.0 for value in values))
                _line(rows[0], _x(records), values, color, linestyle=style)
        if highest > DEAD / 2:
            reference(rows[0], theme, DEAD, "a warning if dead")
            highest = max(highest, 1.2 * DEAD)
        rows[0].set(ylim=(-0.03 * highest, 1.05 * highest), xlabel="step")
        rows[0].set_ylabel("share" if not bounded else "share (dashed: saturated)")
        rows[0].yaxis.set_major_formatter(require("matplotlib.ticker").PercentFormatter(1))
        legend(rows[0], theme, _layers(names, colors))

    saturated = f" The most saturated has {worst['saturated']:.0%}." if bounded else ""
    return Chart(
        "units", "Dead and saturated units" if bounded else "Dead units",
        "Share of each activation function's units that were active nowhere in the batch, over the "
        f"steps. At the last, the layer with the most has {worst['dead']:.0%}.{saturated}",
        draw,
    )  # fmt: skip


def _gradient_norm(records: Sequence[Record]) -> Chart | None:
    shown = some(records, SNAPSHOTS)
    norms = [_group_norms(record) for record in shown]
    names = list(norms[-1])
    if not names:
        return None

    def draw(rows: Sequence[Any], theme: Theme) -> None:
        colors = gradation(theme, len(shown))
        for norm, color in zip(norms, colors, strict=True):
            values = [norm.get(name) for name in names]
            _line(rows[0], range(len(names)), values, color, marker="o", markersize=3)
        _log_scale(rows[0], norms[-1].values())
        rows[0].set_ylabel("norm")
        _depth_ticks(rows[0], names)
        legend(rows[0], theme, _steps(shown, colors))

    listed = ", ".join(f"{short(n)} {_say(norms[-1][n])}" for n in some(names, 6))
    return Chart(
        "gradient-norm", "Gradient norm by depth",
        f"Norm of the gradient of each part of the model, before clipping, at steps "
        f"{_list_steps(shown)}. At the last: {listed}.",
        draw,
    )  # fmt: skip


def _gradient_histogram(records: Sequence[Record]) -> Chart | None:
    record = records[-1]
    counts: dict[str, list[int]] = {}  # of each group, by size
    for name, seen in record["gradients"].items():
        if "histogram" in seen:
            sizes = _by_size(seen["histogram"])
            old = counts.setdefault(group_of(name), [0] * len(sizes))
            counts[group_of(name)] = [a + b for a, b in zip(old, sizes, strict=True)]
    if not counts:
        return None
    names = list(counts)
    shares = [[n / sum(row) for n in row] for row in counts.values()]
    step = math.log10(EDGES[-1] / EDGES[-2])
    lowest = math.log10(EDGES[len(EDGES) // 2])
    edges = [lowest + step * i for i in range(-1, len(shares[0]))]
    filled = [i for i in range(len(shares[0])) if any(row[i] > 1e-4 for row in shares)]
    medians = {name: _median(edges, row) for name, row in zip(names, shares, strict=True)}

    def draw(rows: Sequence[Any], theme: Theme) -> None:
        colors = require("matplotlib.colors").LinearSegmentedColormap
        axes = rows[0]
        axes.grid(False)
        axes.pcolormesh(
            edges, [i - 0.5 for i in range(len(names) + 1)], shares,
            cmap=colors.from_list("", [theme.paper, theme.strong]),
            vmin=0, vmax=max(max(row[1:]) for row in shares) or 1,
        )  # fmt: skip
        places = _ticks(len(names), 12)
        axes.set_yticks(places, [short(names[i]) for i in places])
        axes.set(xlim=(edges[filled[0]], edges[filled[-1] + 1]), ylim=(len(names) - 0.5, -0.5))
        axes.set_xlabel("log10 of the gradient's size" + (" (left: 0)" if filled[0] == 0 else ""))

    listed = ", ".join(f"{short(n)} 1e{medians[n]:.1f}" for n in some(names, 6))
    return Chart(
        "gradient-histogram", f"Gradient histograms at step {record['step']:,}",
        "For each part of the model, how the sizes of its matrices' gradients are distributed; "
        f"medians: {listed}.",
        draw,
    )  # fmt: skip


def _updates(records: Sequence[Record]) -> Chart | None:
    last = records[-1]
    names = [n for n in last["updates"] if len(last["gradients"][n]["shape"]) >= 2]
    now = [last["updates"][name] for name in names if last["updates"][name] is not None]
    if not names:
        return None

    def draw(rows: Sequence[Any], theme: Theme) -> None:
        colors = gradation(theme, len(names))
        for name, color in zip(names, colors, strict=True):
            values = [record["updates"].get(name) for record in records]
            _line(rows[0], _x(records), values, color, linewidth=1.2)
        reference(rows[0], theme, math.log10(GOOD_RATIO), "1e-3")
        rows[0].set(xlabel="step", ylabel="log10 of update / data")
        legend(rows[0], theme, _layers(names, colors))

    span = f" At the last they lie between {min(now)} and {max(now)}." if now else ""
    return Chart(
        "update-ratio", "Update to data",
        "log10 of the standard deviation of each matrix's update over that of the matrix itself, "
        f"over the steps, beside a line at 1e-3.{span}",
        draw,
    )  # fmt: skip


def _attention(records: Sequence[Record]) -> Chart | None:
    names = list(records[-1]["attention"])
    if not names:
        return None
    limit = records[-1]["attention"][names[0]]["limit"]
    means = {name: _mean_entropy(records[-1], name) for name in names}

    def draw(rows: Sequence[Any], theme: Theme) -> None:
        colors = gradation(theme, len(names))
        for name, color in zip(names, colors, strict=True):
            values = [_mean_entropy(record, name) for record in records]
            _line(rows[0], _x(records), values, color)
            if len(names) <= 6:
                heads = [record["attention"].get(name, {}).get("entropy") for record in records]
                for head in range(len(heads[-1])):
                    one = [None if seen is None else seen[head] for seen in heads]
                    _line(rows[0], _x(records), one, color, linewidth=0.6, alpha=0.5, markersize=0)
        reference(rows[0], theme, limit, "ln(visible keys): all alike")
        rows[0].set(xlabel="step", ylabel="entropy (nats)")
        rows[0].set_ylim(-0.04 * limit, 1.12 * limit or 1)
        legend(rows[0], theme, _layers(names, colors))

    listed = ", ".join(f"{short(n)} {_say(means[n])}" for n in some(names, 6))
    return Chart(
        "attention-entropy", "Attention entropy",
        "Entropy of each layer's attention weights in nats, the mean over heads (thin: each head), "
        f"over the steps, beside ln(visible keys), {limit:.2f}. At the last: {listed}.",
        draw,
    )  # fmt: skip


_PANELS = (_activations, _units, _gradient_norm, _gradient_histogram, _updates, _attention)


def _line(axes: Any, x: Sequence[int], y: Sequence[float | None], color: Any, **style: Any) -> None:
    values = [math.nan if value is None else value for value in y]
    style = {"linewidth": 1.5, "marker": "o" if len(values) == 1 else "", "markersize": 3, **style}
    axes.plot(x, values, color=color, **style)


def _x(records: Sequence[Record]) -> list[int]:
    return [record["step"] for record in records]


def _share(record: Record, name: str, key: str) -> float | None:
    share: float | None = record["activations"].get(name, {}).get(key)
    return share


def _mean_entropy(record: Record, name: str) -> float | None:
    heads = record["attention"].get(name, {}).get("entropy") or [None]
    return None if None in heads else sum(heads) / len(heads)


def _group_norms(record: Record) -> dict[str, float | None]:
    squares: dict[str, float] = {}
    for name, seen in record["gradients"].items():
        square = math.nan if seen["norm"] is None else seen["norm"] ** 2
        squares[group_of(name)] = squares.get(group_of(name), 0.0) + square
    return {name: math.sqrt(s) if math.isfinite(s) else None for name, s in squares.items()}


def _by_size(histogram: list[int]) -> list[int]:
    """The counts of both signs together: of 0 and next to it, then of sizes from small to large."""
    middle = len(histogram) // 2
    both = zip(reversed(histogram[:middle]), histogram[middle + 1 :], strict=True)
    return [histogram[middle], *(a + b for a, b in both)]


def _median(edges: Sequence[float], shares: Sequence[float]) -> float:
    total = 0.0
    for edge, share in zip(edges[1:], shares, strict=True):
        total += share
        if total >= 0.5:
            return edge
    return edges[-1]


def _log_scale(axes: Any, values: Any) -> None:
    if all(value is not None and value > 0 for value in values):
        axes.set_yscale("log")


def _depth_ticks(axes: Any, names: Sequence[str]) -> None:
    places = _ticks(len(names), 9)
    labels = [short(names[i]) for i in places]
    crowded = sum(map(len, labels)) > 36
    axes.set_xticks(
        places, labels, rotation=35 if crowded else 0, ha="right" if crowded else "center"
    )


def _ticks(count: int, most: int) -> range:
    return range(0, count, -(-count // most))


def _steps(records: Sequence[Record], colors: Sequence[Any]) -> list[tuple[str, Any]]:
    steps = [f"{record['step']:,}" for record in records]
    steps[0] = f"step {steps[0]}"
    return list(zip(steps, colors, strict=True))


def _layers(names: Sequence[str], colors: Sequence[Any]) -> list[tuple[str, Any]]:
    pairs = list(zip(map(short, names), colors, strict=True))
    if sum(len(name) for name, _ in some(pairs, 5)) > 45:
        pairs = [pairs[0], pairs[-1]]
    return pairs


def _list_steps(records: Sequence[Record]) -> str:
    return ", ".join(f"{record['step']:,}" for record in records)


def _say(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
