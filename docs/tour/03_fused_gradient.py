# %% [markdown]
# # 3. One fused op and its gradient in one line
#
# Autograd walks the naive loss back step by step, and writes a tensor of the logits' size at each.
# All of it collapses to one line: softmax minus one-hot. That is why a loss can be a single op with
# a gradient written by hand, why it is faster and needs less memory, and why it is more accurate.

# %%
import torch
from drawing import BLUE, RED, panels, save
from torch.nn import functional as F

import fastgpt

torch.manual_seed(0)
N, C = 16, 27
logits = (2 * torch.randn(N, C, dtype=torch.float64)).requires_grad_()
Y = torch.randint(C, (N,))
rows = torch.arange(N)

# %% [markdown]
# ## The chain, by hand
#
# The loss of chapter 2, one operation a line, each result kept. Then backwards: for each result its
# gradient, from those computed after it. `d_counts` has two terms because the counts are used
# twice, in the quotient and in the sum.

# %%
counts = logits.exp()
total = counts.sum(1, keepdim=True)
inverse = total**-1
prob = counts * inverse
log_prob = prob.log()
loss = -log_prob[rows, Y].mean()
steps = {"counts": counts, "total": total, "inverse": inverse, "prob": prob, "log_prob": log_prob}
for step in steps.values():
    step.retain_grad()  # or autograd forgets the gradients between the loss and the leaves
loss.backward()

with torch.no_grad():
    d = {}
    d["log_prob"] = torch.zeros(N, C, dtype=torch.float64)
    d["log_prob"][rows, Y] = -1 / N
    d["prob"] = d["log_prob"] / prob
    d["inverse"] = (d["prob"] * counts).sum(1, keepdim=True)
    d["total"] = -d["inverse"] * total**-2
    d["counts"] = d["prob"] * inverse + d["total"].expand(N, C)
    d_logits = d["counts"] * counts

for name, step in steps.items():
    print(f"d_{name:9} largest difference to autograd {(d[name] - step.grad).abs().max():.0e}")
    torch.testing.assert_close(d[name], step.grad)
torch.testing.assert_close(d_logits, logits.grad)

# %% [markdown]
# ## The closed form
#
# Differentiate the log-sum-exp form instead. For one row,
#
# ```
#   loss = log Σ_k e^x_k − x_y         d loss / d x_j = e^x_j / Σ_k e^x_k − [j = y] = p_j − [j = y]
# ```
#
# and the mean divides by N. Every class is pushed down by the probability it was given, the target
# is pulled up by what it lacks, and the pushes and the pull of a row cancel exactly.

# %%
closed = logits.detach().softmax(1)
closed[rows, Y] -= 1
closed /= N
torch.testing.assert_close(closed, logits.grad)
print(f"largest sum over a row: {closed.sum(1).abs().max():.0e}")
assert closed.sum(1).abs().max() < 1e-15
assert (closed < 0).sum() == N  # of each row only the target's

# %% [markdown]
# ## As an op
#
# `autograd.Function` ties a forward to a backward of one's own. This one saves the probabilities
# and the targets, nothing else; the upstream gradient `d_loss` multiplies. gradcheck compares with
# finite differences.

# %%


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, Y):
        m = logits.max(1, keepdim=True).values
        prob = (logits - m).exp_()  # in place: one tensor of the size of the logits,
        S = prob.sum(1, keepdim=True)
        prob /= S  # and still the same one
        rows = torch.arange(len(Y))
        ctx.save_for_backward(prob, Y)
        return ((S.log() + m).squeeze(1) - logits[rows, Y]).mean()

    @staticmethod
    def backward(ctx, d_loss):
        prob, Y = ctx.saved_tensors
        scale = d_loss / len(Y)
        d_logits = prob * scale
        d_logits[torch.arange(len(Y)), Y] -= scale
        return d_logits, None


assert torch.autograd.gradcheck(CrossEntropy.apply, (logits, Y))
torch.testing.assert_close(CrossEntropy.apply(logits, Y), F.cross_entropy(logits, Y))

# %% [markdown]
# ## What it saves
#
# A larger batch, in float32. `saved_tensors_hooks` shows what autograd keeps between forward and
# backward, counting each memory once; the profiler, which operations run and the memory they
# allocate, both in units of the logits.

# %%
N, C = 256, 5000
logits = (2 * torch.randn(N, C)).requires_grad_()
Y = torch.randint(C, (N,))


def naive(logits, Y):
    counts = logits.exp()
    prob = counts / counts.sum(1, keepdims=True)
    return -prob.log()[torch.arange(N), Y].mean()


def cost(loss_of):
    """What is kept for backward, what is allocated in all, in units of the logits; operations."""
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() != logits.data_ptr():
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(logits, Y).backward()  # also what runs only once, so that it is not profiled
    with torch.profiler.profile(profile_memory=True) as profile:
        loss_of(logits, Y).backward()
    events = profile.events()
    allocated = sum(e.self_cpu_memory_usage for e in events if e.self_cpu_memory_usage > 0)
    large = [e for e in events if e.self_cpu_memory_usage >= 4 * N * C]
    return sum(kept.values()) / (4 * N * C), allocated / (4 * N * C), len(large)


costs = {}
print("           kept  allocated  tensors of N x C")
for loss_of in (naive, CrossEntropy.apply):
    logits.grad = torch.zeros_like(logits)
    name = "naive" if loss_of is naive else "closed"
    costs[name] = cost(loss_of)
    print(
        f"{name:9} {costs[name][0]:5.1f}      {costs[name][1]:5.1f}             {costs[name][2]:5}"
    )
assert [round(c, 1) for c in costs["closed"]] == [1, 2, 2]  # the probabilities, and the gradient
assert costs["naive"][0] >= 2
assert costs["naive"][2] >= 4 * costs["closed"][2]

# %% [markdown]
# The closed form allocates the probabilities and the gradient. At 32,768 tokens of a vocabulary of
# 50,257, one float32 tensor of that size is 6.6 GB, so the difference decides what fits; and on
# every processor, writing and reading it takes longer than its arithmetic. fastgpt's kernels go
# further: they keep two numbers per row instead of the probabilities and work these out again.

# %%
upstream = torch.rand(())
found = []
for loss_of in (CrossEntropy.apply, F.cross_entropy, fastgpt.cross_entropy):
    (gradient,) = torch.autograd.grad(loss_of(logits, Y), logits, upstream)
    found.append(gradient)
torch.testing.assert_close(found[1], found[0])
torch.testing.assert_close(found[2], found[0])
print(f"one tensor: {32768 * 50257 * 4 / 1e9:.1f} GB")
assert round(32768 * 50257 * 4 / 1e9, 1) == 6.6

# %% [markdown]
# ## And it is right where the chain is not
#
# One row again, the target's logit 0 and the other's a. As a grows the gradient of the other must
# go to 1. The chain divides by the square of the sum, on the way: e^−2a is rounded to fewer and
# fewer digits past a = 44, and is 0 past a = 52. The loss is still right there, and the model
# quietly stops learning from its worst mistakes.

# %%


def other_gradient(loss_of, a):
    """The derivative of log(1 + e^a), in float32."""
    row = torch.tensor([[0.0, a]], requires_grad=True)
    loss = loss_of(row, torch.tensor([0]))
    assert abs(loss.item() - a) < 1e-3  # right, from each
    return torch.autograd.grad(loss, row)[0][0, 1].item()


def naive_row(logits, Y):
    counts = logits.exp()
    return -(counts / counts.sum(1, keepdims=True)).log()[0, Y[0]]


print("   a   naive   closed   fastgpt")
for a in (10.0, 50.0, 51.5, 80.0):
    naive_one, closed_one, ours = (
        other_gradient(loss_of, a)
        for loss_of in (naive_row, CrossEntropy.apply, fastgpt.cross_entropy)
    )
    print(f"{a:4.1f}  {naive_one:6.4f}   {closed_one:6.4f}    {ours:6.4f}")
    assert abs(closed_one - 1) < 1e-4
    assert abs(ours - 1) < 1e-4
assert other_gradient(naive_row, 80.0) == 0

# %% [figure]
figure, (left, middle, right) = panels(3, width_ratios=[2, 0.9, 1.5])
limit = 1 / len(closed)
picture = left.imshow(closed.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
left.set(title="softmax - one-hot, over N = 16", xlabel="class", ylabel="example")
figure.colorbar(picture, ax=left, label="gradient of the loss")

middle.bar(["naive", "closed"], [c[1] for c in costs.values()], color=[RED, BLUE], width=0.6)
middle.set(title="memory allocated", ylabel="tensors of the logits' size")

values = [k / 2 for k in range(20, 176)]
right.plot(values, [other_gradient(naive_row, a) for a in values], color=RED, label="naive")
right.plot(
    values, [other_gradient(CrossEntropy.apply, a) for a in values], color=BLUE, label="closed"
)
right.set(title="after a bad mistake", xlabel="other logit - target's logit")
right.set_ylabel("gradient of the other logit")
right.legend(frameon=False, loc="center left")
save(figure, __file__)

# %% [markdown]
# Left, the gradient of the first batch: in each row one blue target is pulled up (its gradient is
# negative), the others are pushed down. Right, in float32, the chain's gradient rounds more and
# more coarsely, and is then 0.
