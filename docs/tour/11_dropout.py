# %% [markdown]
# # 11. Dropout is an ensemble, and a weight penalty is a preference for small
#
# Dropout deletes units at random in every training step, so each step trains another subnetwork; at
# evaluation the whole network stands for the average of all of them. For a linear layer this is
# exact, for a softmax layer too, with the right mean, and for a deep network it is a good guess. A
# weight penalty pulls every weight towards 0, so that only what the data insists on stays large.

# %%
import itertools

import torch
from drawing import BLUE, GREY, RED, panels, save
from torch import nn
from torch.nn import functional as F

# %% [markdown]
# ## What it does
#
# In training each number is set to 0 with probability p, and the rest is divided by 1 − p, which
# keeps the mean. In eval mode nothing happens at all. The factor is why nothing has to be rescaled
# later.

# %%
torch.manual_seed(0)
p = 0.25
drop = nn.Dropout(p)
y = drop(torch.ones(100_000))
print(f"kept {(y > 0).float().mean():.3f}, each times {y.max():.4f}, mean {y.mean():.3f}")
assert y.unique().tolist() == [0, torch.tensor(1 / (1 - p)).item()]
assert abs(y.mean() - 1) < 0.01
assert torch.equal(drop.eval()(y), y)

# %% [markdown]
# ## All the subnetworks, one by one
#
# Ten inputs make 2¹⁰ = 1024 masks, few enough to try each. With p = 1/2 all are equally likely. For
# a linear layer the mean of the 1024 outputs is the output of the whole network: the mean of a sum
# is the sum of the means.

# %%
n, C = 10, 4
x, W = torch.randn(n, dtype=torch.float64), torch.randn(n, C, dtype=torch.float64)
masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)
members = (2 * masks * x) @ W  # (1024, C)
print(f"{len(members)} subnetworks, their outputs spread by {members.std(0).mean():.2f}")
torch.testing.assert_close(members.mean(0), x @ W)

# %% [markdown]
# With a softmax on top, the whole network is the normalised *geometric* mean of the members'
# probabilities: the mean of the log probabilities is linear in the logits again. The arithmetic
# mean, which an ensemble usually takes, is another one, and less sure of itself.

# %%
log_members = members.log_softmax(1)
whole = (x @ W).softmax(0)
geometric = log_members.mean(0).softmax(0)
arithmetic = log_members.exp().mean(0)
torch.testing.assert_close(geometric, whole)
for name, prob in {"whole": whole, "geometric": geometric, "arithmetic": arithmetic}.items():
    print(f"{name:11}", [round(value, 4) for value in prob.tolist()])
assert (arithmetic - whole).abs().max() > 0.01

# %% [markdown]
# ## A deep network: by sampling
#
# Between layers there are nonlinearities, and the mean goes through none of them. Sampling always
# works: keep dropout on, run the network K times and average (Gal & Ghahramani 2016). The spread of
# the runs is a measure of doubt, and the error of their mean falls like 1/√K. How far the single
# pass of eval mode is from the limit depends on the network; here it is inside the spread.

# %%
net = nn.Sequential(
    nn.Linear(n, 50), nn.ReLU(), nn.Dropout(0.5), nn.Linear(50, 50), nn.ReLU(), nn.Dropout(0.5),
    nn.Linear(50, 1),
)  # fmt: skip
point = torch.randn(1, n)
with torch.no_grad():
    samples = net.train()(point.expand(40_000, n)).squeeze(1)
    single = net.eval()(point).item()
limit, spread = samples.mean().item(), samples.std().item()
print(f"mean of 40,000 masks {limit:.3f}, eval mode {single:.3f}, spread of the masks {spread:.3f}")
assert abs(limit - single) < 0.5 * spread
errors = {}
for K in (1, 4, 16, 64, 256):
    means = samples[: 40_000 // K * K].view(-1, K).mean(1)
    errors[K] = (means - limit).square().mean().sqrt().item()
    assert abs(errors[K] * K**0.5 / spread - 1) < 0.25
print("error of the mean of K:", {K: f"{error:.4f}" for K, error in errors.items()})

# %% [markdown]
# ## The weight penalty
#
# Adding λ/2 · |w|² to the loss adds λ w to the gradient. A step of SGD then multiplies each weight
# by 1 − lr · λ before it follows the data: *weight decay*. For SGD the two are the same. Adam
# divides the gradient by its size, and with it the penalty, so that there they are not: AdamW
# decays the weight itself (Loshchilov & Hutter 2019).

# %%
data, target, lam, lr = torch.randn(20, n), torch.randn(20), 0.1, 0.01
start = torch.randn(n)


def steps(make, penalty, count=20):
    w = start.clone().requires_grad_()
    optimizer = make([w])
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.mse_loss(data @ w, target) + penalty / 2 * w.square().sum()
        loss.backward()
        optimizer.step()
    return w.detach()


differences = {}
for name, kind in {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}.items():
    decayed = steps(lambda w, kind=kind: kind(w, lr=lr, weight_decay=lam), 0.0)
    penalised = steps(lambda w, kind=kind: kind(w, lr=lr, weight_decay=0.0), lam)
    differences[name] = (decayed - penalised).abs().max().item()
    print(f"{name:5} decay against penalty, largest difference {differences[name]:.1e}")
assert differences["SGD"] < 1e-6
assert differences["AdamW"] > 1e-3

# %% [markdown]
# What it is good for: a polynomial of degree 15 through 16 noisy points can go through all of them,
# and swings wildly in between. A small penalty costs little on the points and removes the swings.
# Too large a one removes the curve as well.

# %%
torch.manual_seed(1)
line = torch.linspace(-1, 1, 201, dtype=torch.float64)
points = torch.linspace(-1, 1, 16, dtype=torch.float64)
noisy = (3 * points).sin() + 0.2 * torch.randn(16, dtype=torch.float64)
A, B = points[:, None] ** torch.arange(16), line[:, None] ** torch.arange(16)
fits, tests = {}, {}
for penalty in (1e-12, 1e-2, 1e2):
    w = torch.linalg.solve(A.T @ A + penalty * torch.eye(16, dtype=torch.float64), A.T @ noisy)
    fits[penalty] = B @ w
    train_error = (A @ w - noisy).square().mean().sqrt().item()
    tests[penalty] = (B @ w - (3 * line).sin()).square().mean().sqrt().item()
    print(
        f"penalty {penalty:7.0e}: |w| {w.norm():8.2f}, error on the points {train_error:.3f}",
        end="",
    )
    print(f", on the true curve {tests[penalty]:.3f}")
assert tests[1e-2] < 0.5 * tests[1e-12]
assert tests[1e-2] < 0.5 * tests[1e2]

# %% [figure]
figure, (left, middle, right) = panels(3)
left.hist(samples.numpy(), bins=60, density=True, color=BLUE, alpha=0.5)
left.axvline(limit, color=BLUE, label="mean of all")
left.axvline(single, color=RED, linestyle="--", label="eval mode")
left.set(title="40,000 subnetworks", xlabel="output", ylabel="density")
left.legend(frameon=False, fontsize=9)
middle.plot(list(errors), list(errors.values()), "o", color=BLUE, label="measured")
middle.plot(list(errors), [spread / K**0.5 for K in errors], color=GREY, label="spread / √K")
middle.set(xscale="log", yscale="log", title="error of a mean of K", xlabel="K", ylabel="rms error")
middle.legend(frameon=False)
right.plot(line.numpy(), (3 * line).sin().numpy(), color=GREY, linewidth=5, alpha=0.5)
right.plot(points.numpy(), noisy.numpy(), "o", color="black", markersize=4)
for (penalty, fit), colour in zip(fits.items(), (RED, BLUE, "#d98c3f"), strict=True):
    right.plot(line.numpy(), fit.numpy(), color=colour, label=f"{penalty:.0e}")
right.set(title="a weight penalty", xlabel="x", ylabel="y", ylim=(-2.2, 2.2))
right.legend(frameon=False, fontsize=9, loc="lower center")
save(figure, __file__)

# %% [markdown]
# Left, what a network answers under each mask; the mean of all, and the one pass of eval mode.
# Right, the polynomial with three penalties; grey is the curve the points came from.
