"""A short run of every kernel, for compute-sanitizer: small tensors of awkward sizes.

compute-sanitizer --tool memcheck python tests/device/memcheck.py
"""

import itertools

import torch

import fastgpt


def main(device: str = "cuda") -> None:
    torch.manual_seed(0)
    for dtype, classes in itertools.product((torch.float32, torch.bfloat16), (7, 1500)):
        x = torch.randn(5, classes + 3, device=device, dtype=dtype)[:, 3:].detach()
        x.requires_grad_()
        t = torch.tensor([0, classes - 1, -100, 3, 4], device=device)
        weight = torch.rand(classes, device=device, dtype=dtype)
        for options in ({}, {"weight": weight, "label_smoothing": 0.1}):
            torch.autograd.grad(fastgpt.cross_entropy(x, t, **options), x)
    mask = torch.rand(67, 67, device=device) < 0.8
    for dtype, D, options in (
        (torch.float16, 40, {"attn_mask": mask}),
        (torch.bfloat16, 64, {"is_causal": True}),
    ):
        q, k, v = (
            torch.randn(2, heads, 67, D, device=device, dtype=dtype, requires_grad=True)
            for heads in (4, 2, 2)
        )
        y = fastgpt.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
    if device == "cuda":
        torch.cuda.synchronize()
    print("both ops ran")


if __name__ == "__main__":
    main()
