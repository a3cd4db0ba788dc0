"""What a model can take: positions and token ids, known from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel

from lighten.errors import UserError

_POSITION_TABLES = ("wpe", "pos")


class _Row(Protocol):
    @property
    def input_ids(self) -> Sequence[int]: ...
    @property
    def example(self) -> Any: ...


@dataclass(frozen=True)
class Limits:
    """What rows must stay within.

    Attributes:
        vocabulary: Token ids below this have an embedding.
        positions: Tokens that a row can have at most: the model looks each position up in a table.
            None: positions are computed, as rotary ones are, and no row is too long.
        trained_positions: Tokens that the model was made for, if it says so.
    """

    vocabulary: int
    positions: int | None = None
    trained_positions: int | None = None

    def longest(self, max_length: int) -> tuple[int, str]:
        """Tokens that a row may have, and what says so.

        Args:
            max_length: What the recipe allows.
        """
        if self.positions is not None and self.positions < max_length:
            return self.positions, f"the model's {self.positions} positions"
        return max_length, f"max_length {max_length}"

    def room(self, prompt_tokens: int, max_new_tokens: int) -> int:
        """Tokens that can be answered after a prompt of so many tokens."""
        if self.positions is None:
            return max_new_tokens
        return max(0, min(max_new_tokens, self.positions - prompt_tokens))

    def check_ids(self, rows: Iterable[_Row], tokenizer: Any) -> None:
        """Every id has an embedding.

        Raises:
            UserError: One has none: which row and which id.
        """
        highest_of_all = getattr(rows, "highest", None)  # where rows are kept in arrays
        if highest_of_all is not None and highest_of_all < self.vocabulary:
            return
        for row in rows:
            highest = int(max(row.input_ids, default=0))
            if highest >= self.vocabulary:
                raise UserError(self._describe_unknown_id(row, highest, tokenizer))

    def _describe_unknown_id(self, row: _Row, highest: int, tokenizer: Any) -> str:
        message = (
            f"{row.example.where} has the id {highest}, the model has {self.vocabulary} "
            f"(0 to {self.vocabulary - 1})"
        )
        if row.example.input_ids is not None:
            return f"{message}; encode the rows with this model's own tokenizer"
        token = tokenizer.convert_ids_to_tokens(highest)
        return (
            f"{message}: the tokenizer knows the token {token!r} and the model's embedding has no "
            "row for it; list it in added_tokens (and the embedding in modules_to_save, so that it "
            "is learnt), or use the tokenizer that belongs to the model"
        )

    def beyond(self, lengths: Iterable[int]) -> str | None:
        """A sentence about rows beyond the positions that the model was made for, if there are."""
        if self.positions is not None or self.trained_positions is None:
            return None
        count = sum(length > self.trained_positions for length in lengths)
        if not count:
            return None
        rows = "1 row is" if count == 1 else f"{count} rows are"
        return (
            f"{rows} longer than the {self.trained_positions} positions that the model was made "
            "for; it takes them, but may be poor beyond (max_length cuts them)"
        )


def limits_of(model: PreTrainedModel, tokens: int = 0) -> Limits:
    """The limits of a built model (its weights may be on the meta device).

    Args:
        model: Which.
        tokens: Tokens of its tokenizer, where the embedding will grow to them.
    """
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    positions = stated if isinstance(stated, int) and stated > 0 else None
    embedding = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])  # type: ignore[index]
    looked_up = positions is not None and _has_position_table(model, positions, embedding.weight)
    return Limits(max(rows, tokens), positions if looked_up else None, positions)


def _has_position_table(model: PreTrainedModel, positions: int, words: Any) -> bool:
    """Whether the model holds a row per position: learnt (GPT-2, OPT) or computed once (GPT-J)."""
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            path = name.lower().split(".")
            if (
                tensor is not words
                and tensor.dim() == 2
                and tensor.shape[0] >= positions
                and any(part.startswith(_POSITION_TABLES) or "_pos" in part for part in path)
            ):
                return True
    return False
