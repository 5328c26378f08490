# %% [markdown]
# # 8. An embedding is a matrix product that nobody carries out
#
# A token is a name, not a quantity: token 40 is not twice token 20. As a vector it is one-hot, a
# single 1 among zeros, and a linear layer of that vector picks out one row of its matrix. So do
# just that: look the row up. The gradient is a product with the same one-hot matrix, transposed,
# and that too is better done by adding rows where they belong.

# %%
import time

import torch
from drawing import BLUE, RED, panels, save
from torch import nn
from torch.nn import functional as F

from fastgpt.gpt import GPT, PRESETS

# %% [markdown]
# ## Lookup = one-hot @ matrix
#
# The tokens are the letters of a phrase. The product adds C numbers for each output, all but one of
# them times 0; the lookup copies the one. The results are equal to the last bit.

# %%
phrase = "one-- and preferably only one --obvious way"
alphabet = sorted(set(phrase))
idx = torch.tensor([alphabet.index(c) for c in phrase])
N, C, E = len(idx), len(alphabet), 8

torch.manual_seed(0)
table = torch.randn(C, E)
one_hot = F.one_hot(idx, C)
print(f"one-hot {tuple(one_hot.shape)} @ table {tuple(table.shape)}")
assert torch.equal(one_hot.float() @ table, table[idx])
assert torch.equal(F.embedding(idx, table), table[idx])

# %% [markdown]
# `one_hot` returns int64. A matrix product wants one type for both, and refuses:

# %%
try:
    one_hot @ table
    raise AssertionError("a product of int64 and float32")
except RuntimeError as error:
    print(error)

# %% [markdown]
# ## The gradient: scatter and add
#
# For the product the rule is d_table = one_hotᵀ @ d_out. Row c of that is the sum of the gradients
# at all places where token c stood: `index_add_`. A token that comes twice gets two contributions;
# a token that does not come gets exactly 0, and a rare token learns slowly. Writing `d_table[idx]
# += d_out` is the classic mistake: of equal indices, only one is added.

# %%
weight = table.clone().requires_grad_()
d_out = torch.randn(N, E)
weight[idx].backward(d_out)

product = one_hot.T.float() @ d_out
scattered = torch.zeros(C, E).index_add_(0, idx, d_out)
torch.testing.assert_close(weight.grad, product)
torch.testing.assert_close(weight.grad, scattered)

mistake = torch.zeros(C, E)
mistake[idx] += d_out
count = one_hot.sum(0)
repeated = count > 1
assert torch.equal(mistake[~repeated], scattered[~repeated])
assert not torch.isclose(mistake[repeated], scattered[repeated]).all(1).any()
print(f"{repeated.sum()} of {C} letters occur more than once, and += is wrong for each of them")

batch = torch.tensor([1, 1, 4])
weight.grad = None
weight[batch].sum().backward()
print("gradient of a sum over tokens 1, 1, 4, by row:", weight.grad[:6, 0].tolist())
assert torch.equal(weight.grad[:, 0], torch.bincount(batch, minlength=C).float())

# %% [markdown]
# ## What it saves
#
# For GPT-2 a token's one-hot product is 50,257 · 768 multiplications to copy 768 numbers. Here with
# a smaller table. (A linear layer of one-hot vectors would hold the matrix transposed.)

# %%
V, E = 8192, 128
embedding, tokens = nn.Embedding(V, E), torch.randint(V, (256,))
seconds = {}
for name, form in {
    "lookup": lambda: embedding(tokens),
    "product": lambda: F.one_hot(tokens, V).float() @ embedding.weight,
}.items():
    form()
    begin = time.perf_counter()
    for _ in range(3):
        form()
    seconds[name] = (time.perf_counter() - begin) / 3
    print(f"{name:8} {1e3 * seconds[name]:8.3f} ms")
assert seconds["product"] > 5 * seconds["lookup"]
linear = nn.Linear(V, E, bias=False)
linear.weight = nn.Parameter(embedding.weight.T)
torch.testing.assert_close(linear(F.one_hot(tokens[:8], V).float()), embedding(tokens[:8]))

# %% [markdown]
# ## The same matrix at the other end
#
# A GPT ends with the reverse: the logit of token c is the product of the features with a vector of
# c. The reference GPT uses the *same* matrix for both, as GPT-2 does. It is one parameter with two
# uses, so its gradient is the sum of two: the lookup's, with rows for the tokens that were read,
# and the output layer's, with every row, for every token is pushed up or down by the softmax.

# %%
model = GPT(PRESETS["tiny"])
assert model.lm_head.weight is model.transformer.wte.weight
read = torch.arange(10)
predicted = torch.arange(100, 110)
_, loss = model(read[None], predicted[None])
gradient = torch.autograd.grad(loss, model.lm_head.weight)[0]


class Apart(nn.Module):
    """The model with the two uses as two tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, read_with, predict_with):
        parameters = {"transformer.wte.weight": read_with, "lm_head.weight": predict_with}
        call = torch.func.functional_call
        return call(self.model, parameters, (read[None], predicted[None]), tie_weights=False)[1]


uses = [model.lm_head.weight.detach().clone().requires_grad_() for _ in range(2)]
of_reading, of_predicting = torch.autograd.grad(Apart(model)(*uses), uses)
torch.testing.assert_close(of_reading + of_predicting, gradient)
rows = [(g != 0).any(1).sum().item() for g in (of_reading, of_predicting)]
print(f"rows with a gradient: {rows[0]} from the lookup, {rows[1]} from the output layer")
assert rows == [10, PRESETS["tiny"].vocab_size]

# %% [figure]
figure, (left, product_axes, out, right) = panels(4, width_ratios=[1.6, 0.7, 0.7, 1.8])
left.imshow(one_hot.numpy(), cmap="Greys", aspect="auto")
left.set(title="one-hot", xlabel="letter", ylabel="place in the phrase")
for axes, picture, name in ((product_axes, table, "table"), (out, table[idx], "table[idx]")):
    axes.imshow(picture.numpy(), cmap="RdBu_r", vmin=-2.5, vmax=2.5, aspect="auto")
    axes.set(title=name, xlabel="feature")
for axes, step in ((left, 3), (out, 3)):
    axes.set_yticks(range(0, N, step), phrase[::step])
    axes.tick_params(labelsize=8)
product_axes.set_yticks(range(C), alphabet, fontsize=8)
left.set_xticks(range(C), alphabet, fontsize=8)
ones = torch.zeros(C)
ones[idx] += torch.ones(N)
right.bar(range(C), count.tolist(), color=BLUE, label="index_add_: as often as it occurs")
right.bar(range(C), ones.tolist(), color=RED, width=0.4, label="grad[idx] += 1: once")
right.set_xticks(range(C), alphabet)
right.set(title="gradient of a sum", xlabel="letter", ylabel="gradient of its row", ylim=(0, 8))
right.legend(frameon=False, loc="upper right")
save(figure, __file__)

# %% [markdown]
# The product of the first two panels is the third: each row of the phrase is a row of the table.
# Right, the gradient of the sum of all outputs: for each letter, how often it was looked up.
