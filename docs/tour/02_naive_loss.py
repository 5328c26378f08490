# %% [markdown]
# # 2. The loss as it is taught, and where it breaks
#
# Three lines turn logits into a loss: exponentiate, normalise, take the logarithm at the target.
# They are the definition, and they are right, until a logit passes 88 in float32 or 11 in float16.
# Subtracting each row's largest logit first changes nothing in the result and removes the overflow.
# Two more cancellations hide behind it.

# %%
import math

import torch
from drawing import BLUE, GREEN, GREY, RED, panels, save
from torch.nn import functional as F

import fastgpt


def naive_loss(logits, Y):
    """The mean of -log p over the rows: logits (N, C), targets Y (N,)."""
    counts = logits.exp()
    prob = counts / counts.sum(1, keepdims=True)
    return -prob[torch.arange(len(Y)), Y].log().mean()


torch.manual_seed(0)
N, C = 32, 27
logits = torch.randn(N, C)
Y = torch.randint(C, (N,))

for name, loss_of in {
    "naive": naive_loss,
    "torch": F.cross_entropy,
    "fastgpt": fastgpt.cross_entropy,
}.items():
    print(f"{name:8} {loss_of(logits, Y).item():.6f}")
torch.testing.assert_close(naive_loss(logits, Y), F.cross_entropy(logits, Y))
torch.testing.assert_close(naive_loss(logits, Y), fastgpt.cross_entropy(logits, Y))

# %% [markdown]
# The exponentials are called counts because they play the part of a table of counts: positive, and
# normalised along the row they are a probability. The logits are then log counts. A model that
# knows nothing gives every class the same, 1/C, and its loss is ln C: the number to expect before
# training, and the first thing to look at.

# %%
nothing = naive_loss(torch.zeros(N, C), Y).item()
print(f"all logits equal: {nothing:.4f}, ln {C} = {math.log(C):.4f}")
assert abs(nothing - math.log(C)) < 1e-6

# %% [markdown]
# ## Overflow
#
# exp grows fast and the types end: the largest float32 is 3.4 · 10³⁸ = e^88.7, the largest float16
# is 65504 = e^11.09. Past that `exp` is inf, and inf / inf is nan. One bad row makes the mean of
# the batch nan, one nan gradient makes every weight nan. At the other end, a row whose logits are
# all below -104 has counts that round to 0, and 0 / 0 is nan as well.

# %%
for dtype in (torch.float16, torch.float32):
    limit = math.log(torch.finfo(dtype).max)
    last, first = (
        torch.tensor(limit + d, dtype=torch.float64).to(dtype).exp() for d in (-0.1, 0.1)
    )
    print(f"{dtype}: exp overflows above {limit:.2f}")
    assert last.isfinite()
    assert first.isinf()

for shift in (0, 100, -200):
    print(f"all logits + {shift:4}: naive {naive_loss(logits + shift, Y).item():.4f}", end="")
    print(f", torch {F.cross_entropy(logits + shift, Y).item():.4f}")
assert naive_loss(logits + 100, Y).isnan()
assert naive_loss(logits - 200, Y).isnan()

# %% [markdown]
# In float16 no single logit needs to be large. With 27 classes the *sum* of the counts overflows
# once all logits pass 7.8; with the 50,257 of GPT-2 at 0.3.

# %%
for classes in (27, 50257):
    limit = math.log(torch.finfo(torch.float16).max / classes)
    counts = torch.full((classes,), limit + 0.1, dtype=torch.float16).exp()
    print(f"{classes} equal logits: the float16 sum overflows above {limit:.1f}")
    assert counts.isfinite().all()
    assert counts.sum().isinf()

# %% [markdown]
# ## Subtract the largest
#
# Adding a constant a to all logits of a row multiplies every count by e^a, and the division takes
# it out again:
#
# ```
#   e^(x_j − m) / Σ_k e^(x_k − m)  =  e^x_j e^−m / (e^−m Σ_k e^x_k)  =  e^x_j / Σ_k e^x_k
# ```
#
# So m may be anything, and the row's maximum is the best choice: the largest count is then
# e⁰ = 1, nothing overflows, and the sum is at least 1, so nothing divides by 0. What underflows to
# 0 is smaller than the rounding of that sum.

# %%


def shifted_loss(logits, Y):
    return naive_loss(logits - logits.max(1, keepdim=True).values, Y)


exact = shifted_loss(logits.double(), Y)
for m in (-3.0, 1.0, 5.0):
    assert abs(naive_loss(logits.double() - m, Y) - exact) < 1e-14  # any m gives the same
for shift in (0, 100, -200):
    print(f"all logits + {shift:4}: shifted {shifted_loss(logits + shift, Y).item():.4f}")
    assert abs(shifted_loss(logits + shift, Y) - exact) < 1e-5

# %% [markdown]
# ## Still wrong: the logarithm of what was rounded
#
# Let one logit be a and the target's be 0: the loss is log(1 + e^a), for a large a just a. A
# network that is confidently wrong sees just this. The shifted form computes a probability e^−a
# first, which beyond a = 104 is 0 in float32, and −log 0 is inf. Cure: never form the probability.
# The logarithm of the quotient is a difference,
#
# ```
#   loss = −log(e^(x_y − m) / S) = log S + m − x_y,    S = Σ_k e^(x_k − m)
# ```
#
# and log S + m, the *log-sum-exp*, is accurate at any size.

# %%


def lse_loss(logits, Y):
    m = logits.max(1, keepdim=True).values
    lse = (logits - m).exp().sum(1).log() + m.squeeze(1)
    return (lse - logits[torch.arange(len(Y)), Y]).mean()


def two_classes(a, dtype=torch.float32):
    """One row whose target has logit 0, and the other class a: the loss is log(1 + e^a)."""
    return torch.tensor([[0.0, a]], dtype=dtype), torch.tensor([0])


print("    a    naive  shifted      lse     torch   fastgpt")
for a in (10.0, 90.0, 110.0, 1000.0):
    row = two_classes(a)
    losses = [naive_loss, shifted_loss, lse_loss, F.cross_entropy, fastgpt.cross_entropy]
    print(f"{a:5.0f} " + " ".join(f"{loss_of(*row).item():8.2f}" for loss_of in losses))
    for loss_of in losses[2:]:
        assert abs(loss_of(*row) - a) < 1e-4
assert naive_loss(*two_classes(90.0)).isinf()
assert shifted_loss(*two_classes(90.0)).isfinite()
assert shifted_loss(*two_classes(110.0)).isinf()

# %% [markdown]
# ## And at the other end, a loss of exactly 0
#
# When the target wins, by a, the loss is log(1 + e^−a), about e^−a. But 1 + e^−a rounds to 1 in
# float32 as soon as e^−a is below 2⁻²⁴, that is for a > 16.6. The loss becomes 0, and with it the
# gradient of the target, p − 1. Only a small loss is lost, but so is a part of the answer. It is
# still there if the target's own count is left out of the sum:
#
# ```
#   loss = log(1 + R),   R = Σ_(k≠y) e^(x_k − x_y)         log1p(R) in code
# ```
#
# (where x_y is the maximum). fastgpt's kernels keep R beside the maximum for this reason.

# %%


def small_loss(a):
    """The loss of a row in which the target wins by a, with the target left out of the sum."""
    return torch.tensor(-a).exp().log1p().item()


a = 20.0
true = math.log1p(math.exp(-a))
print(f"exact {true:.4e}, lse form {lse_loss(*two_classes(-a)).item():.4e}", end="")
print(f", without the target {small_loss(a):.4e}")
assert lse_loss(*two_classes(-a)) == 0
assert lse_loss(*two_classes(-16.0)) > 0
assert abs(small_loss(a) - true) < 1e-6 * true

# %% [figure]
figure, (left, right) = panels(2)


def line(loss_of, dtype, label, color):
    """The loss against the gap until it stops being a number, and a cross there."""
    found = [loss_of(*two_classes(a, dtype)).item() for a in values]
    end = max(i for i, loss in enumerate(found) if math.isfinite(loss))
    left.plot(values[: end + 1], found[: end + 1], color=color, linewidth=1.5)
    if end + 1 < len(values):
        left.plot(values[end], found[end], "x", color=color, markersize=9, markeredgewidth=2)
        label = f"{label} ends at {values[end]:.0f}"
    left.annotate(label, (values[end] + 5, found[end] - 6), color=color)


values = [k / 2 for k in range(301)]
left.plot(values, values, color=GREY, linewidth=6, alpha=0.4)
line(lse_loss, torch.float32, "", BLUE)
line(shifted_loss, torch.float32, "shifted, then log,", GREEN)
line(naive_loss, torch.float32, "naive, float32,", RED)
line(naive_loss, torch.float16, "naive, float16,", RED)
left.annotate("log-sum-exp", (86, 142), color=BLUE)
left.annotate("grey: exact", (0, 142), color=GREY)
left.set(title="confidently wrong", xlabel="other logit - target's logit", ylabel="loss (nats)")
left.set_xlim(right=200)

values = [k / 4 for k in range(4, 121)]
found = [lse_loss(*two_classes(-a)).item() for a in values]
kept = [i for i, loss in enumerate(found) if loss > 0]
right.plot(values, [math.log1p(math.exp(-a)) for a in values], color=GREY, linewidth=5, alpha=0.4)
right.plot([values[i] for i in kept], [found[i] for i in kept], color=BLUE)
right.plot(values[kept[-1]], found[kept[-1]], "x", color=BLUE, markersize=9, markeredgewidth=2)
right.annotate("log-sum-exp, then 0", (values[kept[-1]] + 0.8, found[kept[-1]]), color=BLUE)
right.plot(values, [small_loss(a) for a in values], color="black", linewidth=1)
right.annotate("log1p(R)", (24, 1e-9))
right.set(title="confidently right", xlabel="target's logit - other logit", ylabel="loss (nats)")
right.set_yscale("log")
save(figure, __file__)

# %% [markdown]
# Each curve ends with a cross where the form stops giving a number. Left, the two naive losses end
# at 11 and 88, the shifted one at 104; the log-sum-exp goes on. Right, on a logarithmic scale, the
# log-sum-exp loses the small losses of a confident model, log1p does not.
