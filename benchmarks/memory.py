"""How much memory a call takes; the tests ask, too."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._profiler import _ExtraFields_Allocation


def peak_bytes(
    function: Callable[[], Any], beside: Callable[[], Iterable[torch.Tensor]] = tuple
) -> int:
    """The most that torch's allocator held at once for a call: its result included, and what was
    there before not. From the profiler's record of every allocation, so exact and repeatable.

    The tensors that `beside` gives after the call are not counted, if the call allocated them: the
    gradients of a training step, say, which are there in any case.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it prints each start and stop
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = function()
    changes = _allocations(profile.profiler.kineto_results.experimental_event_tree())
    changes.sort(key=lambda change: change[0])
    spared = {x.untyped_storage().data_ptr() for x in beside()}
    # An address is used again and again: what a tensor of `beside` has is its last allocation.
    last = {ptr: index for index, (_, ptr, size) in enumerate(changes) if size > 0}
    held = peak = 0
    for index, (_, ptr, size) in enumerate(changes):
        if ptr not in spared or index < last[ptr]:
            held += size
            peak = max(peak, held)
    del kept
    return peak


def _allocations(events: Iterable[Any]) -> list[tuple[int, int, int]]:
    """Of a tree of events, (time, address, bytes), of which what is freed is negative."""
    found = []
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        _, details = event.typed
        if isinstance(details, _ExtraFields_Allocation):
            found.append((event.start_time_ns, details.ptr, details.alloc_size))
    return found


def cuda_peak_bytes(function: Callable[[], Any]) -> int:
    """The same of a GPU's allocator: what was asked of it, not the larger blocks that it gave."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    kept = function()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
