"""torch.compile on a GPU, with the code generator that users have."""

import pytest
import torch
from calls import Call, calls
from device_oracle import half_ulp

import fastgpt

# What the compiler warns of is its own, and of the machine.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: in deterministic mode other code is generated than at a user's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@calls
def test_a_compiled_call_gives_another_result(gpu, kernels, make):
    """The kernel's part is the same; the sums around it may be taken in another order."""
    call = make()
    want = call.run()
    compiled = torch.compile(call.function, fullgraph=True)
    for _ in range(2):
        got = Call(compiled, *call[1:]).run()
        for ours, expected in zip(got, want, strict=True):
            scale = expected.abs().max()
            assert (ours - expected).abs().max() <= 4 * half_ulp(ours.dtype) * scale


@pytest.mark.slow
def test_a_compiled_training_step_goes_wrong(gpu, kernels):
    """Both ops between layers whose code is generated, for a few steps of a small model. Where the
    native kernels are preferred, which have no attention, that is eager's.
    """

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(500, 128)
            self.qkv = torch.nn.Linear(128, 3 * 128)
            self.head = torch.nn.Linear(128, 500)

        def forward(self, tokens, labels):
            x = self.embed(tokens)
            q, k, v = self.qkv(x).view(*tokens.shape, 3, 2, 64).transpose(1, 3).unbind(2)
            y = fastgpt.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + y.transpose(1, 2).flatten(2)
            return fastgpt.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    def losses(compiled: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = Model().to(gpu)
        step = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        tokens = torch.randint(500, (4, 65), device=gpu)
        found = []
        for _ in range(5):
            loss = step(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    compiled, eager = losses(True), losses(False)
    assert compiled[-1] < compiled[0]
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=0)
