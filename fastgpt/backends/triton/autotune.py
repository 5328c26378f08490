"""Choose among a kernel's stored configurations by timing them, and remember the choice.

FASTGPT_AUTOTUNE=1 turns it on. Without it every call takes the table's first candidate. A choice is
kept for the process and, one file for each, in `autotune` in the cache folder, so that processes
that tune at the same time lose nothing.
"""

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastgpt.backends.triton import _interpreted, version
from fastgpt.backends.triton.chips import Chip
from fastgpt.files import atomic_path, cache_dir

Config = TypeVar("Config", bound=tuple)  # a NamedTuple of ints

_chosen: dict[tuple[Hashable, ...], Any] = {}


@functools.cache
def enabled() -> bool:
    """Whether FASTGPT_AUTOTUNE asks for it; read once.

    Raises ValueError for a value other than "0" and "1".
    """
    value = os.environ.get("FASTGPT_AUTOTUNE") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"FASTGPT_AUTOTUNE: expected '0' or '1', got {value!r}")
    return value == "1"


def milliseconds(run: Callable[[], Any]) -> float:
    """The median time of a launch on the device, after a warm-up, each with a cold cache."""
    from triton.testing import do_bench

    return do_bench(run, return_mode="median")


def best(
    name: str,
    key: Hashable,
    chip: Chip,
    candidates: Sequence[Config],
    launch: Callable[[Config], Any],
    measure: Callable[[Callable[[], Any]], float] = milliseconds,
) -> Config:
    """The fastest of the candidates for a kernel; the first one without FASTGPT_AUTOTUNE=1.

    `launch(config)` must give the same results however often it runs, and `key`, of numbers and
    strings, say everything on which the speed and the candidates depend. A candidate that needs
    more than the device has is left out. While a CUDA graph is captured nothing can be timed: then
    it is the choice of an earlier call, or the first candidate.
    """
    if len(candidates) == 1 or not enabled() or not _on_gpu():
        return candidates[0]
    call = (name, key, chip, _device())
    if call in _chosen:
        return _chosen[call]
    entry = (name, key, chip.name, _device_name(), version() or "", tuple(candidates))
    path = _path(entry)
    config = _read(path, candidates)
    if config is None:
        if _capturing():
            return candidates[0]
        times = _measure(candidates, launch, measure)
        if not times:
            return candidates[0]  # which says what it lacks when it is launched
        config = min(times, key=times.__getitem__)
        _write(path, entry, config, times)
    _chosen[call] = config
    return config


def _measure(
    candidates: Sequence[Config],
    launch: Callable[[Config], Any],
    measure: Callable[[Callable[[], Any]], float],
) -> dict[Config, float]:
    from triton.runtime.errors import OutOfResources

    times = {}
    for config in candidates:
        try:
            times[config] = measure(functools.partial(launch, config))
        except OutOfResources:
            continue
        except torch.OutOfMemoryError:
            warnings.warn(f"no memory left to time {config}", stacklevel=3)
            return {}
    return times


@functools.cache
def _on_gpu() -> bool:
    """Not in Triton's interpreter, whose times say nothing."""
    return torch.cuda.is_available() and not _interpreted()


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _device() -> int:
    return torch.cuda.current_device()


def _device_name() -> str:
    return torch.cuda.get_device_name()


# ---- the files ----


def _path(entry: tuple[Hashable, ...]) -> Path:
    digest = hashlib.sha256(repr(entry).encode()).hexdigest()[:16]
    return cache_dir() / "autotune" / f"{entry[0]}-{digest}.json".replace(" ", "-")


def _read(path: Path, candidates: Sequence[Config]) -> Config | None:
    """The stored choice; None, with a warning if the file is broken, where there is none."""
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        warnings.warn(f"{path} can't be read ({error}): tuning again", stacklevel=3)
        return None
    try:
        stored = tuple(json.loads(text)["config"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        stored = None
    for config in candidates:
        if config == stored:
            return config
    warnings.warn(f"{path} holds none of the candidates: tuning again", stacklevel=3)
    return None


def _write(
    path: Path, entry: tuple[Hashable, ...], config: Any, times: dict[Config, float]
) -> None:
    record = {
        "config": config._asdict(),
        "milliseconds": [[*candidate, time] for candidate, time in times.items()],
        "kernel": repr(entry[:-1]),
    }
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(record))
    except OSError as error:
        warnings.warn(f"the choice of {config} can't be kept: {error}", stacklevel=3)
