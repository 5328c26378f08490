"""What happens inside a model while it trains: activations, gradients, updates, attention.

    diagnostics = Diagnostics(model, optimizer, every=100, folder=run)
    for step in range(1, steps + 1):
        with diagnostics.observe(step) as observation:
            loss_of(model).backward()
            observation.gradients()  # before they are clipped, where they are
            optimizer.step()

The first and every 100th step are looked at, by hooks that are there for that step only: in the
others the model runs as if this file did not exist. A record is a line of diagnostics.jsonl
(`Observation.record` says what is in it), from which `panels` draws, `findings` judges, and the
report is made. Looking changes no number that training computes; it costs about a forward pass, and
for the time of the step a copy of the parameters.

The ratio of update to data, and the share of saturated and of dead units, as Karpathy's "Building
makemore" (part 3) looks at them; the update is the parameter's own change, not the learning rate
times the gradient, which under Adam it is not.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UsageError, require
from .findings import Finding, find
from .history import HistoryFile, Record, read_history
from .model import CausalSelfAttention

# At inputs up to this the slope is less than 0.01 in size, and a unit passes nearly nothing on.
OFF_BELOW: dict[type[nn.Module], float] = {nn.ReLU: 0.0, nn.GELU: -3.1, nn.SiLU: -6.3, nn.ELU: -4.6}
# The ends of a bounded function's outputs; beyond 0.97 of the way from the middle, it is saturated.
BOUNDS: dict[type[nn.Module], tuple[float, float]] = {nn.Tanh: (-1.0, 1.0), nn.Sigmoid: (0.0, 1.0)}
SATURATED = 0.97
PASSED_OVER = (nn.Dropout, nn.Identity)

# The bins of the histograms lie between these: four to a decade of size, on both sides of 0.
_SIZES = [10 ** (quarter / 4) for quarter in range(-40, 9)]  # 1e-10 ... 100
EDGES = [*(-size for size in reversed(_SIZES)), *_SIZES]
ENDS = 1e30  # stands for the infinite ends of the outer bins, where a number is needed

QUERIES, SEQUENCES = 8, 4  # of each head, whose attention is looked at: not L x S of everything
CHUNK = 1 << 22  # numbers that a histogram takes at a time


class Diagnostics:
    """Looks at `model` in every `every`-th step of `optimizer`, and notes it in `folder`.

    every: steps from one look to the next, beside the first step, 1, which shows how the model was
        initialised; 0 never looks, and then nothing is written.
    tensorboard: also write the histograms and ratios to folder/tensorboard; MissingExtraError
        without the extra `tensorboard`.
    say: called with a line for each warning (see `findings`), once, until it has been untrue.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: int,
        folder: Path,
        *,
        tensorboard: bool = False,
        say: Callable[[str], object] = print,
    ) -> None:
        if every < 0:
            raise UsageError(f"diagnostics must be at least 0 steps apart, got {every}")
        self.model, self.optimizer, self.every, self.folder = model, optimizer, every, folder
        self.history = HistoryFile(folder / "diagnostics.jsonl")
        self._say = say
        self._said: set[tuple[str, str]] = set()
        self._tensorboard: Any = None
        if every and tensorboard:
            require("tensorboard")
            self._tensorboard = import_module("torch.utils.tensorboard")

    def start(self, last_step: int | None = None) -> None:
        """Begin a new history, or continue the one in the folder after `last_step`."""
        self.history.start(last_step)
        if self._tensorboard is not None:
            purge = None if last_step is None else last_step + 1
            self._writer = self._tensorboard.SummaryWriter(
                str(self.folder / "tensorboard"), purge_step=purge
            )

    def observe(self, step: int) -> "AbstractContextManager[Observation | Unobserved]":
        """Around one step, the `step`-th: the forward and backward passes and optimizer.step()."""
        look = self.every and (step == 1 or step % self.every == 0)
        return self._observe(step) if look else _UNOBSERVED

    @contextmanager
    def _observe(self, step: int) -> "Iterator[Observation]":
        observation = Observation(self.model, self.optimizer)
        with observation.hooks():
            yield observation
        record = {"step": step, **observation.record()}
        found = find(record)
        record["findings"] = [finding.to_json() for finding in found]
        self.history.append(record)
        if self._tensorboard is not None:
            write_events(self._writer, record)
        self._tell(step, found)

    def draw(self) -> None:
        """Draw the panels of all that was seen so far, as PNG files in folder/diagnostics."""
        if records := read_history(self.history.path) if self.every else []:
            from .panels import draw_panels  # only now: to look needs no plots

            draw_panels(self.folder / "diagnostics", records)

    def _tell(self, step: int, found: list[Finding]) -> None:
        now = {(finding.kind, layer) for finding in found for layer in finding.layers}
        for finding in found:
            if any((finding.kind, layer) not in self._said for layer in finding.layers):
                self._say(f"warning at step {step:,}: {finding.text}")
        self._said = now


class Unobserved:
    """What `Diagnostics.observe` gives for a step that is not looked at."""

    def gradients(self) -> None:
        """Nothing."""


_UNOBSERVED = nullcontext(Unobserved())


class Observation:
    """One step, as seen by hooks on the modules, on each attention, and on the optimiser."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._layers: dict[str, _Layer] = {}
        self._gradients: Record = {}
        self._updates: Record = {}
        self._attention: Record = {}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Look, inside the block. The hooks go with it, however it ends."""
        with ExitStack() as stack:
            # A compiled model was compiled without the hooks.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for name, module in _layers(self.model):
                self._layers[name] = layer = _Layer(module)
                stack.callback(module.register_forward_hook(layer).remove)
            for name, module in self.model.named_modules():
                if isinstance(module, CausalSelfAttention):
                    stack.callback(setattr, module, "attention", module.attention)
                    module.attention = self._watch(name, module.attention)
            before = self.optimizer.register_step_pre_hook(self._before_step)
            stack.callback(before.remove)
            after = self.optimizer.register_step_post_hook(self._after_step)
            stack.callback(after.remove)
            yield

    @torch.no_grad()
    def gradients(self) -> None:
        """Note the gradients as they are now; without this call, as the optimiser gets them."""
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            seen: Record = {"shape": list(parameter.shape), "norm": 0.0}
            if gradient is not None:
                seen["norm"] = _number(gradient.float().norm().item())
                if gradient.dim() >= 2:
                    seen["histogram"] = histogram(gradient)
            self._gradients[name] = seen

    def record(self) -> Record:
        """What was seen, in JSON's types; a number that is not finite is null.

        activations: of each layer, in the order of the modules, the mean and std of its outputs,
            and of an activation function `units`, the share of them that are `dead` (flat on all of
            the batch: see OFF_BELOW, BOUNDS), and, if it is bounded, that of `saturated` outputs
        gradients: of each parameter shape and norm, and of matrices the counts in the bins of EDGES
        updates: of each parameter log10 of std(update) / std(data); null where either is 0
        attention: of each attention layer the `entropy` of each head in nats, the mean over QUERIES
            positions of SEQUENCES sequences, and its `limit`, the mean of ln(visible keys)
        """
        return {
            "activations": {n: layer.record() for n, layer in self._layers.items() if layer.calls},
            "gradients": self._gradients,
            "updates": self._updates,
            "attention": self._attention,
        }

    @torch.no_grad()
    def _before_step(self, *_: object) -> None:
        if not self._gradients:
            self.gradients()
        self._data = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        for name, before in self._data.items():
            update = self.parameters[name].detach() - before
            stds = [x.float().std(correction=0).item() for x in (update, before)]
            both = all(0 < std < math.inf for std in stds)
            self._updates[name] = _number(math.log10(stds[0] / stds[1])) if both else None
        self._data.clear()

    def _watch(self, name: str, attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            causal = options.get("is_causal") and q.shape == k.shape
            if causal and options.keys() <= {"is_causal", "dropout_p", "scale"}:
                self._attention[name] = _entropy(q, k, options.get("scale"))
            return attention(q, k, v, **options)

        return watched


class _Layer:
    """A forward hook that gathers the statistics of a module's outputs, over all its calls."""

    def __init__(self, module: nn.Module) -> None:
        self.kind = type(module)
        self.calls: list[Tensor] = []  # each: how many outputs, their mean, variance, saturated
        self.flat: Tensor | None = None  # (units,): those that were flat everywhere so far

    @torch.no_grad()
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        if not (isinstance(y, Tensor) and y.is_floating_point() and y.numel()):
            return
        y = y.detach().float()
        variance, mean = torch.var_mean(y, correction=0)
        saturated = torch.zeros_like(mean)
        flat: Tensor | None = None
        if self.kind in BOUNDS:
            low, high = BOUNDS[self.kind]
            flat = (y - (low + high) / 2).abs() > SATURATED * (high - low) / 2
            saturated = flat.float().mean()
        elif self.kind in OFF_BELOW:
            flat = inputs[0] <= OFF_BELOW[self.kind]
        if flat is not None:
            flat = flat.reshape(-1, *(flat.shape[-1:] or (1,))).all(0)
            self.flat = flat if self.flat is None else self.flat & flat
        count = torch.full_like(mean, y.numel())
        self.calls.append(torch.stack([count, mean, variance, saturated]))

    def record(self) -> Record:
        rows = torch.stack(self.calls).tolist()  # waits for a GPU, once a layer
        total = sum(count for count, *_ in rows)
        mean = sum(count * mean for count, mean, *_ in rows) / total
        variance = sum(count * (var + (m - mean) ** 2) for count, m, var, _ in rows) / total
        seen: Record = {"mean": _number(mean), "std": _number(math.sqrt(variance))}
        if self.flat is not None:
            seen |= {"units": len(self.flat), "dead": _number(self.flat.float().mean().item())}
        if self.kind in BOUNDS:
            seen["saturated"] = _number(sum(row[0] * row[3] for row in rows) / total)
        return seen


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose outputs are looked at: those without children, and the blocks of a list."""
    blocks = {
        id(block)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for block in module
    }
    for name, module in model.named_modules():
        leaf = not any(True for _ in module.children())
        if (leaf or id(module) in blocks) and not isinstance(module, PASSED_OVER):
            yield name, module


@torch.no_grad()
def _entropy(q: Tensor, k: Tensor, scale: float | None) -> Record:
    """Causal attention's entropy for q, k (B, nh, T, hs): at most (b, nh, QUERIES, T) scores."""
    T, hs = q.shape[-2:]
    positions = sorted({(i + 1) * T // QUERIES - 1 for i in range(QUERIES)} - {-1})
    position = torch.tensor(positions, device=q.device)
    q, k = q[:SEQUENCES, :, position].float(), k[:SEQUENCES].float()
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(hs) if scale is None else scale)
    hidden = torch.arange(T, device=q.device) > position[:, None]  # (QUERIES, T)
    log_p = scores.masked_fill(hidden, -math.inf).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(hidden, 0.0)).sum(-1)  # (b, nh, QUERIES)
    limit = sum(math.log(1 + p) for p in positions) / len(positions)
    # Rounding can take the entropy of a single key below 0.
    heads = entropy.mean((0, 2)).clamp(min=0).tolist()
    return {"entropy": [_number(head) for head in heads], "limit": _number(limit)}


def histogram(x: Tensor) -> list[int]:
    """How many numbers of x lie in each of the len(EDGES) + 1 bins between EDGES; NaN in the last.

    A bin holds its upper edge, not its lower. The middle one holds 0.
    """
    edges = torch.tensor(EDGES, device=x.device)
    counts = torch.zeros(len(EDGES) + 1, dtype=torch.int64, device=x.device)
    for part in x.detach().float().flatten().split(CHUNK):
        bins = torch.bucketize(part, edges, out_int32=True)
        counts += torch.bincount(bins, minlength=len(counts))
    result: list[int] = counts.tolist()
    return result


def write_events(writer: Any, record: Record) -> None:
    """Write a record to a SummaryWriter: histograms of gradients, and the rest as scalars."""
    step = record["step"]
    middles = [(a + b) / 2 for a, b in pairwise(EDGES)]
    middles = [EDGES[0], *middles, EDGES[-1]]
    for name, seen in record["gradients"].items():
        if seen["norm"] is not None:
            writer.add_scalar(f"gradient norm/{name}", seen["norm"], step)
        if counts := seen.get("histogram"):
            filled = [i for i, count in enumerate(counts) if count]
            pairs = list(zip(middles, counts, strict=True))
            writer.add_histogram_raw(
                f"gradient/{name}",
                min=middles[filled[0]], max=middles[filled[-1]], num=sum(counts),
                sum=sum(x * n for x, n in pairs), sum_squares=sum(x * x * n for x, n in pairs),
                bucket_limits=[*EDGES, ENDS], bucket_counts=counts, global_step=step,
            )  # fmt: skip
    for name, ratio in record["updates"].items():
        if ratio is not None:
            writer.add_scalar(f"log10 of update to data/{name}", ratio, step)
    for name, seen in record["activations"].items():
        for key in ("mean", "std", "dead", "saturated"):
            if seen.get(key) is not None:
                writer.add_scalar(f"activation {key}/{name}", seen[key], step)
    for name, seen in record["attention"].items():
        for head, entropy in enumerate(seen["entropy"]):
            if entropy is not None:
                writer.add_scalar(f"attention entropy/{name}, head {head}", entropy, step)
    writer.flush()


def _number(x: float) -> float | None:
    """x to the five digits that a plot can show, in JSON."""
    return float(f"{x:.5g}") if math.isfinite(x) else None
