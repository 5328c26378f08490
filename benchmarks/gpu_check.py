"""Is there a GPU that torch and Triton can use? Prints it; or what is missing, and fails.

python -m benchmarks.gpu_check
"""

import importlib.util
import shutil
import sys


def missing() -> str:
    """What is missing, and what to do about it; empty where a kernel ran."""
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed for {sys.executable}"
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is a build for the CPU only: it can use no GPU; install a "
            "CUDA or ROCm build (https://pytorch.org/get-started)"
        )
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
            reason = "torch.cuda.is_available() is false"
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
        if torch.version.cuda and shutil.which("nvidia-smi") is None:
            reason += "; there is no nvidia-smi either, so probably no NVIDIA driver"
        return f"torch {torch.__version__} sees no GPU: {reason}"
    try:
        if torch.ones(2, device="cuda").sum().item() != 2:
            return f"{torch.cuda.get_device_name()} computes 1 + 1 wrongly"
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        return (
            f"{torch.cuda.get_device_name()} is there, but torch {torch.__version__}, built for "
            f"{', '.join(torch.cuda.get_arch_list())}, can't run on it: {first}"
        )
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed for {sys.executable}"
    return ""


def main() -> None:
    if reason := missing():
        sys.exit(f"no GPU to test on: {reason}")
    import torch
    import triton

    major, minor = torch.cuda.get_device_capability()
    free, total = (x / 2**30 for x in torch.cuda.mem_get_info())
    print(
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, capability "
        f"{major}.{minor}, {free:.0f} of {total:.0f} GiB free; torch {torch.__version__}, "
        f"triton {triton.__version__}"
    )


if __name__ == "__main__":
    main()
