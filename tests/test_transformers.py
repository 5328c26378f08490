"""Hugging Face models on the fused kernels: everything as without them, and back again."""

import copy
import gc
import pickle
import re
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fastgpt.integrations.transformers.attention as ours
from benchmarks.memory import peak_bytes
from fastgpt.integrations.transformers import patch, patched, unpatch

VOCABULARY, LENGTH, WINDOW = 61, 20, 6
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that attention attends to something
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
GEMMA = {**SIZES, **LAYERS, "head_dim": 16, "query_pre_attn_scalar": 16}


def gpt2(**changes):
    config = {
        "vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, **changes}))


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes}))


def mistral(**changes):
    config = transformers.MistralConfig(**{**SIZES, "sliding_window": WINDOW, **changes})
    return transformers.MistralForCausalLM(config)


def qwen2(**changes):
    config = {**SIZES, **LAYERS, "use_sliding_window": True, **changes}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))


def qwen3(**changes):
    config = transformers.Qwen3Config(**{**SIZES, "head_dim": 16, **changes})
    return transformers.Qwen3ForCausalLM(config)


def gemma2(**changes):
    config = {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, **changes}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**config))


def gemma3(**changes):
    config = {**GEMMA, "final_logit_softcapping": 4.0, **changes}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**config))


FAMILIES = [gpt2, llama, mistral, qwen2, qwen3, gemma2, gemma3]
family = pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)


def bound(make):
    """On the error relative to the largest number."""
    return 2e-5 if make is gemma2 else 1e-11


def made(make, **changes):
    """In float64, but for Gemma 2: eager attention makes NaN of a float64 mask."""
    torch.manual_seed(0)
    model = make(**changes)
    return model if make is gemma2 else model.double()


def batch(padding="none", rows=2):
    """Token indices, attention mask and labels; the second row is padded."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1:, 13:] = 0
    if padding == "left":
        mask[1:, :7] = 0
    ids = ids.masked_fill(mask == 0, 0)
    # Not what the last padding predicts, which saw no key: eager attention sees all of them then.
    scored = mask.cumsum(1) > 1 if padding == "left" else mask > 0
    return ids, mask, ids.masked_fill(~(scored & (mask > 0)), -100)


def gradients(model):
    found = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    return found


def assert_near(actual, expected, bound):
    """Within `bound` of the largest number expected."""
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= bound * max(1.0, expected.abs().max().item()), error


def assert_all_near(actual, expected, bound):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert_near(actual[name], x, bound)


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of each call of the kernels' attention."""
    found = []

    def recorded(query, key, value, **kwargs):
        found.append({"L": query.shape[2], "S": key.shape[2], **kwargs})
        return fused(query, key, value, **kwargs)

    fused = ours.scaled_dot_product_attention
    monkeypatch.setattr(ours, "scaled_dot_product_attention", recorded)
    return found


def masks_in_full(calls):
    """Whether some call was given a mask with a number for each query and key."""
    return any(call["attn_mask"] is not None and call["attn_mask"].shape[-2] > 1 for call in calls)


# Equal to the unpatched model.


@family
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_logits_or_gradients_differ(make, padding):
    model = made(make)
    ids, mask, labels = batch(padding)
    kwargs = {} if padding == "none" else {"attention_mask": mask}
    logits = model(ids, **kwargs).logits
    # In float64: transformers' own loss is in float32.
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    expected = gradients(model)
    theirs = model(ids, labels=labels, **kwargs).loss
    for keep_logits in (False, True):
        with patched(model, keep_logits=keep_logits):
            output = model(ids, labels=labels, **kwargs)
            output.loss.backward()
            assert output.loss.dtype == theirs.dtype
            assert_near(output.loss, theirs, 1e-6)
            assert_near(output.logits[mask > 0], logits[mask > 0], bound(make))
            assert_all_near(gradients(model), expected, bound(make))


@family
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_differs(make, cache):
    model = made(make).eval()
    ids, mask, _ = batch("left")
    settings = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "eos_token_id": None}
    settings |= {"attention_mask": mask, "cache_implementation": cache}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, **settings)
    with patched(model):
        output = model.generate(ids, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    assert_near(torch.stack(output.logits), torch.stack(expected.logits), bound(make))


@family
def test_a_cached_text_goes_on_differently(make):
    """Several tokens at once after those in the cache, more than the window."""
    model = patch(made(make)).eval()
    ids, mask, _ = batch("left")
    expected = model(ids, attention_mask=mask).logits
    first = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
    second = model(ids[:, 9:], attention_mask=mask, cache=first.cache)
    assert_near(second.logits, expected[:, 9:], bound(make))


@family
def test_a_static_cache_is_filled_differently_in_parts(make):
    model = patch(made(make)).eval()
    ids, mask, _ = batch("left")
    expected = model(ids, attention_mask=mask).logits
    cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 5)
    for tokens in (slice(0, 9), slice(9, LENGTH - 1), slice(LENGTH - 1, LENGTH)):
        seen = mask[:, : tokens.stop]
        output = model(ids[:, tokens], attention_mask=seen, cache=cache, use_cache=True)
        assert_near(output.logits, expected[:, tokens], bound(make))


@family
def test_the_loss_of_an_evaluation_differs(make):
    model = made(make).eval()
    ids, mask, labels = batch("right")
    expected = model(ids, attention_mask=mask, labels=labels)
    with patched(model):
        output = model(ids, attention_mask=mask, labels=labels)
    assert type(output) is type(expected)
    assert_near(output.loss, expected.loss, 1e-6)
    assert_near(output.logits[mask > 0], expected.logits[mask > 0], bound(make))


@pytest.mark.parametrize(
    ("make", "additive"),
    # The eager attention of Gemma 2 adds the mask, a bool one too.
    [(gpt2, False), (gpt2, True), (qwen2, False), (qwen2, True), (gemma2, True)],
)
def test_a_mask_of_the_users_own_is_ignored(make, additive):
    model = made(make).eval()
    ids, _, _ = batch()
    seen = torch.rand(2, 1, LENGTH, LENGTH) < 0.5
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    mask = torch.where(seen, 0.0, -1e30).to(model.dtype) if additive else seen
    expected = model(ids, attention_mask=mask).logits
    with patched(model):
        output = model(ids, attention_mask=mask).logits
    assert_near(output, expected, bound(make))
    assert (output - model(ids).logits).abs().max() > 0.1


def test_a_bidirectional_model_looks_at_the_past_only():
    model = made(llama)
    model.config.is_causal = False
    ids, mask, _ = batch("right")
    for kwargs in ({}, {"attention_mask": mask}):
        expected = model(ids, **kwargs).logits
        with patched(model):
            assert_near(model(ids, **kwargs).logits[mask > 0], expected[mask > 0], 1e-11)


@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_differs_or_gets_masks_in_full(padded, calls):
    model = made(gpt2, add_cross_attention=True)
    ids, mask, labels = batch("right")
    other = torch.randn(2, 9, 32, dtype=torch.float64)
    kwargs = {"encoder_hidden_states": other, "attention_mask": mask, "labels": labels}
    if padded:
        kwargs["encoder_attention_mask"] = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    expected = model(ids, **kwargs)
    with patched(model):
        output = model(ids, **kwargs)
    assert [call["is_causal"] for call in calls] == [True, False] * 2
    assert not masks_in_full(calls)
    assert_near(output.loss, expected.loss, 1e-6)
    assert_near(output.logits[mask > 0], expected.logits[mask > 0], 1e-11)


def test_checkpointed_gradients_differ():
    model = patch(made(gemma3))
    ids, mask, labels = batch("right")
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    expected = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    assert_all_near(gradients(model), expected, 1e-11)


@pytest.mark.parametrize("make", [gpt2, llama, gemma2], ids=lambda make: make.__name__)
def test_bfloat16_autocast_is_less_exact(make):
    """At most twice the error of the unpatched model, against float32."""
    torch.manual_seed(0)
    model = make()
    ids, mask, labels = batch("right")

    def error():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(ids, attention_mask=mask, labels=labels)
        assert output.loss.dtype == torch.float32
        assert output.logits.dtype == expected.logits.dtype
        output.loss.backward()
        found = gradients(model)
        return (output.loss - exact.loss).abs().item(), sum(
            (found[name] - x).square().sum().item() for name, x in exact_gradients.items()
        ) ** 0.5

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(ids, attention_mask=mask, labels=labels)
    exact = model(ids, attention_mask=mask, labels=labels)
    exact.loss.backward()
    exact_gradients = gradients(model)
    theirs = error()
    with patched(model):
        mine = error()
    assert mine[0] <= 2 * theirs[0] + 0.01
    assert mine[1] <= 2 * theirs[1]


def test_hidden_states_are_lost():
    model = made(llama)
    ids, _, labels = batch()
    expected = model(ids, labels=labels, output_hidden_states=True).hidden_states
    output = patch(model)(ids, labels=labels, output_hidden_states=True)
    assert len(output.hidden_states) == len(expected)
    for x, y in zip(output.hidden_states, expected, strict=True):
        assert_near(x, y, 1e-11)


# What the kernels are told.


@family
def test_the_kernels_are_not_called_or_get_masks_in_full(make, calls):
    model = patch(made(make))
    ids, mask, labels = batch("left")
    model(ids, attention_mask=mask, labels=labels)
    assert len(calls) == 2
    for call in calls:
        assert call["attn_mask"].shape == (2, 1, 1, LENGTH)
        assert torch.equal(call["attn_mask"][:, 0, 0], mask > 0)
        assert call["is_causal"]
    window = (WINDOW - 1, 0) if make not in (gpt2, llama, qwen3) else None
    assert [call["window"] for call in calls] == [window, window if make is mistral else None]
    assert {call["softcap"] for call in calls} == {3.0 if make is gemma2 else None}
    assert {call["enable_gqa"] for call in calls} == {make is not gpt2}


def test_an_unpadded_batch_gets_a_mask(calls):
    model = patch(made(qwen2)).eval()
    ids, mask, _ = batch()
    model(ids, attention_mask=mask)
    model.generate(ids, attention_mask=mask, max_new_tokens=3)
    assert len(calls) == 8
    assert all(call["attn_mask"] is None for call in calls)


def test_padding_that_has_left_the_window_is_masked(calls):
    model = patch(made(qwen2)).eval()
    ids, mask, _ = batch("left")
    cache = model(ids, attention_mask=mask, use_cache=True).cache
    del calls[:]
    mask = F.pad(mask, (0, 1), value=1)
    model(ids[:, :1], attention_mask=mask, cache=cache)
    sliding, full = calls
    assert sliding["S"] == WINDOW
    assert sliding["attn_mask"] is None
    assert full["attn_mask"].shape == (2, 1, 1, LENGTH + 1)


def test_a_mask_for_generation_is_taken_for_one_of_positions():
    """Static caches make `generate` ask for the mask, and hand it back to the model."""
    model = made(mistral).eval()
    ids, mask, _ = batch("left")
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    settings |= {"attention_mask": mask, "cache_implementation": "static", "prefill_chunk_size": 4}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, **settings)
    output = patch(model).generate(ids, **settings)
    assert_near(torch.stack(output.logits), torch.stack(expected.logits), 1e-11)
    # Of keys that do not begin at position 0, a 2-D mask could not be handed back.
    kwargs = {"batch_size": 2, "q_length": 4, "kv_length": 9, "q_offset": 8, "kv_offset": 3}
    kwargs |= {"mask_function": sliding_window_causal_mask_function(WINDOW), "local_size": WINDOW}
    made_of = {"attention_mask": mask[:, :12] > 0, "device": "cpu"}
    seen = ours.mask(**kwargs, **made_of)
    assert torch.equal(seen, sdpa_mask(**kwargs, **made_of))
    assert seen.shape == (2, 1, 4, 9)


def test_a_static_cache_is_read_where_it_is_empty(calls):
    model = patch(made(llama)).eval()
    ids, mask, _ = batch()
    cache = transformers.StaticCache(config=model.config, max_cache_len=1000)
    model(ids, attention_mask=mask, cache=cache, use_cache=True)
    assert [call["S"] for call in calls] == [LENGTH, LENGTH]
    assert not masks_in_full(calls)


def test_dropout_is_not_drawn_or_not_repeatable(calls):
    model = patch(made(gpt2, attn_pdrop=0.25))
    ids, _, labels = batch()

    def loss(seed):
        torch.manual_seed(seed)
        return model(ids, labels=labels).loss.item()

    assert loss(3) == loss(3) != loss(4)
    assert {call["dropout_p"] for call in calls} == {0.25}
    mean = sum(loss(seed) for seed in range(30)) / 30
    model.eval()
    assert loss(3) == loss(4)
    assert abs(mean - loss(0)) < 0.3
    assert calls[-1]["dropout_p"] == 0


def test_attention_weights_are_silently_missing():
    for make in (gpt2, llama):
        model = patch(made(make))
        ids, _, labels = batch()
        with pytest.raises(ValueError, match=r"output_attentions=True.*never has the weights"):
            model(ids, labels=labels, output_attentions=True)
        model.set_attn_implementation("eager")
        assert len(model(ids, labels=labels, output_attentions=True).attentions) == 2
        assert unpatch(model).config._attn_implementation == "sdpa"
    model = made(llama)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions=True"):
        patch(model)(ids)


def test_an_argument_of_another_attention_is_ignored():
    model = patch(made(llama))
    with pytest.raises(NotImplementedError, match=r"'s_aux' of LlamaAttention"):
        model(batch()[0], s_aux=torch.zeros(4))


# Packed documents.

DOCUMENTS = (5, 8, 7)


@family
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_documents_see_each_other(make, rows, calls):
    model = patch(made(make))
    ids, _, _ = batch(rows=rows)
    parts = [model(x).logits for x in ids.split(DOCUMENTS, 1)]
    expected = torch.cat(parts, 1)
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS]).expand(rows, -1)
    del calls[:]
    output = model(ids, position_ids=positions)
    assert_near(output.logits, expected, bound(make))
    assert masks_in_full(calls) == (rows > 1)
    output = model(ids, position_ids=positions, use_cache=False)
    assert_near(output.logits, expected, bound(make))
    if rows > 1:
        with pytest.raises(ValueError, match=r"packed documents.*use_cache=True"):
            model(ids, position_ids=positions, use_cache=True)


def test_boundaries_of_documents_are_ignored(calls):
    model = patch(made(qwen2))
    ids, _, labels = batch(rows=1)
    expected = torch.cat([model(x).logits for x in ids.split(DOCUMENTS, 1)], 1)
    del calls[:]
    boundaries = torch.tensor([0, 5, 13, 20], dtype=torch.int32)
    kwargs = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    kwargs |= {"max_length_q": 8, "max_length_k": 8, "labels": labels}
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    assert_near(model(ids, position_ids=positions, **kwargs).logits, expected, 1e-11)
    # Rotary embeddings are relative; transformers computes them in float32.
    assert_near(model(ids, **kwargs).logits, expected, 1e-5)
    assert not masks_in_full(calls)
    with pytest.raises(ValueError, match=r"in one row, got a batch of 2"):
        model(ids.expand(2, -1), **{**kwargs, "labels": None})
    with pytest.raises(ValueError, match="rise from 0 to 20"):
        model(ids, cu_seq_lens_q=boundaries[:-1])


# The loss.


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("make", [gpt2, gemma2], ids=lambda make: make.__name__)
def test_an_argument_of_the_loss_is_ignored(make, keep_logits):
    model = made(make)
    ids, _, labels = batch("right")
    shifted = torch.randint(0, VOCABULARY, ids.shape)
    shifted[0, :3] = -100
    others = shifted.masked_fill(shifted == -100, 4)
    kwargs = [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(11)},
        {"shift_labels": shifted},
        {"shift_labels": others, "num_items_in_batch": 5, "ignore_index": 4},
        {"ignore_index": 0},  # the padding
    ]
    for each in kwargs:
        chosen = labels if each.get("ignore_index") is None else labels.clamp(0)
        expected = model(ids, labels=chosen, **each).loss
        expected.backward()
        wanted = gradients(model)
        with patched(model, keep_logits=keep_logits):
            loss = model(ids, labels=chosen, **each).loss
            loss.backward()
        assert_near(loss, expected, 1e-6)
        assert_all_near(gradients(model), wanted, 1e-5)
    different = {model(ids, labels=labels.clamp(0), **each).loss.item() for each in kwargs}
    assert len(different) == len(kwargs)


@pytest.mark.parametrize("keep_logits", [False, True])
def test_the_loss_of_16_bit_logits_is_rounded_to_16_bits(keep_logits):
    torch.manual_seed(0)
    model = llama().bfloat16()
    ids, _, labels = batch()
    expected = model(ids, labels=labels).loss
    loss = patch(model, keep_logits=keep_logits)(ids, labels=labels).loss
    assert loss.dtype == expected.dtype == torch.float32
    assert loss.bfloat16().float() != loss
    assert_near(loss, expected, 0.02)


def test_logits_of_a_training_step_are_missing_or_computed_unasked(monkeypatch):
    model = patch(made(gemma2))
    ids, _, labels = batch()
    expected = model(ids).logits
    products = []
    monkeypatch.setattr(F, "linear", recording(F.linear, products))
    output = model(ids, labels=labels)
    output.loss.backward()
    heads = [weight for _, weight in products if weight is model.lm_head.weight]
    assert not heads
    assert output[0] is output.loss is output["loss"]
    assert list(output) == ["loss", "cache"]
    assert "logits" in output
    assert_near(output["logits"], expected, 1e-6)
    assert output.get("logits") is output.logits is output["logits"] is output[1]
    assert list(output) == ["loss", "logits", "cache"]
    assert len([weight for _, weight in products if weight is model.lm_head.weight]) == 1
    output = model(ids, labels=labels)
    model.zero_grad()
    (0 * output.loss + output.logits.sum()).backward()
    wanted = gradients(model)
    model(ids).logits.sum().backward()
    assert_all_near(gradients(model), wanted, 1e-5)
    loss, logits = model(ids, labels=labels, return_dict=False, use_cache=False)
    assert_near(loss, output.loss, 1e-6)
    assert_near(logits, expected, 1e-6)
    assert model(ids, labels=labels).to_tuple()[1].shape == logits.shape


def recording(function, calls):
    def recorded(*args, **kwargs):
        calls.append(args[:2])
        return function(*args, **kwargs)

    return recorded


def test_logits_are_those_of_later_weights():
    model = patch(made(llama))
    ids, _, labels = batch()
    output = model(ids, labels=labels)
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="weight has changed since the forward"):
        _ = output.logits


def test_a_head_that_is_more_than_its_weight_is_bypassed():
    class Marked(torch.Tensor):
        """As a quantised or a distributed weight."""

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.sum(-1, keepdim=True)

    ids, _, labels = batch()
    model = made(llama)
    adapted = Adapted(32, VOCABULARY, bias=False).double()
    hooked = made(llama)
    hooked.lm_head.register_forward_hook(lambda head, args, output: 2 * output)
    marked = made(llama)
    marked.lm_head.weight = nn.Parameter(marked.lm_head.weight.detach().as_subclass(Marked))
    for each in (model, hooked, marked):
        if each is model:
            each.lm_head = adapted
        expected = each(ids, labels=labels)
        expected.loss.backward()
        wanted = gradients(each)
        output = patch(each)(ids, labels=labels)
        output.loss.backward()
        assert type(output) is type(expected)
        assert_near(output.loss, expected.loss, 1e-6)
        assert_all_near(gradients(each), wanted, 1e-6)


def test_a_loss_of_the_users_own_is_replaced():
    def own(logits, labels, vocab_size, **kwargs):
        return logits.sum()

    ids, _, labels = batch()
    for before in (True, False):
        model = made(llama)
        if before:
            model.loss_function = own
        patch(model)
        model.loss_function = own
        output = model(ids, labels=labels)
        assert_near(output.loss, output.logits.sum(), 1e-12)
        assert unpatch(model).loss_function is own


def test_labels_by_place_are_lost():
    model = made(llama)
    ids, mask, labels = batch("right")
    expected = model(ids, mask, None, None, None, labels).loss
    patch(model)
    assert_near(model(ids, mask, None, None, None, labels).loss, expected, 1e-6)
    with pytest.raises(TypeError, match="multiple values"):
        model(ids, input_ids=ids)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_float32_copy_of_the_logits_is_made(dtype):
    """The most that a training step holds at once, in copies of its float32 logits."""
    torch.manual_seed(0)
    vocabulary, tokens = 20000, 1024
    model = llama(vocab_size=vocabulary, tie_word_embeddings=True).to(dtype)
    ids = torch.randint(3, vocabulary, (2, tokens // 2))

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    def copies():
        step()
        gc.collect()
        return peak_bytes(step) / (4 * tokens * vocabulary)

    theirs = copies()
    with patched(model, keep_logits=True):
        kept = copies()
    with patched(model):
        mine = copies()
    # The logits and their gradient; without them, chunks of 64 MiB and the head's gradient.
    own_type = dtype.itemsize / 4
    assert theirs > 2.9
    assert kept < 2 * own_type + 0.2
    assert mine < 64 * 2**20 / (4 * tokens * vocabulary) + 0.25
    print(f"{dtype}: {theirs:.2f}, with logits {kept:.2f}, without {mine:.2f}")


# One model, and back.


def snapshot(model):
    """All attributes of all modules but the dictionaries of parameters, hooks and the like."""
    return [
        (
            module,
            {name: value for name, value in vars(module).items() if not isinstance(value, dict)},
        )
        for module in model.modules()
    ]


@family
def test_another_model_of_the_same_configuration_is_patched(make):
    model = made(make)
    other = type(model)(model.config).double()
    assert other.config is model.config
    implementation = other.config._attn_implementation
    states = snapshot(other)
    patch(model)
    assert snapshot(other) == states
    assert other.config._attn_implementation == implementation
    assert model.config._attn_implementation == "fastgpt"
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__module__ == "transformers.integrations.sdpa_attention"
    assert LOSS_MAPPING["ForCausalLM"] is ForCausalLMLoss
    assert make().config._attn_implementation == implementation


@family
def test_unpatching_leaves_something_behind(make):
    model = made(make)
    before, names = snapshot(model), list(model.state_dict())
    assert patch(patch(model)) is model
    assert model.loss_function is not ForCausalLMLoss
    assert list(model.state_dict()) == names
    assert unpatch(unpatch(model)) is model
    after = snapshot(model)
    assert after == before
    for (_, now), (_, then) in zip(after, before, strict=True):
        assert all(now[name] is value for name, value in then.items())


def test_the_block_does_not_end_where_it_began():
    model = made(gpt2)

    def interrupted():
        with patched(model) as inside:
            assert inside is model
            assert model.config._attn_implementation == "fastgpt"
            with patched(model):
                pass
            assert model.config._attn_implementation == "fastgpt"
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model)
    both = nn.ModuleList([patch(model), made(llama)])
    with patched(both):
        assert both[1].config._attn_implementation == "fastgpt"
    assert [m.config._attn_implementation for m in both] == ["fastgpt", "sdpa"]
    assert ["forward" in vars(m) for m in both] == [True, False]


def test_a_change_of_the_configuration_is_undone():
    model = made(llama)
    config = model.config
    patch(model)
    assert isinstance(model.config, transformers.LlamaConfig)
    assert model.config == config
    model.config.use_cache = False
    assert config.use_cache is False
    assert unpatch(model).config is config
    assert config.use_cache is False


class Wrapper(nn.Module):
    """As PEFT's models are made: the model lies inside, and shares its configuration."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model
        self.config = model.config

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def test_a_model_in_a_wrapper_is_not_found():
    wrapper = Wrapper(made(llama))
    config = wrapper.config
    ids, _, labels = batch()
    expected = wrapper(ids, labels=labels).loss
    patch(wrapper)
    assert wrapper.config._attn_implementation == "fastgpt"
    assert type(wrapper(ids, labels=labels)).__name__ == "CausalLMOutput"
    assert_near(wrapper(ids, labels=labels).loss, expected, 1e-6)
    unpatch(wrapper.base_model)
    unpatch(wrapper)
    assert wrapper.config is wrapper.base_model.config is config


def test_a_forward_wrapped_since_keeps_the_kernels(calls):
    model = patch(made(llama))
    ids, _, labels = batch()
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    unpatch(model)
    assert model(ids, labels=labels).logits is not None
    assert not calls
    # And one that was there before goes on being called.
    seen = []
    model.forward = lambda *args, **kwargs: (
        seen.append(args) or type(model).forward(model, *args, **kwargs)
    )
    own = model.forward
    patch(model)(ids, labels=labels)
    assert len(seen) == 1
    assert len(calls) == 2
    assert unpatch(model).forward is own


def test_accelerate_loses_the_kernels_or_the_way_back():
    torch.manual_seed(0)
    model = patch(llama())
    ids, _, labels = batch()
    expected = model(ids, labels=labels).loss
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    output = prepared(ids, labels=labels)
    assert output.logits is None  # as documented: Accelerate copies the items that there are
    assert_near(output.loss, expected, 0.02)
    assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is model
    assert_near(model(ids, labels=labels).loss, expected, 1e-6)
    assert model(ids, labels=labels).logits is not None
    unpatch(model)
    assert "forward" not in vars(model)


def test_ddp_loses_a_gradient(one_rank):
    ids, mask, labels = batch("right")
    for static_graph in (False, True):
        model = patch(made(gpt2))
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        expected = gradients(model)
        parallel = nn.parallel.DistributedDataParallel(model, static_graph=static_graph)
        parallel(ids, attention_mask=mask, labels=labels).loss.backward()
        assert_all_near(gradients(model), expected, 1e-12)
        assert unpatch(parallel).module.config._attn_implementation == "sdpa"


@pytest.fixture
def one_rank(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_a_classifier_differs(name, calls):
    torch.manual_seed(0)
    model = getattr(transformers, name)(llama().config).double().eval()  # or its dropout draws
    ids, mask, _ = batch("right")
    labels = torch.tensor([0, 1]) if "Sequence" in name else ids % 2
    expected = model(ids, attention_mask=mask, labels=labels)
    assert not calls
    output = patch(model)(ids, attention_mask=mask, labels=labels)
    assert len(calls) == 2
    assert_near(output.loss, expected.loss, 1e-6)
    chosen = mask > 0 if "Token" in name else ...
    assert_near(output.logits[chosen], expected.logits[chosen], 1e-11)


def test_a_model_without_a_head_is_refused(calls):
    model = made(llama).model
    ids, _, _ = batch()
    expected = model(ids).last_hidden_state
    assert_near(patch(model)(ids).last_hidden_state, expected, 1e-11)
    assert len(calls) == 2


def test_another_class_is_patched_or_half_patched():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = transformers.BertModel(
        transformers.BertConfig(vocab_size=9, intermediate_size=8, **sizes)
    )
    with pytest.raises(TypeError, match=r"a model of GPT-2, Llama.*got BertModel$"):
        patch(bert)
    both = nn.ModuleList([made(llama), bert])
    with pytest.raises(TypeError, match=r"got BertModel in ModuleList$"):
        patch(both)
    assert both[0].config._attn_implementation == "sdpa"
    with pytest.raises(TypeError, match=r"got Linear$"):
        patch(nn.Linear(2, 2))
    assert unpatch(bert) is bert


def test_a_copy_shares_the_model_or_cannot_be_restored():
    model = patch(made(llama))
    ids, _, labels = batch()
    expected = model(ids, labels=labels).loss.item()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.lm_head.weight.data.zero_()
        assert model(ids, labels=labels).loss.item() == expected
        assert twin.config._attn_implementation == "fastgpt"
        assert type(twin(ids, labels=labels)).__name__ == "CausalLMOutput"
        unpatch(twin)
        assert type(twin.config) is transformers.LlamaConfig
        assert twin.config._attn_implementation == "sdpa"
        assert model.config._attn_implementation == "fastgpt"
        assert twin(ids, labels=labels).loss.item() == pytest.approx(torch.tensor(61).log().item())


def test_a_saved_model_remembers_the_patch(tmp_path):
    model = patch(made(llama))
    model.save_pretrained(tmp_path)
    assert "fastgpt" not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_missing_library_is_not_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fastgpt.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'fastgpt\[transformers\]'"):
        import fastgpt.integrations.transformers  # noqa: F401


# In a program.


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, gemma2], ids=lambda make: make.__name__)
@pytest.mark.parametrize("padding", ["none", "right"])
def test_a_compiled_model_differs_or_breaks_the_graph(make, padding, compiled, calls):
    model = patch(made(make))
    ids, mask, labels = batch(padding)
    kwargs = {} if padding == "none" else {"attention_mask": mask}
    expected = model(ids, labels=labels, **kwargs)
    expected.loss.backward()
    wanted = gradients(model)
    del calls[:]
    fast = compiled(model)
    output = fast(ids, labels=labels, **kwargs)
    output.loss.backward()
    assert output.logits is None
    assert_near(output.loss, expected.loss, 1e-6)
    assert_all_near(gradients(model), wanted, bound(make))
    if padding == "none":
        model.eval()
        assert_near(fast(ids).logits, expected.logits, bound(make))
        unpatch(model)
        assert_near(fast(ids).logits, expected.logits, bound(make))


@pytest.mark.slow
def test_a_compiled_model_gets_masks_in_full(calls, compiled):
    model = patch(made(llama))
    ids, mask, labels = batch("right")
    # Runs the model's Python as the compiler would, and the recording with it.
    for kwargs in ({}, {"attention_mask": mask}):
        torch._dynamo.reset()
        shapes = []

        def backend(graph, inputs, shapes=shapes):
            shapes += [
                node.meta["example_value"].shape
                for node in graph.graph.nodes
                if isinstance(node.meta.get("example_value"), torch.Tensor)
                and node.meta["example_value"].dtype == torch.bool
            ]
            return graph

        torch.compile(model, fullgraph=True, backend=backend)(ids, labels=labels, **kwargs)
        assert torch.Size((2, 1, 1, LENGTH)) in shapes
        assert all(shape[-2:] != (LENGTH, LENGTH) for shape in shapes)


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("make", [gpt2, qwen2], ids=lambda make: make.__name__)
def test_trainer_learns_differently(make, keep_logits, tmp_path, calls):
    """Batches of unequal numbers of labels, so that the mean of means would be another loss."""
    torch.manual_seed(2)
    rows = []
    for n in (5, 19, 3, 12, 20, 7, 15, 9):
        ids = torch.randint(3, VOCABULARY, (n,)).tolist()
        pads = [0] * (LENGTH - n)
        rows.append(
            {
                "input_ids": ids + pads,
                "attention_mask": [1] * n + pads,
                "labels": ids + [-100] * (LENGTH - n),
            }
        )

    def losses(model):
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, max_steps=3, learning_rate=0.01, seed=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            report_to=[], save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(found) == 3
        return found

    torch.manual_seed(0)
    model = make()
    start = copy.deepcopy(model.state_dict())
    expected = losses(model)
    assert not calls
    model.load_state_dict(start)
    found = losses(patch(model, keep_logits=keep_logits))
    assert len(calls) == 2 * 2 * 3
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[0] != found[1] != found[2]


def test_the_documented_recipe_fails():
    text = (Path(__file__).parents[1] / "docs" / "transformers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(code, "docs/transformers.md", "exec"), names)
    assert names["text"].shape == (2, 40)
    assert names["model"].lm_head.weight.grad.abs().max() > 0
    assert names["model"].config is names["config"]
