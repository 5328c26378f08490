"""What this installation can run: versions, instruction set, threads, and the table op x
backend.
"""

import importlib.metadata
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastgpt import dispatch
from fastgpt.backends import extensions, native, triton
from fastgpt.dispatch import BACKENDS

OPS = ("cross_entropy", "linear_cross_entropy", "scaled_dot_product_attention")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Info:
    """The answer of `fastgpt.info()`; prints as a table."""

    version: str
    torch: str
    triton: str | None  # None where it is not installed
    isa: str | None  # the CPU instruction set that runs; None without native kernels
    isas: tuple[str, ...]  # those this processor can run
    threads: int
    build: dict[str, Any]  # what the installation recorded
    # op, backend, device, available, reason, default (whether it runs anything unasked), note
    cells: tuple[dict[str, Any], ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [
            f"fastgpt {self.version}, torch {self.torch}, triton {self.triton or 'missing'}",
            f"instruction set: {self.isa or 'none'} (of {', '.join(self.isas) or 'none'}), "
            f"{self.threads} threads",
            "",
        ]
        width = max(len(op) for op in OPS)
        for cell in self.cells:
            place = f"{cell['op']:{width}}  {cell['backend']:7} {cell['device']:5}"
            lines.append(f"{place} {_state(cell)}")
        return "\n".join(lines)


def _state(cell: dict[str, Any]) -> str:
    if not cell["available"]:
        return f"off: {cell['reason']}"
    if not cell["default"]:
        return f"on when asked for, {cell['note']}"
    return f"on, {cell['note']}" if cell["note"] else "on"


def info() -> Info:
    """What can run here: versions, threads, and each op x backend x device with its reason."""
    cells = []
    for op in OPS:
        for backend in BACKENDS:
            for device in DEVICES:
                cell = dispatch.lookup(op, backend, device)
                cells.append(
                    {
                        "op": op,
                        "backend": backend,
                        "device": device,
                        "available": cell.available,
                        "reason": cell.reason,
                        "default": cell.available and cell.default,
                        "note": cell.note if cell.available else "",
                    }
                )
    return Info(
        version=version(),
        torch=torch.__version__,
        triton=triton.version(),
        isa=native.isa(),
        isas=native.isas(),
        threads=torch.get_num_threads(),
        build=extensions.build_record(),
        cells=tuple(cells),
    )


def version() -> str:
    """The installed version; "unknown" for a source tree that was never installed."""
    try:
        return importlib.metadata.version("fastgpt")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
