# %% [markdown]
# # 10. Why attention divides by √d
#
# The product of a query and a key sums d terms, so its standard deviation is √d. A softmax of
# numbers of that size is nearly one-hot: each token reads one other, chosen by the accident of the
# initialisation, and the gradient that could change its mind is nearly 0. Divided by √d, the scores
# have variance 1 at any width, and the softmax begins diffuse.

# %%
import math

import torch
from drawing import BLUE, GREY, RED, panels, save

import fastgpt
from fastgpt.gpt import GPT, PRESETS

# %% [markdown]
# ## The variance of q · k is d
#
# With independent entries of mean 0 and variance 1, each product q_i k_i has mean 0 and variance
# 1 · 1, and d of them add up.

# %%
torch.manual_seed(0)
S = 64  # keys
widths = [4, 16, 64, 256, 1024]
raw, scaled = {}, {}
for d in widths:
    q, k = torch.randn(256, d), torch.randn(S, d)
    raw[d] = q @ k.T
    scaled[d] = raw[d] / d**0.5
    print(f"d = {d:4}: variance of q.k {raw[d].var():7.1f}, of q.k / sqrt(d) {scaled[d].var():.2f}")
    assert abs(raw[d].var() / d - 1) < 0.15
    assert abs(scaled[d].var() - 1) < 0.15

# %% [markdown]
# ## Diffuse or one-hot
#
# The *entropy* of the weights, −Σ p log p, says over how many keys they spread: ln S if over all
# S alike, 0 if all weight is on one. exp(entropy) is a number of keys. For scores of variance 1 the
# entropy is about ln S − 1/2, whatever d.

# %%


def entropy(scores):
    log_p = scores.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean().item()


print(f"ln {S} = {math.log(S):.2f}")
for d in widths:
    e_raw, e_scaled = entropy(raw[d]), entropy(scaled[d])
    print(f"d = {d:4}: entropy {e_raw:.2f}, {math.exp(e_raw):4.1f} keys;", end=" ")
    print(f"scaled {e_scaled:.2f}, {math.exp(e_scaled):4.1f} keys")
    assert abs(e_scaled - (math.log(S) - 0.5)) < 0.15
assert math.exp(entropy(raw[1024])) < 1.3

# %% [markdown]
# ## What a sharp softmax does to learning
#
# The derivative of the weights p with respect to the scores is diag(p) − p pᵀ. If p is one-hot,
# that is 0: pushing any score a little changes nothing. Its size, averaged over the queries:

# %%


def slope(scores):
    p = scores.softmax(-1)
    jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return jacobian.square().sum((1, 2)).sqrt().mean().item()


for d in (4, 1024):
    print(f"d = {d:4}: slope of the softmax {slope(raw[d]):.4f}, scaled {slope(scaled[d]):.4f}")
assert slope(raw[1024]) < 0.5 * slope(scaled[1024])

# %% [markdown]
# The average hides the worst. At large d most queries are stuck altogether: below, how many of them
# get less than a thousandth of the gradient that the luckiest one gets. torch's default scale, and
# fastgpt's, is 1/√d; `scale=1.0` turns it off.

# %%
attend = fastgpt.scaled_dot_product_attention
stuck = {}
for d in (64, 1024, 4096):
    q, k, v = torch.randn(256, d, requires_grad=True), torch.randn(S, d), torch.randn(S, d)
    torch.testing.assert_close(attend(q, k, v), attend(q, k, v, scale=d**-0.5))
    for scale in (None, 1.0):
        (gradient,) = torch.autograd.grad(attend(q, k, v, scale=scale).sum(), q)
        size = gradient.norm(dim=1)
        stuck[d, scale] = (size < 1e-3 * size.max()).float().mean().item()
    print(f"d = {d:4}: stuck {stuck[d, 1.0]:4.0%}, with 1 / sqrt(d) {stuck[d, None]:.0%}")
    assert stuck[d, None] < 0.02
assert stuck[4096, 1.0] > 0.5

# %% [markdown]
# ## In a GPT at its initialisation
#
# The weights that make queries and keys are small, N(0, 0.02²), and so are the scores: each token
# reads all before it nearly alike. Training will sharpen what should be sharp. With i + 1 tokens to
# read the largest entropy is ln(i + 1); the share of it is taken.

# %%
shares = []


def watch(q, k, v, **options):
    T, d = q.shape[-2:]
    scores = (q @ k.mT) * d**-0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1) == 1, -1e9)  # e^-1e9 is 0
    log_p = scores.log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1)[..., 1:]
    shares.append((entropies / torch.arange(2, T + 1).log()).mean().item())
    return attend(q, k, v, **options)


config = PRESETS["tiny"]
model = GPT(config)
model.use_attention(watch)
with torch.no_grad():
    model(torch.randint(config.vocab_size, (2, config.block_size)))
print("share of the largest entropy, by layer:", [f"{share:.4f}" for share in shares])
assert len(shares) == config.n_layer
assert min(shares) > 0.98

# %% [figure]
figure, (left, middle, right) = panels(3)
left.plot(widths, widths, color=GREY, linestyle="--", label="d")
left.plot(widths, [raw[d].var().item() for d in widths], "o", color=RED, label="q.k")
left.plot(widths, [scaled[d].var().item() for d in widths], "o", color=BLUE, label="q.k / √d")
left.set(xscale="log", yscale="log", title="variance of the scores", xlabel="d", ylabel="variance")
middle.axhline(math.log(S), color=GREY, linestyle="--")
middle.annotate(f"ln {S}: all keys alike", (4, math.log(S)), (0, 4), textcoords="offset points")
middle.plot(widths, [entropy(raw[d]) for d in widths], "o-", color=RED, label="q.k")
middle.plot(widths, [entropy(scaled[d]) for d in widths], "o-", color=BLUE, label="q.k / √d")
middle.set(xscale="log", ylim=(0, 4.8), title="entropy of the weights", xlabel="d", ylabel="nats")
for scores, colour, label in ((raw, RED, "q.k"), (scaled, BLUE, "q.k / √d")):
    row = scores[256][0].softmax(0).sort(descending=True).values
    right.plot(range(1, 17), row[:16].numpy(), "o-", color=colour, label=label, markersize=4)
right.set(title="one query's weights, d = 256", xlabel="key, the heaviest first", ylabel="weight")
for axes, place in ((left, "upper left"), (middle, "center right"), (right, "upper right")):
    axes.legend(frameon=False, loc=place)
save(figure, __file__)

# %% [markdown]
# The wider the head, the larger the scores and the fewer keys are read; divided by √d, neither
# depends on the width. Right, the weights of one query: without the division it reads hardly more
# than one key.
