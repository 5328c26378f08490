"""Compile the Triton kernels for a chip that need not be there, and read what they use of it."""

from typing import Any, NamedTuple


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
