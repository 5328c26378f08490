# %% [markdown]
# # 4. Initialisation: the state in which training begins
#
# Before the first step a network should know that it knows nothing: its loss should be ln C. Its
# activations should neither die out nor explode with depth, and its units should be neither
# saturated nor dead, for a unit whose slope is 0 passes no gradient and learns nothing. All of it
# is a matter of one number per layer, the standard deviation of its weights.

# %%
import math

import torch
from drawing import BLUE, RED, panels, save
from torch import nn

import fastgpt
from fastgpt.gpt import GPT, PRESETS

# %% [markdown]
# ## The loss at step 0
#
# Without a reason to prefer one class, each should get 1/C, and the loss is −log(1/C) = ln C. Large
# random logits are a network that is confidently wrong: the loss is far above, and the first
# thousand steps of training do nothing but shrink the output layer. It shows as a curve like a
# hockey stick. For logits N(0, s²) the loss is about ln C + s²/2 as long as s is small.

# %%
torch.manual_seed(0)
N, C = 4096, 27
Y = torch.randint(C, (N,))
print("std of logits   loss   ln C + s^2/2")
for s in (10.0, 3.0, 1.0, 0.3, 0.01):
    loss = fastgpt.cross_entropy(s * torch.randn(N, C), Y).item()
    print(f"{s:13} {loss:6.2f} {math.log(C) + s * s / 2:14.2f}")
    if s <= 0.3:
        assert abs(loss - math.log(C) - s * s / 2) < 0.02
    if s == 10:
        assert loss > 4 * math.log(C)

# %% [markdown]
# The reference GPT ends in a LayerNorm, whose n_embd outputs have variance 1, and an output matrix
# of standard deviation 0.02. So its logits have a standard deviation of 0.02 √n_embd: small, and
# the loss starts where it should. Run this check on every model before training it.

# %%
config = PRESETS["tiny"]
model = GPT(config)
idx = torch.randint(config.vocab_size, (4, config.block_size))
with torch.no_grad():
    logits, _ = model(idx)
    _, loss = model(idx, torch.randint(config.vocab_size, idx.shape))
print(f"std of logits {logits.std():.3f}, 0.02 sqrt(n_embd) = {0.02 * config.n_embd**0.5:.3f}")
print(f"loss {loss:.4f}, ln {config.vocab_size} = {math.log(config.vocab_size):.4f}")
assert abs(logits.std() - 0.02 * config.n_embd**0.5) < 0.01
assert abs(loss - math.log(config.vocab_size)) < 0.05

# %% [markdown]
# ## gain / √fan_in
#
# A unit sums fan_in products. If inputs and weights are independent with mean 0, variances add up:
#
# ```
#   Var(Σ_i w_i x_i) = fan_in · Var(w) · E[x²]
# ```
#
# Weights of standard deviation 1/√fan_in keep the scale. The nonlinearity then takes some of it
# away, and a *gain* gives it back (He et al. 2015). ReLU zeroes half of the distribution, half of
# E[x²], so its gain is √2. tanh squashes; torch's gain for it is 5/3. `kaiming_normal_` draws
# weights with gain / √fan_in.

# %%
weight = torch.empty(512, 512)
for nonlinearity, gain in {"linear": 1, "relu": math.sqrt(2), "tanh": 5 / 3}.items():
    nn.init.kaiming_normal_(weight, nonlinearity=nonlinearity)
    print(f"{nonlinearity:7} gain {gain:.3f}, std of the weights x sqrt(512) = ", end="")
    print(f"{weight.std() * 512**0.5:.3f}")
    assert abs(nn.init.calculate_gain(nonlinearity) - gain) < 1e-12
    assert abs(weight.std() * 512**0.5 - gain) < 0.01 * gain

# %% [markdown]
# Ten layers show what a factor does that is applied ten times. With ReLU, a gain of 1 halves the
# variance per layer, (1/2)^10 in all; of 2, it doubles it. With tanh, too small a gain dies out,
# too large a gain saturates: the activations cannot leave (−1, 1), so all of them go to its ends.

# %%
depth, width = 10, 512
x0 = torch.randn(256, width)


def activations(gain, f):
    """The root mean square of x0 and of each layer's output, and the last output."""
    x, found = x0, [1.0]
    for _ in range(depth):
        x = f(x @ (torch.randn(width, width) * gain / width**0.5))
        found.append(x.square().mean().sqrt().item())
    return found, x


scales = {}
for f, gains in {torch.relu: (1.0, 2**0.5, 2.0), torch.tanh: (0.5, 5 / 3, 5.0)}.items():
    for gain in gains:
        scales[f, gain], last = activations(gain, f)
        saturated = (last.abs() > 0.97).float().mean().item()
        print(
            f"{f.__name__} gain {gain:.2f}: rms after 10 layers {scales[f, gain][-1]:7.4f}", end=""
        )
        print(f", saturated {saturated:.0%}" if f is torch.tanh else "")
for gain, power in {1.0: -5, 2**0.5: 0, 2.0: 5}.items():  # variance (1/2)^10, 1, 2^10
    assert abs(math.log2(scales[torch.relu, gain][-1]) - power) < 0.6
assert scales[torch.tanh, 0.5][-1] < 0.01
assert 0.5 < scales[torch.tanh, 5 / 3][-1] < 0.8
assert saturated > 0.6  # tanh, gain 5

# %% [markdown]
# ## Saturated and dead
#
# The slope of tanh is 1 − tanh². Where |tanh| > 0.97 it is below 0.06, and the gradient that goes
# through is all but gone. The slope of ReLU is 0 for every negative input. That is harmless as long
# as some example of the data makes the unit positive. A unit that is negative for *all* of them is
# dead: no gradient reaches its weights, and it stays as it is. Large negative biases do it, and so
# does one step with too large a learning rate.

# %%
x = torch.randn(100, 30)
wide, kaiming = torch.randn(30, 60), torch.empty(60, 30)
nn.init.kaiming_normal_(kaiming, nonlinearity="tanh")
before, after = (x @ wide).tanh(), (x @ kaiming.T).tanh()
shares = [(h.abs() > 0.97).float().mean().item() for h in (before, after)]
print(f"saturated: {shares[0]:.0%} with weights N(0, 1), {shares[1]:.0%} with kaiming_normal_")
assert shares[0] > 0.6
assert shares[1] < 0.25

layer = nn.Linear(30, 60)
nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
with torch.no_grad():
    layer.bias[:20] = -8.0
active = layer(x).relu()
active.sum().backward()
dead = (active == 0).all(0)
print(f"dead ReLUs: {dead.sum().item()} of 60, weights with a gradient: ", end="")
print(f"{(layer.weight.grad != 0).any(1).sum().item()} units")
assert dead[:20].sum() >= 15
assert (layer.weight.grad[dead] == 0).all()
assert (layer.weight.grad[~dead] != 0).any(1).all()

# %% [figure]
figure, axes = panels(4, width_ratios=[1.9, 1, 1, 1])
lines = {  # colour, label, and how far to move the label
    (torch.relu, 1.0): (RED, "relu, 1", 0),
    (torch.relu, 2**0.5): (RED, "relu, √2", 8),
    (torch.relu, 2.0): (RED, "relu, 2", 0),
    (torch.tanh, 0.5): (BLUE, "tanh, 0.5", 0),
    (torch.tanh, 5 / 3): (BLUE, "tanh, 5/3", -10),
    (torch.tanh, 5.0): (BLUE, "tanh, 5", -2),
}
for key, (colour, label, rise) in lines.items():
    axes[0].plot(range(depth + 1), scales[key], color=colour)
    place = {"xytext": (4, rise - 4), "textcoords": "offset points"}
    axes[0].annotate(label, (depth, scales[key][-1]), **place, color=colour)
axes[0].set(title="scale by depth, for a gain", xlabel="layer", ylabel="rms of the activations")
axes[0].set(yscale="log", xlim=(0, depth + 5), xticks=range(0, depth + 1, 2))
maps = {
    "tanh, N(0, 1)": before.abs() > 0.97,
    "tanh, kaiming": after.abs() > 0.97,
    "ReLU, 20 biases -8": active == 0,
}
for each, (name, flat) in zip(axes[1:], maps.items(), strict=True):
    each.imshow(flat.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    each.set_title(name, fontsize=10)
    each.set(xlabel="unit")
axes[1].set(ylabel="example")
save(figure, __file__)

# %% [markdown]
# Left, one line per gain: √2 and 5/3 keep the scale, and so does 5, by saturation. Right, black is
# a unit without slope for an example: |tanh| > 0.97, or a ReLU at 0. White is where gradients flow.
# The black columns of the last panel are dead units.
