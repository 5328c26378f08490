# %% [markdown]
# # 6. Depth: gradients that vanish or explode, and the residual highway
#
# A gradient on its way to the first layer is multiplied by a matrix per layer, so it shrinks or
# grows like a power. And even with gradients of the right size, a plain stack of many layers trains
# to a *worse training error* than a shallow one. Adding each layer's input to its output cures
# both: the gradient then has a path that no matrix stands on.

# %%
import torch
from drawing import BLUE, GREEN, GREY, RED, panels, save
from torch import nn
from torch.nn import functional as F

import fastgpt

# %% [markdown]
# ## A power of the depth
#
# Back through h = tanh(x W), the gradient is multiplied by the slope of tanh and by Wᵀ. Weights of
# standard deviation gain / √n change its norm by about gain · (rms slope) per layer. After 30
# layers, a factor of 0.6 leaves less than a millionth of it, 1.6 makes it a million times larger.
# To see the powers bare, the first three stacks have no nonlinearity at all.

# %%
depth, width = 30, 100


def gradient_norms(layer):
    """The norm of the gradient at the output of each of 30 layers, over that at the last."""
    torch.manual_seed(0)
    x = torch.randn(64, width, requires_grad=True)
    outputs = []
    for _ in range(depth):
        x = layer(x, torch.randn(width, width) / width**0.5)
        x.retain_grad()
        outputs.append(x)
    x.backward(torch.randn(64, width))
    return [(h.grad.norm() / x.grad.norm()).item() for h in outputs]


norms = {
    "linear, gain 0.6": gradient_norms(lambda x, W: x @ (0.6 * W)),
    "linear, gain 1": gradient_norms(lambda x, W: x @ W),
    "linear, gain 1.6": gradient_norms(lambda x, W: x @ (1.6 * W)),
    "tanh, gain 5/3": gradient_norms(lambda x, W: (x @ (5 / 3 * W)).tanh()),
    "residual": gradient_norms(lambda x, W: x + (x @ W).tanh() / depth**0.5),
}
for name, values in norms.items():
    print(f"{name:17} first layer's gradient / last layer's {values[0]:.1e}")
assert 0.2 < norms["linear, gain 0.6"][0] / 0.6**29 < 5
assert 0.2 < norms["linear, gain 1"][0] < 5
assert 0.2 < norms["linear, gain 1.6"][0] / 1.6**29 < 5
assert 0.5 < norms["residual"][0] < 5

# %% [markdown]
# ## The highway
#
# For y = x + f(x) the derivative is I + f′(x). Multiplied out over L layers it is a sum over all
# ways to go through some of the f and around the others, and one of its terms is I: the gradient of
# the loss arrives at the first layer *as it is*, whatever the weights. With f = 0 nothing else
# arrives, where a plain stack with f = 0 would receive nothing at all.

# %%
x = torch.randn(4, width, requires_grad=True)
upstream = torch.randn(4, width)
for residual in (True, False):
    h = x
    for _ in range(depth):
        f = (h @ torch.zeros(width, width)).tanh()
        h = h + f if residual else f
    (gradient,) = torch.autograd.grad(h, x, upstream)
    print(f"residual {residual}: gradient arrives unchanged {torch.equal(gradient, upstream)}")
    assert torch.equal(gradient, upstream if residual else torch.zeros_like(x))

# %% [markdown]
# ## Degradation
#
# Could a deeper network not simply copy its input through the extra layers? It could, and it would
# then be as good as the shallow one. But optimisation does not find those weights (He et al. 2016).
# Here the task is to say on which of two spirals a point lies. Every layer is normalised (chapter
# 7) and drawn with `kaiming_normal_`, so that no gradient vanishes or explodes; all networks take
# the same steps of Adam; and there is no data but the training data, so this is not overfitting.
# The deep plain stack has only one thing against it.

# %%
t = torch.linspace(0.2, 1, 150) * 12
arm = torch.stack([t.cos(), t.sin()], 1) * t[:, None] / 12
data, label = torch.cat([arm, -arm]), torch.arange(2).repeat_interleave(150)


class Stack(nn.Module):
    def __init__(self, depth, residual, width=24):
        super().__init__()
        self.first, self.last = nn.Linear(2, width), nn.Linear(width, 2)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.residual = residual
        for layer in self.hidden:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        x = self.first(x)
        for layer in self.hidden:
            f = layer(F.layer_norm(x, x.shape[1:]).relu())
            x = x + f if self.residual else f
        return self.last(F.layer_norm(x, x.shape[1:]).relu())


def train(depth, residual, steps=150):
    """The loss of each step, and the share of wrong answers on the training data at the end."""
    torch.manual_seed(0)
    model = Stack(depth, residual)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    losses = []
    for _ in range(steps):
        loss = fastgpt.cross_entropy(model(data), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        wrong = (model(data).argmax(1) != label).float().mean().item()
    return losses, wrong


curves = {}
for name, (layers, residual) in {
    "5 layers": (5, False),
    "30 layers": (30, False),
    "30 layers, residual": (30, True),
}.items():
    curves[name], wrong = train(layers, residual)
    print(f"{name:19} training loss {curves[name][-1]:.4f}, training error {wrong:.0%}")
    plain_and_deep = name == "30 layers"
    assert (curves[name][-1] > 0.3) == plain_and_deep
    assert (wrong > 0.1) == plain_and_deep

# %% [markdown]
# The residual network begins near the identity and learns corrections to it; the plain one has to
# learn the identity as well, once per layer. A GPT's block is the same twice, attention and MLP,
# each behind a LayerNorm and each *added* to the stream. Each term adds variance to the stream, so
# GPT-2 shrinks the matrices that write to it by √(2 n_layer), as many terms as there are.

# %% [figure]
figure, (left, middle, right) = panels(3, width_ratios=[1.3, 0.9, 1.2])
colours = [RED, GREY, "#d98c3f", BLUE, GREEN]
for (name, values), colour in zip(norms.items(), colours, strict=True):
    left.plot(range(1, depth + 1), values, color=colour, label=name)
left.set(title="gradient by layer", xlabel="layer", ylabel="gradient's norm / the last layer's")
left.set(yscale="log", ylim=(1e-7, 1e12))
left.legend(frameon=False, fontsize=8, loc="upper right")
for half, colour in ((data[:150], BLUE), (data[150:], RED)):
    middle.plot(*half.T.numpy(), ".", color=colour, markersize=3)
middle.set(title="the task", xlabel="x", ylabel="y", aspect="equal")
for (name, values), colour in zip(curves.items(), (GREY, RED, GREEN), strict=True):
    right.plot(values, color=colour, label=name)
right.set(title="training loss", xlabel="step", ylabel="nats")
right.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.42))
save(figure, __file__)

# %% [markdown]
# Left, from right to left as the gradient travels: a power of the depth without residuals, a level
# road with them. Right, thirty plain layers do not learn in the steps in which five learn the
# spirals; with residuals thirty learn them as well.
