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
