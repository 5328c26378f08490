# %% [markdown]
# # 7. Batch norm, and why a GPT has layer norm
#
# Normalising means subtracting a mean and dividing by a standard deviation. Batch norm, layer norm
# and group norm differ in one thing only: over which numbers. Batch norm takes them from the whole
# batch. So it ties the examples to each other, and needs a second set of statistics, a second mode,
# and care with both. The other two look at one example at a time and need none of it.

# %%
import torch
from drawing import BLUE, GREY, panels, save
from torch import nn

# %% [markdown]
# ## Batch norm by hand
#
# For each feature, mean and variance over the batch. Then a gain and a bias, so that the network
# can undo it. At evaluation there may be one example only, or its neighbours may be chance: so
# batch norm keeps *running* averages of what it saw in training and uses those. They are no
# parameters, for no gradient trains them, yet they belong to the model: they must be saved, loaded
# and moved to a GPU with it. That is what `register_buffer` is for.

# %%


class BatchNorm(nn.Module):
    def __init__(self, features, momentum=0.1, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x):  # (N, C)
        if self.training:
            mean, var = x.mean(0), x.var(0, correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(x.var(0), self.momentum)  # / (N - 1): unbiased
        else:
            mean, var = self.running_mean, self.running_var
        return self.weight * (x - mean) / (var + self.eps).sqrt() + self.bias


torch.manual_seed(0)
N, C = 32, 12
mine, theirs = BatchNorm(C), nn.BatchNorm1d(C)
names = [name for name, _ in mine.named_parameters()]
print("parameters:", names, "buffers:", [name for name, _ in mine.named_buffers()])
assert set(mine.state_dict()) == {*names, "running_mean", "running_var"}

scale, centre = 3.0, 5.0
means = []
for _ in range(60):
    x = scale * torch.randn(N, C) + centre
    y = mine(x)
    torch.testing.assert_close(y, theirs(x))
    means.append(mine.running_mean[0].item())
print(f"a training batch after it: mean {y.mean().abs():.3f}, std {y.std():.3f}")
torch.testing.assert_close(mine.running_mean, theirs.running_mean)
torch.testing.assert_close(mine.running_var, theirs.running_var)
assert abs(mine.running_mean.mean() - centre) < 0.3
assert abs(mine.running_var.mean().sqrt() - scale) < 0.3

# %% [markdown]
# After k batches a fraction 0.9^k of the starting value 0 is left: after 60, less than 0.2 %. A
# model evaluated after a few steps, or trained with tiny batches, is evaluated with statistics that
# are wrong.

# %%
print(f"running mean after 1, 10, 60 batches: {means[0]:.2f}, {means[9]:.2f}, {means[59]:.2f}")
assert 0.9**60 < 0.002
assert abs(means[0] - 0.1 * centre) < 0.3
assert abs(means[59] - centre) < 0.7

# %% [markdown]
# ## Train and eval are two functions
#
# The same input, the same weights, and two results. In training mode one example alone has no
# variance, and torch refuses it. Forgetting `model.eval()` makes predictions depend on who else is
# in the batch; forgetting to go back to `model.train()` freezes the statistics.

# %%
x = scale * torch.randn(4, C) + centre + 2  # a batch from elsewhere
train_output, eval_output = mine.train()(x), mine.eval()(x)
print(f"mean of the output: train {train_output.mean():.2f}, eval {eval_output.mean():.2f}")
assert abs(train_output.mean()) < 0.01  # the shift is normalised away
assert abs(eval_output.mean() - 2 / scale) < 0.3  # the shift shows
try:
    theirs.train()(x[:1])
    raise AssertionError("one example has no variance")
except ValueError as error:
    print(str(error).split(",")[0])

# %% [markdown]
# ## Who influences whom
#
# The derivative of output i with respect to input j, for each pair of examples of a batch of eight.
# Layer norm normalises over the features of an example, group norm over groups of them. With
# either, and with batch norm in eval mode, examples are strangers to each other. With batch norm in
# training every example reads every other. (It acts as noise, and regularises. But a
# language model with it would see the future through the batch statistics.)

# %%
norms = {
    "batch, train": nn.BatchNorm1d(C).train(),
    "batch, eval": nn.BatchNorm1d(C).eval(),
    "layer": nn.LayerNorm(C),
    "group": nn.GroupNorm(3, C),
}
x = torch.randn(8, C)
influence = {}
for name, norm in norms.items():
    jacobian = torch.autograd.functional.jacobian(norm, x)  # (8, C, 8, C)
    influence[name] = jacobian.square().sum((1, 3)).sqrt()  # (8, 8)
    across = influence[name].clone().fill_diagonal_(0).max().item()
    print(f"{name:13} largest influence on another example {across:.2f}")
    assert (across > 0.1) == (name == "batch, train")

# %% [markdown]
# Group norm with one group is layer norm. And all of them are the same arithmetic: statistics over
# other dimensions of the same array.

# %%


def normalise(x, dims):
    mean, var = x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


torch.testing.assert_close(normalise(x, 0), nn.BatchNorm1d(C)(x))
torch.testing.assert_close(normalise(x, 1), nn.LayerNorm(C)(x))
torch.testing.assert_close(normalise(x.view(8, 3, 4), 2).view(8, C), nn.GroupNorm(3, C)(x))
torch.testing.assert_close(nn.GroupNorm(1, C)(x), nn.LayerNorm(C)(x))

# %% [figure]
figure, grid = panels(4, rows=2, height=5.2)
sets = {
    "batch norm": (slice(None), 4),
    "layer norm": (2, slice(None)),
    "group norm": (2, slice(4, 8)),
}
for each, (name, chosen) in zip(grid[0], sets.items(), strict=False):
    picture = torch.zeros(8, C)
    picture[chosen] = 1
    each.imshow(picture.numpy(), cmap="Blues", vmax=1.4)
    each.set(xticks=[i - 0.5 for i in range(C)], yticks=[i - 0.5 for i in range(8)])
    each.grid(color="0.8", linewidth=0.5)
    each.tick_params(length=0, labelbottom=False, labelleft=False)
    each.set(title=f"{name}: one mean", xlabel="feature", ylabel="example")
grid[0, 3].plot(range(1, 61), means, color=BLUE)
grid[0, 3].axhline(centre, color=GREY, linestyle="--")
grid[0, 3].set(title="running mean", xlabel="batch", ylabel="of one feature")
grid[0, 3].annotate("true mean", (2, centre), (0, -14), textcoords="offset points", color=GREY)
for each, (name, pairs) in zip(grid[1], influence.items(), strict=True):
    each.imshow(pairs.numpy(), cmap="Blues", vmin=0, vmax=3)
    each.set(title=f"{name}", xlabel="input of example", ylabel="output of example")
save(figure, __file__)

# %% [markdown]
# Above, the numbers that share one mean, and how batch norm's running mean finds the true one.
# Below, who influences whom: off the diagonal there is something in one case only.
