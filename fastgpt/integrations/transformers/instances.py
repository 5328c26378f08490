"""`patch`, `unpatch` and `patched`: attention, masks and loss of one model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2ForCausalLM,
    Gemma2PreTrainedModel,
    Gemma3ForCausalLM,
    Gemma3PreTrainedModel,
    GPT2LMHeadModel,
    GPT2PreTrainedModel,
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    MistralForCausalLM,
    MistralPreTrainedModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3PreTrainedModel,
)
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast

from fastgpt.integrations.transformers import attention, loss
from fastgpt.integrations.transformers.outputs import (
    CausalLMOutput,
    CrossCausalLMOutput,
    HeadLogits,
)
from fastgpt.integrations.transformers.packing import separated

M = TypeVar("M", bound=nn.Module)

SUPPORTED = (
    GPT2PreTrainedModel,
    LlamaPreTrainedModel,
    MistralPreTrainedModel,
    Qwen2PreTrainedModel,
    Qwen3PreTrainedModel,
    Gemma2PreTrainedModel,
    Gemma3PreTrainedModel,
)
NAMES = "GPT-2, Llama, Mistral, Qwen 2 or 3, or Gemma 2 or 3 (text)"

# The causal language models whose forward is: hidden states, head, softcap, loss.
HEADS: tuple[type[PreTrainedModel], ...] = (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
)


def patch(model: M, *, keep_logits: bool = False) -> M:
    """Run a `transformers` model on the fused kernels; returns it.

    Its attention becomes `fastgpt.scaled_dot_product_attention`, with padding, causality, sliding
    window, softcap and grouped queries in the kernel. Its next-token loss becomes, in training,
    `fastgpt.linear_cross_entropy` of the hidden states, so that no logits exist, and otherwise
    `fastgpt.cross_entropy` of the logits. Weights, parameter names and everything else stay; so do
    all other models, those made from the same configuration object included.

    Args:
        model: a model of GPT-2, Llama, Mistral, Qwen 2 or 3, or Gemma 2 or 3 (text), with or
            without a head, or a module that holds such models, like a PEFT model. A model that is
            patched already stays as it is.
        keep_logits: in training, too, compute the logits with the loss. Without it the output of a
            training step with labels computes them if its `logits` are read, which has to be before
            the weights change; compiled, it has none, and `logits` is None. They are always
            computed where `logits_to_keep` or `return_dict=False` asks for them, where the head is
            not a plain linear layer (adapted, quantised, sharded or hooked), and where the model's
            loss is not the default one.

    Raises:
        TypeError: a model inside is of another class, or there is none. Nothing is patched then.

    A patched model raises ValueError for `output_attentions=True`: the weights never exist.
    """
    models = _models(model)
    others = [m for m in models if not isinstance(m, SUPPORTED)]
    if others or not models:
        found = others[0] if others else model
        where = "" if found is model else f" in {type(model).__name__}"
        raise TypeError(f"patch: expected a model of {NAMES}, got {type(found).__name__}{where}")
    views: dict[int, PreTrainedConfig] = {}
    for module, name, config in _configs(model):
        if not isinstance(config, _View):
            setattr(module, name, views.setdefault(id(config), _view(config, attention.NAME)))
    for m in models:
        if not _is_patched(m):
            _Forward(m, keep_logits).install()
    return model


def unpatch(model: M) -> M:
    """Undo `patch`: the model is what it was, with what has happened to it since; returns it.

    A model that is not patched stays as it is.
    """
    _restore(_models(model), _configs(model))
    return model


@contextmanager
def patched(model: M, *, keep_logits: bool = False) -> Iterator[M]:
    """Inside `with patched(model):` it is patched, as by `patch`; then as it was before."""
    models = [m for m in _models(model) if not _is_patched(m)]
    configs = [each for each in _configs(model) if not isinstance(each[-1], _View)]
    patch(model, keep_logits=keep_logits)
    try:
        yield model
    finally:
        _restore(models, [(module, name, getattr(module, name)) for module, name, _ in configs])


def _restore(
    models: list[PreTrainedModel], configs: list[tuple[nn.Module, str, PreTrainedConfig]]
) -> None:
    for m in models:
        if _is_patched(m):
            vars(m)["_fastgpt_forward"].remove()
    for module, name, config in configs:
        if isinstance(config, _View):
            setattr(module, name, config._original)


def _models(model: nn.Module) -> list[PreTrainedModel]:
    return [m for m in model.modules() if isinstance(m, PreTrainedModel)]


def _configs(model: nn.Module) -> list[tuple[nn.Module, str, PreTrainedConfig]]:
    """Every attribute of every module that is a configuration."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in list(vars(module).items())
        if isinstance(value, PreTrainedConfig)
    ]


def _is_patched(model: PreTrainedModel) -> bool:
    return "_fastgpt_forward" in vars(model)


class _View:
    """Mixin of a configuration that shares all but the choice of attention with the original.

    A configuration may belong to several models, and a model asks it which attention to use.
    """

    __slots__ = ("_implementation", "_original")  # beside the __dict__, which is the original's
    _original: PreTrainedConfig
    _implementation: str | None

    @property
    def _attn_implementation_internal(self) -> str | None:
        return self._implementation

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: str | None) -> None:
        self._implementation = value

    def __eq__(self, other: object) -> bool:
        return bool(self._original == (other._original if isinstance(other, _View) else other))

    def __reduce__(self) -> tuple[Any, ...]:
        return _view, (self._original, self._implementation)


def _view(config: PreTrainedConfig, implementation: str | None) -> Any:
    view: Any = object.__new__(_view_class(type(config)))  # type: ignore[arg-type]
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "_original", config)
    object.__setattr__(view, "_implementation", implementation)
    return view


@cache
def _view_class(config_class: Any) -> type:
    # A configuration's class is made a dataclass, with an __eq__ if it defines none.
    namespace = {"__slots__": (), "__module__": config_class.__module__, "__eq__": _View.__eq__}
    return type(config_class.__name__, (_View, config_class), namespace)


class _Forward:
    """The forward of a patched model, an attribute of the instance in the way of its class's."""

    def __init__(self, model: PreTrainedModel, keep_logits: bool) -> None:
        self.model = model
        # One that another library put into the instance already.
        self.previous: Callable[..., Any] | None = vars(model).get("forward")
        self.parameters = tuple(
            name
            for name, parameter in signature(model.forward).parameters.items()
            if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
        )
        self.defers_logits = (
            not keep_logits
            and self.previous is None
            and any(
                isinstance(model, head) and type(model).forward is head.forward for head in HEADS
            )
        )

    def install(self) -> None:
        attributes = vars(self.model)
        attributes.update(_fastgpt_forward=self, forward=self)
        # The type stays, from which Trainer knows which labels count. The default is found as
        # `loss_function` finds it, which also warns about GPT-2's type, None.
        default = LOSS_MAPPING.get(self.model.loss_type, ForCausalLMLoss)
        if default is ForCausalLMLoss and "_loss_function" not in attributes:
            attributes["_loss_function"] = loss.causal_lm_loss

    def remove(self) -> None:
        # Another library may have wrapped it since; then it stays, and only passes calls on, as
        # neither the configuration nor the loss is ours any more.
        attributes = vars(self.model)
        del attributes["_fastgpt_forward"]
        forward = attributes.get("forward")
        if self in (forward, getattr(forward, "__func__", None)):
            del attributes["forward"]
            if self.previous is not None:
                attributes["forward"] = self.previous
        if attributes.get("_loss_function") is loss.causal_lm_loss:
            del attributes["_loss_function"]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """For `inspect.signature`, from which Trainer learns what the model accepts."""
        return self.previous or type(self.model).forward.__get__(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.model:  # bound to it, by Accelerate's unwrap_model
            args = args[1:]
        names = self.parameters[: len(args)]
        if len(names) < len(args) or any(name in kwargs for name in names):
            return self.__wrapped__(*args, **kwargs)
        config = self.model.config
        kwargs = {**dict(zip(names, args, strict=True)), **kwargs}
        if config._attn_implementation == attention.NAME:
            if kwargs.get("output_attentions") or config.output_attentions:
                raise ValueError(
                    "output_attentions=True: fastgpt's attention never has the weights; unpatch the"
                    ' model and use attn_implementation="eager"'
                )
            if self.model.base_model is self.model:
                kwargs = separated(kwargs, self.model.training)
        if self._needs_no_logits(kwargs):
            return self._without_logits(**kwargs)
        return self.__wrapped__(**kwargs)

    def _needs_no_logits(self, kwargs: dict[str, Any]) -> bool:
        model, labels, keep = self.model, kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
        return_dict = kwargs.get("return_dict")
        return bool(
            self.defers_logits
            and model.training
            and isinstance(labels, Tensor)
            and labels.dim() == 2
            and isinstance(keep, int)
            and keep == 0
            and (model.config.return_dict if return_dict is None else return_dict)
            and model.loss_function is loss.causal_lm_loss
            and _is_plain(model.lm_head)
        )

    def _without_logits(self, **kwargs: Any) -> Any:
        model, head = self.model, self.model.lm_head
        labels = kwargs.pop("labels")
        kwargs.pop("logits_to_keep", None)
        kwargs.pop("return_dict", None)
        outputs = model.base_model(**kwargs)
        x = outputs.last_hidden_state
        softcap = getattr(model.config, "final_logit_softcapping", None)
        values = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        values["loss"] = loss.hidden_states_loss(x, head, labels, softcap, **kwargs)
        crossed = isinstance(model, GPT2LMHeadModel)
        if torch.compiler.is_compiling():
            return (CausalLMOutputWithCrossAttentions if crossed else CausalLMOutputWithPast)(
                **values
            )
        output = (CrossCausalLMOutput if crossed else CausalLMOutput)(**values)
        output._compute = HeadLogits(head, x, softcap)
        return output


def _is_plain(head: nn.Module) -> bool:
    """Whether calling the head is multiplying with its weight, and nothing else."""
    return (
        type(head) is nn.Linear
        and type(head.weight) in (nn.Parameter, Tensor)
        and "forward" not in head.__dict__
        and not (head._forward_pre_hooks or head._forward_hooks)
        and not (head._backward_pre_hooks or head._backward_hooks)
    )
