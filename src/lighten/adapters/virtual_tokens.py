"""Prompts that are learnt (prompt tuning, p-tuning, prefix tuning) in front of a base's tokens.

Dimensions: B rows, T tokens, v virtual tokens, H hidden size. PEFT puts them there in a forward
and a `generate` of its own; here they stand in the forward of the module that embeds tokens, so
that the loss at supervised positions, the model's own forward and transformers' `generate` all see
them, and nobody sees their v states. Real tokens begin at position v whatever stands left of them:
PEFT lets padding shift them, so that an answer depends on the batch it is in (trap 17).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from transformers import PreTrainedModel

# These give keys and values to every layer; the others give embeddings.
PREFIXES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


def install(owner: PeftModel, model: PreTrainedModel, on: Callable[[], bool]) -> nn.Module:
    """Put the learnt prompt in front of what the model is given.

    Args:
        owner: PEFT's model with the prompt.
        model: The base.
        on: Whether the prompt is in use.

    Returns:
        The module whose forward was replaced; deleting the attribute puts its own back.
    """
    embedding = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is embedding)
    # Some heads call this module past the one that `base_model` names (OPT's decoder).
    place = model.get_submodule(path.rpartition(".")[0])
    plain = place.forward
    cache_key = "cache" if "cache" in inspect.signature(plain).parameters else "past_key_values"
    virtual = int(owner.active_peft_config.num_virtual_tokens)
    prefix = owner.active_peft_config.peft_type in PREFIXES

    @functools.wraps(plain)
    def run(input_ids: Tensor | None = None, **options: Any) -> Any:
        if not on():
            return plain(input_ids=input_ids, **options)
        embedded = options.pop("inputs_embeds", None)
        if embedded is None and not prefix:
            embedded, input_ids = embedding(input_ids), None
        rows = len(embedded if input_ids is None else input_ids)
        positions, mask = options.get("position_ids"), options.get("attention_mask")
        if positions is not None:
            options["position_ids"] = positions + virtual
        begun = options.get(cache_key) is not None and options[cache_key].get_seq_length() > 0
        if mask is not None:
            options["attention_mask"] = torch.cat([mask.new_ones(rows, virtual), mask], 1)
            if not prefix:
                # Padding comes before the prompt, so that a sliding window sees what it saw.
                order = _order(mask, virtual)
                options["attention_mask"] = options["attention_mask"].gather(1, order)
        if begun or prefix:
            if not begun:
                options[cache_key] = owner.get_prompt(rows)
            return plain(input_ids=input_ids, inputs_embeds=embedded, **options)
        prompts = owner.get_prompt(rows).to(embedded.dtype)
        embedded = torch.cat([prompts, embedded], 1)
        if positions is not None:
            first = torch.arange(virtual, device=positions.device).expand(len(positions), -1)
            options["position_ids"] = torch.cat([first, options["position_ids"]], 1)
        if mask is not None:
            embedded = embedded.gather(1, order[..., None].expand_as(embedded))
            if positions is not None:
                spread = options["position_ids"].expand(rows, -1)
                options["position_ids"] = spread.gather(1, order)
        out = plain(inputs_embeds=embedded, **options)
        out.last_hidden_state = out.last_hidden_state[:, virtual:]
        return out

    place.forward = run
    return place


def _order(mask: Tensor, virtual: int) -> Tensor:
    """[B, v + T]: what stands where when each row's v virtual tokens move behind its padding."""
    width = virtual + mask.shape[1]
    padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # [B, 1], zeros left of the first one
    at = torch.arange(width, device=mask.device).expand(len(mask), -1)
    order = torch.where(at < padding, at + virtual, at - padding)
    return torch.where(at >= padding + virtual, at, order)
