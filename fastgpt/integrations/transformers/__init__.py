"""Hugging Face `transformers` 5 on the fused kernels, one model at a time.

    model = fastgpt.integrations.transformers.patch(AutoModelForCausalLM.from_pretrained(...))

The registries of `transformers` for attention and for masks gain the name "fastgpt"; no default of
theirs changes.
"""

from fastgpt.extras import require

require("transformers")

from fastgpt.integrations.transformers.instances import patch as patch  # noqa: E402
from fastgpt.integrations.transformers.instances import patched as patched  # noqa: E402
from fastgpt.integrations.transformers.instances import unpatch as unpatch  # noqa: E402

__all__ = ["patch", "patched", "unpatch"]
