"""The bigram model: what can be known of a token from the one before it; the bar for a GPT."""

from typing import TYPE_CHECKING

from .data import TokenArray
from .errors import LazyModule

if TYPE_CHECKING:
    import numpy as np
else:
    np = LazyModule("numpy")


class Bigram:
    """Interpolated Kneser-Ney (Kneser & Ney 1995; Chen & Goodman 1999), a strong bigram.

        p(b | a) = max(c(a, b) - d, 0) / c(a)  +  d n(a) / c(a) * q(b)

    c counts pairs in the training tokens, n(a) is in how many kinds of pair a comes first, q(b) the
    share of the kinds of pair that end in b (plus one each, so that no token is impossible), and
    d = n1 / (n1 + 2 n2) for n1 kinds of pair seen once and n2 seen twice. There is nothing to tune.
    """

    def __init__(self, tokens: TokenArray, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        # Of the V^2 possible pairs only those that occur are kept, as sorted numbers a V + b.
        self.pairs, self.counts = np.unique(self._pair_numbers(tokens), return_counts=True)
        first, second = np.divmod(self.pairs, vocab_size)
        self.context_count = np.bincount(first, weights=self.counts, minlength=vocab_size)
        self.context_kinds = np.bincount(first, minlength=vocab_size)
        once, twice = np.count_nonzero(self.counts == 1), np.count_nonzero(self.counts == 2)
        self.discount = once / (once + 2 * twice) if once else 0.5
        kinds = np.bincount(second, minlength=vocab_size) + 1.0
        self.backoff = kinds / kinds.sum()

    def probability(self, first: "np.ndarray", second: "np.ndarray") -> "np.ndarray":
        """p(second | first), float64, for two integer arrays of one shape."""
        number = first.astype(np.int64) * self.vocab_size + second
        place = np.searchsorted(self.pairs, number).clip(max=len(self.pairs) - 1)
        count = np.where(self.pairs[place] == number, self.counts[place], 0)
        total = self.context_count[first]
        seen = np.maximum(count - self.discount, 0) / np.maximum(total, 1)
        weight = np.where(
            total > 0, self.discount * self.context_kinds[first] / np.maximum(total, 1), 1
        )
        prob: TokenArray = seen + weight * self.backoff[second]
        return prob

    def loss(self, tokens: TokenArray) -> float:
        """The mean of -log p over the tokens after the first, in nats: a GPT's loss, to compare."""
        return float(-np.log(self.probability(tokens[:-1], tokens[1:])).mean())

    def _pair_numbers(self, tokens: TokenArray) -> "np.ndarray":
        numbers: TokenArray = tokens[:-1].astype(np.int64) * self.vocab_size + tokens[1:]
        return numbers
