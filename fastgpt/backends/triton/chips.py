"""The GPUs for which the Triton kernels are stored, compiled ahead of time and tuned."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Chip:
    """What the kernels' tiles must fit on one kind of GPU.

    Sources: the CUDA Programming Guide, "Compute Capabilities"; AMD's ROCm hardware specifications
    and LLVM's AMDGPU usage guide.
    """

    name: str  # under which the tiles are stored
    backend: str  # Triton's: "cuda" or "hip"
    arch: int | str  # what the code is compiled for: 90, "gfx942"
    warp_size: int
    shared_memory: int  # bytes that one block may have
    registers: int  # 32-bit ones of a multiprocessor
    registers_per_thread: int
    descriptors: bool  # a tensor copy engine (TMA), which the stored tiles use
    threads: int = 2048  # that a multiprocessor holds at once
    blocks: int = 32


# AMD's blocks of more than one wave are limited by a compute unit's barriers.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "cuda", 80, 32, 163 * 1024, 65536, 255, False),
        Chip("sm_90", "cuda", 90, 32, 227 * 1024, 65536, 255, True),
        Chip("sm_100", "cuda", 100, 32, 227 * 1024, 65536, 255, True),
        Chip("gfx942", "hip", "gfx942", 64, 64 * 1024, 131072, 512, False, blocks=16),
    )
}

_SM_80, _SM_100, _GFX942 = CHIPS["sm_80"], CHIPS["sm_100"], CHIPS["gfx942"]
# The relatives that run the tiles of one of these, as far as their own limits allow. Compute
# capability 12 is newer than 10 but has neither its tensor memory nor its shared memory.
RELATIVES = {
    "sm_86": replace(_SM_80, arch=86, shared_memory=99 * 1024, threads=1536, blocks=16),
    "sm_87": replace(_SM_80, arch=87, threads=1536, blocks=16),
    "sm_89": replace(_SM_80, arch=89, shared_memory=99 * 1024, threads=1536, blocks=24),
    "sm_103": replace(_SM_100, arch=103),
    "sm_110": replace(_SM_100, arch=110, threads=1536, blocks=24),
    "sm_120": replace(_SM_80, arch=120, shared_memory=99 * 1024, threads=1536, blocks=24),
    "sm_121": replace(_SM_80, arch=121, shared_memory=99 * 1024, threads=1536, blocks=24),
    "gfx90a": replace(_GFX942, arch="gfx90a"),
    "gfx950": replace(_GFX942, arch="gfx950", shared_memory=160 * 1024),
}


@torch.compiler.assume_constant_result
def chip_of(device: torch.device) -> Chip:
    """The chip whose stored tiles run on a device, with the device's own limits.

    On a CPU, in Triton's interpreter, that is sm_90: any chip's tiles give the same numbers there.
    Raises RuntimeError with the reason of `unserved` for a GPU that no stored chip serves.
    """
    if device.type == "cpu":
        return CHIPS["sm_90"]
    chip = _chip_of(_index(device))
    if isinstance(chip, str):
        raise RuntimeError(f"fastgpt's Triton kernels can't run on {device}: {chip}")
    return chip


@torch.compiler.assume_constant_result
def unserved(device: torch.device) -> str:
    """Why no stored chip serves a device; empty where one does."""
    # A device that is not there has fake tensors only.
    if device.type == "cpu" or (device.index or 0) >= torch.cuda.device_count():
        return ""
    chip = _chip_of(_index(device))
    return chip if isinstance(chip, str) else ""


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _chip_of(index: int) -> Chip | str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return _amd(properties.gcnArchName.split(":")[0])
    chip = _nvidia(10 * properties.major + properties.minor)
    if isinstance(chip, str):
        return chip
    limit = getattr(properties, "shared_memory_per_block_optin", chip.shared_memory)
    return replace(chip, shared_memory=min(chip.shared_memory, limit))


def _known(backend: str) -> dict[Any, Chip]:
    chips = (*CHIPS.values(), *RELATIVES.values())
    return {chip.arch: chip for chip in chips if chip.backend == backend}


def _nvidia(capability: int) -> Chip | str:
    """Code for any capability runs on one that is not listed: its newest listed elder's tiles."""
    known = _known("cuda")
    elders = [arch for arch in known if arch <= capability]
    if not elders:
        return f"its compute capability, {capability / 10}, is older than 8.0"
    return replace(known[max(elders)], arch=capability)


def _amd(arch: str) -> Chip | str:
    known = _known("hip")
    if arch not in known:
        return f"no tiles are stored for {arch}, only for {', '.join(sorted(known))}"
    return known[arch]


def target(chip: Chip) -> Any:
    """Triton's description of the chip, a GPUTarget."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget(chip.backend, chip.arch, chip.warp_size)
