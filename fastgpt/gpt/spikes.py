"""Steps whose loss or gradient leaps: noticed before they are applied, and left out.

A batch of broken text, or one step too far, shows as a loss or a gradient norm far above those of
the steps before, and its update can cost what many steps have learned. A step is a spike when its
loss or its gradient's norm is not finite, or is more than `threshold` standard deviations above the
mean of the last `WINDOW` steps that were none. Clipping is no substitute: it keeps the direction.
"""

import math
from collections import deque

import torch
from torch import Tensor

from .errors import UsageError

WINDOW = 64  # steps; before there are as many, only what is not finite is a spike
MOST_IN_A_ROW = 64  # then it is no spike but the level that the run is on


class Spikes:
    """The losses and gradient norms of the last steps, and how many steps were left out.

    Every rank of a distributed run gives the same numbers, and so takes the same decisions.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.skipped = 0
        self.in_a_row = 0
        names = "loss", "gradient norm"
        self._recent = {name: deque[float](maxlen=WINDOW) for name in names}

    def check(self, loss: float, norm: float) -> str | None:
        """Why the step of this loss and gradient norm is to be left out; None if it is not.

        Raises UsageError where leaving out steps can't help: after `MOST_IN_A_ROW` of them.
        """
        values = {"loss": loss, "gradient norm": norm}
        for name, value in values.items():
            if reason := self._reason(name, value):
                self.skipped += 1
                self.in_a_row += 1
                if self.in_a_row >= MOST_IN_A_ROW:
                    raise UsageError(
                        f"{self.in_a_row} steps in a row were left out as spikes, the last one for "
                        f"its {reason}: the run has diverged; try a smaller --lr, or resume from "
                        "a checkpoint before it (--keep)"
                    )
                return reason
        self.in_a_row = 0
        for name, value in values.items():
            self._recent[name].append(value)
        return None

    def _reason(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"{name} {value}"
        recent = self._recent[name]
        if len(recent) < WINDOW:
            return None
        mean = math.fsum(recent) / WINDOW
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in recent) / WINDOW)
        if value <= mean + self.threshold * deviation:
            return None
        how_far = f"{(value - mean) / deviation:.1f} standard deviations" if deviation else "far"
        return f"{name} {value:.4g}, {how_far} above the mean {mean:.4g} of the last {WINDOW} steps"

    def tensors(self) -> dict[str, Tensor]:
        """All of the above, for a checkpoint."""
        kept = {
            f"spikes/{name}": torch.tensor(list(values), dtype=torch.float64)
            for name, values in self._recent.items()
        }
        return {**kept, "spikes/counts": torch.tensor([self.skipped, self.in_a_row])}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave; a checkpoint from before there were spikes has nothing."""
        if "spikes/counts" in tensors:
            self.skipped, self.in_a_row = map(int, tensors["spikes/counts"])
            for name, values in self._recent.items():
                values.clear()
                values.extend(tensors[f"spikes/{name}"].tolist())
