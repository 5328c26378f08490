"""Compile the Triton kernels for a chip that need not be there, and read what they use of it."""

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from fastgpt.backends.triton.chips import Chip, target

TENSOR_MEMORY = 512  # columns of a multiprocessor's, on compute capability 10


class Compilation(NamedTuple):
    """One kernel in one stored configuration, as each op's `compilations(chip)` yields them."""

    name: str  # "attention forward bfloat16 d128 causal"
    kernel: Any  # the triton.jit function
    signature: dict[str, str]  # of its arguments: "*bf16", "i64", "fp32", "constexpr"
    constants: dict[str, Any]  # the constexpr arguments
    divisible: tuple[str, ...]  # arguments that the launcher promises to be multiples of 16
    options: dict[str, Any]  # num_warps, num_stages, ...
    instructions: dict[str, str]  # of this chip's assembly: what for -> regular expression
    work: str  # "bytes" or "flops" of the path, in words: "2 reads of x", "4 L S D / 2"


class Resources(NamedTuple):
    """What a compiled kernel uses of a multiprocessor."""

    registers: int  # 32-bit ones of a thread
    spill_stores: int  # bytes; on AMD 4 for each store of a register
    spill_loads: int
    stack: int  # bytes of a thread
    shared_memory: int  # bytes of a block
    tensor_memory: int  # columns of a block
    threads: int  # of a block
    blocks: int  # that a multiprocessor holds at once
    instructions: dict[str, int]  # how often each of `Compilation.instructions` occurs
    warnings: tuple[str, ...]  # about performance that is lost otherwise


def compile(compilation: Compilation, chip: Chip) -> Resources:
    """Compile a kernel as a launch does, down to the chip's machine code.

    On AMD a launch compiles other code for tensors within 2 GiB than for larger ones: of the two
    the worse number counts. Raises RuntimeError under TRITON_INTERPRET, ValueError for a
    compilation that is not the kernel's, and Triton's own errors for what does not compile.
    """
    import triton

    kernel = compilation.kernel
    if not isinstance(kernel, triton.runtime.JITFunction):
        raise RuntimeError(
            "TRITON_INTERPRET makes Triton's functions uncompilable when they are imported:"
            " unset it and start Python anew"
        )
    if mistaken := _mistaken(compilation):
        raise ValueError(f"{compilation.name}: the signature is mistaken in {mistaken}")

    specialized = [p.name for p in kernel.params if not p.do_not_specialize]
    aligned = {n: [["tt.divisibility", 16]] for n in specialized if n in compilation.divisible}
    used = _compile(compilation, chip, aligned)
    if chip.backend == "hip":
        small = {
            name: [*aligned.get(name, ()), ["tt.pointer_range", 32]]
            for name in specialized
            if compilation.signature[name].startswith("*")
        }
        used = _worse(used, _compile(compilation, chip, aligned | small))
    return used


def _mistaken(compilation: Compilation) -> list[str]:
    """The arguments that the kernel does not have, or has with another type."""
    signature = compilation.signature
    types = {p.name: p.annotation_type for p in compilation.kernel.params}
    return sorted(
        (types.keys() ^ signature.keys())
        | set(compilation.divisible) - types.keys()
        | {n for n, kind in signature.items() if kind not in ("constexpr", types.get(n) or kind)}
    )


def _compile(compilation: Compilation, chip: Chip, attributes: dict[str, Any]) -> Resources:
    import triton
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    kernel, gpu = compilation.kernel, target(chip)
    source = ASTSource(
        kernel,
        compilation.signature,
        compilation.constants,
        {(kernel.arg_names.index(name),): value for name, value in attributes.items()},
    )
    options = {"debug": bool(kernel.debug), **compilation.options}  # as a launch sets it
    with _ptxas_log() as log:
        compiled = triton.compile(source, target=gpu, options=dict(options))
    if chip.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        used = parse_amdgcn(assembly)
    else:
        assembly = compiled.asm["ptx"]
        if not log.getvalue():  # the code was in Triton's cache
            backend = make_backend(gpu)
            with _ptxas_log() as log:
                backend.make_cubin(assembly, {}, backend.parse_options(dict(options)), chip.arch)
        used = parse_ptxas(log.getvalue())
    metadata = compiled.metadata
    threads = metadata.num_warps * chip.warp_size
    shared, tensor_memory = metadata.shared, getattr(metadata, "tmem_size", None) or 0
    return used._replace(
        shared_memory=shared,
        tensor_memory=tensor_memory,
        threads=threads,
        blocks=occupancy(chip, used.registers, shared, threads, tensor_memory),
        instructions={
            what: len(re.findall(pattern, assembly, re.MULTILINE))
            for what, pattern in compilation.instructions.items()
        },
    )


def _worse(a: Resources, b: Resources) -> Resources:
    return Resources(
        registers=max(a.registers, b.registers),
        spill_stores=max(a.spill_stores, b.spill_stores),
        spill_loads=max(a.spill_loads, b.spill_loads),
        stack=max(a.stack, b.stack),
        shared_memory=max(a.shared_memory, b.shared_memory),
        tensor_memory=max(a.tensor_memory, b.tensor_memory),
        threads=a.threads,
        blocks=min(a.blocks, b.blocks),
        instructions={what: min(n, b.instructions[what]) for what, n in a.instructions.items()},
        warnings=tuple(dict.fromkeys(a.warnings + b.warnings)),
    )


@contextlib.contextmanager
def _ptxas_log() -> Iterator[io.StringIO]:
    """What ptxas says: Triton runs it with -v and its own flags, and shows the log if asked. Takes
    whatever else is printed, too: where Triton or ptxas fails, that is all of the code.
    """
    from triton import knobs

    log = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        yield log


_NOTHING = Resources(0, 0, 0, 0, 0, 0, 0, 0, {}, ())


def parse_ptxas(log: str) -> Resources:
    """The registers, spills, stack and warnings that `ptxas -v` reports of one kernel."""
    registers = re.search(r"Used (\d+) registers", log)
    memory = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    if registers is None or memory is None:
        raise ValueError(f"ptxas reported no registers or no stack:\n{log}")
    stack, stores, loads = map(int, memory.groups())
    warnings = re.findall(
        r"Potential Performance Loss: (.*?)(?: in (?:the )?function .*)?$", log, re.M
    )
    return _NOTHING._replace(
        registers=int(registers[1]),
        spill_stores=stores,
        spill_loads=loads,
        stack=stack,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def parse_amdgcn(assembly: str) -> Resources:
    """The registers, spills and stack in the metadata of one kernel's assembly.

    Vector registers include the accumulators. The metadata counts the stores of spilled registers.
    A scalar register spills into a lane of a vector register, which costs no memory: a warning.
    """

    def field(name: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)", assembly, re.M)
        if found is None:
            raise ValueError(f"the assembly's metadata has no {name}")
        return int(found[1])

    spills = 4 * field("vgpr_spill_count")
    return _NOTHING._replace(
        registers=field("vgpr_count"),
        spill_stores=spills,
        spill_loads=spills,
        stack=field("private_segment_fixed_size"),
        warnings=("scalar registers spill into vector registers",)
        * bool(field("sgpr_spill_count")),
    )


def occupancy(
    chip: Chip, registers: int, shared_memory: int, threads: int, tensor_memory: int = 0
) -> int:
    """How many blocks a multiprocessor holds at once.

    Its four partitions each hold whole warps and a quarter of the registers, of which a warp takes
    multiples of 256 (NVIDIA) or 8 for each lane (AMD). NVIDIA reserves 1 KiB of shared memory for
    each block. Source: CUDA's occupancy calculator; LLVM's AMDGPU usage guide.
    """
    if threads > 1024:
        return 0
    granule, reserved = (8 * chip.warp_size, 0) if chip.backend == "hip" else (256, 1024)
    warps = threads // chip.warp_size
    of_a_warp = -(-max(registers, 1) * chip.warp_size // granule) * granule
    resident = 4 * (chip.registers // 4 // of_a_warp)
    return min(
        chip.blocks,
        chip.threads // threads,
        resident // warps,
        (chip.shared_memory + reserved) // max(shared_memory + reserved, 1),
        TENSOR_MEMORY // max(tensor_memory, 1),
    )


def check(resources: Resources, compilation: Compilation, chip: Chip) -> list[str]:
    """What is wrong with a compiled kernel, one sentence each; empty where all is well."""
    complaints = []
    if resources.spill_stores or resources.spill_loads:
        complaints.append(
            f"spills registers: {resources.spill_stores} bytes stored,"
            f" {resources.spill_loads} loaded"
        )
    if resources.stack:
        complaints.append(f"uses {resources.stack} bytes of stack")
    if resources.tensor_memory > TENSOR_MEMORY:
        complaints.append(
            f"needs {resources.tensor_memory} columns of tensor memory, of {TENSOR_MEMORY}"
        )
    if resources.shared_memory > chip.shared_memory:
        complaints.append(
            f"needs {resources.shared_memory} bytes of shared memory, of {chip.shared_memory}"
        )
    elif not resources.blocks:
        complaints.append("does not fit: no multiprocessor can hold one block")
    complaints += [
        f"has no {what}: nothing matches {compilation.instructions[what]!r}"
        for what, count in resources.instructions.items()
        if not count
    ]
    return [f"{compilation.name}: {complaint}" for complaint in complaints]
