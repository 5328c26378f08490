"""Cross-entropy of more than 2^31 logits, where a product of sizes is no 32-bit number."""

import pytest
import torch
from oracle import gradient_of, random_like, random_logits


@pytest.mark.slow
def test_offsets_beyond_31_bits_wrap(best_native):
    """Rows repeated over and over: whatever their place, they have the bits of the first ones.

    One test, since two at once would not fit into the memory of a small machine.
    """
    _repeat(best_native, columns=False, in_place=False)
    _repeat(best_native, columns=True, in_place=True)


def _repeat(best_native, columns, in_place):
    classes, few, times = 131072, 64, 257
    logits, target = random_logits(few, classes, dtype=torch.bfloat16)
    upstream = random_like(logits[:, 0])

    def loss(x, t, **options):
        if columns:  # (1, C, N) with the rows side by side
            return best_native.cross_entropy(x, t.unsqueeze(0), reduction="none", **options)[0]
        return best_native.cross_entropy(x, t, reduction="none", **options)

    if columns:
        logits = logits.t().contiguous().unsqueeze(0)
    want, gradient = gradient_of(lambda x: loss(x, target), logits, upstream)
    large = logits.repeat(1, 1, times) if columns else logits.repeat(times, 1)
    assert large.numel() > 1 << 31
    large.requires_grad_()
    repeated = loss(large, target.repeat(times), inplace_backward=in_place)
    (got,) = torch.autograd.grad(repeated, large, upstream.repeat(times))
    assert torch.equal(repeated.view(times, few), want.expand(times, few))
    assert (got.data_ptr() == large.data_ptr()) == in_place
    dimension = 2 if columns else 0
    for part in got.split(few, dimension):
        assert torch.equal(part, gradient)
