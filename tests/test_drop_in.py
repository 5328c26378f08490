"""`fastgpt.drop_in()`: a model that imports nothing of ours runs on our kernels."""

import threading
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint

import fastgpt
from fastgpt.backends.eager import attention as eager_attention
from fastgpt.ops import attention as attention_op

# What a call of cross-entropy runs outside of every transform.
FORWARDS = {
    "native": "fastgpt.cross_entropy_reduced.default",
    "triton": "fastgpt_triton.cross_entropy_forward.default",
}
BACKWARDS = {
    "native": "fastgpt.cross_entropy_reduced_backward.default",
    "triton": "fastgpt_triton.cross_entropy_backward.default",
}


class Operators(TorchDispatchMode):
    """The names of the operators that run inside the block."""

    supports_higher_order_operators = True  # those of a compiled checkpoint

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def fused(self) -> bool:
        """Whether a fused cross-entropy ran."""
        return any(name in FORWARDS.values() for name in self.names)


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


@pytest.fixture
def kernel_here(best_kernel):
    """Each fused backend that runs on the CPU, where the models are."""
    if best_kernel.device != "cpu":
        pytest.skip("compiled Triton kernels run on a GPU only")
    return best_kernel


@pytest.mark.parametrize("as_module", [False, True])
def test_an_unmodified_model_does_not_run_the_kernel(kernel_here, as_module):
    forward_operator, backward_operator = FORWARDS[kernel_here.name], BACKWARDS[kernel_here.name]
    model = Model(as_module)
    with Operators() as without:
        model(*batch()).backward()
    with Operators() as operators, fastgpt.drop_in():
        loss = model(*batch())
        forward = list(operators.names)
        loss.backward()
    assert forward_operator not in without.names
    assert forward_operator in forward
    assert backward_operator in operators.names
    assert not any("log_softmax" in name or "nll_loss" in name for name in operators.names)


@pytest.mark.parametrize("as_module", [False, True])
def test_an_unmodified_model_learns_otherwise(kernel_here, as_module):
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
    assert BACKWARDS["native"] in operators.names


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
    attention_forward = nn.MultiheadAttention.forward
    inside = {}
    with fastgpt.drop_in():
        uses_kernel()
        Attention().step()
        inside = dict(vars(F))
    for name, value in before.items():
        assert inside[name] is value, name
        assert getattr(F, name) is value, name
    assert torch._C._nn.scaled_dot_product_attention is before["scaled_dot_product_attention"]
    assert nn.CrossEntropyLoss.forward is loss_forward
    assert nn.MultiheadAttention.forward is attention_forward


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


# ---- attention ----


def attention_is_ours(call) -> bool:
    """Whether the attention in `call()` is ours: the kernel, or eager where none covers it."""
    name = "scaled_dot_product_attention"
    spied = mock.patch.object(eager_attention, name, wraps=getattr(eager_attention, name))
    with spied as spy, Operators() as operators:
        call()
    ours = {str(launcher.forward) for launcher in attention_op.LAUNCHERS.values()}
    return spy.called or not ours.isdisjoint(operators.names)


def compiled_with_our_attention(counter) -> bool:
    """Whether the graph compiled last applies our Function, and no attention of torch's."""
    code = counter.graphs[-1].code
    torchs = ("scaled_dot_product", "multi_head_attention", "transformer_encoder_layer")
    return compiled_with_kernel(counter) and not any(name in code for name in torchs)


def tokens(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


L, S, B, E, H = 5, 7, 2, 8, 2
MASK = torch.zeros(L, S, dtype=torch.bool)  # True where a query may not look
MASK[1, 3] = MASK[3, 1:] = True
PADDING = torch.zeros(B, S, dtype=torch.bool)
PADDING[0, 5:] = True
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)


class Attention:
    """An `nn.MultiheadAttention`, what it is called with, and its outputs and gradients."""

    def __init__(self, module=None, shapes=((L, B, E), (S, B, E), (S, B, E)), dtype=None, **call):
        torch.manual_seed(0)
        self.module = nn.MultiheadAttention(E, H, **(module or {})).to(dtype or torch.float32)
        self.inputs = [tokens(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
        self.call = {"need_weights": False, **call}

    def forward(self, *inputs):
        return self.module(*inputs, **self.call)[0]

    def step(self):
        leaves = [x.clone().requires_grad_() for x in self.inputs]
        out = self.forward(*leaves)
        upstream = tokens(*out.shape, dtype=out.dtype, seed=9)
        return out, *torch.autograd.grad(out, [*leaves, *self.module.parameters()], upstream)


SELF = (L, B, E)
CASES = {
    "plain": {},
    "batch first": {
        "module": {"batch_first": True}, "shapes": ((B, L, E), (B, S, E), (B, S, E)),
        "key_padding_mask": PADDING,
    },
    "unbatched": {"shapes": ((L, E), (S, E), (S, E)), "key_padding_mask": PADDING[0]},
    "padding": {"key_padding_mask": PADDING},
    "additive padding": {"key_padding_mask": tokens(B, S)},
    "mask": {"attn_mask": MASK},
    "additive mask": {"attn_mask": tokens(L, S)},
    "mask of each head": {"attn_mask": MASK.repeat(B * H, 1, 1)},
    "additive mask of each head": {"attn_mask": tokens(B * H, L, S)},
    "mask and padding": {"attn_mask": MASK, "key_padding_mask": PADDING},
    "causal": {"shapes": (SELF, SELF, SELF), "attn_mask": CAUSAL, "is_causal": True},
    "causal and padding": {
        "shapes": (SELF, SELF, SELF), "attn_mask": CAUSAL, "is_causal": True,
        "key_padding_mask": PADDING[:, -L:],
    },
    "everything hidden": {"attn_mask": MASK.index_fill(0, torch.tensor([2]), True)},
    "key and value biases": {
        "module": {"add_bias_kv": True}, "attn_mask": MASK, "key_padding_mask": PADDING,
    },
    "a zero key": {
        "module": {"add_zero_attn": True}, "attn_mask": MASK, "key_padding_mask": PADDING,
    },
    "other sizes": {"module": {"kdim": 3, "vdim": 4}, "shapes": ((L, B, E), (S, B, 3), (S, B, 4))},
    "no bias": {"module": {"bias": False}},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16, "attn_mask": MASK},
    "float16": {"dtype": torch.float16, "attn_mask": MASK},
}  # fmt: skip
TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 5e-3}


def assert_same(got, want):
    for ours, torchs in zip(got, want, strict=True):
        tol = TOLERANCE.get(torchs.dtype, 1e-5)
        torch.testing.assert_close(ours, torchs, rtol=tol, atol=tol)


@pytest.mark.parametrize(
    "function", [F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention]
)
def test_an_unmodified_models_attention_stays_torchs(function):
    q, k = tokens(1, 4, L, E), tokens(1, 2, S, E)
    options = {"attn_mask": ~MASK, "scale": 0.3, "enable_gqa": True}
    want = function(q, k, value=k, **options)
    assert not attention_is_ours(lambda: function(q, k, k, enable_gqa=True))
    with fastgpt.drop_in():
        assert attention_is_ours(lambda: function(q, k, k, enable_gqa=True))
        torch.testing.assert_close(function(q, k, value=k, **options), want)


@pytest.mark.parametrize("name", CASES)
def test_multi_head_attention_learns_otherwise(kernel_here, name):
    attention = Attention(**CASES[name])
    want = attention.step()
    assert not attention_is_ours(attention.step)
    with fastgpt.drop_in():
        assert attention_is_ours(attention.step)
        assert_same(attention.step(), want)


@pytest.mark.parametrize("name", CASES)
def test_multi_head_attention_infers_otherwise(kernel_here, name):
    attention = Attention(**CASES[name])
    attention.module.eval()
    with torch.no_grad():
        want = attention.forward(*attention.inputs)
        with fastgpt.drop_in():
            assert attention_is_ours(lambda: attention.forward(*attention.inputs))
            assert_same([attention.forward(*attention.inputs)], [want])


@pytest.mark.parametrize("padding", [None, PADDING[:, -L:]])
def test_the_inference_fast_path_bypasses_the_mode(padding):
    attention = Attention({"batch_first": True}, [(B, L, E)], key_padding_mask=padding)
    attention.module.eval()
    (x,) = attention.inputs
    with torch.no_grad():
        with Operators() as operators:
            want = attention.forward(x, x, x)
        assert operators.names[-1] == "aten._native_multi_head_attention.default"
        with fastgpt.drop_in():
            assert attention_is_ours(lambda: attention.forward(x, x, x))
            assert_same([attention.forward(x, x, x)], [want])


@pytest.mark.filterwarnings("ignore:.*nested.tensor")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_layers_differ_from_torchs(train, gradients, batch_first):
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 2, 1, 16, dropout=0.0, batch_first=batch_first).train(train)
    source, target = tokens(B, S, E), tokens(B, L, E, seed=1)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)

    def step():
        out = model(
            source, target, tgt_mask=CAUSAL, tgt_is_causal=True, src_key_padding_mask=PADDING,
            memory_key_padding_mask=PADDING,
        )  # fmt: skip
        if not gradients:
            return (out,)
        return out, *torch.autograd.grad((out * tokens(*out.shape)).sum(), model.parameters())

    with torch.set_grad_enabled(gradients):
        want = step()
        with fastgpt.drop_in():
            assert attention_is_ours(step)
            with Operators() as operators:
                got = step()
    assert not any("fwd" in name or "scaled_dot_product" in name for name in operators.names)
    assert_same(got, want)


@pytest.mark.parametrize("average", [True, False])
def test_attention_weights_are_lost_or_ours(average):
    """A fused kernel never has them: torch computes what returns them."""
    attention = Attention(need_weights=True, average_attn_weights=average)
    want = attention.module(*attention.inputs, **attention.call)
    with fastgpt.drop_in():
        got = attention.module(*attention.inputs, **attention.call)
        assert not attention_is_ours(lambda: attention.forward(*attention.inputs))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_dropout_is_lost_or_stays_on_in_eval():
    attention = Attention({"dropout": 0.5})

    def forward(seed):
        torch.manual_seed(seed)
        return attention.forward(*attention.inputs)

    with fastgpt.drop_in():
        assert torch.equal(forward(0), forward(0))
        assert not torch.equal(forward(0), forward(1))
        attention.module.eval()
        assert torch.equal(forward(0), forward(1))


def test_autocast_is_lost_inside_the_mode():
    attention = Attention(attn_mask=MASK)
    with torch.autocast("cpu", torch.bfloat16):
        want = attention.forward(*attention.inputs)
        with fastgpt.drop_in():
            got = attention.forward(*attention.inputs)
            with torch.autocast("cpu", enabled=False):
                exact = attention.forward(*attention.inputs)
    assert_same([got], [want])
    assert exact.dtype == torch.float32


@pytest.mark.parametrize(
    "call",
    [
        {"key_padding_mask": PADDING[:, 1:]},
        {"key_padding_mask": PADDING[:1]},
        {"attn_mask": MASK[1:]},
        {"attn_mask": MASK.long()},
        {"is_causal": True},
    ],
)
def test_a_bad_call_of_multi_head_attention_is_accepted_or_raises_another_type(call):
    attention = Attention(**call)
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        attention.step()
    with fastgpt.drop_in(), pytest.raises(expected.type):
        attention.step()


@pytest.mark.filterwarnings("ignore:.*nested.tensor")
def test_nested_tensors_fail():
    ragged = torch.nested.nested_tensor([tokens(3, E), tokens(L, E)], layout=torch.jagged)
    heads = ragged.unflatten(-1, (H, -1)).transpose(1, 2)
    want = F.scaled_dot_product_attention(heads, heads, heads)
    with fastgpt.drop_in():
        got = F.scaled_dot_product_attention(query=heads, key=heads, value=heads)
    assert torch.equal(got.values(), want.values())


def test_another_mode_hides_the_attention():
    class Other(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    attention = Attention()
    want = attention.step()
    for modes in (
        (fastgpt.drop_in(), Other()),
        (Other(), fastgpt.drop_in()),
        (fastgpt.drop_in(), fastgpt.drop_in()),
        (torch.device("cpu"), fastgpt.drop_in()),
    ):
        seen = []
        with modes[0], modes[1]:
            assert attention_is_ours(attention.step)
            assert_same(attention.step(), want)
        assert bool(seen) == any(isinstance(mode, Other) for mode in modes)
    assert not attention_is_ours(attention.step)


def test_attention_outlives_an_exception():
    with pytest.raises(RuntimeError), fastgpt.drop_in():
        F.scaled_dot_product_attention(tokens(L, E), tokens(L, 3), tokens(L, E))
    assert not attention_is_ours(Attention().step)


@pytest.mark.parametrize("name", ["plain", "mask and padding", "causal", "key and value biases"])
@pytest.mark.parametrize("train", [True, False])
def test_attention_breaks_or_vanishes_under_compile(kernel_here, name, train):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    attention = Attention(**CASES[name])
    attention.module.train(train)
    eager = attention.forward
    with torch.set_grad_enabled(train):
        run = attention.step if train else lambda: [attention.forward(*attention.inputs)]
        want = run()

        def inside(*inputs):
            with fastgpt.drop_in():
                return eager(*inputs)

        attention.forward = torch.compile(inside, fullgraph=True, backend=counter)
        got = run()
        assert compiled_with_our_attention(counter)
        assert_same(got, want)

        attention.forward = torch.compile(eager, fullgraph=True, backend=counter)
        with fastgpt.drop_in():
            assert_same(run(), want)
        assert compiled_with_our_attention(counter)
        assert_same(run(), want)  # the mode is a guard of what was compiled
        assert not compiled_with_our_attention(counter)
    torch._dynamo.reset()


@pytest.mark.parametrize("fast_path", [True, False])
def test_a_compiled_encoder_layer_runs_elsewhere_than_documented(fast_path):
    counter = CompileCounterWithBackend("aot_eager")
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True).eval()
    x = tokens(B, L, E)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        with torch.no_grad():
            want = layer(x)
            torch._dynamo.reset()
            with fastgpt.drop_in():
                got = torch.compile(layer, fullgraph=True, backend=counter)(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert compiled_with_our_attention(counter) != fast_path
    assert_same([got], [want])
    torch._dynamo.reset()


# ---- activation checkpointing ----

KERNEL = FORWARDS["native"]
TORCHS = "aten._log_softmax.default"


class Checkpointed:
    """A model whose attention and loss are recomputed in its backward pass."""

    def __init__(self, context_fn=fastgpt.checkpoint_context_fn):
        self.context = {"context_fn": context_fn} if context_fn else {}
        self.attention = Attention()

    def body(self, query, key, value):
        logits = self.attention.forward(query, key, value).flatten(0, 1)
        return F.cross_entropy(logits, torch.arange(L * B) % E)

    def loss(self):
        self.leaves = [x.clone().requires_grad_() for x in self.attention.inputs]
        return checkpoint(self.body, *self.leaves, use_reentrant=False, **self.context)

    def gradients(self, loss):
        """They, and the names of the operators of the backward pass."""
        leaves = [*self.leaves, *self.attention.module.parameters()]
        for leaf in leaves:
            leaf.grad = None
        with Operators() as operators:
            torch.autograd.backward(loss, retain_graph=True)
        return [leaf.grad for leaf in leaves], operators.names


def test_checkpointing_needs_no_context():
    """If this fails because nothing is raised, `checkpoint_context_fn` has become superfluous."""
    model = Checkpointed(context_fn=None)
    with fastgpt.drop_in():
        loss = model.loss()
    with pytest.raises(CheckpointError):
        model.gradients(loss)


@pytest.mark.parametrize("forward_inside", [True, False])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_the_recomputation_runs_elsewhere_than_the_forward(
    kernel_here, forward_inside, backward_inside
):
    forward_operator = FORWARDS[kernel_here.name]
    model = Checkpointed()
    want, _ = model.gradients(model.loss())
    with fastgpt.drop_in() if forward_inside else nullcontext():
        loss = model.loss()
    for _ in range(2):  # a second backward recomputes again
        with fastgpt.drop_in() if backward_inside else nullcontext():
            got, names = model.gradients(loss)
            assert uses_kernel() == backward_inside
        assert (forward_operator in names) == forward_inside
        assert (TORCHS in names) != forward_inside
        assert_same(got, want)
    if forward_inside:
        assert attention_is_ours(lambda: model.gradients(loss))


def test_the_recomputation_in_another_thread_runs_elsewhere():
    model = Checkpointed()
    with fastgpt.drop_in():
        loss = model.loss()
    seen = []

    def work():
        seen.append(model.gradients(loss)[1])
        seen.append(uses_kernel())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert KERNEL in seen[0]
    assert seen[1] is False


def test_the_recomputation_forgets_the_preferred_backend():
    model = Checkpointed()
    with fastgpt.drop_in(), fastgpt.backend("eager"):
        loss = model.loss()
    assert KERNEL not in model.gradients(loss)[1]
    with fastgpt.drop_in():
        assert uses_kernel()
        loss = model.loss()
    with fastgpt.backend("eager"):
        assert KERNEL in model.gradients(loss)[1]


def test_the_restored_state_outlives_the_recomputation():
    with fastgpt.drop_in():
        _, recomputation = fastgpt.checkpoint_context_fn()
    with fastgpt.backend("eager"):
        for _ in range(2):
            with recomputation:
                assert uses_kernel()
            with pytest.raises(KeyError), recomputation:
                raise KeyError
        with fastgpt.drop_in():
            assert not uses_kernel()
    assert not uses_kernel()


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch loses the mode there")
@pytest.mark.parametrize("context_fn", [None, fastgpt.checkpoint_context_fn])
def test_checkpointing_breaks_or_loses_the_mode_under_compile(context_fn):
    torch._dynamo.reset()
    model = Checkpointed(context_fn)
    want, _ = model.gradients(model.loss())

    def step(*inputs):
        with fastgpt.drop_in():
            return checkpoint(model.body, *inputs, use_reentrant=False, **model.context)

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*model.leaves)
    got, names = model.gradients(loss)
    assert "fastgpt.cross_entropy_forward.default" in names
    assert TORCHS not in names
    assert_same(got, want)
    torch._dynamo.reset()


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch loses the mode there")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_checkpoint_misses_the_mode_outside(fullgraph):
    """Never silently. torch 2.13 can't enter a mode there: it raises, or leaves the call to eager
    execution.
    """
    torch._dynamo.reset()
    model = Checkpointed()
    want, _ = model.gradients(model.loss())

    @torch.compile(fullgraph=fullgraph, backend="aot_eager")
    def step(*inputs):
        return checkpoint(model.body, *inputs, use_reentrant=False, **model.context)

    try:
        with fastgpt.drop_in():
            loss = step(*model.leaves)
    except torch._dynamo.exc.Unsupported:
        assert fullgraph
    else:
        got, names = model.gradients(loss)
        assert KERNEL in names
        assert TORCHS not in names
        assert_same(got, want)
    torch._dynamo.reset()
