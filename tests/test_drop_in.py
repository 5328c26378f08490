"""`fastgpt.drop_in()`: a model that imports nothing of ours runs on our kernels."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt


class Operators(TorchDispatchMode):
    """The names of the operators that run inside the block."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def fused(self) -> bool:
        return "fastgpt.cross_entropy_forward.default" in self.names


class Model(nn.Module):
    """Somebody's model: torch only, a loss function and a loss module."""

    def __init__(self, as_module: bool):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 11))
        self.loss = nn.CrossEntropyLoss() if as_module else None

    def forward(self, x, target):
        logits = self.body(x)
        return self.loss(logits, target) if self.loss else F.cross_entropy(logits, target)


def batch(seed=0, n=32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return x, torch.randint(11, (n,), generator=generator)


def curve(as_module: bool, steps=20):
    torch.manual_seed(0)
    model = Model(as_module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(*batch(0))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def uses_kernel() -> bool:
    with Operators() as operators:
        F.cross_entropy(*_call())
    return operators.fused


def _call():
    return torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("as_module", [False, True])
def test_an_unmodified_model_does_not_run_the_kernel(as_module):
    model = Model(as_module)
    with Operators() as without:
        model(*batch()).backward()
    with Operators() as operators, fastgpt.drop_in():
        loss = model(*batch())
        forward = list(operators.names)
        loss.backward()
    assert not without.fused
    assert "fastgpt.cross_entropy_forward.default" in forward
    assert "fastgpt.cross_entropy_backward.default" in operators.names
    assert not any("log_softmax" in name or "nll_loss" in name for name in operators.names)


@pytest.mark.parametrize("as_module", [False, True])
def test_an_unmodified_model_learns_otherwise(as_module):
    want = curve(as_module)
    with fastgpt.drop_in():
        got = curve(as_module)
    assert got == pytest.approx(want, rel=1e-3)
    assert got[-1] < 0.5 * got[0]


def test_a_backward_outside_the_block_fails():
    model = Model(False)
    with fastgpt.drop_in():
        loss = model(*batch())
    with Operators() as operators:
        loss.backward()
    assert "fastgpt.cross_entropy_backward.default" in operators.names


def test_keyword_arguments_or_rules_are_lost():
    logits, target = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    options = {"weight": torch.linspace(0.5, 2, 5), "label_smoothing": 0.2, "reduction": "sum"}
    want = F.cross_entropy(input=logits, target=target, **options)
    with fastgpt.drop_in():
        got = F.cross_entropy(input=logits, target=target, **options)
        module = nn.CrossEntropyLoss(weight=options["weight"], reduction="none")(logits, target)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        module, F.cross_entropy(logits, target, options["weight"], reduction="none")
    )


def test_the_mode_does_not_nest():
    assert not uses_kernel()
    with fastgpt.drop_in():
        with fastgpt.drop_in():
            assert uses_kernel()
        assert uses_kernel()
    assert not uses_kernel()


def test_the_mode_ignores_the_chosen_backend():
    with fastgpt.drop_in(), fastgpt.backend("eager"):
        assert not uses_kernel()


def test_the_mode_outlives_an_exception():
    with pytest.raises(KeyError), fastgpt.drop_in():
        raise KeyError
    assert not uses_kernel()
    with pytest.raises(IndexError, match="out of bounds"), fastgpt.drop_in():
        F.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 7]))
    assert not uses_kernel()


def test_the_mode_reaches_another_thread():
    seen = []
    with fastgpt.drop_in():
        thread = threading.Thread(target=lambda: seen.append(uses_kernel()))
        thread.start()
        thread.join()
        assert uses_kernel()
    assert seen == [False]


def test_the_mode_assigns_to_torch():
    before = dict(vars(F))
    loss_forward = nn.CrossEntropyLoss.forward
    inside = {}
    with fastgpt.drop_in():
        uses_kernel()
        inside = dict(vars(F))
    for name, value in before.items():
        assert inside[name] is value, name
        assert getattr(F, name) is value, name
    assert nn.CrossEntropyLoss.forward is loss_forward


def test_attention_is_replaced_before_it_has_a_kernel():
    q = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    want = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with Operators() as plain:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with Operators() as inside, fastgpt.drop_in():
        got = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert inside.names == plain.names
    assert torch.equal(got, want)


def test_other_functions_are_disturbed():
    x = torch.linspace(-1, 1, 12).view(3, 4)
    want = F.nll_loss(F.log_softmax(x.relu(), 1), torch.tensor([0, 1, 2]))
    with fastgpt.drop_in():
        got = F.nll_loss(F.log_softmax(x.relu(), 1), torch.tensor([0, 1, 2]))
    assert torch.equal(got, want)


def compiled_with_kernel(counter) -> bool:
    """Whether the graph compiled last applies our autograd Function."""
    return "autograd_apply" in counter.graphs[-1].code


def test_the_mode_breaks_or_vanishes_under_compile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Model(True)
    want = model(*batch())
    want_gradients = torch.autograd.grad(want, list(model.parameters()))

    def step(x, target):
        with fastgpt.drop_in():
            return model(x, target)

    got = torch.compile(step, fullgraph=True, backend=counter)(*batch())
    gradients = torch.autograd.grad(got, list(model.parameters()))
    assert compiled_with_kernel(counter)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients, want_gradients)
    torch._dynamo.reset()


def test_the_mode_is_lost_on_a_compiled_model_inside_it():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Model(False)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    want = model(*batch())
    with fastgpt.drop_in():
        torch.testing.assert_close(compiled(*batch()), want)
    assert compiled_with_kernel(counter)
    torch.testing.assert_close(compiled(*batch()), want)  # the mode is a guard of what was compiled
    assert not compiled_with_kernel(counter)
    assert counter.frame_count == 2
    torch._dynamo.reset()
