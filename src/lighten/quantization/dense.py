"""A base whose files hold few bits, as the dense one that an adapter is added to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lighten.adapters.frozen import make_dense
from lighten.errors import UserError
from lighten.models import quantized
from lighten.models.stored import bring_into_format, on_processor, stored_as
from lighten.peft_config import WEIGHTS, read_config, tensor_shapes


def dense_base(folder: Path) -> Any:
    """A base in float32; what its files hold in few bits is dequantised.

    Args:
        folder: Of the model.

    Raises:
        UserError: They are quantised in a way that is not undone here.
    """
    stored = stored_as(folder)
    if stored is not None and stored.get("quant_method") != "bitsandbytes":
        raise UserError(
            f"{folder} is quantised ({stored.get('quant_method')}), and an adapter is merged onto "
            "dense weights or bitsandbytes'; train on the model that it was made from"
        )
    base: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, **on_processor(folder)
    )
    if stored is not None:
        bring_into_format(base, folder, torch.float32)
        quantized.finish(base, None, torch.float32, "cpu")
        make_dense(base)
    return base


def untie(model: Any, adapter: Path) -> None:
    """Give the head a weight of its own where an adapter changes one of embedding and head.

    PEFT merges either's change into the tensor that both share. Rows of tokens, and what
    `ensure_weight_tying` asks for, are of both.

    Args:
        model: The base.
        adapter: Folder of an adapter on it.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    changed = any(
        key.startswith(_of_words(model)) and "trainable_tokens" not in key
        for key in tensor_shapes(adapter / WEIGHTS)
    )
    if changed and not read_config(adapter).get("ensure_weight_tying"):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _of_words(model: Any) -> tuple[str, ...]:
    """What PEFT's names of tensors of the word embeddings begin with, and of the head's."""
    paths = {id(module): path for path, module in model.named_modules()}
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(f"base_model.model.{paths[id(part)]}." for part in parts if part is not None)
