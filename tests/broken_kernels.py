"""Kernels that are broken on purpose, for tests/test_triton_aot.py. Run where nothing interprets.

`python broken_kernels.py compile` prints what `aot` says of each, as JSON; `report` makes them the
stored kernels of the report.
"""

import json
import sys

import triton
import triton.language as tl

from fastgpt.backends.triton import aot, report
from fastgpt.backends.triton.chips import CHIPS


@triton.jit
def product(
    a, b, out, columns: tl.int64, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr
):
    i, j, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DEPTH)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, columns, DEPTH):
        x = tl.load(a + i[:, None] * columns + start + k[None, :])
        y = tl.load(b + j[:, None] * columns + start + k[None, :])
        acc = tl.dot(x, y.T, acc)
    tl.store(out + i[:, None] * BLOCK_N + j[None, :], acc)


@triton.jit
def copy(a, out, shift, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(a + shift + i))


@triton.jit
def untranslatable(a, out, shift, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(a + no_such_name))  # noqa: F821


def multiply(name, m, n, depth, num_warps, num_stages=2):
    return aot.Compilation(
        name=name,
        kernel=product,
        signature={"a": "*bf16", "b": "*bf16", "out": "*fp32", "columns": "i64"}
        | dict.fromkeys(("BLOCK_M", "BLOCK_N", "DEPTH"), "constexpr"),
        constants={"BLOCK_M": m, "BLOCK_N": n, "DEPTH": depth},
        divisible=("a", "b", "out", "columns"),
        options={"num_warps": num_warps, "num_stages": num_stages},
        instructions={"matrix instructions": r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma"},
        work="2 m n k",
    )


def move(name, divisible, kernel=copy):
    return aot.Compilation(
        name=name,
        kernel=kernel,
        signature={"a": "*fp32", "out": "*fp32", "shift": "i32", "BLOCK": "constexpr"},
        constants={"BLOCK": 1024},
        divisible=divisible,
        options={"num_warps": 4},
        instructions={"128-bit loads": r"ld\.global\S*\.v4\.b32|_load_dwordx4"},
        work="1 read, 1 write",
    )


GOOD = multiply("good", 64, 64, 32, 4)
BROKEN = (
    multiply("spills", 128, 128, 16, 1),
    multiply("too large", 64, 64, 512, 4, num_stages=3),
    move("no vectors", ("a", "out")),
    move("untranslatable", (), untranslatable),
    move("mistaken", ())._replace(signature={"a": "*fp32"}),
    multiply("mistyped", 64, 64, 32, 4)._replace(
        signature=GOOD.signature | {"columns": "i32"},
    ),
)


def compile_them() -> dict:
    found: dict = {}
    for chip in ("sm_90", "gfx942"):
        found[chip] = {}
        for compilation in (GOOD, move("vectors", ("a", "out", "shift")), *BROKEN):
            try:
                resources = aot.compile(compilation, CHIPS[chip])
            except Exception as error:
                found[chip][compilation.name] = {"error": f"{type(error).__name__}: {error}"}
                continue
            complaints = aot.check(resources, compilation, CHIPS[chip])
            found[chip][compilation.name] = resources._asdict() | {"complaints": complaints}
    return found


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        print(json.dumps(compile_them()))
    else:
        stored = [GOOD, *BROKEN] if "broken" in sys.argv[2] else [GOOD]
        report.compilations = lambda op, chip: stored
        sys.exit(report.main([*sys.argv[3:], "--op", "attention", "--jobs", "1"]))
