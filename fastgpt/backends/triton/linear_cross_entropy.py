"""Linear cross-entropy in chunks of the logits: products by torch's library, the rest in Triton.

A chunk is some rows by some classes. Its logits are formed in the accumulator type, and a kernel
takes of each row the numbers of its softmax; another one turns the logits into S, the gradient, in
the type of the inputs, which is multiplied by both of them. Where a chunk has all classes, that is
all: 3 products. Where all classes of enough rows do not fit, the rows go through slices of them
twice, since the softmax must be known before S is: the logits are formed again, a fourth product.

A GPU does not know on the host which rows are ignored, and to ask would wait for it. Their part is
computed and left out.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastgpt.backends.triton import cross_entropy as rows_of_logits
from fastgpt.backends.triton.aot import Compilation
from fastgpt.backends.triton.chips import Chip
from fastgpt.backends.triton.cross_entropy import POINTERS, VECTOR_BYTES, Tile
from fastgpt.backends.triton.linear_cross_entropy_kernels import combine
from fastgpt.ops.cross_entropy import Options
from fastgpt.ops.linear_cross_entropy import Problem, new_gradients, new_losses
from fastgpt.ops.raw import accumulator_dtype

# ---- the chunks ----

BUDGET = 64 << 20  # bytes, of all that is neither an input nor a gradient
# Rows that are enough for chunks of all classes, by the size of an input's number. Each such chunk
# adds to the whole gradient of the matrix, 8 bytes moved for 2 x rows operations on each number of
# it. Where a GPU does 200 operations while it moves a byte (H100, H200 and A100, for 16-bit inputs)
# that takes longer than the fourth product below some 400 rows; at 15 of them, below 30.
ENOUGH = {2: 512, 4: 64, 8: 64}
GRANULE = 128  # rows and classes, of the tiles of matrix products
PITCH = 16  # numbers, to which a chunk's rows are padded: products of unaligned ones are slow
ROW_BYTES = 64  # of the statistics of one row
SLICE_BYTES = 28  # of those of one row in one slice
CLASS_BYTES = 16  # of vectors of classes: what a chunk adds to the gradient of the bias


class Chunks(NamedTuple):
    """How much of the logits is formed at a time."""

    rows: int
    classes: int


def chunks(N: int, C: int, of_number: int, of_row: int, enough: int) -> Chunks:
    """The chunks of (N, C) logits that take BUDGET bytes at most, `of_number` for each logit and
    `of_row` beside for each row; of all classes, if they have `enough` rows, or all of them.

    As large as they can be, so that small problems are one chunk and a few launches. Slices of the
    classes are about as wide as the rows are many: then the sums over chunks of the input's
    gradient and of the matrix's move the least.
    """
    of_row += ROW_BYTES
    rows = max(0, BUDGET - C * CLASS_BYTES) // (_up(C, PITCH) * of_number + of_row)
    if rows >= min(N, enough):
        return Chunks(_evenly(N, max(1, rows)), C)
    room = BUDGET - BUDGET // 16  # the rest is for the vectors of classes
    rows = min(
        N,
        math.isqrt(room // of_number),
        room // 4 // of_row,
        math.isqrt(room**2 // (8 * SLICE_BYTES * C * of_number)),  # an eighth for statistics
    )
    rows = _evenly(N, max(1, rows))
    slices = 2
    while True:
        left = room // rows - of_row - slices * SLICE_BYTES
        classes = max(1, left // (of_number * GRANULE)) * GRANULE
        if classes * slices >= C:
            return Chunks(rows, _up(triton.cdiv(C, slices), GRANULE))
        slices = max(slices + 1, triton.cdiv(C, classes))


def _up(n: int, multiple: int) -> int:
    return triton.cdiv(n, multiple) * multiple


def _evenly(n: int, most: int) -> int:
    """The size of parts of n, none above `most`, that differ little."""
    if n <= most:
        return max(1, n)
    if most > GRANULE:
        most -= most % GRANULE
        return _up(triton.cdiv(n, triton.cdiv(n, most)), GRANULE)
    return triton.cdiv(n, triton.cdiv(n, most))


def _chunks_of(problem: Problem) -> Chunks:
    """The same for forward and backward and for any of the gradients: no bit of a result depends on
    which others are wanted.
    """
    x, W, _, target, _ = problem
    size, number = x.dtype.itemsize, accumulator_dtype(x.dtype).itemsize
    if size == 2:
        number += size  # S, beside the logits
    if target.is_floating_point():  # as large as the logits, so a row is never sliced
        return chunks(len(x), len(W), number, 0, 0)
    # A copy of the inputs without the ignored ones.
    return chunks(len(x), len(W), number, x.shape[1] * size, ENOUGH[size])


def _parts(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


# ---- products ----


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b. Products of 16-bit matrices are float32 all the way."""
    if a.dtype != out.dtype and not a.is_cuda:  # where the library has no such product
        a, b = a.to(out.dtype), b.to(out.dtype)
    mixed: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, **mixed, out=out)
    else:
        torch.mm(a, b, **mixed, out=out)


# ---- the launches ----


class _Upstream(NamedTuple):
    """The gradients of loss, lse and lse², (N,) of the accumulator type, and what to leave out."""

    loss: Tensor
    lse: Tensor | None
    square: Tensor | None
    filter_eps: float
    scale: Tensor | None = None  # (), of S; None: 1

    def of(self, block: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradients of a block of rows, scaled."""
        scale = self.scale
        g, g_lse, square = (
            None if x is None else x[block] if scale is None else x[block] * scale for x in self[:3]
        )
        assert g is not None
        return g, g_lse, square


class _Statistics(NamedTuple):
    """Of the rows of a chunk: what the kernel needs that turns its logits into S."""

    grad_loss: Tensor
    grad_lse: Tensor | None
    row_max: Tensor
    rest: Tensor
    floors: Tensor | None


class _Call:
    """A call in its chunks, with the memory for one."""

    def __init__(self, problem: Problem, options: Options):
        self.problem, self.options, size = problem, options, _chunks_of(problem)
        x, W = problem.input, problem.linear_weight
        self.blocks, self.slices = _parts(x.shape[0], size.rows), _parts(W.shape[0], size.classes)
        self.size, self.dtype = size, accumulator_dtype(x.dtype)
        self.memory = self.new_memory(self.dtype)
        self.weight = None if problem.weight is None else problem.weight.contiguous()
        self.weight_sums: Tensor | None = None
        if self.weight is not None and options.spread and not self.of_probabilities:
            missing = len(self.slices) * size.classes - W.shape[0]
            padded = torch.nn.functional.pad(self.weight, (0, missing))
            self.weight_sums = padded.view(-1, size.classes).sum(1)

    @property
    def of_probabilities(self) -> bool:
        return self.problem.target.is_floating_point()

    def new_memory(self, dtype: torch.dtype) -> Tensor:
        return self.problem.input.new_empty(
            self.size.rows * _up(self.size.classes, PITCH), dtype=dtype
        )

    def chunk(self, memory: Tensor, block: slice, s: slice) -> Tensor:
        """The part of the memory, or of another like it, that has the numbers of a chunk."""
        rows, classes = block.stop - block.start, s.stop - s.start
        pitch = _up(classes, PITCH)
        return memory[: rows * pitch].view(rows, pitch)[:, :classes]

    def form(self, block: slice, s: slice) -> Tensor:
        """The logits of a chunk, in the memory."""
        x, W, bias = self.problem[:3]
        logits = self.chunk(self.memory, block, s)
        _multiply(x[block], W[s].t(), logits)
        # Few heads have a bias. To start from it instead would move as many bytes.
        return logits if bias is None else logits.add_(bias[s])

    def prepared(self, logits: Tensor, block: slice, s: slice) -> tuple[Tensor, Tile, dict]:
        target, sliced = self.problem.target[block], len(self.slices) > 1
        sums = self.weight_sums
        return rows_of_logits.prepare(
            logits,
            target,
            None if self.weight is None else self.weight[s],
            self.options._replace(partial=self.options.partial or sliced),
            None if sums is None else sums[s.start // self.size.classes],
            s.start if sliced else None,
        )

    def statistics(
        self, block: slice, loss: Tensor, lse: Tensor, upstream: _Upstream | None
    ) -> tuple[Tensor, list[_Statistics]]:
        """Write loss and lse of a block of rows. The logits of its last slice, which are still in
        the memory, and with `upstream` the statistics of its slices.
        """
        loss, lse, rows = loss[block], lse[block], loss[block].shape[0]
        slices = len(self.slices)
        # Aligned alike in each slice, or else the kernels are compiled for each alignment.
        shape = (2, slices, _up(rows, VECTOR_BYTES // 4))
        row_max, rests = lse.new_empty(shape, dtype=self.dtype)[:, :, :rows]
        if slices == 1:
            losses, lses = loss.unsqueeze(0), lse.unsqueeze(0)
        else:
            losses, lses = lse.new_empty(shape, dtype=torch.float64)[:, :, :rows]
        for i, s in enumerate(self.slices):
            logits = self.form(block, s)
            outputs = losses[i], lses[i], row_max[i], rests[i]
            rows_of_logits.run_forward(*self.prepared(logits, block, s), outputs)
        if slices > 1:
            return logits, self._combined(block, loss, lse, upstream, losses, lses, row_max, rests)
        if upstream is None:
            return logits, []
        g, g_lse, square = upstream.of(block)
        lse = lse.to(self.dtype)
        if square is not None:
            g_lse = (
                2 * square * lse if g_lse is None else torch.addcmul(g_lse, square, lse, value=2)
            )
        floors = upstream.filter_eps * (lse - row_max[0]).exp() if upstream.filter_eps else None
        return logits, [_Statistics(g, g_lse, row_max[0], rests[0], floors)]

    def _combined(
        self,
        block: slice,
        loss: Tensor,
        lse: Tensor,
        upstream: _Upstream | None,
        losses: Tensor,
        lses: Tensor,
        row_max: Tensor,
        rests: Tensor,
    ) -> list[_Statistics]:
        slices, rows = lses.shape
        target, options = self.problem.target[block], self.options
        filter_eps = 0.0 if upstream is None else upstream.filter_eps
        g, g_lse, square = (None, None, None) if upstream is None else upstream.of(block)
        floors = row_max.new_empty(slices, row_max.stride(0)) if filter_eps else None
        chosen = combining_tile()
        arguments = {
            "targets": target,
            "weights": self.weight,
            "weight_sums": self.weight_sums,
            "slice_losses": losses,
            "slice_lses": lses,
            "row_max": row_max,
            "floors": floors,
            "losses": loss,
            "lses": lse,
            "grad_losses": g,
            "grad_lses": g_lse,
            "grad_squares": square,
            "target_stride": target.stride(0),
            "grad_stride": 0 if g is None else g.stride(0),
            "lse_stride": 0 if g_lse is None else g_lse.stride(0),
            "square_stride": 0 if square is None else square.stride(0),
            "N": rows,
            "slices": slices,
            "slice_stride": lses.stride(0),
            "slice_classes": self.size.classes,
            "classes": self.problem.linear_weight.shape[0],
            "ignore_index": options.ignore_index,
            "hard": options.hard,
            "spread": options.spread,
            "filter_eps": filter_eps,
            "SMOOTHED": (options.hard, options.spread) != (1, 0),
            "PARTIAL": options.partial,
            "ROWS": chosen.rows,
        }
        rows_of_logits.launch(combine, triton.cdiv(rows, chosen.rows), chosen, arguments)
        if g is None:
            return []
        return [
            _Statistics(
                g, lses[i], row_max[i], rests[i], None if floors is None else floors[i, :rows]
            )
            for i in range(slices)
        ]


def combining_tile() -> Tile:
    """A row for each thread."""
    return Tile(128, 1, 4)


def forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The raw operator linear_cross_entropy_forward: see `ops.linear_cross_entropy.define`."""
    problem = Problem(input, linear_weight, linear_bias, target, weight)
    told = Options(*options)
    _check(problem, told)
    loss, lse = new_losses(problem, told)
    call = _Call(problem, told)
    for block in call.blocks:
        call.statistics(block, loss, lse, None)
    return loss, lse


def backward(
    grad_loss: Tensor, grad_lse: Tensor | None, grad_square: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """The raw operator linear_cross_entropy_backward: see `ops.linear_cross_entropy.define`."""
    problem = Problem(*rest[: len(Problem._fields)])
    options = Options(*rest[len(problem) : len(problem) + len(Options._fields)])
    filter_eps, of_input, of_weight, of_bias = rest[len(problem) + len(options) :]
    upstream = _Upstream(grad_loss, grad_lse, grad_square, filter_eps)
    _check(problem, options, upstream)
    loss, lse = new_losses(problem, options)
    gradients = new_gradients(problem, of_input, of_weight, of_bias)
    if problem.input.shape[0] == 0:
        return loss, lse, *(gradient.zero_() for gradient in gradients)
    call = _Call(problem, options)
    if problem.input.dtype == torch.float16:
        upstream = upstream._replace(scale=_scale(call, upstream))
    _accumulate(call, upstream, loss, lse, *gradients)
    if upstream.scale is not None:
        for gradient in gradients:
            gradient.div_(upstream.scale)
    return loss, lse, *gradients


def _accumulate(
    call: _Call,
    upstream: _Upstream,
    loss: Tensor,
    lse: Tensor,
    of_input: Tensor,
    of_weight: Tensor,
    of_bias: Tensor,
) -> None:
    """Write loss, lse and the gradients that are not empty."""
    x, W, _, target, _ = call.problem
    # S in place of the logits has their type, and products of 16-bit matrices would need a copy: 14
    # bytes moved for each number, and as much memory. Written as they need it, it is 6 bytes.
    memory = call.new_memory(x.dtype) if x.dtype.itemsize == 2 else None
    for block in call.blocks:
        logits, statistics = call.statistics(block, loss, lse, upstream)
        some = x[block]
        if of_weight.numel() and not call.of_probabilities:
            # Whatever an ignored row holds, 0 times it must be 0.
            ignored = target[block] == call.options.ignore_index
            some = some.masked_fill(ignored.unsqueeze(1), 0)
        # From the last slice, whose logits are there.
        for i, s in reversed(list(enumerate(call.slices))):
            if s is not call.slices[-1]:
                logits = call.form(block, s)
            S = None if memory is None else call.chunk(memory, block, s)
            rows_of_logits.run_backward(
                statistics[i][:4], *call.prepared(logits, block, s), S, statistics[i].floors
            )
            S = logits if S is None else S
            if of_input.numel():
                _multiply(S, W[s], of_input[block], add=s is not call.slices[-1])
            first = block is call.blocks[0]
            if of_weight.numel():
                _multiply(S.t(), some, of_weight[s], add=not first)
            if of_bias.numel():
                sums = S.sum(0, dtype=of_bias.dtype)
                of_bias[s].copy_(sums) if first else of_bias[s].add_(sums)


def _scale(call: _Call, upstream: _Upstream) -> Tensor:
    """A power of two for S in float16.

    A mean over N rows makes numbers of S about 1 / (N C), which is 0 in float16. With the largest
    that a number of S can be in [2^13, 2^14), in that row a probability has all bits down to 2^-27.
    """
    target, weight, options = *call.problem[3:], call.options
    largest: Tensor | float = 1.0 if weight is None else weight.abs().amax()
    sizes = []
    for block in call.blocks:
        g, g_lse, square = upstream.of(block)
        t = target[block]
        size = g.abs() * largest
        if call.of_probabilities:
            sums = torch.linalg.vector_norm(t, 1, dim=1, dtype=g.dtype)
            size = size * (options.hard * sums + options.spread * t.shape[1])
        if g_lse is not None:
            size = size + g_lse.abs()
        if square is not None:  # 2 h lse, and lse is not known yet: of 16-bit inputs below 512
            size = size + 1024 * square.abs()
        if not call.of_probabilities:
            size = size.masked_fill(t == options.ignore_index, 0)
        sizes.append(size.amax())
    most = torch.stack(sizes).amax()
    exponent = torch.frexp(most).exponent.clamp(-100, 100).where(most.isfinite(), 14)
    return torch.ldexp(torch.ones_like(most), 14 - exponent)


def _check(problem: Problem, options: Options, upstream: _Upstream | None = None) -> None:
    """Shapes and types."""
    x, W, bias, target, weight = problem
    if x.dim() != 2 or W.dim() != 2 or x.shape[1] != W.shape[1] or 0 in W.shape:
        raise RuntimeError(
            "expected input (N, D) and linear_weight (C, D), neither of them empty but for N, got "
            f"{list(x.shape)} and {list(W.shape)}"
        )
    (N, _), C = x.shape, W.shape[0]
    of_probabilities = target.is_floating_point()
    accumulator = accumulator_dtype(x.dtype)
    types = (x.dtype, accumulator) if of_probabilities else (torch.int64,)
    if target.shape != ((N, C) if of_probabilities else (N,)) or target.dtype not in types:
        raise RuntimeError(
            f"expected target [{N}] of int64, or probabilities [{N}, {C}] of input's type or the "
            f"accumulator's, got {list(target.shape)} of {target.dtype}"
        )
    if x.dtype not in POINTERS or W.dtype != x.dtype:
        raise RuntimeError(
            "expected input and linear_weight of one type, float32, float64, bfloat16 or float16, "
            f"got {x.dtype} and {W.dtype}"
        )
    vectors = [("linear_bias", bias, C, x.dtype), ("weight", weight, C, accumulator)]
    if upstream is not None:
        names = ("grad_loss", "grad_lse", "grad_square")
        vectors += [(n, g, N, accumulator) for n, g in zip(names, upstream[:3], strict=True)]
    for name, v, length, dtype in vectors:
        if v is not None and (v.shape != (length,) or v.dtype != dtype):
            raise RuntimeError(
                f"expected {name} [{length}] of type {dtype}, got {list(v.shape)} of {v.dtype}"
            )
    rows_of_logits.check_targets(target, C, options)


# ---- ahead of time ----

# Calls by what they ask for, and whether the kernel sees slices of the classes.
_SLICED = ("slice", "first class", "gradient of lse", "wide gradient of lse")
_EVERYTHING = ("weights", "smoothing", "softcap", "floors")
_CALLS: dict[str, tuple[str, ...]] = {
    "": (),
    " slices": _SLICED,
    " slices, everything": _SLICED + _EVERYTHING,
    " probabilities": ("probabilities",),
}


def compilations(chip: Chip) -> Iterator[Compilation]:
    """What this op adds to the kernels of the cross-entropy, whose forward of float32 and float64
    logits is the one that chunks of all classes have here.
    """
    for dtype, C, calls in (
        (torch.bfloat16, 1000, ("",)),
        (torch.bfloat16, 50257, tuple(_CALLS)),
        (torch.float32, 50257, ("", " slices")),
        (torch.float64, 50257, ("",)),
    ):
        for call in calls:
            yield rows_of_logits.compilation(
                chip,
                accumulator_dtype(dtype),
                C,
                call,
                (*_CALLS[call], "padded"),
                "backward",
                op="linear cross-entropy",
                gradient=dtype,
                in_place=dtype.itemsize > 2,
            )
    for call in (" slices", " slices, everything"):
        yield rows_of_logits.compilation(
            chip, torch.float32, 50257, call, _CALLS[call], "forward", op="linear cross-entropy"
        )
    for dtype in (torch.float32, torch.float64):
        yield _combination(chip, dtype, " slices", False)
    yield _combination(chip, torch.float32, " slices, everything", True)


def _combination(chip: Chip, dtype: torch.dtype, call: str, everything: bool) -> Compilation:
    chosen = combining_tile()
    constants: dict[str, Any] = {"SMOOTHED": everything, "PARTIAL": False, "ROWS": chosen.rows}
    if not everything:
        constants.update(
            dict.fromkeys(("weights", "weight_sums", "floors", "grad_lses", "grad_squares"))
        )
    kinds = rows_of_logits.VALUES | {
        "targets": "*i64",
        "slice_classes": "i32",
        "slice_stride": "i32",
    }
    kinds |= dict.fromkeys(("slice_losses", "slice_lses"), "*fp64")
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, POINTERS[dtype])
        for name in combine.arg_names
    }
    return Compilation(
        name=f"linear cross-entropy combine {str(dtype).removeprefix('torch.')}{call}",
        kernel=combine,
        signature=signature,
        constants=constants,
        divisible=tuple(n for n, kind in signature.items() if kind.startswith("*")),
        options={"num_warps": chosen.num_warps, "sanitize_overflow": False},
        instructions={},
        work="4 reads of loss and lse in each slice",
    )
