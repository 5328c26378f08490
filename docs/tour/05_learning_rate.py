# %% [markdown]
# # 5. How large a step: the update-to-data ratio, and why the rate must fall
#
# A learning rate means nothing by itself. What matters is how far a step moves the weights compared
# with their own size: a thousandth is the rule of thumb. And a rate that is right at the beginning
# is wrong at the end, where the noise of the batches keeps the weights from settling: lower it in
# steps, or along a cosine.

# %%
import argparse
import inspect
import math

import torch
from drawing import BLUE, GREEN, GREY, RED, panels, save
from torch import nn

import fastgpt
from fastgpt.gpt import TrainConfig
from fastgpt.gpt.optim import learning_rate

# %% [markdown]
# The text is a module of Python's own library, the model that of Bengio et al. 2003: the last eight
# characters, each a vector of ten numbers, a layer of tanh, and logits for the next character.

# %%
text = inspect.getsource(argparse)
characters = sorted(set(text))
tokens = torch.tensor([characters.index(c) for c in text])
context, C = 8, len(characters)
examples = tokens.unfold(0, context + 1, 1)
X, Y = examples[:, :-1], examples[:, -1]


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Embedding(C, 10),
            nn.Flatten(),
            nn.Linear(10 * context, 100),
            nn.Tanh(),
            nn.Linear(100, C),
        )
        nn.init.kaiming_normal_(self[2].weight, nonlinearity="tanh")


def batch(size=32):
    rows = torch.randint(len(Y), (size,))
    return X[rows], Y[rows]


def train(steps, rate, optimizer_class=torch.optim.SGD, watch=None):
    """Train with rate(step) as the learning rate; `watch` sees each update."""
    torch.manual_seed(0)
    model = MLP()
    optimizer = optimizer_class(model.parameters())
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate(step)
        x, y = batch()
        loss = fastgpt.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()] if watch else []
        optimizer.step()
        if watch:
            watch(model, before)
        losses.append(loss.item())
    return model, losses


# %% [markdown]
# ## std(update) / std(weights)
#
# Far below 1e-3 the weights barely move; far above, each step overwrites what the last ones
# learned. The rule is for a long run at one rate. A run as short as those below begins with more,
# and comes down through 1e-3.
#
# The update is the parameter after the step minus the parameter before. For plain SGD that is
# −lr · gradient, but with momentum, Adam, clipping or weight decay it is not, so it is measured.

# %%


def ratios(rate, optimizer_class=torch.optim.SGD, steps=150):
    """log10 of the ratio of the hidden layer's weights, for each step."""
    found = []

    def watch(model, before):
        after = model[2].weight.detach()
        found.append(math.log10((after - before[1]).std() / after.std()))

    train(steps, lambda step: rate, optimizer_class, watch)
    return found


found = {rate: ratios(rate) for rate in (0.001, 0.03, 2.0)}
middle = {rate: sorted(values)[len(values) // 2] for rate, values in found.items()}
for rate, value in middle.items():
    print(f"SGD, rate {rate:6}: median ratio 10^{value:.1f}")
assert middle[0.001] < -4  # would take forever
assert -3.5 < middle[0.03] < -2.5  # about 1e-3
assert middle[2.0] > -1.5  # leaps

# %% [markdown]
# Adam divides the gradient by its own size, so that its first step moves each weight by the rate
# itself, whatever the gradient. The ratio is then rate / std(weights): for the weights of a GPT,
# whose standard deviation is 0.02, a rate of 1e-3 means 5 % in one step. This is what the warm-up
# is for, and why a rate that suits SGD is far too large for Adam.

# %%
update = []
train(1, lambda step: 1e-3, torch.optim.Adam, lambda m, b: update.append(m[4].bias - b[4]))
print(f"Adam's first step: every update is {update[0].abs().median():.6f}")
assert (update[0].abs() - 1e-3).abs().max() < 1e-5

# %% [markdown]
# ## A rate that falls
#
# Every batch gives a gradient with noise on it. A large rate makes fast progress as long as the
# slope is larger than the noise; then the weights shake around the minimum, the wider the larger
# the rate. A smaller rate lets them settle. Two schedules: *step decay*, here divided by 10 after
# half of the steps and again after four fifths; and the *cosine*, of the reference GPT's own
# training, from the peak to 0 along half a wave, after a short warm-up.

# %%
steps, top = 800, 1.0
config = TrainConfig(steps=steps, lr=top, min_lr=0.0, warmup=20)
schedules = {
    "constant": lambda step: top,
    "step decay": lambda step: top * 0.1 ** (step >= steps // 2) * 0.1 ** (step >= steps * 4 // 5),
    "cosine": lambda step: learning_rate(step, config),
    "constant, small": lambda step: 0.03 * top,
}
curves, final, cosine_ratios = {}, {}, []


def watch(model, before):
    after = model[2].weight.detach()
    cosine_ratios.append(((after - before[1]).std() / after.std()).item())


for name, schedule in schedules.items():
    watching = watch if name == "cosine" else None
    model, curves[name] = train(steps, schedule, watch=watching)
    with torch.no_grad():
        final[name] = fastgpt.cross_entropy(model(X[::4]), Y[::4]).item()
    print(f"{name:16} loss over a quarter of the text {final[name]:.3f}")
assert final["cosine"] < final["constant"] - 0.1
assert final["step decay"] < final["constant"] - 0.1
assert final["constant, small"] > final["cosine"] + 0.1  # never got there

# %% [figure]
figure, (left, middle_axes, right) = panels(3)
for (rate, values), colour in zip(found.items(), (BLUE, GREEN, RED), strict=True):
    left.plot(values, color=colour, label=f"rate {rate}")
left.axhline(-3, color="black", linewidth=1, linestyle="--")
left.annotate("1e-3", (151, -2.97))
left.set(title="update-to-data ratio", xlabel="step", ylabel="log10 of std(update) / std(weights)")
left.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.12))
colours = dict(zip(schedules, (RED, GREEN, BLUE, GREY), strict=True))
for name, schedule in schedules.items():
    middle_axes.plot([schedule(step) for step in range(steps)], color=colours[name])
    smooth = torch.tensor(curves[name]).unfold(0, 50, 1).mean(1).numpy()
    right.plot(
        range(50, steps + 1), smooth, color=colours[name], label=f"{name}: {final[name]:.2f}"
    )
middle_axes.set(title="schedules", xlabel="step", ylabel="learning rate")
right.set(title="loss, mean of 50 batches", xlabel="step", ylabel="nats per character")
right.legend(frameon=False, fontsize=9)
save(figure, __file__)

# %% [markdown]
# Left, three rates and the line at 1e-3. Right, the losses of the schedules in the middle; in the
# legend the loss at the end. The curves of the decayed rates drop where the rate does.
#
# The ratio of the cosine's run, by the way, comes down through the line:

# %%
early, late = sum(cosine_ratios[50:100]) / 50, sum(cosine_ratios[730:780]) / 50
print(f"mean ratio: {early:.0e} in steps 50 to 100, {late:.0e} in steps 730 to 780")
assert early > 1e-2
assert late < 1e-3
