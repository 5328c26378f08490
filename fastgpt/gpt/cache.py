"""The key-value cache: what attention needs of the tokens that a GPT has read already."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import GPTConfig
from .errors import UsageError


class KeyValueCache:
    """The keys and values of B sequences of any lengths; `GPT.new_cache` makes one.

        cache = model.new_cache(batch_size=1)
        model.features(prompt, cache)  # (1, T): reads the prompt
        model.features(token, cache)  # (1, 1): one token more, as if after a second reading

    A token's place in the cache is its position in its sequence. All memory is taken at once:
    `keys` and `values` are (n_layer, B, nh, length, hs), where `length` is the most tokens that a
    sequence can have, block_size unless it is less. Nothing is differentiated.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        length = config.block_size if length is None else length
        if not 1 <= length <= config.block_size:
            raise UsageError(
                f"length must be in 1 ... {config.block_size}, the model's block_size, got {length}"
            )
        heads = config.n_head, length, config.n_embd // config.n_head
        self.config = config
        # Not empty: torch's attention multiplies what a mask hides by 0, and 0 x NaN is NaN.
        self.keys = torch.zeros(config.n_layer, batch_size, *heads, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * batch_size  # tokens read of each sequence
        self._new: Any = None  # where in (B, block_size) the tokens being read belong
        self._end = 0  # how far the longest sequence reaches with them
        self._visible: dict[str, Any] = {}  # which keys they may look at

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[b]` tokens of each sequence b, such as padding."""
        if len(lengths) != len(self.lengths) or any(
            not 0 <= length <= own for length, own in zip(lengths, self.lengths, strict=True)
        ):
            raise UsageError(f"a cache of lengths {self.lengths} can't be cut to {list(lengths)}")
        self.lengths = list(lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all sequences but these, in ascending order; they move together, in place."""
        B = len(self.lengths)
        if not rows or any(not 0 <= b < B for b in rows) or sorted(set(rows)) != list(rows):
            raise UsageError(f"of {B} sequences the cache can't keep {list(rows)}")
        for to, b in enumerate(rows):  # to <= b: nothing that is still to be moved is overwritten
            if to < b:
                for stored in (self.keys, self.values):
                    end = self.lengths[b]
                    stored[:, to, :, :end] = stored[:, b, :, :end]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        self.lengths = [self.lengths[b] for b in rows]

    def begin(self, B: int, T: int) -> Tensor:
        """Prepare for T tokens more of each of the B sequences; their positions, (1 or B, T)."""
        first, room, device = max(self.lengths), self.keys.shape[3], self.keys.device
        if len(self.lengths) != B:
            raise UsageError(f"the cache is of {len(self.lengths)} sequences, got {B}")
        if first + T > room:
            name = "block_size" if room == self.config.block_size else "its length"
            raise UsageError(
                f"{T} tokens do not fit the context after {first} in the cache: {name} is "
                f"{room}; pass the last {room} of them all with an empty cache"
            )
        self._end = first + T
        same = min(self.lengths) == first
        if same:
            position = torch.arange(first, self._end, device=device)[None]
            self._new = slice(None), slice(first, self._end)
        else:
            length = torch.tensor(self.lengths, device=device)
            position = length[:, None] + torch.arange(T, device=device)
            self._new = torch.arange(B, device=device)[:, None], position
        if first == 0:
            self._visible = {"is_causal": True}
        elif same and T == 1:
            self._visible = {}  # the last token looks at all
        else:
            mask = torch.arange(self._end, device=device) <= position[:, :, None]
            self._visible = {"attn_mask": mask[:, None]}  # (1 or B, 1, T, S)
        return position

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Store a layer's keys and values (B, nh, T, hs) of the tokens that `begin` announced.

        Returns those of all S tokens so far, (B, nh, S, hs), views of the cache, and the arguments
        that tell attention, ours or torch's, which of them each of the T may look at.
        """
        if k.requires_grad:
            raise UsageError("a cache keeps no gradients: call the model under torch.no_grad()")
        for stored, x in ((self.keys[layer], k), (self.values[layer], v)):
            stored.transpose(1, 2)[self._new] = x.transpose(1, 2).to(stored.dtype)
        end = self._end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end], self._visible

    def advance(self, T: int) -> None:
        """Count T tokens more as read, now that every layer has stored them."""
        self.lengths = [length + T for length in self.lengths]
