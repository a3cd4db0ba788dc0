"""Folders of quantised weights that plain `from_pretrained` loads; each maker is a library's.

- `int8`: torchao's INT8 weights, one scale a row, products in 16 bits. A row's answer depends on
  nothing but the row, on a processor too.
- `int8:bitsandbytes`: LLM.int8 (arXiv 2208.07339), which rounds activations too and keeps outlier
  columns apart; it looks for those over a whole batch.
- `nf4`: QLoRA's 4 bits with its scales quantised too (arXiv 2305.14314). Layers with whose shapes
  bitsandbytes does not compute on processors stay dense (`shapes`).
- `int4`: integers with a scale per group in auto-round's layout, rounded by GPTQ (arXiv 2210.17323)
  on calibration rows (`int4`). `int4:rounded` is the same format with plain rounding.
- `int8-dynamic-act-int4-weight`: torchao's 8da4w, what quantisation-aware runs are trained for.
  torchao gives each 4-bit weight a byte on a processor; the ExecuTorch export packs them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lighten.adapters.fake_quant import scheme
from lighten.artifacts import COMPANIONS, copy_named_templates
from lighten.models.describe import skeleton
from lighten.quantization import int4
from lighten.quantization.shapes import (
    dense_in_nf4,
    linear_layers,
    require_groups,
    words_in_int8,
)
from lighten.quantization.targets import DYNAMIC, GROUP_SIZE


def make(
    kind: str,
    model: Path,
    folder: Path,
    calibration: Sequence[Sequence[int]],
    *,
    group_size: int = GROUP_SIZE,
) -> None:
    """Write a quantised model beside its tokenizer.

    Args:
        kind: One of `targets.KINDS`.
        model: Folder of the model in 16 bits.
        folder: Is filled.
        calibration: Token ids of rows, for those that look at data.
        group_size: Of 8da4w.

    Raises:
        UserError: The model's shapes do not suit the format.
    """
    if kind.startswith("int4"):
        int4.write(model, folder, None if kind == "int4:rounded" else calibration)
    else:
        shape = skeleton(str(model))
        if kind == DYNAMIC:
            require_groups(shape, group_size)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.bfloat16,
            quantization_config=_config(kind, group_size, _dense(shape) if kind == "nf4" else None),
            local_files_only=True,
        )
        tied = kind == "int8" and _with_embedding(loaded)
        loaded.save_pretrained(folder, max_shard_size="1TB" if tied else "5GB")
        if tied:
            _without_head(folder / "model.safetensors")
    _companions(model, folder)


def _dense(model: PreTrainedModel) -> list[str] | None:
    """Layers to leave dense, the head among them; None: the head alone, as is usual."""
    dense = dense_in_nf4(linear_layers(model))
    head = model.get_output_embeddings()
    return [*dense, *(p for p, m in model.named_modules() if m is head)] if dense else None


def _config(kind: str, group_size: int, dense: list[str] | None) -> Any:
    if kind == "int8:bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=dense,  # of 4 bits too, whatever its name says
        )
    from transformers import TorchAoConfig

    if kind == DYNAMIC:
        return TorchAoConfig(scheme(group_size))
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2), include_input_output_embeddings=True)


def _with_embedding(model: Any) -> bool:
    """Store an embedding that is the head too in INT8: of a small model it is much of the file.

    transformers 5.24 leaves tied ones as they are, whatever its settings say.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if not words_in_int8(model):
        return False
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    quantize_(
        model, Int8WeightOnlyConfig(version=2), filter_fn=lambda module, _: module is embedding
    )
    head.weight = embedding.weight
    return True


def _companions(model: Path, folder: Path) -> None:
    """Tokenizer, template and generation settings as the 16-bit folder has them."""
    for name in COMPANIONS:
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)
    copy_named_templates(model, folder)


def _without_head(file: Path) -> None:
    """Leave a head that shares the embedding's weights out of a torchao file.

    transformers 5.24 writes both, and on loading compares them with an operation that torchao's
    tensors do not have; without the head's copy it ties them.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
        tensors = {k: opened.get_tensor(k) for k in opened.keys() if not k.startswith("lm_head.")}  # noqa: SIM118
    facts = {key: value for key, value in facts.items() if not key.startswith("lm_head.")}
    names = [name for name in json.loads(facts["tensor_names"]) if not name.startswith("lm_head.")]
    save_file(tensors, file, metadata={**facts, "tensor_names": json.dumps(names)})
