"""What an adapter changes of each weight of its base, and that weight some rows at a time.

A low-rank update is added in float32 and rounded once. A block of rows of B·A is formed with the
block of the weight that it belongs to, so that neither is ever there whole.

Dimensions: O outputs, I inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lighten.adapters.files import spec_from_peft
from lighten.errors import UserError
from lighten.peft_config import FACTOR, WEIGHTS, more_than_low_rank, tensor_shapes

_PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector"
_TOKENS = ".trainable_tokens_delta"
# What of `peft_config.NOT_PLAIN` is merged here all the same.
_DORA = "LoRA adapter with use_dora"
Blocks = Iterator[Tensor]


@dataclass
class Change:
    """What an adapter does to one weight.

    Attributes:
        replacement: Key of the tensor that takes the weight's place.
        A: Key of the factor [r, I] (of an embedding [r, V]).
        B: Key of the factor [O, r] (of an embedding [H, r]).
        scale: Before B·A.
        magnitude: Key of DoRA's norm of each output, [O].
        embedding: Whether the factors are those of an embedding, whose weight is turned.
        rows: Key of trained rows.
        indices: Which rows they are.
    """

    replacement: str | None = None
    A: str | None = None
    B: str | None = None
    scale: float = 1.0
    magnitude: str | None = None
    embedding: bool = False
    rows: str | None = None
    indices: tuple[int, ...] = ()


@dataclass
class Changes:
    """An adapter by the weights of the base that it changes.

    Attributes:
        folder: The adapter's.
        shapes: Of its tensors by key.
        by_name: Change by the name of the weight (or bias) in the base.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    by_name: dict[str, Change] = field(default_factory=dict)

    def read(self, key: str) -> Tensor:
        """A tensor of the adapter in float32.

        Raises:
            UserError: The file is broken, or a number is not finite.
        """
        path = self.folder / WEIGHTS
        try:
            with safe_open(path, framework="pt") as file:
                value: Tensor = file.get_tensor(key).float()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file: {error}") from error
        if not bool(value.isfinite().all()):
            raise UserError(
                f"{path} holds numbers in {key} that are not finite; the training diverged, take "
                "an earlier checkpoint"
            )
        return value

    def rows_of(self, name: str) -> int | None:
        """Rows of the tensor that takes a weight's place, None where none does."""
        change = self.by_name.get(name)
        return self.shapes[change.replacement][0] if change and change.replacement else None


def streamable(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's change of each weight can be told from that weight alone."""
    reason = more_than_low_rank(config)
    if config.get("peft_type") == "TRAINABLE_TOKENS":
        return True
    return reason in (None, _DORA) and config.get("bias") in (None, "none", "all", "lora_only")


def read_changes(folder: Path, config: Mapping[str, Any]) -> Changes:
    """What an adapter changes, from its configuration and the header of its file.

    Args:
        folder: The adapter's.
        config: Its `adapter_config.json`.

    Raises:
        UserError: A tensor is not understood, half of a pair is missing, or a factor has another
            rank than the configuration says.
    """
    shapes = tensor_shapes(folder / WEIGHTS)
    changes = Changes(folder, shapes)
    spec = None
    if config.get("peft_type") == "LORA":
        spec = spec_from_peft(folder.name, config, folder, shapes)
    for key in shapes:
        if not key.startswith(_PREFIX):
            raise UserError(f"{folder / WEIGHTS}: {key} is not named as PEFT names tensors")
        if (match := FACTOR.match(key)) is not None and spec is not None:
            change = changes.by_name.setdefault(f"{match['path']}.weight", Change())
            setattr(change, match["factor"], key)
            if match["factor"] == "A":  # [r, ...]
                spec.require_rank(match["path"], shapes[key][0], folder)
            change.scale = spec.scale_at(match["path"])
            change.embedding = ".lora_embedding_" in key
            continue
        # Where the vocabulary was resized, PEFT writes embeddings as its wrapper has them, too.
        if ".original_module." in key:
            continue
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        name = name.replace(".modules_to_save.", ".")
        if _MAGNITUDE in name:
            path = name.partition(_MAGNITUDE)[0]
            changes.by_name.setdefault(f"{path}.weight", Change()).magnitude = key
        elif _TOKENS in name:
            path = name.partition(_TOKENS)[0].removesuffix(".token_adapter")
            change = changes.by_name.setdefault(f"{path}.weight", Change())
            change.rows, change.indices = key, _indices(config, path, folder)
        elif ".lora_" in name:
            raise UserError(f"{folder / WEIGHTS}: {key} is not known here; merge it with PEFT")
        else:
            changes.by_name.setdefault(name, Change()).replacement = key
    for name, change in changes.by_name.items():
        if (change.A is None) != (change.B is None):
            raise UserError(f"{folder}: {name} has only one of lora_A and lora_B; it is not whole")
        if change.magnitude and change.A is None:
            raise UserError(f"{folder}: {name} has a magnitude without a low-rank update")
    if not changes.by_name:
        raise UserError(f"{folder / WEIGHTS} holds no weights; save the adapter again")
    return changes


def _indices(config: Mapping[str, Any], path: str, folder: Path) -> tuple[int, ...]:
    """Which rows of a weight were trained."""
    indices = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(indices, dict):
        indices = next((v for k, v in indices.items() if path == k or path.endswith(f".{k}")), None)
    if not isinstance(indices, list):
        raise UserError(f"{folder}: its configuration does not say which rows of {path} it trained")
    return tuple(int(index) for index in indices)


def require_fit(
    changes: Changes, name: str, shape: tuple[int, ...], *, turned: bool, grown: bool
) -> None:
    """A change fits the weight that it is for.

    Args:
        changes: The adapter's.
        name: Of the weight.
        shape: Of the weight, as the base has it.
        turned: The weight is kept as [I, O] (GPT-2).
        grown: The weight is one of the vocabulary, which may have become taller.

    Raises:
        UserError: It does not.
    """
    change, shapes = changes.by_name[name], changes.shapes

    def refuse(actual: tuple[int, ...]) -> UserError:
        return UserError(
            f"{changes.folder} does not fit this base: {name} is {shape} there and the adapter has "
            f"{actual}; it was trained on another model"
        )

    if change.replacement is not None:
        tensor_shape = shapes[change.replacement]
        if tensor_shape != shape and not (grown and tensor_shape[1:] == shape[1:]):
            raise refuse(tensor_shape)
        shape = tensor_shape
    if change.A is not None and change.B is not None:
        A, B = shapes[change.A], shapes[change.B]
        if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
            raise refuse((*B, *A))
        product = (A[1], B[0]) if turned or change.embedding else (B[0], A[1])
        if product != shape and not (grown and product[1:] == shape[1:]):
            raise refuse(product)
    if change.rows is not None:
        tensor_shape = shapes[change.rows]
        if tensor_shape[1:] != shape[1:] or len(change.indices) != tensor_shape[0]:
            raise refuse(tensor_shape)
        if max(change.indices, default=0) >= shape[0]:
            raise UserError(f"{changes.folder} trained row {max(change.indices)} of {name}, "
                            f"which has {shape[0]} rows")  # fmt: skip


def changed(changes: Changes, name: str, blocks: Callable[[], Blocks], *, turned: bool) -> Blocks:
    """A weight as the adapter changes it, in float32 and some rows at a time.

    Args:
        changes: The adapter's.
        name: Of the weight.
        blocks: Gives the base's weight in float32, some rows at a time, at each call.
        turned: The weight is kept as [I, O] (GPT-2).
    """
    change = changes.by_name[name]
    if change.replacement is not None:
        replacement = changes.read(change.replacement)
        blocks = lambda: iter([replacement])  # noqa: E731  # the same kind of thing, from elsewhere
    if change.A is not None and change.B is not None:
        blocks = _low_rank(changes, change, blocks, turned=turned)
    if change.rows is None:
        return blocks()
    return _with_rows(blocks(), changes.read(change.rows), change.indices)


def _low_rank(
    changes: Changes, change: Change, blocks: Callable[[], Blocks], *, turned: bool
) -> Callable[[], Blocks]:
    assert change.A is not None
    assert change.B is not None
    A, B = changes.read(change.A), changes.read(change.B) * change.scale
    # The factor whose rows go with those of the weight stands at the left.
    left, right = (A.T, B.T) if turned or change.embedding else (B, A)

    def updated() -> Blocks:
        start = 0
        for block in blocks():
            stop = start + len(block)
            yield torch.addmm(block, left[start:stop], right)
            start = stop

    if change.magnitude is None:
        return updated
    magnitude = changes.read(change.magnitude).flatten()
    if not turned:
        return lambda: (
            block * (magnitude[start:stop] / block.norm(dim=1))[:, None]
            for start, stop, block in _numbered(updated())
        )

    def scaled() -> Blocks:
        # An output is a column here: its norm is known after all rows.
        squares = sum((block.square().sum(0) for block in updated()), torch.zeros(()))
        factors = magnitude / squares.sqrt()
        for block in updated():
            yield block * factors

    return scaled


def _numbered(blocks: Blocks) -> Iterator[tuple[int, int, Tensor]]:
    start = 0
    for block in blocks:
        yield start, start + len(block), block
        start += len(block)


def _with_rows(blocks: Blocks, rows: Tensor, indices: tuple[int, ...]) -> Blocks:
    for start, stop, block in _numbered(blocks):
        for place, index in enumerate(indices):
            if start <= index < stop:
                block[index - start] = rows[place]
        yield block
