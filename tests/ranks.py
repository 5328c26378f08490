"""Classes in slices on the ranks of a process group: all cases of a test file in one start of each
number of processes.
"""

import datetime
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SPLITS = {2: [(25, 25), (49, 1)], 3: [(17, 17, 16), (1, 30, 19)]}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 4.0},
    "z_loss": {"z_loss": 0.01},
    "everything": {"weight": True, "label_smoothing": 0.1, "softcap": 4.0, "z_loss": 0.01},
}


class Exchanged(TorchDispatchMode):
    """The sizes of what the ranks exchange meanwhile."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # What every collective calls, but what waits for it.
        if "c10d" in function.namespace and "wait_tensor" not in str(function):
            self.sizes.append(sum(x.numel() for x in tree_leaves(args) if torch.is_tensor(x)))
        return function(*args, **(kwargs or {}))


def attempt(function, *args) -> Any:
    """Its result, or the text of what it raised: one case must not keep the others from theirs."""
    try:
        return function(*args)
    except Exception:
        return traceback.format_exc()


def work(
    rank: int,
    size: int,
    folder: str,
    cases: Callable[[], list[Any]],
    run: Callable[[Any, Any], Any],
    out_of_range: Callable[[str, int, Any], str],
) -> None:
    """All cases of one rank, and targets out of range among 5 classes of each."""
    warnings.simplefilter("error", FutureWarning)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init{size}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=30),
    )
    group = torch.distributed.group.WORLD
    found = {str(c): attempt(run, c, group) for c in cases() if len(c.split) == size}
    for backend in ("native", "eager"):
        for target in (-1, 5 * size, 1 << 40):
            found[backend, target] = attempt(out_of_range, backend, target, group)
    torch.save(found, f"{folder}/{size}-{rank}.pt")
    torch.distributed.destroy_process_group()


class Ranks:
    """What each rank found, for each number of ranks: started when first asked for."""

    def __init__(self, tmp_path_factory: Any, *what: Any):
        self.tmp_path_factory, self.what = tmp_path_factory, what
        self.results: dict[int, list[dict[Any, Any]]] = {}

    def __call__(self, size: int) -> list[dict[Any, Any]]:
        if size not in self.results:
            folder = str(self.tmp_path_factory.mktemp("ranks"))
            torch.multiprocessing.spawn(work, (size, folder, *self.what), nprocs=size)
            self.results[size] = [torch.load(f"{folder}/{size}-{r}.pt") for r in range(size)]
        return self.results[size]
