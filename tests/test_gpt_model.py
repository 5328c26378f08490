"""The reference GPT's model: its layout, its initialisation, and what causality demands."""

import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt
from fastgpt.gpt import GPT, PRESETS, GPTConfig, TrainConfig
from fastgpt.gpt.config import LOSSES
from fastgpt.gpt.errors import UsageError
from fastgpt.gpt.model import attention_function, loss_function, of_logits

SMALL = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=32)


def small_gpt(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(SMALL), **changes}))


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_gpt2_presets_have_exactly_the_published_number_of_parameters(preset, published):
    with torch.device("meta"):
        assert GPT(PRESETS[preset]).num_parameters() == published


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("gpt3-")])
def test_gpt3_presets_have_about_the_parameters_they_are_named_for(preset):
    number, unit = float(preset[5:-1]), {"m": 1e6, "b": 1e9}[preset[-1]]
    with torch.device("meta"):
        assert GPT(PRESETS[preset]).num_parameters() == pytest.approx(number * unit, rel=0.05)


def test_parameters_have_gpt2s_names_and_shapes():
    C, V, T = SMALL.n_embd, SMALL.vocab_size, SMALL.block_size
    block = {
        "ln_1.weight": (C,), "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C), "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,), "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C), "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C), "mlp.c_proj.bias": (C,),
    }  # fmt: skip
    expected = {
        "transformer.wte.weight": (V, C),
        "transformer.wpe.weight": (T, C),
        "transformer.ln_f.weight": (C,),
        "transformer.ln_f.bias": (C,),
        "lm_head.weight": (V, C),
    }
    for layer in range(SMALL.n_layer):
        expected |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    assert {name: tuple(t.shape) for name, t in small_gpt().state_dict().items()} == expected


def test_output_layer_is_the_embedding_and_gets_both_gradients():
    model = small_gpt()
    assert model.lm_head.weight is model.transformer.wte.weight
    x = torch.zeros(1, 4, dtype=torch.int64)
    model(x, x + 1)[1].backward()
    gradient = model.transformer.wte.weight.grad
    assert gradient[50].abs().sum() > 0, "a token that is not in the input learns as an output"
    untied = torch.autograd.grad(
        model.lm_head(model.features(x).detach()).logsumexp(-1).mean(), model.lm_head.weight
    )[0]
    assert not torch.allclose(gradient[0], untied[0]), "an input token learns as an input too"


def test_embedding_lookup_is_a_one_hot_row_times_the_matrix():
    model = small_gpt()
    idx = torch.randint(SMALL.vocab_size, (3, 7))
    wte = model.transformer.wte
    one_hot = F.one_hot(idx, SMALL.vocab_size).float()
    torch.testing.assert_close(one_hot @ wte.weight, wte(idx))


def test_a_future_token_changes_no_earlier_logit():
    model = small_gpt().eval()
    idx = torch.randint(SMALL.vocab_size, (2, 16))
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % SMALL.vocab_size
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(after[:, :9], before[:, :9], rtol=0, atol=1e-6)
    assert (after[:, 9:] - before[:, 9:]).abs().amax(-1).min() > 1e-4, "every later one changes"


def test_logits_do_not_depend_on_the_rest_of_the_batch():
    model = small_gpt().eval()
    idx = torch.randint(SMALL.vocab_size, (3, 10))
    torch.testing.assert_close(model(idx)[0][1:2], model(idx[1:2])[0], rtol=1e-5, atol=1e-6)


def test_initial_weights_have_gpt2s_spread():
    model = GPT(GPTConfig(vocab_size=500, block_size=128, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        mean, std = parameter.mean().item(), parameter.std().item()
        if "ln_" in name:
            assert (mean, std) == (float(name.endswith("weight")), 0)
        elif name.endswith("bias"):
            assert (mean, std) == (0, 0)
        else:
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert std == pytest.approx(expected, rel=0.04), name
            assert abs(mean) < 5 * expected / math.sqrt(parameter.numel()), name


def test_untrained_model_knows_nothing_so_its_loss_is_ln_vocab_size():
    model = small_gpt(vocab_size=1000)
    idx = torch.randint(1000, (8, 17))
    loss = model(idx[:, :-1], idx[:, 1:])[1].item()
    assert loss == pytest.approx(math.log(1000), abs=0.05)


def test_model_calls_fastgpts_functions_by_their_public_names(monkeypatch):
    called = []

    def spy(name):
        function = getattr(fastgpt, name)

        def record(*args, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(fastgpt, name, record)

    spy("linear_cross_entropy")
    spy("scaled_dot_product_attention")
    idx = torch.zeros(1, 4, dtype=torch.int64)
    small_gpt()(idx, idx)
    assert called == ["scaled_dot_product_attention"] * 2 + ["linear_cross_entropy"]


def test_targets_of_minus_100_teach_nothing():
    model = small_gpt()
    idx, targets = torch.randint(SMALL.vocab_size, (2, 2, 8))
    targets[:, 5:] = -100
    logits = model(idx)[0]
    expected = F.cross_entropy(logits[:, :5].flatten(0, 1), targets[:, :5].flatten())
    for name in ("linear_cross_entropy", "cross_entropy", "torch"):
        torch.testing.assert_close(model(idx, targets, loss_function(name))[1], expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_call_gives_logits_or_with_targets_a_loss_whichever_it_is(name):
    model = small_gpt()
    idx, targets = torch.randint(SMALL.vocab_size, (2, 2, 8))
    logits, none = model(idx)
    assert logits.shape == (2, 8, SMALL.vocab_size)
    assert none is None
    none, loss = model(idx, targets, loss_function(name))
    assert none is None
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_every_loss_gives_one_model_the_same_loss_and_gradients(best_kernel):
    idx, targets = best_kernel.placed(torch.randint(SMALL.vocab_size, (2, 3, 16)).unbind())
    results = []
    for name in LOSSES:
        model = small_gpt().to(best_kernel.device)
        loss = model(idx, targets, loss_function(name))[1]
        loss.backward()
        results.append((loss.detach(), *(parameter.grad for parameter in model.parameters())))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-7)


def test_a_loss_of_logits_gets_those_of_the_model():
    model = small_gpt()
    idx, targets = torch.randint(SMALL.vocab_size, (2, 3, 8))
    got = []

    def record(logits, targets):
        got.extend((logits, targets))
        return logits.sum()

    _, loss = model(idx, targets, of_logits(record))
    torch.testing.assert_close(got, [model(idx)[0].flatten(0, 1), targets.flatten()])
    assert loss.item() == got[0].sum().item()


class LargestStorage(TorchDispatchMode):
    """Notes the bytes of the largest storage of any tensor that an operator returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.untyped_storage().nbytes())
        return results


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["float32", "autocast"]
)
def test_a_training_step_never_holds_the_logits(best_native, dtype, size):
    model = small_gpt(vocab_size=2000)
    idx, targets = torch.randint(2000, (2, 64, 16))
    largest = {}
    for name in ("linear_cross_entropy", "cross_entropy"):
        with LargestStorage() as storage:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(idx, targets, loss_function(name))[1]
            loss.backward()
        largest[name] = storage.largest
    logits = 64 * 16 * 2000 * size
    assert largest["cross_entropy"] >= logits
    assert largest["linear_cross_entropy"] < logits / 2


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_model_gives_the_loss_and_the_gradients_of_the_model(name):
    model, loss_fn = small_gpt(), loss_function(name)
    idx, targets = torch.randint(SMALL.vocab_size, (2, 3, 16))
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        loss = forward(idx, targets, loss_fn)[1]
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "cross_entropy", "torch"])
def test_under_autocast_the_loss_is_float32_and_near_that_of_a_float32_model(name):
    model, loss_fn = small_gpt(), loss_function(name)
    idx, targets = torch.randint(SMALL.vocab_size, (2, 3, 16))
    expected = model(idx, targets, loss_fn)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(idx, targets, loss_fn)[1]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() != expected.item(), "or autocast did nothing"
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_the_three_attentions_give_one_model_the_same_logits_and_gradients(best_kernel):
    idx = torch.randint(SMALL.vocab_size, (3, 16))
    idx, upstream = best_kernel.placed((idx, torch.randn(3, 16, SMALL.vocab_size)))
    results = []
    for name in ("fused", "torch", "explicit"):
        model = small_gpt().to(best_kernel.device)
        model.use_attention(attention_function(name))
        logits = model(idx)[0]
        gradients = torch.autograd.grad(logits, list(model.parameters()), upstream)
        results.append((logits.detach(), *gradients))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_explicit_attention_asks_for_eager_where_a_kernel_would_cover_the_call(monkeypatch):
    reasons = []

    def explain(*args, **options):
        explanation = fastgpt.explain(F.scaled_dot_product_attention, *args, **options)
        reasons.extend(decision.reason for decision in explanation.decisions)
        return args[0]

    monkeypatch.setattr(fastgpt, "scaled_dot_product_attention", explain)
    q = torch.randn(1, 2, 4, 8)
    attention_function("explicit")(q, q, q, is_causal=True)
    asked = "the backend 'eager' was asked for"
    assert reasons == [asked, asked, ""], "native, triton, and eager, which runs"


def test_every_block_calls_the_attention_in_use_and_the_weights_do_not_hold_it():
    model = small_gpt()
    names = set(model.state_dict())
    calls = []

    def attention(q, k, v, **options):
        calls.append(options)
        return v

    model.use_attention(attention)
    model(torch.zeros(1, 4, dtype=torch.int64))
    assert calls == [{"dropout_p": 0.0, "is_causal": True}] * SMALL.n_layer
    assert set(model.state_dict()) == names


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (
            loss_function,
            "loss must be one of linear_cross_entropy, cross_entropy, torch, naive, got 'flash'",
        ),
        (attention_function, "attention must be one of fused, torch, explicit, got 'flash'"),
    ],
)
def test_a_function_of_an_unknown_name_is_refused_with_the_names_there_are(choose, message):
    with pytest.raises(UsageError, match=message):
        choose("flash")


def test_dropout_acts_in_training_and_not_in_evaluation():
    model = small_gpt(dropout=0.5)
    idx = torch.randint(SMALL.vocab_size, (1, 8))
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_every_parameter_gets_a_gradient():
    model = small_gpt()
    idx = torch.randint(SMALL.vocab_size, (2, 16))  # the whole context, or wpe has rows without one
    model(idx, idx)[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_sequence_longer_than_the_context_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match=r"17 tokens .* block_size is\s+16"):
        small_gpt()(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_embd": 30, "n_head": 4}, "n_embd=30 and n_head=4"),
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_with_the_values(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "gpt5"}, "preset must be one of tiny, .*, got 'gpt5'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": 1e-3, "min_lr": 1e-2}, r"min_lr must be in \[0, lr=0.001\], got 0.01"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"vocab_size": 100}, "vocab_size must be at least 256, the bytes, got 100"),
        ({"loss": "fused"}, "loss must be one of linear_cross_entropy, .*, naive, got 'fused'"),
    ],
)
def test_a_training_run_that_cannot_work_is_refused_with_the_values(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_the_model_needs_only_torch_and_the_rest_says_what_to_install():
    code = """
import sys
for name in ("numpy", "tokenizers", "safetensors", "matplotlib", "tqdm"):
    sys.modules[name] = None  # as if it were not installed
import torch
from fastgpt.gpt import GPT, PRESETS
idx = torch.zeros(1, 4, dtype=torch.int64)
GPT(PRESETS["tiny"])(idx, idx)[1].backward()
from fastgpt.gpt import train
from fastgpt.gpt.errors import MissingExtraError, run_command
assert issubclass(MissingExtraError, ImportError)
run_command(lambda: train.main([]))
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: this part of fastgpt needs the library 'safetensors'")
    assert line.endswith("pip install 'fastgpt[gpt]'")
