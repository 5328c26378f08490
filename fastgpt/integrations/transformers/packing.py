"""Documents packed into a row: attention that stays inside each, without a mask of L x L."""

from typing import Any

import torch
import torch.nn.functional as F

DECIDING = ("attention_mask", "cache", "past_key_values")  # the last is the cache's former name


def separated(arguments: dict[str, Any], training: bool) -> dict[str, Any]:
    """The arguments of a model without head, such that packed documents do not see each other.

    As `transformers` has it, a document begins where `position_ids` do not go on by one, if there
    is neither an attention mask nor a cache that was passed in. It forgets the documents where the
    model makes a cache of its own, which is the default; and a compiled model, which can't look at
    the positions, gets a mask of L x L even where there are none.
    """
    x = arguments.get("input_ids")
    x = arguments.get("inputs_embeds") if x is None else x
    position_ids = arguments.get("position_ids")
    if x is None or any(arguments.get(name) is not None for name in DECIDING):
        return arguments
    # With a mask, `transformers` does not look for documents.
    no_padding = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if arguments.get("cu_seq_lens_q") is not None:
        return {**arguments, "attention_mask": no_padding}
    if position_ids is None:
        compiling = torch.compiler.is_compiling()
        return {**arguments, "attention_mask": no_padding} if compiling else arguments
    if not torch.compiler.is_compiling():
        starts = F.pad(position_ids.diff(dim=-1) != 1, (1, 0))
        if not bool(starts.any()):
            return arguments
        if x.shape[0] == 1:
            ends = torch.tensor([x.shape[1]], device=x.device)
            first = torch.zeros_like(ends)
            boundaries = torch.cat((first, starts[0].nonzero()[:, 0], ends)).int()
            return {
                **arguments,
                "attention_mask": no_padding,
                "cu_seq_lens_q": boundaries,
                "cu_seq_lens_k": boundaries,
            }
    elif not training:
        return arguments
    if arguments.get("use_cache"):
        raise ValueError(
            "packed documents (position_ids that begin anew) in a batch of "
            f"{x.shape[0]} with use_cache=True: expected use_cache=False, or one row"
        )
    return {**arguments, "use_cache": False}
