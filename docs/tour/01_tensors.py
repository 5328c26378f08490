# %% [markdown]
# # 1. Tensors, and four ways to be wrong without an error
#
# A tensor is a block of numbers and a rule for walking it. Most of the bugs of a training loop
# written by hand live in that rule: a type nobody asked for, a view that shares memory, a number
# that drags a graph behind it, and a subtraction that makes a matrix where a list was meant.

# %%
import warnings
import weakref

import torch
from drawing import BLUE, GREY, RED, panels, save
from torch.nn import functional as F

# %% [markdown]
# ## `torch.tensor` takes your numbers, `torch.Tensor` makes them float32
#
# `torch.tensor(data)` is a function. It looks at the data and picks the type: integers stay int64.
# `torch.Tensor(...)` is the constructor of the class, and always float32. So class labels come out
# as floats, which can index nothing, and large integers are rounded: float32 has 24 bits for the
# digits, and 2²⁴ + 1 needs 25.

# %%
labels = [0, 2, 16_777_217]
print(torch.tensor(labels), torch.tensor(labels).dtype)
print(torch.Tensor(labels).long(), torch.Tensor(labels).dtype)
assert torch.tensor(labels).tolist() == labels
assert torch.Tensor(labels).tolist() == [0, 2, 16_777_216]

try:
    torch.eye(3)[torch.Tensor([0, 2])]
    raise AssertionError("floats must not index")
except IndexError as error:
    print(error)

# %% [markdown]
# And a single number is a size to the one and a value to the other. The three numbers of
# `torch.Tensor(3)` are whatever the memory held before.

# %%
print(tuple(torch.tensor(3).shape), tuple(torch.Tensor(3).shape))
assert torch.tensor(3).shape == ()
assert torch.Tensor(3).shape == (3,)

# %% [markdown]
# ## `view` is the same memory, walked differently
#
# A tensor has a *storage*, a flat row of numbers, and a *stride*: how many of them to skip for a
# step along each dimension. `view` and `transpose` change the steps and copy nothing, whatever the
# size. The price: writing through one name changes what the other name sees.

# %%
flat = torch.arange(6)
grid = flat.view(2, 3)
print(f"{grid.stride() = }, {grid.T.stride() = }")
grid[0, 0] = 100
print(f"{flat = }")
assert flat[0] == 100
assert grid.T.data_ptr() == grid.data_ptr() == flat.data_ptr()

# %% [markdown]
# The transpose of (2, 3) steps by 1 and then by 3. No single step walks it in its own order, so it
# cannot be viewed as one row: `view` refuses, and `reshape` copies, silently. After a `reshape` you
# don't know whether you hold the same memory. In an attention layer this is the line where the
# heads are laid side by side again.

# %%
try:
    grid.T.view(6)
    raise AssertionError("a transpose must not be viewed as a row")
except RuntimeError as error:
    print(str(error).split(" (")[0])
assert grid.T.reshape(6).data_ptr() != grid.data_ptr()  # a copy
assert grid.reshape(6).data_ptr() == grid.data_ptr()  # not a copy

# %% [markdown]
# ## `.item()` lets go of the graph
#
# A loss is a tensor that remembers how it was computed, so that `backward` can walk back. Whoever
# keeps the loss keeps all that. Below, 20 losses are added up, as for a mean over a validation set,
# once as tensors and once as Python floats. We count the tensors that autograd still holds.

# %%
layer = torch.nn.Linear(100, 100)


def held_by_a_sum_of(take):
    """How many tensors saved for backward are alive while the sum of 20 losses is."""
    held = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            held.add(self)

    total = 0.0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        for _ in range(20):
            loss = layer(torch.ones(8, 100)).square().mean()
            total = total + take(loss)
    del loss
    return len(held)


tensors, floats = held_by_a_sum_of(lambda loss: loss), held_by_a_sum_of(lambda loss: loss.item())
print(f"kept alive by a sum of tensors: {tensors}, by a sum of floats: {floats}")
assert floats == 0
assert tensors >= 40  # the input and the output of the square, 20 times

# %% [markdown]
# ## (N,) − (N, 1) is N × N
#
# Broadcasting lines shapes up from the right and stretches every 1. A linear layer returns (N, 1);
# the targets are (N,), which counts as (1, N). Their difference compares every prediction with
# every target, and `mean` hides it: the loss is a plausible number, it falls, training runs. But a
# prediction that must be near all targets at once can only learn their mean. The fitted line is
# flat.

# %%
torch.manual_seed(0)
N = 64
x = torch.linspace(-1, 1, N)
y = 2 * x + 0.5 + 0.2 * torch.randn(N)


def fit(loss_of):
    """Slope, intercept and last loss of a line fitted by gradient descent."""
    line = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(line.parameters(), lr=0.3)
    for _ in range(100):
        optimizer.zero_grad()
        loss = loss_of(line(x[:, None]), y)
        loss.backward()
        optimizer.step()
    return line.weight.item(), line.bias.item(), loss.item()


wrong = fit(lambda prediction, target: (target - prediction).square().mean())
right = fit(lambda prediction, target: (target - prediction.squeeze(1)).square().mean())
print("         slope  intercept   loss")
print(f"wrong  {wrong[0]:7.3f}    {wrong[1]:7.3f}  {wrong[2]:5.3f}")
print(f"right  {right[0]:7.3f}    {right[1]:7.3f}  {right[2]:5.3f}")

assert (y - x[:, None]).shape == (N, N)
assert abs(wrong[0]) < 0.01  # flat,
assert abs(wrong[1] - y.mean().item()) < 0.01  # at the mean,
assert abs(wrong[2] - y.var(correction=0).item()) < 0.01  # whose loss is the variance
assert abs(right[0] - 2) < 0.1
assert right[2] < 0.1 * wrong[2]

# %% [markdown]
# torch's own loss at least warns. Yours won't, unless you write `assert a.shape == b.shape`.

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    F.mse_loss(torch.zeros(N, 1), torch.zeros(N))
print(str(caught[0].message).partition(" that")[0])
assert "different to the input size" in str(caught[0].message)

# %% [markdown]
# The same trap waits in a softmax by hand. `counts.sum(1)` has lost a dimension: with 3 rows and 4
# columns the division raises, with as many rows as columns it goes through and divides column j by
# the sum of row j. `keepdim=True` is the cure, and the check is that rows sum to 1.

# %%
counts = torch.rand(4, 4) + 0.1
bad, good = counts / counts.sum(1), counts / counts.sum(1, keepdim=True)
print("row sums without keepdim", [round(v, 2) for v in bad.sum(1).tolist()])
print("row sums with keepdim   ", [round(v, 2) for v in good.sum(1).tolist()])
assert torch.allclose(good.sum(1), torch.ones(4))
assert not torch.allclose(bad.sum(1), torch.ones(4), atol=0.05)

# %% [figure]
x, y = x.numpy(), y.numpy()
figure, (left, right_axes) = panels(2, width_ratios=[1, 1.5])
prediction = 2 * x + 0.5
picture = left.imshow(abs(y - prediction[:, None]), cmap="Blues", vmin=0)
left.plot([0, N - 1], [0, N - 1], color=RED, linewidth=1.5)
left.text(24, 16, "what was meant", color=RED, rotation=-45, rotation_mode="anchor")
left.set(title="what (N,) - (N, 1) computes", xlabel="target", ylabel="prediction")
figure.colorbar(picture, ax=left, label="|target - prediction|")
right_axes.plot(x, y, ".", color=GREY, label="data")
right_axes.plot(x, right[0] * x + right[1], color=BLUE, label=f"(N,) and (N,): loss {right[2]:.2f}")
right_axes.plot(x, wrong[0] * x + wrong[1], color=RED, label=f"(N,) and (N, 1): {wrong[2]:.2f}")
right_axes.set(title="what training makes of it", xlabel="x", ylabel="y")
right_axes.legend(frameon=False, loc="upper left")
save(figure, __file__)

# %% [markdown]
# Left, the 64 × 64 differences between every prediction of the true line and every target; only the
# red diagonal was meant. Right, the two lines after the same 100 steps.
