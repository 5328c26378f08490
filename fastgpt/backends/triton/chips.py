"""The GPUs for which the Triton kernels are stored, compiled ahead of time and tuned."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What the kernels' tiles must fit on one kind of GPU.

    Sources: the CUDA C++ Programming Guide, "Compute Capabilities"; AMD's CDNA 3 ISA reference.
    """

    name: str
    backend: str  # Triton's: "cuda" or "hip"
    arch: int | str  # 90, "gfx942"
    warp_size: int
    shared_memory: int  # bytes that one block may have
    registers: int  # 32-bit ones of a multiprocessor (a compute unit's SIMD)
    registers_per_thread: int
    descriptors: bool  # a tensor copy engine (TMA)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "cuda", 80, 32, 163 * 1024, 65536, 255, False),
        Chip("sm_90", "cuda", 90, 32, 227 * 1024, 65536, 255, True),
        Chip("sm_100", "cuda", 100, 32, 227 * 1024, 65536, 255, True),
        Chip("gfx942", "hip", "gfx942", 64, 64 * 1024, 131072, 512, False),
    )
}
