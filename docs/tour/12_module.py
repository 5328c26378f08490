# %% [markdown]
# # 12. nn.Module: what it registers, and how to look inside
#
# A module is a function with a memory. It knows its parameters, which training changes; its
# buffers, which it does not; its parts; and one flag, `training`, that dropout and batch norm obey.
# Hooks let you look at what flows through a model without touching its code, forwards and
# backwards.

# %%
import torch
from drawing import BLUE, GREY, RED, panels, save
from torch import nn

from fastgpt.gpt import GPT, PRESETS, GPTConfig

# %% [markdown]
# ## What is registered, and what is only an attribute
#
# Assigning a Parameter, a Module or a buffer to `self` registers it. A plain tensor is an attribute
# like any other: `state_dict` does not save it, `.to` does not move it, no optimiser sees it. Nor
# do they see modules in a Python list: that is what `nn.ModuleList` is for.

# %%


class Example(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)  # moved, not saved
        self.plain = torch.zeros(3)
        self.hidden = [nn.Linear(3, 3)]
        self.visible = nn.ModuleList([nn.Linear(3, 3)])


example = Example()
print("parameters:", [name for name, _ in example.named_parameters()])
print("buffers:   ", [name for name, _ in example.named_buffers()])
print("state_dict:", list(example.state_dict()))
assert not any("hidden" in name or "plain" in name for name in example.state_dict())

example.to(torch.float64)
types = {name: getattr(example, name).dtype for name in ("weight", "count", "scratch", "plain")}
print("after .to(torch.float64):", {name: str(dtype)[6:] for name, dtype in types.items()})
assert types["weight"] == types["count"] == types["scratch"] == torch.float64
assert types["plain"] == example.hidden[0].weight.dtype == torch.float32  # left behind

# %% [markdown]
# A GPT's parameters can be counted on paper. Per block: 3C² for query, key and value, C² for the
# projection, 8C² for the MLP, and 13C of biases and layer norms. The matrix that is used at both
# ends (chapter 8) counts once. (On torch's device "meta" a model has shapes and no memory.)

# %%
config = PRESETS["gpt2"]
with torch.device("meta"):
    gpt2 = GPT(config)
V, T, C, L = config.vocab_size, config.block_size, config.n_embd, config.n_layer
by_hand = V * C + T * C + L * (12 * C**2 + 13 * C) + 2 * C
print(f"GPT-2: {gpt2.num_parameters():,} parameters, by hand {by_hand:,}")
assert gpt2.num_parameters() == by_hand == 124_439_808

# %% [markdown]
# ## `eval` and `no_grad` are two different things
#
# `model.eval()` sets `training` to False in every part: dropout lets everything pass, batch norm
# uses its running statistics. Autograd records as before. `torch.no_grad()` stops the recording,
# and so the memory: nothing is kept for a backward that will not come. Dropout drops as before. An
# evaluation wants both.

# %%
torch.manual_seed(0)
small = GPT(GPTConfig(vocab_size=256, block_size=32, n_layer=2, n_head=2, n_embd=32, dropout=0.2))
idx = torch.randint(256, (4, 32))


def look():
    """Whether two passes agree, whether they are recorded, the bytes kept for backward."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        first, second = small(idx)[0], small(idx)[0]
    return torch.equal(first, second), first.requires_grad, sum(kept)


print("                     deterministic  recorded  kept for backward")
for training in (True, False):
    for recording in (True, False):
        small.train(training)
        assert all(part.training == training for part in small.modules())
        with torch.set_grad_enabled(recording):
            same, recorded, kept = look()
        name = f"{'train' if training else 'eval'}{'' if recording else ', no_grad'}"
        print(f"{name:20} {same!s:>13} {recorded!s:>9} {kept:>12,} bytes")
        assert same == (not training)
        assert recorded == recording
        assert (kept > 0) == recording

# %% [markdown]
# ## Hooks
#
# A forward hook is called with a module's input and output after each forward; a tensor's
# `register_hook` with its gradient on the way back. Registering returns a handle, and `remove`
# takes the hook off again. Forget it, and the hook stays as long as the model, with all that it
# holds: so take them off in a `finally`. A hook that keeps tensors should keep numbers instead
# (chapter 1).
#
# Below, the residual stream of a GPT at its initialisation, as it grows from block to block, and
# the gradient on its way back.

# %%
torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=256, block_size=32, n_layer=12, n_head=4, n_embd=64))
rms, gradients = {}, {}


def watch(name):
    def after_forward(module, inputs, output):
        rms[name] = output.detach().square().mean().sqrt().item()

        def after_backward(gradient):
            gradients[name] = gradient.norm().item()

        output.register_hook(after_backward)

    return after_forward


handles = [b.register_forward_hook(watch(i)) for i, b in enumerate(model.transformer.h, 1)]
try:
    _, loss = model(idx, idx.roll(-1, 1))
    loss.backward()
finally:
    for handle in handles:
        handle.remove()

print("rms of the stream after block 1, 6, 12:", [round(rms[i], 3) for i in (1, 6, 12)])
print(f"gradient at block 1 / at block 12: {gradients[1] / gradients[12]:.2f}")
assert list(rms) == list(range(1, 13))
assert list(gradients) == list(range(12, 0, -1))  # backwards comes in the other order
assert rms[12] > rms[1]
assert 0.5 < gradients[1] / gradients[12] < 4  # the highway of chapter 6

seen = dict(rms)
model(torch.zeros_like(idx))
assert rms == seen  # the hooks are gone
assert not any(module._forward_hooks for module in model.modules())

# %% [markdown]
# A forward hook that returns something replaces the output. That is an experiment without a line of
# the model changed: switch off the attention of each layer in turn, and see what the loss does.
# (After a little training, or nothing would depend on anything.)

# %%
text = torch.tensor(list(b"for i in range(n): x = x + i\n" * 40))
rows = text.unfold(0, 33, 37)
optimizer = torch.optim.AdamW(small.train().parameters(), lr=1e-2)
for _ in range(100):
    _, loss = small(rows[:, :-1], rows[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def loss_without(part=None):
    small.eval()
    handle = part.register_forward_hook(lambda module, inputs, out: 0 * out) if part else None
    loss = small(rows[:, :-1], rows[:, 1:])[1].item()
    if handle:
        handle.remove()
    return loss


losses = {"nothing": loss_without()}
for i, block in enumerate(small.transformer.h):
    losses[f"attn {i}"], losses[f"mlp {i}"] = loss_without(block.attn), loss_without(block.mlp)
print("loss without", {name: f"{value:.2f}" for name, value in losses.items()})
assert loss_without() == losses["nothing"]  # all is as it was
assert losses["nothing"] < min(losses.values()) + 0.05
assert max(losses.values()) > losses["nothing"] + 0.3

# %% [figure]
figure, (left, middle, right) = panels(3)
left.plot(list(rms), list(rms.values()), "o-", color=BLUE)
left.set(
    title="forward hooks",
    xlabel="block",
    ylabel="rms of the residual stream",
    ylim=(0, 0.04),
    xticks=range(1, 13),
)
middle.plot(list(gradients), list(gradients.values()), "o-", color=RED)
middle.set(
    title="backward hooks",
    xlabel="block",
    ylabel="norm of the gradient",
    ylim=(0, 0.6),
    xticks=range(1, 13),
)
right.bar(list(losses), list(losses.values()), color=[GREY, BLUE, RED, BLUE, RED])
right.set(title="a hook that replaces", xlabel="switched off", ylabel="loss (nats per byte)")
right.tick_params(axis="x", labelsize=8)
save(figure, __file__)

# %% [markdown]
# Left and middle, what the hooks saw: the stream grows a little with every block that adds to it,
# the gradient comes back through all of them hardly changed. Right, the trained model with one part
# switched off at a time.
