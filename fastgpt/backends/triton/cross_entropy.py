"""Softmax-cross-entropy over rows, in Triton: the launches, and what is compiled ahead of time."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastgpt.backends.triton.aot import Compilation
from fastgpt.backends.triton.chips import Chip, chip_of
from fastgpt.backends.triton.cross_entropy_kernels import (
    backward_narrow,
    backward_wide,
    forward_narrow,
    forward_wide,
    shares_wide,
)
from fastgpt.ops.cross_entropy import Options, class_rows, new_gradient, new_losses
from fastgpt.ops.raw import accumulator_dtype

VECTOR_BYTES = 16  # of the widest load
NARROW = 1024  # classes of a row that stays on chip
# Blocks of a row that one program writes backward, since what it does before the first of them
# costs as much as two; and how many programs there should be before it writes more than one.
STRIPE = 8
PROGRAMS = 4096

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
}

# ---- the launches ----


class Tile(NamedTuple):
    """How much a program takes, and by how many warps."""

    rows: int  # 1 for wide rows
    block: int  # classes, a power of two
    num_warps: int


def tile(classes: int, itemsize: int, warp_size: int, capped: bool) -> Tile:
    """The tile for rows of so many classes. Not of so many rows: a row's bits must not depend on
    the rows beside it.

    Two vectors of 128 bits for each thread keep enough bytes in flight for the memory, with the
    registers of two blocks of 8 warps to spare. Narrow rows give each thread 16 classes, and 8
    where it needs many registers for each.
    """
    lanes = VECTOR_BYTES // itemsize
    if classes <= NARROW:
        block = triton.next_power_of_2(classes)
        together = 1024 if itemsize == 8 or capped else 2048
        return Tile(min(max(together // block, 1), 64), block, 4)
    num_warps = 8 if classes * itemsize > 32 * 1024 else 4
    return Tile(1, 2 * lanes * warp_size * num_warps, num_warps)


def _check(logits: Tensor, target: Tensor, weight: Tensor | None, **rows: Tensor | None) -> None:
    """Shapes and types; `rows` are shaped like the unreduced loss."""
    shape = logits.shape[:1] + logits.shape[2:]
    of_probabilities = target.is_floating_point()
    expected = logits.shape if of_probabilities else shape
    if logits.dim() not in (2, 3) or target.shape != expected or logits.shape[1] == 0:
        raise RuntimeError(
            "expected logits (N, C) or (N, C, L) of at least one class and target (N,) or (N, L), "
            "or probabilities shaped like the logits, got "
            f"{list(logits.shape)} and {list(target.shape)}"
        )
    accumulator = accumulator_dtype(logits.dtype)
    types = (logits.dtype, accumulator) if of_probabilities else (torch.int64,)
    if logits.dtype not in POINTERS or target.dtype not in types:
        raise RuntimeError(
            "expected logits of float32, float64, bfloat16 or float16 and a target of int64, or "
            "probabilities of the logits' type or the accumulator's, got "
            f"{logits.dtype} and {target.dtype}"
        )
    vectors = [("weight", weight, logits.shape[1:2])]
    vectors += [(name, x, shape) for name, x in rows.items()]
    for name, x, size in vectors:
        if x is not None and (x.shape != size or x.dtype != accumulator):
            raise RuntimeError(
                f"expected {name} {list(size)} of type {accumulator}, got {list(x.shape)} of "
                f"{x.dtype}"
            )


def check_targets(target: Tensor, classes: int, options: Options) -> None:
    """On the CPU; on a GPU the kernel asserts, since looking would wait for the device."""
    if target.device.type != "cpu" or target.is_floating_point() or options.partial:
        return
    ignore_index = options.ignore_index
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if len(wrong):
        raise RuntimeError(
            f"Target {int(wrong[0])} is out of bounds: expected 0 <= target < {classes} (the "
            f"number of classes) or ignore_index ({ignore_index})."
        )


def _rows(x: Tensor) -> Tensor:
    """(N, C) or (N, C, L) as rows (R, C) whose classes lie together: a copy if they do not."""
    rows = class_rows(x)
    return x.movedim(1, -1).contiguous().flatten(0, -2) if rows is None else rows


def prepare(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    total_weight: Tensor | None = None,
    first_class: int | None = None,
) -> tuple[Tensor, Tile, dict[str, Any]]:
    """The rows of logits, their tile, and what forward and backward are told alike.

    `total_weight` (), the sum of the weights, if it is known; `first_class` is that of the logits,
    where targets are counted from another one.
    """
    of_probabilities = target.is_floating_point()
    x, t = _rows(logits), _rows(target) if of_probabilities else target.reshape(-1)
    N, C = x.shape
    smoothed = (options.hard, options.spread) != (1, 0)
    capped = options.softcap != 0
    chosen = tile(C, x.element_size(), chip_of(x.device).warp_size, capped)
    arguments = {
        "logits": x,
        "targets": t,
        "weights": None if weight is None else weight.contiguous(),
        "total_weight": None,
        "row_stride": x.stride(0),
        "target_stride": t.stride(0),
        "first_class": first_class,
        "classes": C,
        "ignore_index": options.ignore_index,
        "hard": options.hard,
        "spread": options.spread,
        "softcap": options.softcap,
        "SMOOTHED": smoothed,
        "CAPPED": capped,
        "PARTIAL": options.partial,
        "BLOCK": chosen.block,
    }
    if weight is not None and smoothed and not of_probabilities:
        arguments["total_weight"] = weight.sum() if total_weight is None else total_weight
    if C <= NARROW:
        arguments.update(N=N, ROWS=chosen.rows)
    else:
        arguments.update(LANES=VECTOR_BYTES // x.element_size())
    return x, chosen, arguments


def launch(kernel: Any, programs: int, chosen: Tile, arguments: dict[str, Any]) -> None:
    with torch.cuda.device_of(arguments["targets"]):
        # The assertion of the target needs debug, which would check every sum of integers, too.
        kernel[(programs,)](**arguments, num_warps=chosen.num_warps, sanitize_overflow=False)


def _in_phase(x: Tensor, y: Tensor) -> bool:
    """Whether vectors of x's rows are whole where those of y's rows are. If x's elements are the
    larger ones, a vector of y is several of x, and each of them must be whole.
    """
    lanes = VECTOR_BYTES // x.element_size()
    ahead = x.data_ptr() // x.element_size() - y.data_ptr() // y.element_size()
    return ahead % lanes == 0 and (x.stride(0) - y.stride(0)) % lanes == 0


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw operator cross_entropy_forward: see `fastgpt.ops.cross_entropy.define`."""
    _check(logits, target, weight)
    check_targets(target, logits.shape[1], Options(*options))
    outputs = new_losses(logits, target, weight, *options)
    run_forward(*prepare(logits, target, weight, Options(*options)), outputs)
    return outputs


def run_forward(
    x: Tensor,
    chosen: Tile,
    arguments: dict[str, Any],
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Write loss, lse, row_max and rest of what was prepared."""
    N, C = x.shape
    if N == 0:
        return
    arguments.update(zip(("losses", "lses", "row_max", "rests"), outputs, strict=True))
    if C <= NARROW:
        launch(forward_narrow, triton.cdiv(N, chosen.rows), chosen, arguments)
    else:
        t = arguments["targets"]
        arguments["TARGET_IN_PHASE"] = t.is_floating_point() and _in_phase(t, x)
        launch(forward_wide, N, chosen, arguments)


def backward(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_max: Tensor,
    rest: Tensor,
    *options: Any,
) -> Tensor:
    """The raw operator cross_entropy_backward: see `fastgpt.ops.cross_entropy.define`."""
    gradient = new_gradient(grad_loss, grad_lse, logits)
    out = _rows(gradient)
    statistics = grad_loss, grad_lse, row_max, rest
    _backward(statistics, logits, target, weight, Options(*options), out)
    if logits.dim() == 3 and class_rows(gradient) is None:
        gradient.movedim(1, -1).copy_(out.view(gradient.movedim(1, -1).shape))
    return gradient


def backward_in_place(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_max: Tensor,
    rest: Tensor,
    *options: Any,
) -> None:
    """The raw operator cross_entropy_backward_in_place: see `fastgpt.ops.cross_entropy.define`."""
    if class_rows(logits) is None:
        arguments = grad_loss, grad_lse, logits, target, weight, row_max, rest
        logits.copy_(backward(*arguments, *options))
        return
    statistics = grad_loss, grad_lse, row_max, rest
    _backward(statistics, logits, target, weight, Options(*options), None)


def _backward(
    statistics: tuple[Tensor, Tensor | None, Tensor, Tensor],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    gradient: Tensor | None,
) -> None:
    """Write the gradient into the rows `gradient`; None: over the logits."""
    grad_loss, grad_lse, row_max, rest = statistics
    _check(
        logits, target, weight, grad_loss=grad_loss, grad_lse=grad_lse, row_max=row_max, rest=rest
    )
    if not (row_max.is_contiguous() and rest.is_contiguous()):
        raise RuntimeError("expected contiguous row_max and rest")
    check_targets(target, logits.shape[1], options)
    run_backward(statistics, *prepare(logits, target, weight, options), gradient)


def run_backward(
    statistics: tuple[Tensor, Tensor | None, Tensor, Tensor],
    x: Tensor,
    chosen: Tile,
    arguments: dict[str, Any],
    gradient: Tensor | None,
    floors: Tensor | None = None,
) -> None:
    """Write the gradient of what was prepared.

    The rows `gradient` may lie at any distance, and be of another type than the logits. `floors`
    (R,) are what exp(y - row_max) must reach; of smaller ones the probability is taken to be 0.
    """
    grad_loss, grad_lse, row_max, rest = statistics
    N, C = x.shape
    if N == 0:
        return
    t = arguments["targets"]
    g = grad_loss.reshape(-1)
    g_lse = None if grad_lse is None else grad_lse.reshape(-1)
    arguments.update(
        grad_losses=g,
        grad_lses=g_lse,
        grad_stride=g.stride(0),
        lse_stride=0 if g_lse is None else g_lse.stride(0),
        at_targets=None,
        row_max=row_max,
        rests=rest,
        gradients=gradient,
        gradient_stride=None,
        floors=floors,
    )
    if gradient is not None and gradient.stride(0) != C:
        arguments["gradient_stride"] = gradient.stride(0)
    if gradient is None and not t.is_floating_point():
        # Where one thread of a program, or one program of a row, reads the target's logit, another
        # may have written over it.
        first = arguments["first_class"] or 0
        arguments["at_targets"] = x.gather(1, (t - first).clamp(0, C - 1).unsqueeze(1)).squeeze(1)
    if C <= NARROW:
        launch(backward_narrow, triton.cdiv(N, chosen.rows), chosen, arguments)
        return
    out = x if gradient is None else gradient
    blocks = triton.cdiv(C, chosen.block)
    stripe_blocks = max(1, min(STRIPE, N * blocks // PROGRAMS))
    stripes = triton.cdiv(blocks, stripe_blocks)
    arguments.update(
        amounts=_amounts(t, row_max, chosen, arguments) if t.is_floating_point() else None,
        stripes=stripes,
        stripe_blocks=stripe_blocks,
        IN_PHASE=_in_phase(x, out),
        TARGET_IN_PHASE=t.is_floating_point() and _in_phase(t, out),
        LANES=VECTOR_BYTES // out.element_size(),
    )
    launch(backward_wide, N * stripes, chosen, arguments)


def _amounts(q: Tensor, row_max: Tensor, chosen: Tile, arguments: dict[str, Any]) -> Tensor:
    """A of each row of probabilities."""
    amounts = torch.empty_like(row_max)
    shared = ("targets", "weights", "target_stride", "classes", "hard", "spread", "SMOOTHED")
    told = {name: arguments[name] for name in (*shared, "BLOCK")}
    told.update(amounts=amounts, LANES=VECTOR_BYTES // q.element_size())
    launch(shares_wide, q.shape[0], chosen, told)
    return amounts


# ---- ahead of time ----

VALUES = {
    "first_class": "i32",
    "gradient_stride": "i32",
    "square_stride": "i64",
    "slices": "i32",
    "filter_eps": "fp64",
    "row_stride": "i64",
    "target_stride": "i64",
    "grad_stride": "i64",
    "lse_stride": "i64",
    "ignore_index": "i64",
    "N": "i32",
    "classes": "i32",
    "stripes": "i32",
    "stripe_blocks": "i32",
    "hard": "fp64",
    "spread": "fp64",
    "softcap": "fp64",
}
_KERNELS = {
    ("forward", False): forward_narrow,
    ("forward", True): forward_wide,
    ("backward", False): backward_narrow,
    ("backward", True): backward_wide,
    ("shares", True): shares_wide,
}
# Calls by what they ask for: the rest is not compiled.
_CALLS = {
    "": (),
    " weights, smoothing": ("weights", "smoothing"),
    " everything": ("weights", "smoothing", "softcap", "gradient of lse"),
    " probabilities": ("probabilities",),
    " slice of the classes": ("slice",),
}


def compilations(chip: Chip) -> Iterator[Compilation]:
    """Each kernel for each type and call, at its stored tile."""
    for dtype in POINTERS:
        if dtype == torch.float16:  # bfloat16's tiles
            continue
        for C in (1000, 50257):
            for call, options in _CALLS.items():
                for which in ("forward", "backward"):
                    yield compilation(chip, dtype, C, call, options, which)
        yield compilation(chip, dtype, 50257, " probabilities", ("probabilities",), "shares")


def compilation(
    chip: Chip,
    dtype: torch.dtype,
    C: int,
    call: str,
    options: tuple[str, ...],
    which: str,
    op: str = "cross-entropy",
    gradient: torch.dtype | None = None,
    in_place: bool = False,
) -> Compilation:
    """One kernel for logits of `dtype`, and a gradient of the same type if it is not named."""
    wide, gradient = C > NARROW, gradient or dtype
    chosen = tile(C, dtype.itemsize, chip.warp_size, "softcap" in options)
    kernel = _KERNELS[which, wide]
    absent = {
        "weights": "weights" not in options,
        "total_weight": "weights" not in options or "smoothing" not in options,
        "grad_lses": "gradient of lse" not in options,
        "amounts": "probabilities" not in options,
        "at_targets": not in_place,
        "gradients": in_place,
        "gradient_stride": in_place or "padded" not in options,
        "first_class": "first class" not in options,
        "floors": "floors" not in options,
    }
    constants: dict[str, Any] = {
        "SMOOTHED": "smoothing" in options,
        "CAPPED": "softcap" in options,
        "PARTIAL": "slice" in options,
        "IN_PHASE": True,
        "TARGET_IN_PHASE": "probabilities" in options,
        "LANES": VECTOR_BYTES // (gradient if which == "backward" else dtype).itemsize,
        "BLOCK": chosen.block,
        "ROWS": chosen.rows,
        **{name: None for name, is_absent in absent.items() if is_absent},
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    accumulator, pointer = POINTERS[accumulator_dtype(dtype)], POINTERS[dtype]
    kinds = VALUES | {"logits": pointer, "at_targets": pointer, "gradients": POINTERS[gradient]}
    kinds["targets"] = POINTERS[gradient] if "probabilities" in options else "*i64"
    if "wide gradient of lse" in options:
        kinds["grad_lses"] = "*fp64"
    if "slice" in options:
        kinds.update(dict.fromkeys(("losses", "lses"), "*fp64"))
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, accumulator)
        for name in kernel.arg_names
    }
    name = str(gradient).removeprefix("torch.")
    return Compilation(
        name=f"{op} {which} {name} {'wide' if wide else 'narrow'}{call}",
        kernel=kernel,
        signature=signature,
        constants=constants,
        divisible=tuple(
            n
            for n, kind in signature.items()
            # A chunk's rows are padded, and its first class is a multiple of 128.
            if kind.startswith("*") or (n in ("first_class", "gradient_stride") and kind == "i32")
        ),
        options={"num_warps": chosen.num_warps, "sanitize_overflow": False},
        instructions=_vector_instructions(chip, dtype, gradient, which) if wide else {},
        work=_WORK[which, "probabilities" in options],
    )


_WORK = {
    ("forward", False): "1 read of the logits",
    ("backward", False): "1 read and 1 write of the logits",
    ("forward", True): "1 read of logits and probabilities",
    ("backward", True): "1 read of logits and probabilities, 1 write of the logits",
    ("shares", True): "1 read of the probabilities",
}


def _vector_instructions(
    chip: Chip, dtype: torch.dtype, gradient: torch.dtype, which: str
) -> dict[str, str]:
    if chip.backend == "cuda":
        form = {2: "v4.b32", 4: "v4.b32", 8: "v2.b64"}
        loads = rf"ld\.global(\.\w+)*\.{form[dtype.itemsize]}"
        stores = rf"st\.global(\.\w+)*\.{form[gradient.itemsize]}"
    else:
        # An assertion's call of the host has such instructions, too, of another form.
        loads, stores = (
            rf"global_{way}_dwordx4 v\[\d+:\d+\], v\[\d+:\d+\], off\n" for way in ("load", "store")
        )
    if which == "backward":
        return {"128-bit loads": loads, "128-bit stores": stores}
    return {"128-bit loads": loads}
