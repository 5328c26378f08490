"""The table op x backend, and the choice of a backend for a call.

A cell says whether a backend can run an op on a kind of device, and why not where it can't. For a
call, the first backend of `BACKENDS` whose cell is on and covers the call runs it; `eager` covers
everything. `fastgpt.backend(name)` and the environment variable FASTGPT_BACKEND prefer one backend
over the others.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

BACKENDS = ("native", "triton", "eager")  # in order of preference
NOT_IMPLEMENTED = "not implemented"


@dataclass(frozen=True)
class Cell:
    """One op on one backend and one kind of device."""

    op: str
    backend: str
    device: str  # a torch device type, or "any"
    reason: str  # why it is off; empty when it is on
    covers: Callable[[Any], str] = lambda call: ""  # why it can't do this call; empty when it can
    default: bool = True  # whether it runs anything without being asked for
    note: str = ""  # when it runs unasked, or how to ask for it
    kernels: Callable[[Any], str] = lambda call: ""  # which of two generations does it, and why

    @property
    def available(self) -> bool:
        return not self.reason


class Decision(NamedTuple):
    """What became of one backend for a call: it runs (no reason), or the reason why not."""

    backend: str
    reason: str


TABLE: dict[tuple[str, str, str], Cell] = {}


def register(cell: Cell) -> None:
    """Add a cell. Each backend's module does this once for each op it has."""
    TABLE[cell.op, cell.backend, cell.device] = cell


def lookup(op: str, backend: str, device: str) -> Cell:
    """The cell for a kind of device; an empty one where nothing is registered."""
    cell = TABLE.get((op, backend, device)) or TABLE.get((op, backend, "any"))
    return cell or Cell(op, backend, device, NOT_IMPLEMENTED)


class _Preference(threading.local):
    backend: str | None = None


# A threading.local, because the compiler guards on it; a ContextVar would break the graph.
_preference = _Preference()
_default: str | None = None  # FASTGPT_BACKEND; read once, since the compiler can't see it change


def _check_backend(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(
            f"{source}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}"
        )
    cells = [cell for cell in TABLE.values() if cell.backend == name]
    if not any(cell.available for cell in cells):
        reasons = sorted({f"{c.op} on {c.device}: {c.reason}" for c in cells})
        raise RuntimeError(
            f"{source}: the backend {name!r} is off: {'; '.join(reasons) or NOT_IMPLEMENTED}. "
            "`python -m fastgpt.info` shows every backend and how to turn it on."
        )


def read_environment() -> None:
    """Take FASTGPT_BACKEND as the default preference; called once, when the table is complete."""
    global _default
    name = os.environ.get("FASTGPT_BACKEND") or None
    if name is not None:
        _check_backend(name, "FASTGPT_BACKEND")
    _default = name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Prefer the backend `name` ("native", "triton" or "eager") in this thread, inside the block.

    A call that this backend does not cover still goes to eager; `fastgpt.explain` says which and
    why. Nests. Raises ValueError for an unknown name, and RuntimeError with the reason if the
    backend can run nothing on this machine.
    """
    _check_backend(name, "fastgpt.backend")
    previous = prefer(name)
    try:
        yield
    finally:
        prefer(previous)


def preferred() -> str | None:
    """The backend that this thread prefers by `fastgpt.backend`."""
    return _preference.backend


def prefer(name: str | None) -> str | None:
    """Set the backend that this thread prefers; returns the one before."""
    previous, _preference.backend = _preference.backend, name
    return previous


def asked_for() -> str | None:
    """The backend that this thread, or else the process, prefers; None where it left the choice."""
    return _preference.backend or _default


def choose(op: str, device: str, call: Any) -> list[Decision]:
    """Ask the backends in turn; the last decision names the one that runs."""
    preferred = asked_for()
    decisions = []
    for name in BACKENDS:
        cell = lookup(op, name, device)
        if preferred is not None and name not in (preferred, "eager"):
            reason = f"the backend {preferred!r} was asked for"
        else:
            reason = cell.reason or cell.covers(call)
        decisions.append(Decision(name, reason))
        if not reason:
            break
    return decisions


@torch.compiler.assume_constant_result
def nested_forward_levels() -> int:
    """How many levels of forward-mode differentiation (torch.func.jvp) surround the call.

    A constant for the compiler: it traces each stack of transforms anew.
    """
    stack = torch._C._functorch.get_interpreter_stack()
    if stack is None:
        return 0
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)
