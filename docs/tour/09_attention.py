# %% [markdown]
# # 9. Attention: a weighted sum over the edges of a directed graph
#
# Tokens are nodes. An edge from j to i means that i may read from j. Attention is how i sums up
# what it reads, with weights that the two of them decide. Which edges there are is all that
# distinguishes a decoder, an encoder and cross-attention. Where a token stands in the row is not
# part of it: a graph has no notion of space, so positions must be put into the nodes.

# %%
import torch
from drawing import BLUE, GREEN, RED, panels, save
from torch.nn import functional as F

import fastgpt
from fastgpt.gpt import GPT, PRESETS

# %% [markdown]
# ## From a loop to a matrix
#
# The simplest way to read: the mean of oneself and all before. As loops; as a product with a lower
# triangular matrix, whose row i holds the weights with which i reads; and as a softmax of scores
# that are 0 along an edge and −∞ where there is none. The three are the same, and the third is the
# one that leaves the weights open: 0 may become any number.

# %%
torch.manual_seed(0)
B, T, C = 4, 8, 16
x = torch.randn(B, T, C)

loops = torch.zeros(B, T, C)
for b in range(B):
    for t in range(T):
        loops[b, t] = x[b, : t + 1].mean(0)

edges = torch.ones(T, T).tril()
weights = edges / edges.sum(1, keepdim=True)
matrix = weights @ x  # (T, T) @ (B, T, C): the same weights for each b

scores = torch.zeros(T, T).masked_fill(edges == 0, -torch.inf)
softmax = scores.softmax(1) @ x

torch.testing.assert_close(matrix, loops)
torch.testing.assert_close(softmax, loops)
print("weights of the third token:", [round(w, 3) for w in scores.softmax(1)[2].tolist()])

# %% [markdown]
# ## Weights that depend on the tokens
#
# Each token emits a *query*, what it looks for; a *key*, what it contains; and a *value*, what it
# hands over. The score of an edge is query · key / √d (the root is the subject of chapter 10).
# Again with a loop over the edges, and then in one call: `is_causal=True` is the lower triangle.

# %%
d = 16
W_q, W_k, W_v = torch.randn(3, C, d) / C**0.5
q, k, v = x @ W_q, x @ W_k, x @ W_v

loops = torch.zeros(B, T, d)
for b in range(B):
    for i in range(T):
        incoming = range(i + 1)
        score = torch.stack([q[b, i] @ k[b, j] / d**0.5 for j in incoming])
        for weight, j in zip(score.softmax(0), incoming, strict=True):
            loops[b, i] += weight * v[b, j]

fused = fastgpt.scaled_dot_product_attention(q, k, v, is_causal=True)
torch.testing.assert_close(fused, loops)
torch.testing.assert_close(fused, F.scaled_dot_product_attention(q, k, v, is_causal=True))

# %% [markdown]
# ## Three graphs
#
# *Decoder*: edges from the past only, or a model that predicts the next token could read it.
# *Encoder*: every token reads every other; leave the mask out. *Cross-attention*: the queries come
# from one set of tokens, keys and values from another, as a translation reads the original. Nothing
# else in the code changes.

# %%


def attention(reader, read_from, is_causal=False):
    q, k, v = reader @ W_q, read_from @ W_k, read_from @ W_v
    return fastgpt.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


other = torch.randn(B, 5, C)  # other tokens, and another number of them
graphs = {
    "decoder": lambda x: attention(x, x, is_causal=True),
    "encoder": lambda x: attention(x, x),
    "cross-attention": lambda x: attention(x, other),
}
for name, graph in graphs.items():
    reads = torch.autograd.functional.jacobian(graph, x[:1] if name != "cross-attention" else x)
    reads = reads[0].abs().sum((1, -1))[:, 0] > 0  # (T, T): does output i depend on token j?
    shape = "past" if torch.equal(reads, edges > 0) else "all" if reads.all() else "itself"
    print(f"{name:16} output i depends on {shape}")
    assert torch.equal(
        graph(torch.cat([x[:1], -x[1:]]))[0], graph(x)[0]
    )  # no edges between examples
    assert shape == {"decoder": "past", "encoder": "all", "cross-attention": "itself"}[name]

# %% [markdown]
# ("Itself", because the query is still the token's own; all it reads is the other set.) There is no
# path between the examples of a batch: they are separate graphs. And a whole GPT is a decoder:
# change a token, and no logit before it changes.

# %%
model = GPT(PRESETS["tiny"]).eval()
idx = torch.randint(8192, (1, 10))
changed = idx.clone()
changed[0, 6] = (idx[0, 6] + 1) % 8192
with torch.no_grad():
    difference = (model(idx)[0] - model(changed)[0]).abs().amax(2)[0]
print("change at place 6; logits change at places", difference.nonzero().flatten().tolist())
assert (difference[:6] == 0).all()
assert (difference[6:] > 0).all()

# %% [markdown]
# ## No notion of space
#
# Shuffle the tokens of an encoder, and the outputs are the same, shuffled alike. To it a sentence
# is a bag of words. Add a vector to each token that depends on its place, as `wpe` does in a GPT,
# and the order shows.

# %%
order = torch.randperm(T)
encoder = graphs["encoder"]
torch.testing.assert_close(encoder(x[:, order]), encoder(x)[:, order])

positions = torch.randn(T, C)
moved = (encoder(x[:, order] + positions) - encoder(x + positions)[:, order]).abs().max().item()
print(f"shuffled with positions: outputs differ by up to {moved:.2f}")
assert moved > 0.1

# %% [markdown]
# A causal mask is itself a trace of order: the last token reads more than the first. But it tells
# apart only what is past from what is not. Among its past, a token still sees a bag:

# %%
decoder = graphs["decoder"]
past = torch.cat([torch.randperm(T - 1), torch.tensor([T - 1])])  # all but the last one shuffled
torch.testing.assert_close(decoder(x[:, past])[:, -1], decoder(x)[:, -1])
assert not torch.allclose(decoder(x[:, past])[:, 3], decoder(x)[:, 3], atol=1e-2)

# %% [figure]
figure, axes = panels(3, rows=2, height=5.4, height_ratios=[1, 1.25])
colours = {"decoder": BLUE, "encoder": GREEN, "cross-attention": RED}
for (top, bottom), (name, colour) in zip(axes.T, colours.items(), strict=True):
    keys = other if name == "cross-attention" else x
    S = keys.shape[1]
    score = (q @ (keys @ W_k).mT / d**0.5)[0]
    if name == "decoder":
        score = score.masked_fill(edges == 0, -torch.inf)
    weight = score.softmax(1)
    above = 0.0 if name != "cross-attention" else 1.0
    for i in range(T):
        for j in range(S):
            if (i == j and not above) or weight[i, j] == 0:
                continue
            bend = "arc3,rad=0.45" if not above else "arc3,rad=0"
            start, end = (j + above * (T - S) / 2, above), (i, 0)
            arrow = {"arrowstyle": "-|>", "connectionstyle": bend, "color": colour}
            arrow |= {"alpha": min(1, 0.1 + 2 * weight[i, j].item()), "shrinkA": 5, "shrinkB": 5}
            top.annotate("", end, start, arrowprops=arrow)
    top.plot(range(T), [0] * T, "o", color="black")
    if above:
        top.plot([j + (T - S) / 2 for j in range(S)], [1] * S, "s", color=colour)
    top.set(title=name, xlim=(-0.5, T - 0.5), ylim=(-1.9, 1.9) if not above else (-0.4, 1.4))
    top.axis("off")
    bottom.imshow(weight.numpy(), cmap="Blues", vmin=0, vmax=0.6)
    bottom.set(xlabel="key: read from", ylabel="query: reader")
save(figure, __file__)

# %% [markdown]
# Above, the three graphs for the first example, an arrow's strength its weight (self-loops not
# drawn; squares are the other set). Below, the same weights as matrices, each row of which sums to
# 1.
