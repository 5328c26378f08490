"""The output of a step whose loss needed no logits: they are computed if they are asked for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast


class DeferredLogits:
    """Mixin of an output: `logits`, ["logits"], get("logits") and to_tuple() compute them once.

    What goes through the items, as DDP does in search of tensors, sees those that exist.
    """

    _compute: Callable[[], Tensor] | None = None

    @property
    def logits(self) -> Tensor | None:
        if vars(self).get("logits") is None and self._compute is not None:
            self["logits"] = self._compute()  # type: ignore[index]
            for name in tuple(self.keys()):  # type: ignore[attr-defined]
                if name not in ("loss", "logits"):
                    self.move_to_end(name)  # type: ignore[attr-defined]
        return vars(self).get("logits")

    @logits.setter
    def logits(self, value: Tensor | None) -> None:
        vars(self)["logits"] = value

    def __getitem__(self, key: Any) -> Any:
        if key == 0 and "loss" in vars(self):
            return vars(self)["loss"]
        if key == "logits":
            return self.logits
        return super().__getitem__(key)  # type: ignore[misc]

    def __contains__(self, key: object) -> bool:
        return key == "logits" or super().__contains__(key)  # type: ignore[misc]

    def get(self, key: str, default: Any = None) -> Any:
        return self.logits if key == "logits" else super().get(key, default)  # type: ignore[misc]

    def to_tuple(self) -> tuple[Any, ...]:
        _ = self.logits
        return super().to_tuple()  # type: ignore[misc]


class CausalLMOutput(DeferredLogits, CausalLMOutputWithPast):
    pass


class CrossCausalLMOutput(DeferredLogits, CausalLMOutputWithCrossAttentions):
    pass


class HeadLogits:
    """The logits softcap tanh(head(hidden_states) / softcap), as the forward would compute them."""

    def __init__(self, head: nn.Linear, hidden_states: Tensor, softcap: float | None) -> None:
        self.head, self.hidden_states, self.softcap = head, hidden_states, softcap
        self.versions = self._versions()
        device = hidden_states.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.autocast = torch.autocast(device, dtype=dtype, enabled=enabled)

    def __call__(self) -> Tensor:
        if self._versions() != self.versions:
            raise RuntimeError(
                "the head's weight has changed since the forward: read `logits` before the step of "
                "the optimizer, or patch(model, keep_logits=True)"
            )
        with self.autocast:
            logits = self.head(self.hidden_states)
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap

    def _versions(self) -> tuple[int, ...]:
        parameters = self.head.weight, self.head.bias
        return tuple(x._version for x in parameters if x is not None)
