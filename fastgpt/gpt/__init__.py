"""The reference GPT: the demonstration of fastgpt's kernels, and their first user.

Building a model needs only torch; data, training and sampling need `pip install 'fastgpt[gpt]'`.

    python -m fastgpt.gpt.demo                       everything, in less than five minutes on a CPU
    python -m fastgpt.gpt.train --preset small       train
    python -m fastgpt.gpt.sample --run runs/...      write text with the result
    GPT.from_pretrained(DIR), save_pretrained(DIR)   a GPT-2 folder as Hugging Face has it
    python -m fastgpt.gpt.report --run runs/...      a page about the run, in HTML
"""

from .cache import KeyValueCache
from .config import PRESETS, GPTConfig, TrainConfig
from .model import GPT

__all__ = ["GPT", "PRESETS", "GPTConfig", "KeyValueCache", "TrainConfig"]
