"""The public functions."""

from fastgpt.functional.attention import (
    scaled_dot_product_attention as scaled_dot_product_attention,
)
from fastgpt.functional.explanation import Explanation as Explanation
from fastgpt.functional.explanation import explain as explain
from fastgpt.functional.linear_loss import linear_cross_entropy as linear_cross_entropy
from fastgpt.functional.loss import cross_entropy as cross_entropy
