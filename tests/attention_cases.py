"""The options of attention that the tests go through, alone and together, for calls of any size."""

from typing import NamedTuple

import torch
from oracle import random_like, random_mask

import fastgpt


class Sizes(NamedTuple):
    """Of a call, and the type of its inputs."""

    B: int
    Hq: int
    L: int
    S: int
    dtype: torch.dtype = torch.float64

    @property
    def accumulator(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)


def boundaries(n: int, *shares: float) -> torch.Tensor:
    """Those of documents that end behind these shares of n."""
    return torch.tensor([0, *(int(n * share) for share in shares), n], dtype=torch.int32)


def documents(n: Sizes) -> dict:
    """The second is empty, the third has a single token (if there are enough)."""
    first = n.L // 3
    ends = [0, first, first, min(first + 1, n.L), n.L]
    return {"cu_seqlens_q": torch.tensor(ends, dtype=torch.int32)} if n.L == n.S else cross(n)


def cross(n: Sizes) -> dict:
    """Keys of other lengths: one document has no queries, and one no keys."""
    return {
        "cu_seqlens_q": boundaries(n.L, 0.3, 0.3, 0.5).long(),
        "cu_seqlens_k": boundaries(n.S, 0.2, 0.5, 0.5).long(),
    }


def slopes(n: Sizes, *batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.rand((*batch, n.Hq), generator=generator).to(n.accumulator) * 0.3


def sinks(n: Sizes) -> torch.Tensor:
    return random_like(torch.empty(n.Hq, dtype=n.dtype), 4)


def bias(n: Sizes, *shape: int) -> torch.Tensor:
    return random_like(torch.empty(shape, dtype=n.dtype), 6)


def partly_hidden(n: Sizes) -> torch.Tensor:
    """An additive mask with entries of -inf."""
    return bias(n, n.L, n.S).masked_fill(~random_mask(n.L, n.S), -torch.inf)


CAUSAL = {"is_causal": True}
BOTTOM_RIGHT = {"causal_alignment": "bottom_right"}

CASES = {
    "window": lambda n: {"window": (3, 2)},
    "causal window": lambda n: {**CAUSAL, "window": (20, -1)},
    "bottom right": lambda n: {**CAUSAL, **BOTTOM_RIGHT},
    "bottom right window": lambda n: {**BOTTOM_RIGHT, "window": (9, 40)},
    "documents": lambda n: {**CAUSAL, **documents(n)},
    "cross documents": lambda n: {**cross(n), **BOTTOM_RIGHT, **CAUSAL},
    "alibi": lambda n: {"alibi_slopes": slopes(n)},
    "alibi for each batch": lambda n: {
        **CAUSAL, **BOTTOM_RIGHT, "alibi_slopes": slopes(n, n.B)
    },
    "softcap": lambda n: {"softcap": 2.0},
    "sinks": lambda n: {**CAUSAL, "sinks": sinks(n)},
    "mask": lambda n: {"attn_mask": bias(n, 1, n.Hq, n.L, n.S)},
    "mask of keys": lambda n: {"attn_mask": bias(n, n.B, 1, 1, n.S), **CAUSAL},
    "mask and window": lambda n: {"attn_mask": partly_hidden(n), "window": (-1, 3)},
    "dropout": lambda n: {"dropout_p": 0.3},
    "everything": lambda n: {
        **cross(n), **BOTTOM_RIGHT, "window": (11, 2), "softcap": 3.0, "alibi_slopes": slopes(n),
        "sinks": sinks(n), "attn_mask": bias(n, n.B, 1, n.L, n.S), "dropout_p": 0.2,
    },
    "everything but documents": lambda n: {
        **CAUSAL, **BOTTOM_RIGHT, "window": (37, -1), "softcap": 3.0,
        "alibi_slopes": slopes(n, n.B), "sinks": sinks(n), "attn_mask": bias(n, 1, n.Hq, 1, n.S),
        "dropout_p": 0.2,
    },
}  # fmt: skip


def kept(device: str, n: Sizes, dropout_p: float, seed: int) -> torch.Tensor:
    """(B, Hq, L, S) bool: what dropout keeps in a call behind `torch.manual_seed(seed)`.

    Where all weights are the same and the values are rows of the identity, the output is what is
    left of the weights. In torch operations, on the device whose generator gives the seed.
    """

    def run(*inputs, **options):
        with fastgpt.backend("eager"):
            inputs = (x.to(device) for x in inputs)
            return fastgpt.scaled_dot_product_attention(*inputs, **options).cpu()

    return weights_left(run, n, dropout_p, seed) != 0


def weights_left(function, n: Sizes, dropout_p: float, seed: int, columns: int = 512):
    """(B, Hq, L, S) float32, from calls for so many columns each; a kernel has no more."""
    query, key = torch.zeros(n.B, n.Hq, n.L, 1), torch.zeros(n.B, n.Hq, n.S, 1)
    parts = []
    for value in torch.eye(n.S).split(columns, -1):
        torch.manual_seed(seed)
        value = value.expand(n.B, n.Hq, *value.shape)
        parts.append(function(query, key, value, dropout_p=dropout_p))
    return torch.cat(parts, -1)
