"""A short run of every kernel, for compute-sanitizer: small tensors of awkward sizes.

compute-sanitizer --tool memcheck python tests/device/memcheck.py
compute-sanitizer --tool racecheck python tests/device/memcheck.py --backend native
"""

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import torch

import fastgpt
from fastgpt.backends import cuda, hopper

BACKENDS = ("triton", "native")
EVERYTHING = {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 1e-2}
WIDE = 150_001  # classes that no one multiprocessor holds


def loss(backend: str, x: torch.Tensor, target: torch.Tensor, **options: Any) -> None:
    """Forward and backward, on this backend and no other."""
    leaf = x.detach().requires_grad_()
    explanation = fastgpt.explain(fastgpt.cross_entropy, leaf, target, **options)
    assert explanation.backend == backend, str(explanation)
    torch.autograd.grad(fastgpt.cross_entropy(leaf, target, **options), leaf)


def rows(backend: str, device: str) -> None:
    for dtype, classes in itertools.product((torch.float32, torch.bfloat16), (7, 1500)):
        x = torch.randn(5, classes + 3, device=device, dtype=dtype)[:, 3:]
        t = torch.tensor([0, classes - 1, -100, 3, 4], device=device)
        weight = torch.rand(classes, device=device, dtype=dtype)
        loss(backend, x, t)
        loss(backend, x, t, weight=weight, label_smoothing=0.1)


def other_kernels(backend: str, device: str) -> None:
    """What is a kernel of its own in CUDA: wide rows, columns, probabilities, in place."""
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.randn(3, WIDE, device=device, dtype=dtype)
        t = torch.tensor([0, WIDE - 1, -100], device=device)
        loss(backend, wide, t)
        loss(backend, wide, t, inplace_backward=True, **EVERYTHING)
        columns = torch.randn(2, 37, 35, device=device, dtype=dtype)
        loss(backend, columns, torch.randint(37, (2, 35), device=device), **EVERYTHING)
        matrix = torch.randn(37, 35, device=device, dtype=dtype).t()
        loss(backend, matrix, torch.randint(37, (35,), device=device))
        for of in (dtype, torch.float32):
            x = torch.randn(5, 1003, device=device, dtype=dtype)
            q = torch.rand(5, 1003, device=device, dtype=of)
            loss(backend, x, q, **EVERYTHING)


def attention(backend: str, device: str) -> None:
    """Of CUDA's, which take no mask, the kernels of both generations, of every kind of width."""
    if backend == "triton":
        mask = torch.rand(150, 150, device=device) < 0.8
        attend(backend, device, torch.float16, 40, attn_mask=mask)
        attend(backend, device, torch.bfloat16, 64, is_causal=True)
        return
    for on in (hopper.ALL, hopper.NONE) if cuda.extension else (None,):
        if on is not None:
            hopper.switch(on)
        for width in hopper.WIDTHS:
            attend(backend, device, torch.bfloat16, width, is_causal=True)
            attend(backend, device, torch.float16, width - 8, softcap=9.0, dropout_p=0.1)


def attend(backend: str, device: str, dtype: torch.dtype, columns: int, **options: Any) -> None:
    """Forward and backward of more than a block of queries, on this backend and no other."""
    q, k, v = (
        torch.randn(1, heads, 150, columns, device=device, dtype=dtype, requires_grad=True)
        for heads in (2, 1, 1)
    )
    function = fastgpt.scaled_dot_product_attention
    explanation = fastgpt.explain(function, q, k, v, enable_gqa=True, **options)
    assert explanation.backend == backend, str(explanation)
    y = function(q, k, v, enable_gqa=True, **options)
    torch.autograd.grad(y, (q, k, v), torch.randn_like(y))


def main(device: str = "cuda", backends: Sequence[str] = BACKENDS) -> None:
    torch.manual_seed(0)
    for backend in backends:
        with fastgpt.backend(backend):
            rows(backend, device)
            if backend == "native":
                other_kernels(backend, device)
            attention(backend, device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"the kernels of {' and '.join(backends)} ran")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="only this one's")
    main(backends=parser.parse_args().backend or BACKENDS)
