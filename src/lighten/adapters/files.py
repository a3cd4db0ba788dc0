"""Adapters in PEFT's file format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers import PreTrainedModel

from lighten.adapters import dtensors, shards
from lighten.adapters.frozen import is_conv1d
from lighten.adapters.spec import AdapterSpec
from lighten.adapters.targets import shortest_names
from lighten.errors import UserError
from lighten.peft_config import CONFIG, WEIGHTS, settings

if TYPE_CHECKING:
    from lighten.adapters.cohort import Cohort
    from lighten.adapters.trained import Trained

PIECE_NUMBERS = 2**22  # are looked at at once


def contents(
    cohort: Cohort, name: str, *, base_model: str | None = None, revision: str | None = None
) -> dict[str, bytes]:
    """The adapter's files as bytes by file name, for whoever writes them safely.

    Args:
        cohort: Where the adapter lives.
        name: Which one.
        base_model: What `base_model_name_or_path` says.
        revision: The base's revision.
    """
    weights = {
        key: value.detach().cpu().contiguous() for key, value in cohort.parameters(name).items()
    }
    config = peft_config(cohort, name, base_model=base_model, revision=revision)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {CONFIG: text.encode(), WEIGHTS: to_bytes(weights, metadata={"format": "pt"})}


def peft_config(
    cohort: Cohort, name: str, *, base_model: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """What PEFT's own `LoraConfig` would write for this adapter."""
    from peft import LoraConfig  # a second and more, which a plan does without

    spec = cohort.specs[name]
    linears = {p: layer for p, layer in cohort.linears.items() if name in layer.specs}
    with cohort._detached():
        targets = shortest_names(cohort.model, linears)
        saved_modules = _saved_names(cohort, name)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT computes with floats too
        lora_dropout=spec.dropout,
        target_modules=targets,
        use_rslora=spec.use_rslora,
        init_lora_weights=spec.init_lora_weights,  # type: ignore[arg-type]  # checked by the recipe
        modules_to_save=saved_modules or None,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        fan_in_fan_out=any(is_conv1d(layer.base) for layer in linears.values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        revision=revision,
        inference_mode=True,
    )
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }


def _saved_names(cohort: Cohort, name: str) -> list[str]:
    """The modules saved whole as PEFT finds them again: it matches ends of paths, dots or not."""
    paths = {path for path, copies in cohort.copies.items() if name in copies.copies}
    short = sorted({path.rpartition(".")[2] for path in paths})
    matching = {path for path, _ in cohort.model.named_modules() if path.endswith(tuple(short))}
    return short if matching == paths else sorted(paths)


def verify(folder: str | os.PathLike[str], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Reopen saved weights: every key there with its shape, nothing empty, not all zeros.

    Args:
        folder: Theirs.
        expected: Shape by key, from the live ones.

    Raises:
        UserError: The files are not whole; says which key.
    """
    path = Path(folder)
    saved = read_weights(path)
    for key, shape in expected.items():
        if key not in saved:
            raise UserError(f"{path}: {key} is missing, it was not saved whole")
        if tuple(saved[key].shape) != tuple(shape) or saved[key].numel() == 0:
            raise UserError(
                f"{path}: {key} has shape {tuple(saved[key].shape)}, not {tuple(shape)}"
            )
    if extra := sorted(set(saved) - set(expected)):
        raise UserError(f"{path}: {extra[0]} does not belong there")
    factors = [value for key, value in saved.items() if ".lora_A." in key]
    if factors and not any(bool(value.any()) for value in factors):
        raise UserError(f"{path}: every lora_A is zero; the adapter would do nothing")
    del factors
    while saved:  # what was read of a mapped tensor stays in memory until it is gone
        pieces = saved.popitem()[1].flatten().split(PIECE_NUMBERS)
        if not all(bool(piece.isfinite().all()) for piece in pieces):
            raise UserError(f"{path}: holds values that are not finite")


@torch.no_grad()
def restore(
    trained: Trained,
    name: str,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    where: str | None = None,
    after_each: Callable[[], None] | None = None,
) -> None:
    """Copy saved weights into the live ones; of a base one of them is in memory at a time.

    Args:
        trained: Where they live.
        name: Whose.
        source: The weights by key, or the folder that holds them.
        where: What an error calls the source.
        after_each: Is called when a weight was copied.

    Raises:
        UserError: A key is missing, left over, or has another shape (trap 27).
    """
    if isinstance(source, Mapping):
        weights, where = dict(source), where or "what is to be restored"
    else:
        weights, where = read_weights(Path(source)), str(source)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    check_fit(shapes, trained.shapes(name), where)
    for key, parameter in trained.parameters(name).items():
        # What was read of a mapped tensor stays in memory until it is gone.
        dtensors.copy_rows(parameter, weights.pop(key))
        if after_each is not None:
            after_each()


def check_fit(
    saved: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Every key must be there with its shape, and no other (trap 27).

    Args:
        saved: Shape by key, from the files.
        expected: Shape by key, from the live ones.
        where: What an error calls the source.

    Raises:
        UserError: One is missing, left over, or has another shape.
    """
    if wrong := sorted(set(expected) ^ set(saved)):
        side = "lacks" if wrong[0] in expected else "has an unknown"
        raise UserError(
            f"{where} {side} {wrong[0]} ({len(wrong)} keys differ); it does not fit this base model"
        )
    for key, shape in expected.items():
        if saved[key] != shape:
            raise UserError(
                f"{where}: {key} has shape {saved[key]}, the base wants {shape}; "
                "it was trained on another model"
            )


def word_rows(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of the word embeddings that an adapter brings along in place of the base's; 0: none.

    Args:
        model: The base.
        shapes: Of the adapter's tensors by key.
    """
    embedding = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is embedding)
    keys = (f"base_model.model.{path}.weight", f"base_model.model.{path}.base_layer.weight")
    return max(shapes.get(key, (0,))[0] for key in keys)


def adapter_tensors(
    model: PreTrainedModel, weights: Mapping[str, Tensor], config: Mapping[str, Any], *, alone: bool
) -> dict[str, Tensor]:
    """What an adapter trained, without tensors of its base that PEFT saved beside it.

    Those are the head beside its factors, and both embeddings where the vocabulary was resized:
    PEFT puts them into the base again.

    Args:
        model: The base, with as many words as the adapter's.
        weights: Of the adapter's file.
        config: Of `read_config`.
        alone: The base may change. Else what is not as the base has it stays among the tensors.
    """
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = {path: part for path, part in model.named_modules() if part in parts}
    trained = {}
    for key, value in weights.items():
        if ".original_module." in key:
            continue
        key = key.replace(".modules_to_save.", ".")
        path = key.removeprefix("base_model.model.").removesuffix(".weight")
        path = path.removesuffix(".base_layer")
        named = any(f".{path}".endswith(f".{name}") for name in config.get("modules_to_save") or ())
        weight: Any = None if named or path not in paths else paths[path].weight
        plain = type(getattr(weight, "data", None)) is Tensor and weight.is_floating_point()
        fits = plain and value.shape == weight.shape
        if fits and (alone or torch.equal(value.to(weight), weight)):
            weight.data.copy_(value)
        else:
            trained[key] = value
    return trained


def spec_from_peft(
    name: str,
    config: Mapping[str, Any],
    where: str | os.PathLike[str],
    weights: Iterable[str] = (),
) -> AdapterSpec:
    """The adapter that a PEFT configuration describes; what it leaves out is PEFT's default.

    Args:
        name: What it shall be called.
        config: Of `read_config`.
        where: What an error calls it.
        weights: Keys of its tensors (see `settings`).

    Raises:
        UserError: A setting has a value that PEFT would not take.
    """
    return AdapterSpec(name=name, **settings(config, where, weights))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder, or of the trained part of a base.

    Raises:
        UserError: There are none, or a file is broken.
    """
    path = folder / WEIGHTS
    if not path.is_file() and not shards.listing(folder, shards.STEM):
        pickle_file = path.with_name("adapter_model.bin")
        hint = (
            "; only safetensors are read, never pickle, which can run code: where you trust "
            f"{pickle_file.name}, load it with PEFT and save_pretrained(...) writes safetensors"
            if pickle_file.exists()
            else ""
        )
        raise UserError(f"{path} does not exist{hint}")
    try:
        return load_file(path) if path.is_file() else shards.load(folder, shards.STEM)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
