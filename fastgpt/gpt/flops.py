"""Arithmetic of a training step, and the share of a GPU's peak that it uses: MFU.

Chowdhery et al. 2022, "PaLM", appendix B: a forward and backward pass takes, per token,

    6 N + 12 n_layer n_embd T

operations, where N are the parameters that multiply (all but the position embeddings; the tied
matrix as the output layer) and T is the context. It is what the model needs, by convention with the
half of the attention scores that causality hides, and without what checkpointing computes again:
so numbers compare with published ones, and an implementation gains by doing less.
"""

import re

import torch

from .config import GPTConfig

# Peak dense TFLOP/s by name of the device, without structured sparsity, from the vendors' data
# sheets (NVIDIA: V100, T4, A100, A10, A30, A40, L4, L40S, H100, H200, HGX B200 and the Ampere GA102
# and Ada architecture papers, whose rates with float32 accumulation are taken; AMD: MI300X,
# MI325X). A name is matched whole, as words, and the first that fits counts. No entry: unknown.
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("B200", {"bfloat16": 2250, "float16": 2250, "tf32": 1125, "float32": 75}),
    ("H200 NVL", {"bfloat16": 835.5, "float16": 835.5, "tf32": 417.5, "float32": 60}),
    ("H200", {"bfloat16": 989.5, "float16": 989.5, "tf32": 494.5, "float32": 67}),
    ("GH200", {"bfloat16": 989.5, "float16": 989.5, "tf32": 494.5, "float32": 67}),
    ("H100 PCIe", {"bfloat16": 756, "float16": 756, "tf32": 378, "float32": 51}),
    ("H100 NVL", {"bfloat16": 835.5, "float16": 835.5, "tf32": 417.5, "float32": 60}),
    ("H100", {"bfloat16": 989.5, "float16": 989.5, "tf32": 494.5, "float32": 67}),
    ("A100", {"bfloat16": 312, "float16": 312, "tf32": 156, "float32": 19.5}),
    ("A40", {"bfloat16": 149.7, "float16": 149.7, "tf32": 74.8, "float32": 37.4}),
    ("A30", {"bfloat16": 165, "float16": 165, "tf32": 82, "float32": 10.3}),
    ("A10", {"bfloat16": 125, "float16": 125, "tf32": 62.5, "float32": 31.2}),
    ("L40S", {"bfloat16": 362, "float16": 362, "tf32": 183, "float32": 91.6}),
    ("L4", {"bfloat16": 121, "float16": 121, "tf32": 60, "float32": 30.3}),
    ("RTX 4090", {"bfloat16": 165.2, "float16": 165.2, "tf32": 82.6, "float32": 82.6}),
    ("RTX 3090", {"bfloat16": 71, "float16": 71, "tf32": 35.6, "float32": 35.6}),
    ("V100", {"float16": 125, "float32": 15.7}),
    ("T4", {"float16": 65, "float32": 8.1}),
    ("MI300X", {"bfloat16": 1307.4, "float16": 1307.4, "tf32": 653.7, "float32": 163.4}),
    ("MI325X", {"bfloat16": 1307.4, "float16": 1307.4, "tf32": 653.7, "float32": 163.4}),
)


def flops_per_token(config: GPTConfig) -> int:
    """Operations of the forward and backward pass, for each token of a full context."""
    C, T = config.n_embd, config.block_size
    block = 12 * C * C + 13 * C  # four matrices, their biases, two layer norms
    N = config.n_layer * block + config.vocab_size * C + 2 * C
    return 6 * N + 12 * config.n_layer * C * T


def peak_flops(device_name: str, precision: str) -> float | None:
    """A device's peak, operations per second; None for a device or precision that is not listed.

    precision: "bfloat16", "float16", "tf32" or "float32". A part of a GPU (MIG) is not listed.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for name, peaks in PEAKS:
        if all(re.search(rf"(?<![^\W_]){w}(?![^\W_])", device_name) for w in name.split()):
            return peaks[precision] * 1e12 if precision in peaks else None
    return None


def peak_of(device: torch.device, dtype: str) -> tuple[float | None, str]:
    """The peak of this machine's device in the arithmetic of `dtype`, and what it is the peak of.

    float32 matrices are multiplied in tf32 where torch's setting of the precision allows it.
    """
    if device.type != "cuda":
        return None, f"{dtype} on {device.type}"
    tf32 = dtype == "float32" and torch.get_float32_matmul_precision() != "highest"
    precision = "tf32" if tf32 else dtype
    name = torch.cuda.get_device_name(device)
    return peak_flops(name, precision), f"{precision} on {name}"
