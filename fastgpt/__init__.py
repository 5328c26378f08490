"""Fused, numerically stable cross-entropy and attention for PyTorch, and a reference GPT."""

from fastgpt.backends import cuda as _native_cuda  # noqa: F401 (fills its part of the table)
from fastgpt.backends import eager as _eager  # noqa: F401
from fastgpt.backends import native as _native  # noqa: F401
from fastgpt.backends import triton as _triton  # noqa: F401
from fastgpt.dispatch import backend as backend
from fastgpt.dispatch import read_environment as _read_environment
from fastgpt.drop_in import checkpoint_context_fn as checkpoint_context_fn
from fastgpt.drop_in import drop_in as drop_in
from fastgpt.functional import Explanation as Explanation
from fastgpt.functional import cross_entropy as cross_entropy
from fastgpt.functional import explain as explain
from fastgpt.functional import linear_cross_entropy as linear_cross_entropy
from fastgpt.functional import scaled_dot_product_attention as scaled_dot_product_attention
from fastgpt.info import Info as Info
from fastgpt.info import info as info
from fastgpt.info import version as _version
from fastgpt.modules import CrossEntropyLoss as CrossEntropyLoss
from fastgpt.modules import LinearCrossEntropyLoss as LinearCrossEntropyLoss

__version__ = _version()
_read_environment()

__all__ = [
    "CrossEntropyLoss",
    "Explanation",
    "Info",
    "LinearCrossEntropyLoss",
    "backend",
    "checkpoint_context_fn",
    "cross_entropy",
    "drop_in",
    "explain",
    "info",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
]
