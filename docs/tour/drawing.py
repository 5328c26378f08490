"""What the figures of the tour share: one look, and the folder they go to."""

import io
from pathlib import Path
from typing import Any

from fastgpt.files import atomic_path
from fastgpt.gpt.errors import require

BLUE, RED, GREEN, GREY = "#08519c", "#c44e52", "#2a7f3f", "0.55"


def panels(columns: int, rows: int = 1, height: float = 3.4, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, as many side by side; the options are those of `Figure.subplots`."""
    figure_class = require("matplotlib.figure").Figure  # no pyplot: no display, no global state
    figure = figure_class(figsize=(9.6, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
        each.set_axisbelow(True)
    return figure, axes


def save(figure: Any, script: str) -> None:
    """Write the figure of a chapter, given its `__file__`, to figures/ beside it."""
    from PIL import Image  # which matplotlib needs, too

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    few_colours = Image.open(drawn).convert("RGB").quantize(128)  # a third the size
    with atomic_path(Path(script).parent / "figures" / f"{Path(script).stem}.png") as temporary:
        few_colours.save(temporary, format="png", optimize=True)
