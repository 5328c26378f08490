"""CUDA's own kernels of attention on the GPU, those of Ampere and those of Hopper: values and
gradients against float64.
"""

from collections.abc import Iterator

import pytest
import torch
from device_oracle import REHEARSED, attention, both, check_attention, normal

import fastgpt
from fastgpt import dispatch
from fastgpt.backends import cuda, hopper, measured

BF16, FP16 = torch.bfloat16, torch.float16
Hq, H, L, S = 4, 2, 333, 450  # several blocks and tiles of each kernel, none of them whole


@pytest.fixture(params=["ampere", "hopper"])
def generation(request) -> Iterator[str]:
    """The device. In a rehearsal the CPU, with its own kernels."""
    if REHEARSED:
        with fastgpt.backend("native"):
            yield "cpu"
        return
    if torch.version.hip:
        pytest.skip("there are no native kernels for AMD's GPUs")
    cell = dispatch.lookup(cuda.ATTENTION, "native", "cuda")
    if cell.reason:
        pytest.fail(f"attention is off on native: {cell.reason}")
    if request.param == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU has no code of Hopper's")
    hopper.switch(hopper.ALL if request.param == "hopper" else hopper.NONE)
    with fastgpt.backend("native"):
        yield "cuda"
    hopper.switch(hopper.chosen(measured.read()))


def options_of(name: str, device: str) -> dict:
    causal = {"is_causal": True, "causal_alignment": "bottom_right"}
    boundaries = {
        f"cu_seqlens_{which}": torch.tensor([0, n // 9, n // 9, n // 2, n], device=device)
        for which, n in (("q", L), ("k", S))
    }
    return {
        "plain": {},
        "causal": causal,
        "window": {"window": (70, 9), "causal_alignment": "bottom_right"},
        "documents": {**boundaries, "is_causal": True},
        "options": {
            **causal,
            "softcap": 3.0,
            "alibi_slopes": torch.linspace(0.01, 0.2, Hq, device=device),
            "sinks": torch.linspace(-1, 2, Hq, device=device),
            "dropout_p": 0.2,
        },
    }[name]


def leaves_of(device: str, dtype: torch.dtype, columns: int, value_columns: int) -> list:
    sizes = (Hq, L, columns), (H, S, columns), (H, S, value_columns)
    return [
        normal(2, *size, dtype=dtype, device=device, seed=seed).requires_grad_()
        for seed, size in enumerate(sizes)
    ]


def results(leaves: list, upstream: torch.Tensor, function=attention, **options) -> tuple:
    torch.manual_seed(3)  # of dropout, whose weights are the same ones on every backend
    return both(lambda *x: function(*x, enable_gqa=True, **options), leaves, upstream)


@pytest.mark.parametrize("name", ["plain", "causal", "window", "documents", "options"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("columns", "value_columns"),
    [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (33, 33), (72, 40), (136, 200)],
)
def test_an_output_or_gradient_of_cudas_kernels_is_not_exact(
    generation, columns, value_columns, dtype, name
):
    options = options_of(name, generation)
    leaves = leaves_of(generation, dtype, columns, value_columns)
    upstream = normal(2, Hq, L, value_columns, dtype=dtype, device=generation, seed=9)
    got = results(leaves, upstream, **options)
    again = results(leaves, upstream, **options)
    assert all(map(torch.equal, got, again)), "another run has other bits"
    exact = {
        key: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in options.items()
    }
    wide = [x.detach().double().requires_grad_() for x in leaves]
    with fastgpt.backend("eager"):
        truth = results(wide, upstream.double(), fastgpt.scaled_dot_product_attention, **exact)
    check_attention(got, truth, dtype)


def test_hoppers_kernels_do_not_run(generation):
    """Or Ampere's: a pass of both has other bits."""
    if REHEARSED or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("there is one generation of kernels")
    leaves = leaves_of(generation, BF16, 128, 128)
    upstream = normal(2, Hq, L, 128, dtype=BF16, device=generation, seed=9)
    passes = []
    for on in (hopper.NONE, {**hopper.NONE, ("forward", 128): True}, hopper.ALL):
        hopper.switch(on)
        passes.append(results(leaves, upstream, is_causal=True))
    none, forward, both_passes = passes
    assert not torch.equal(none[0], forward[0])
    assert torch.equal(forward[0], both_passes[0])
    assert not all(map(torch.equal, forward[1:], both_passes[1:]))


@pytest.mark.parametrize("layout", ["heads inside", "unaligned", "expanded heads"])
def test_a_view_has_other_bits_than_its_copy(generation, layout):
    query, key, value = leaves_of(generation, BF16, 64, 64)
    if layout == "heads inside":
        view = key.detach().transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "unaligned":
        room = normal(2, H, S, 67, dtype=BF16, device=generation, seed=5)
        view = room[..., 1:65]
    else:
        view = key.detach()[:, :1].expand(-1, H, -1, -1)
    upstream = normal(2, Hq, L, 64, dtype=BF16, device=generation, seed=9)
    got, want = (
        results([query, x.requires_grad_(), value], upstream, is_causal=True)
        for x in (view, view.clone(memory_format=torch.contiguous_format))
    )
    assert all(map(torch.equal, got, want))
