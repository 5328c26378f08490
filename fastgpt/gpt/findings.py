"""Warnings in plain language: a layer that is dead, saturated, vanishing or exploding."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

DEAD = 0.25  # share of a layer's units that were active nowhere in the batch
SATURATED = 0.5  # share of a bounded function's outputs that are near its ends
ONE_KEY = 0.05  # share of ln(visible keys) that is left of a layer's attention entropy
VANISHING = 1e-3  # of the root mean square in another layer
EXPLODING = 1e3


@dataclass(frozen=True)
class Finding:
    """What is wrong (`kind`), in which layers, and in a sentence with what to try."""

    kind: str  # dead, saturated, vanishing or exploding
    layers: tuple[str, ...]
    text: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}


def find(record: dict[str, Any]) -> list[Finding]:
    """What is wrong in a record of `Diagnostics`, at most one finding of each rule."""
    return [finding for rule in _RULES if (finding := rule(record)) is not None]


def group_of(name: str) -> str:
    """The part of a model that a layer or parameter is in: up to the first number in its name.

    transformer.h.3.mlp.c_fc.weight -> transformer.h.3; transformer.wte.weight -> transformer.wte.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or name


def is_numbered(name: str) -> bool:
    """Whether a module is one of a list, such as the blocks of a GPT, and so has a depth."""
    return name.rpartition(".")[2].isdecimal()


def gradient_rms(record: dict[str, Any]) -> dict[str, float | None]:
    """Of each group, in order, the root mean square of its matrices' gradients; None: not finite.

    A root mean square can be compared between groups of different size, which a norm can't.
    """
    sums: dict[str, list[float]] = {}
    for name, seen in record["gradients"].items():
        if len(seen["shape"]) >= 2:
            total = sums.setdefault(group_of(name), [0.0, 0.0])
            total[0] += math.nan if seen["norm"] is None else seen["norm"] ** 2
            total[1] += math.prod(seen["shape"])
    return {
        group: math.sqrt(square / count) if math.isfinite(square) else None
        for group, (square, count) in sums.items()
    }


def _dead(record: dict[str, Any]) -> Finding | None:
    shares = {n: seen["dead"] for n, seen in record["activations"].items() if "dead" in seen}
    layers = {name: share for name, share in shares.items() if share >= DEAD}
    return _finding(
        "dead", "units", layers, lambda share: f"{share:.0%} of them",
        "They were flat on every example of the batch, so they let no gradient through and do not "
        "learn. Smaller initial weights and biases, or a smaller learning rate, keep units alive.",
    )  # fmt: skip


def _saturated(record: dict[str, Any]) -> Finding | None:
    activations = record["activations"].items()
    shares = {name: seen["saturated"] for name, seen in activations if "saturated" in seen}
    layers = {n: share for n, share in shares.items() if share is not None and share >= SATURATED}
    return _finding(
        "saturated", "outputs", layers, lambda share: f"{share:.0%} of them",
        "They are at the ends of their function, where it is flat and gradients are lost. Smaller "
        "weights, or a normalisation before the function, bring them back.",
    )  # fmt: skip


def _one_key(record: dict[str, Any]) -> Finding | None:
    layers = {}
    for name, seen in record["attention"].items():
        if None not in seen["entropy"]:
            mean = sum(seen["entropy"]) / len(seen["entropy"])
            if mean < ONE_KEY * seen["limit"]:
                layers[name] = mean
    return _finding(
        "saturated", "attention", layers, lambda entropy: f"entropy {entropy:.2g} nats",
        "Nearly all of the weight is on one key, where the softmax is flat, and queries and keys "
        "learn next to nothing. Smaller query and key weights keep it diffuse.",
    )  # fmt: skip


def _not_finite(record: dict[str, Any]) -> Finding | None:
    bad = {name: 0.0 for name, seen in record["activations"].items() if seen["std"] is None}
    bad |= {name: 0.0 for name, seen in record["gradients"].items() if seen["norm"] is None}
    return _finding(
        "exploding", "values", bad, lambda _: "NaN or infinite",
        "A smaller learning rate, clipping, or float32 keeps them finite.",
    )  # fmt: skip


def _gradients(far: Callable[[float], bool], kind: str, advice: str) -> Any:
    def rule(record: dict[str, Any]) -> Finding | None:
        depths = {g: rms for g, rms in gradient_rms(record).items() if is_numbered(g)}
        if len(depths) < 2:
            return None
        last = next(reversed(depths))  # which the gradient comes to first
        reference = depths[last]
        if reference is None:
            return None  # _not_finite's affair
        layers = {}
        for group, rms in depths.items():
            if rms is not None and far(ratio := rms / reference if reference else 0.0):
                layers[group] = ratio
        return _finding(
            kind, "gradient", layers, lambda r: f"{r:.1e} of that of {last}" if r else "0", advice
        )

    return rule


def _activations(far: Callable[[float], bool], kind: str, advice: str) -> Any:
    def rule(record: dict[str, Any]) -> Finding | None:
        stacks: dict[str, dict[str, float]] = {}  # the same part of each block, in order
        for name, seen in record["activations"].items():
            group = group_of(name)
            dead = seen.get("dead", 0.0) >= DEAD  # which has a finding of its own
            if is_numbered(group) and seen["std"] is not None and not dead:
                stacks.setdefault(name.removeprefix(group), {})[name] = seen["std"]
        layers = {}
        for stds in stacks.values():
            reference = next(iter(stds.values()))
            for name, std in stds.items():
                if reference and far(std / reference):
                    layers[name] = std / reference
        return _finding(
            kind,
            "activations",
            layers,
            lambda r: f"std {r:.1e} of the first's" if r else "std 0",
            advice,
        )

    return rule


def _finding(
    kind: str,
    what: str,
    layers: dict[str, float],
    describe: Callable[[float], str],
    advice: str,
) -> Finding | None:
    if not layers:
        return None
    shown = ", ".join(f"{name} ({describe(value)})" for name, value in list(layers.items())[:3])
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return Finding(kind, tuple(layers), f"{kind} {what}: {shown}{more}. {advice}")


_RULES: tuple[Callable[[dict[str, Any]], Finding | None], ...] = (
    _dead,
    _saturated,
    _one_key,
    _not_finite,
    _gradients(
        lambda ratio: ratio < VANISHING,
        "vanishing",
        "Almost nothing reaches these layers, and they do not learn. Residual connections, "
        "normalisation, or weights scaled to their fan-in keep the gradient's size.",
    ),
    _gradients(
        lambda ratio: ratio > EXPLODING,
        "exploding",
        "It grows on its way back. Residual connections, normalisation, or weights scaled to their "
        "fan-in keep its size, and clipping limits the harm.",
    ),
    _activations(
        lambda ratio: ratio < VANISHING,
        "vanishing",
        "The signal fades with the depth. Weights scaled to their fan-in or normalisation keep it.",
    ),
    _activations(
        lambda ratio: ratio > EXPLODING,
        "exploding",
        "The signal grows with the depth. Weights scaled to their fan-in or normalisation hold it.",
    ),
)
