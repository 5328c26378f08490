"""Which attention weights dropout keeps: a function of a seed and of the weight's place alone.

The mask is never stored. Forward, backward and every backend work it out again from (seed, b, h, i,
j), so that they agree. For query i of head h, Philox4x32-10 (Salmon et al., "Parallel Random
Numbers: As Easy as 1, 2, 3", 2011) of the counter (i, h, 0, 0) under the 64 bits of sequence b's
seed as its key gives two words a and c, for the row. Key j's 32 bits are then a hash of j between
them,

    x = j ^ a            x = (x ^ x >> 16) * 0x7feb352d
    x = x ^ x >> 15 ^ c  x = x * 0x846ca68b            x = x ^ x >> 16

with the constants of Wellons's lowbias32 ("Prospecting for Hash Functions", 2018), and the weight
is dropped if they are less than p 2^32. Philox alone would cost four times as much for each weight.

csrc/cpu/attention.inl.h, csrc/cuda/attention_tiles.cuh and backends/triton/attention.py hold the
same function.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """One seed (1,) int64 from torch's generator of the device."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device)


def seeds_of(seed: Tensor, batch: int) -> Tensor:
    """A seed for each of `batch` sequences, (B,) int64, from the call's."""
    return seed + torch.arange(batch, device=seed.device)


def threshold(dropout_p: float) -> int:
    """Weights whose 32 bits are less than this are dropped."""
    return min(round(dropout_p * 2**32), _WORD)


def rescale(dropout_p: float) -> float:
    """What the weights that are kept are multiplied by; 0 where none should be."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def keep_mask(seeds: Tensor, heads: int, first: int, rows: int, keys: int, p: float) -> Tensor:
    """(B, heads, rows, keys) bool: the weights that stay, of the queries from `first` on.

    seeds: (B,) int64.
    """
    device = seeds.device
    i = torch.arange(first, first + rows, device=device)
    h = torch.arange(heads, device=device).unsqueeze(1)
    a, c = _philox(seeds.reshape(-1, 1, 1), (i, h))
    x = torch.arange(keys, device=device) ^ a.unsqueeze(-1)
    x = _product(x ^ x >> 16, 0x7FEB352D)
    x = _product(x ^ x >> 15 ^ c.unsqueeze(-1), 0x846CA68B)
    return (x ^ x >> 16) >= threshold(p)


def _product(x: Tensor, factor: int) -> Tensor:
    """The lower 32 bits of a product of 32-bit numbers, held in int64."""
    return x * factor & _WORD


def _philox(key: Tensor, counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The first two words of Philox4x32-10 for the counter (c0, c1, 0, 0)."""
    k0, k1 = key & _WORD, key >> 32 & _WORD
    c0, c1 = counter
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        # The sign bit of a product is its 64th bit; the shift repeats it and the mask cuts it off.
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (odd >> 32 & _WORD) ^ c1 ^ k0,
            odd & _WORD,
            (even >> 32 & _WORD) ^ c3 ^ k1,
            even & _WORD,
        )
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1
