"""Triton's interpreter, which runs the kernels on CPU tensors where torch sees no GPU.

Import this before fastgpt, and call `load_kernels` behind that. Between the two the environment
asks for the interpreter; the processes that tests start do not inherit it.
"""

import importlib
import os
from types import SimpleNamespace
from typing import Any

import torch

ON = not torch.cuda.is_available()
if ON:
    os.environ["TRITON_INTERPRET"] = "1"


def load_kernels() -> None:
    """Import Triton and the kernels: both look when they are imported."""
    from fastgpt import dispatch

    if ON and dispatch.lookup("cross_entropy", "triton", "cpu").available:
        from triton import knobs

        knobs.runtime.interpret = True  # stays when the environment forgets it
        for op in ("cross_entropy", "linear_cross_entropy", "attention"):
            importlib.import_module(f"fastgpt.backends.triton.{op}")
        _quicken()
    os.environ.pop("TRITON_INTERPRET", None)


def _quicken() -> None:
    """Let a launch cost what its kernel costs.

    Each launch, and each call of a device function, replaces a few hundred attributes of
    `triton.language`, which it finds by walking through its modules; that takes longer than most
    kernels do in the tests. The replacements are always the same ones: found once here, they are
    put in at a launch and taken out behind it.

    NumPy, which computes, warns of what a GPU does silently, such as exp(-inf - -inf) in lanes
    whose result is thrown away.
    """
    import numpy as np
    from triton import language
    from triton.runtime import interpreter

    find = interpreter._patch_lang
    everywhere = SimpleNamespace(__globals__={"tl": language, "core": language.core})
    replacements: list[tuple[object, str, object]] = []
    launching = False

    class Launch(interpreter._LangPatchScope):
        def __init__(self) -> None:
            super().__init__()
            self.silence = np.errstate(all="ignore")
            self.silence.__enter__()

        def restore(self) -> None:
            nonlocal launching
            launching = False
            self.silence.__exit__(None, None, None)
            super().restore()

    def patch(function: Any) -> Any:
        nonlocal launching
        if launching:  # a device function
            return None
        if not replacements:
            found = find(everywhere)
            replacements.extend((x, name, getattr(x, name)) for x, name, _ in found._changes)
            found.restore()
        launch = Launch()
        for replacement in replacements:
            launch.set_attr(*replacement)
        launching = True
        return launch

    interpreter._patch_lang = patch

    # It fills a table of all types before it looks up one.
    slow, known = interpreter._get_np_dtype, {}

    def np_dtype(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = slow(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = np_dtype
