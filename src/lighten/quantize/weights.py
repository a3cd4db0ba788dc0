"""Folders of quantised weights that plain `from_pretrained` loads; each maker is a library's.

- `int8`: torchao's INT8 weights, one scale a row, products in 16 bits. A row's answer depends on
  nothing but the row, on a processor too.
- `int8:bitsandbytes`: LLM.int8 (arXiv 2208.07339), which rounds activations too and keeps outlier
  columns apart; it looks for those over a whole batch.
- `nf4`: QLoRA's 4 bits with its scales quantised too (arXiv 2305.14314).
- `int4`: AutoRound (arXiv 2309.05516): integers with a scale and a zero point per group, whose
  rounding is learnt on calibration rows. `int4:rounded` is the same format with plain rounding.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lighten.errors import UserError

# Sizes of a group, the largest that divides every row first: a group across the edge of a row
# is written and cannot be read back (auto-round 0.16.1).
GROUPS = (128, 64, 32, 16)
# Learnt rounding: steps of its optimiser per decoder layer, and rows per step.
STEPS, STEP_ROWS = 40, 4


def make(kind: str, model: Path, folder: Path, calibration: Sequence[Sequence[int]]) -> None:
    """Write a quantised model beside its tokenizer.

    Args:
        kind: One of `targets.KINDS`.
        model: Folder of the model in 16 bits.
        folder: Is filled.
        calibration: Token ids of rows of one length, for those that learn.

    Raises:
        UserError: The model's shapes do not suit the format.
    """
    if kind.startswith("int4"):
        _auto_round(model, folder, calibration, steps=0 if kind == "int4:rounded" else STEPS)
    else:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, quantization_config=_config(kind), local_files_only=True
        )
        tied = kind == "int8" and _with_embedding(loaded)
        loaded.save_pretrained(folder, max_shard_size="1TB" if tied else "5GB")
        if tied:
            _without_head(folder / "model.safetensors")
    _companions(model, folder)


def _config(kind: str) -> Any:
    if kind == "int8:bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2), include_input_output_embeddings=True)


def _with_embedding(model: Any) -> bool:
    """Store an embedding that is the head too in INT8: of a small model it is much of the file.

    transformers 5.24 leaves tied ones as they are, whatever its settings say.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding.weight is not head.weight:
        return False
    quantize_(model, Int8WeightOnlyConfig(version=2), filter_fn=lambda own, _: own is embedding)
    head.weight = embedding.weight
    return True


def group_size(model: torch.nn.Module) -> int:
    """The largest group that divides the rows of every linear layer but the head.

    Raises:
        UserError: None does.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    rows = {
        int(module.in_features)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    for size in GROUPS:
        if rows and all(row % size == 0 for row in rows):
            return size
    raise UserError(
        f"int4 needs rows that groups of {GROUPS[-1]} divide, and the model's linear layers have "
        f"rows of {', '.join(map(str, sorted(rows))) or 'no kind'}; use nf4 or int8"
    )


def _auto_round(
    model: Path, folder: Path, calibration: Sequence[Sequence[int]], *, steps: int
) -> None:
    from auto_round import AutoRound

    logging.getLogger("autoround").setLevel(logging.ERROR)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    rows = [torch.tensor([list(row)]) for row in calibration]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maker = AutoRound(
            loaded,
            tokenizer,
            scheme={
                "bits": 4,
                "group_size": group_size(loaded),
                "sym": True,
                "data_type": "int",
                "act_bits": 16,
            },
            iters=steps,
            nsamples=len(rows),
            seqlen=rows[0].shape[1],
            batch_size=min(STEP_ROWS, len(rows)),
            dataset=rows,
            device_map="cpu" if not torch.cuda.is_available() else 0,
            # Compiling costs minutes on a processor, and 16 bits mixed with float32 more yet.
            enable_torch_compile=False,
            amp=torch.cuda.is_available(),
            **({} if steps else {"disable_opt_rtn": True}),
        )
        scratch = folder / ".auto_round"  # a folder is named in it, by the scheme
        maker.quantize_and_save(str(scratch), format="auto_round")
        written = next(scratch.rglob("config.json")).parent
        for path in list(written.iterdir()):
            path.rename(folder / path.name)
        shutil.rmtree(scratch)


def _companions(model: Path, folder: Path) -> None:
    """Tokenizer, template and generation settings as the 16-bit folder has them."""
    for path in model.iterdir():
        kept = path.suffix in (".jinja", ".txt", ".model") or path.name.startswith("tokenizer")
        if path.is_file() and (kept or path.name in ("generation_config.json", "vocab.json",
                                                     "special_tokens_map.json")):  # fmt: skip
            shutil.copyfile(path, folder / path.name)


def _without_head(file: Path) -> None:
    """Leave a head that shares the embedding's weights out of a torchao file.

    transformers 5.24 writes both, and on loading compares them with an operation that torchao's
    tensors do not have; without the head's copy it ties them.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
        kept = {k: opened.get_tensor(k) for k in opened.keys() if not k.startswith("lm_head.")}  # noqa: SIM118
    facts = {key: value for key, value in facts.items() if not key.startswith("lm_head.")}
    names = [name for name in json.loads(facts["tensor_names"]) if not name.startswith("lm_head.")]
    save_file(kept, file, metadata={**facts, "tensor_names": json.dumps(names)})
