"""The CUDA kernels, the native backend on a GPU: loads their extension, or finds out why there is
none, and decides where they run without being asked for.

Triton is the default on a chip until a stored measurement on it says that the CUDA kernels are
faster. Without one they have not run there, and are not trusted unasked, not even where Triton is
missing. Of attention there are two generations of kernels: which one runs, hopper.py says.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastgpt import dispatch
from fastgpt.backends import coverage, extensions, hopper, measured
from fastgpt.backends.measured import Measurement
from fastgpt.dispatch import NOT_IMPLEMENTED, Cell, lookup, register
from fastgpt.ops.attention import AttentionCall
from fastgpt.ops.cross_entropy import CrossEntropyCall

ATTENTION = "scaled_dot_product_attention"
MAX_HEAD_DIM = 256  # of attention: csrc/cuda/attention_launch.h
OLDEST = (8, 0)  # the oldest capability that the extension has code for; what is newer runs its PTX


def _load() -> tuple[Any, str]:
    if torch.version.hip:
        return None, f"torch {torch.__version__} is a build for ROCm, and the kernels are CUDA's"
    return extensions.load("_cuda", "cuda")


extension, _reason = _load()


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU; None for one that is not there, which has fake tensors only.

    Initialises CUDA, but only for a GPU that is there.
    """
    if (device.index or 0) >= torch.cuda.device_count():
        return None
    return torch.cuda.get_device_capability(device)


def _chip(device: torch.device) -> str:
    version = capability(device)
    return "sm_{}{}".format(*version) if version else ""


@torch.compiler.assume_constant_result
def unserved(device: torch.device) -> str:
    """Why the extension has no code for a device; empty where it has."""
    version = capability(device)
    if version is None or version >= OLDEST:
        return ""
    return "its compute capability, {}.{}, is older than {}.{}".format(*version, *OLDEST)


def built_for_hopper() -> bool:
    """Whether the extension has code that is tied to Hopper."""
    return any("90a" in target for target in extensions.build_record().get("cuda_targets", ()))


class _Rule(NamedTuple):
    """What the kernels of an op cover."""

    device: Callable[[Any], torch.device]  # of a call
    covers: Callable[[Any], str]  # why they cannot do it; empty where they can


def _covers_cross_entropy(call: CrossEntropyCall) -> str:
    return coverage.cross_entropy(call, rows=False)


def _covers_attention(call: AttentionCall) -> str:
    if call.query.dtype not in (torch.bfloat16, torch.float16):
        return f"query of type {call.query.dtype}: only bfloat16 and float16"
    if call.attn_mask is not None:
        return "an attn_mask"
    return coverage.attention(call, MAX_HEAD_DIM)


_RULES = {
    "cross_entropy": _Rule(lambda call: call.logits.device, _covers_cross_entropy),
    ATTENTION: _Rule(lambda call: call.query.device, _covers_attention),
}


def _is_plain(call: AttentionCall) -> bool:
    """Whether a score is its product, and there is no dropout: as `is_plain` and `take_scale` in
    csrc/cuda say.
    """
    least = 1e-30 if call.sinks is None else 1e-6
    return (
        not (call.softcap or call.dropout_p)
        and call.alibi_slopes is None
        and (call.scale is None or call.scale > least)
    )


def cell(reason: str, measurements: Sequence[Measurement], op: str = "cross_entropy") -> Cell:
    """An op's cell, by the measurements that are stored; `reason`: why it is off."""
    rule = _RULES[op]
    known = measured.latest(measurements, op)
    faster = [chip for chip, m in known.items() if m.ratio > 1]

    @torch.compiler.assume_constant_result
    def has_run(device: torch.device) -> bool:
        return _chip(device) in known

    @torch.compiler.assume_constant_result
    def not_by_default(device: torch.device) -> str:
        chip = _chip(device)
        if chip in faster:
            return ""
        where = f"on {chip}" if chip else "on a GPU that is not there"
        why = "no stored measurement says that it is faster there than Triton"
        if chip in known:
            slower, date = 1 / known[chip].ratio, known[chip].date
            why = f"measured there it takes {slower:.3g} times Triton's time ({date})"
        return f"runs {where} only when asked for, by fastgpt.backend('native'): {why}"

    def covers(call: Any) -> str:
        device = rule.device(call)
        why_not = unserved(device) or rule.covers(call)
        if why_not or dispatch.asked_for() == "native":
            return why_not
        why_not = not_by_default(device)
        if why_not and has_run(device):
            # Slower than Triton is still faster than eager.
            triton = lookup(op, "triton", "cuda")
            if triton.reason or triton.covers(call):
                return ""
        return why_not

    if faster:
        note = f"by default on {', '.join(faster)}, elsewhere by fastgpt.backend('native')"
    elif known:
        note = f"by fastgpt.backend('native'): it is not faster than Triton on {', '.join(known)}"
    else:
        note = "by fastgpt.backend('native'): it has never run on a GPU"
    if op != ATTENTION:
        return Cell(op, "native", "cuda", reason, covers, bool(faster), note)

    built = built_for_hopper()
    note += f"; {hopper.note(measurements, built)}"

    def kernels(call: AttentionCall) -> str:
        columns = call.query.shape[-1], call.value.shape[-1]
        return hopper.explain(
            measurements, built, _chip(call.query.device), *columns, _is_plain(call)
        )

    return Cell(op, "native", "cuda", reason, covers, bool(faster), note, kernels)


_stored = measured.read()
if extension is not None:
    hopper.switch(hopper.chosen(_stored))
for _op in _RULES:
    register(cell(_reason, _stored, _op))
register(Cell("linear_cross_entropy", "native", "cuda", NOT_IMPLEMENTED))
