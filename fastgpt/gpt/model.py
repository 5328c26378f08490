"""GPT-2: token and position embeddings, pre-norm blocks of attention and MLP, a tied output layer.

Radford et al. 2019; the parameters have the names of the published weights. (Hugging Face's files
store the four projections of a block transposed, (in, out); these are nn.Linear's (out, in).)

Shapes: B sequences, T tokens, C = n_embd, nh heads of hs = C / nh, V = vocab_size.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import fastgpt

from .cache import KeyValueCache
from .config import LOSSES, GPTConfig
from .errors import UsageError

if TYPE_CHECKING:
    from .tokenizer import BPETokenizer

# Features (N, C), the output layer's matrix (V, C), targets (N,) -> a scalar
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
AttentionFunction = Callable[..., Tensor]  # called like F.scaled_dot_product_attention


class CausalSelfAttention(nn.Module):
    """Each position gathers values from itself and the positions before it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer  # which of the n_layer, in a cache
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.attention: AttentionFunction = fastgpt.scaled_dot_product_attention
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
            for part in self.c_attn(x).split(C, dim=2)  # (B, T, 3C) -> 3 x (B, T, C)
        )
        visible: dict[str, Any] = {"is_causal": True}
        if cache is not None:
            k, v, visible = cache.append(self.layer, k, v)  # (B, nh, S, hs): T and those before
        y = self.attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, **visible
        )  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each position on its own: four times wider, GELU, and back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # GPT-2's form of it
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


# What takes long to compute again: products, and attention.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "fastgpt::attention_forward")


def _keep_products(_context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator.name().partition(".")[0] in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _products_context_fn() -> tuple[Any, Any]:
    return fastgpt.checkpoint_context_fn(_keep_products)


class Block(nn.Module):
    """Communicate, then compute; each adds to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.recompute = False  # keep nothing but the input for the backward pass,
        self.keep_products = False  # and this

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            context = _products_context_fn if self.keep_products else fastgpt.checkpoint_context_fn
            return checkpoint(self._forward, x, cache, use_reentrant=False, context_fn=context)
        return self._forward(x, cache)

    def _forward(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """From tokens (B, T) to the features (B, T, C) that the output layer reads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, idx: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        B, T = idx.shape
        position = torch.arange(T, device=idx.device) if cache is None else cache.begin(B, T)
        x = self.drop(self.wte(idx) + self.wpe(position))  # (B, T, C) + (T, C)
        for block in self.h:
            x = block(x, cache)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)


class GPT(nn.Module):
    """A language model: for each position, the logits of the next token."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: Press & Wolf 2017
        self.init_weights()

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, loss_fn: LossFunction | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, None) for tokens `idx` (B, T) int64, or with `targets` (None, their mean loss).

        logits are (B, T, V); where there is a loss to compute they need not exist, and whether they
        do is `loss_fn`'s affair. targets (B, T) int64 are the next token of each position, or -100
        where there is none to learn from. `loss_fn` is called as `fastgpt.linear_cross_entropy`,
        the default, with features (B*T, C), the matrix (V, C) and targets (B*T,); `of_logits` makes
        such a function of one that takes logits.
        Raises UsageError (a ValueError) if T exceeds the config's block_size.
        """
        x = self.features(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x), None  # (B, T, V)
        loss_fn = loss_fn or fastgpt.linear_cross_entropy
        return None, loss_fn(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def features(self, idx: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """What the output layer multiplies: (B, T, C) for tokens (B, T).

        With a cache (see `new_cache`) the tokens follow those that it holds, and join them.
        """
        if idx.shape[1] > self.config.block_size:
            raise UsageError(
                f"{idx.shape[1]} tokens do not fit the context: block_size is "
                f"{self.config.block_size}; pass the last {self.config.block_size} of them"
            )
        if cache is not None and cache.config != self.config:
            raise UsageError(f"the cache is for {cache.config}, the model is {self.config}")
        return self.transformer(idx, cache)

    def new_cache(self, batch_size: int, length: int | None = None) -> KeyValueCache:
        """Room for the keys and values of `batch_size` sequences, for `features`.

        `length` is the most tokens that a sequence can have, block_size unless it is less.
        """
        weight = self.lm_head.weight
        return KeyValueCache(
            self.config, batch_size, length, dtype=weight.dtype, device=weight.device
        )

    def use_attention(self, attention: AttentionFunction) -> None:
        """Have every block call `attention`, not `fastgpt.scaled_dot_product_attention`."""
        for module in self.modules():
            if isinstance(module, CausalSelfAttention):
                module.attention = attention

    def checkpoint_activations(self, enabled: bool = True, *, keep_products: bool = False) -> None:
        """Have a backward pass compute each block's activations again, instead of keeping them.

        A third more arithmetic, for the memory of one block's activations rather than of all. With
        `keep_products` the results of matrix products and of attention are kept, and only what lies
        between them is computed again (as torch.compile does): hardly more arithmetic, for two
        thirds of the memory. The gradients are the same, bit for bit, with dropout too.
        """
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute, module.keep_products = enabled, keep_products

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), biases 0.

        The projections onto the residual stream are smaller by sqrt(2 n_layer), the number of
        terms that the stream sums, so that its variance does not grow with the depth.
        """
        for module in self.transformer.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std)

    @classmethod
    def from_pretrained(
        cls,
        directory: Path | str,
        *,
        dropout: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "GPT":
        """The GPT-2 of a folder in Hugging Face's format, in eval mode.

        The folder holds config.json and model.safetensors, or the index of several such files.
        Nothing is downloaded, and nothing in it is executed. `dropout` is the folder's unless it is
        given, and so is `dtype`. Raises CheckpointError, with what was found and what was expected,
        if something is missing or damaged, or if the model is one that this class is not.
        """
        from .pretrained import load_pretrained

        return load_pretrained(directory, dropout=dropout, dtype=dtype, device=device)

    def save_pretrained(
        self, directory: Path | str, *, tokenizer: "BPETokenizer | None" = None
    ) -> None:
        """Write a folder that `from_pretrained` reads, and `transformers` as a GPT2LMHeadModel.

        With a tokeniser the folder has its tokenizer.json, too. It appears whole or not at all.
        Raises FileExistsError if the folder is there and not empty.
        """
        from .pretrained import save_pretrained

        save_pretrained(self, directory, tokenizer=tokenizer)

    def num_parameters(self) -> int:
        """How many numbers training adjusts; the tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())


def loss_function(name: str) -> LossFunction:
    """The loss of that name: one of `LOSSES`, of which "naive" knows no ignored targets."""
    if name == "linear_cross_entropy":
        return fastgpt.linear_cross_entropy
    if name == "cross_entropy":
        return of_logits(fastgpt.cross_entropy)
    if name == "torch":
        return of_logits(F.cross_entropy)
    if name == "naive":
        from fastgpt.backends.eager.cross_entropy import naive_cross_entropy

        return of_logits(naive_cross_entropy)
    raise UsageError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}")


def of_logits(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> LossFunction:
    """For `GPT.forward`, a loss of logits (N, V) and targets (N,), after the output layer."""

    def of_features(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return loss_fn(F.linear(x, weight), targets)

    return of_features


def attention_function(name: str) -> AttentionFunction:
    """The attention called "fused", "torch" or "explicit"; "explicit" writes QK^T to memory."""
    if name == "fused":
        return fastgpt.scaled_dot_product_attention
    if name == "torch":
        return F.scaled_dot_product_attention
    if name == "explicit":
        return _explicit_attention
    raise UsageError(f"attention must be one of fused, torch, explicit, got {name!r}")


def _explicit_attention(*args: Any, **kwargs: Any) -> Tensor:
    with fastgpt.backend("eager"):
        return fastgpt.scaled_dot_product_attention(*args, **kwargs)
