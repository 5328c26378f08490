"""How much memory a call takes; the tests ask, too."""

import os
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most that torch's allocator held at once for a call: its result included, and what was
    there before not. From the profiler's record of every allocation, so exact and repeatable.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it prints each start and stop
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def cuda_peak_bytes(function: Callable[[], Any]) -> int:
    """The same of a GPU's allocator: what was asked of it, not the larger blocks that it gave."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    kept = function()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
