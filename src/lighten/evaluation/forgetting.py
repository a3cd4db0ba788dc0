"""What a training made a model forget: its loss on text that has nothing to do with the task.

A text says nothing of what a model cannot do any more, but a loss that rises on text of every kind
does: the weights have moved away from what they could before.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lighten import data
from lighten.data import Encoded, Example
from lighten.errors import UserError
from lighten.models import Limits
from lighten.recipe import Recipe
from lighten.training.encoding import encode_as

BUILTIN = "builtin"
METRIC = "general_loss"
_FILE = Path(__file__).with_name("general.jsonl")
_PARAGRAPH = re.compile(r"\n[ \t]*\n+")


@dataclass(frozen=True)
class GeneralText:
    """Text beside the task.

    Attributes:
        name: Its file, or `builtin`.
        sha256: Of the texts; what has to be the same for two losses to be comparable.
        rows: As the model sees them.
    """

    name: str
    sha256: str
    rows: Encoded

    @property
    def facts(self) -> dict[str, str | int]:
        """For `evaluation.json`."""
        return {"path": self.name, "sha256": self.sha256, "rows": len(self.rows.rows)}


def read(source: str) -> list[Example]:
    """Texts of a file, or our own of both languages.

    Args:
        source: `builtin`; a text file, whose paragraphs are the texts; or a data file as training
            takes it.

    Raises:
        UserError: There is no such file, it is no text, or it is empty.
    """
    if source == BUILTIN:
        return list(data.read(str(_FILE)).examples)
    path = Path(source).expanduser()
    if path.suffix.lower() not in (".txt", ".md"):
        return list(data.read(source, split="test" if data.with_split(source, "test") else "train")
                    .examples)  # fmt: skip
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"forgetting: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"forgetting: {path} is no UTF-8 text") from error
    parts = [part.strip() for part in _PARAGRAPH.split(text) if part.strip()]
    if not parts:
        raise UserError(f"forgetting: {path} is empty")
    return [Example(str(path), place, text=part) for place, part in enumerate(parts, 1)]


def encoded(
    source: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> GeneralText:
    """The texts as rows, cut as training cuts rows.

    Args:
        source: As for `read`.
        recipe: Of the run.
        tokenizer: Of the model.
        limits: Of the model.

    Raises:
        UserError: As for `read`.
    """
    examples = read(source)
    content = "\x1e".join(repr((example.text, example.messages)) for example in examples)
    cut = recipe.changed({"truncation_strategy": "truncate"})
    rows = encode_as(cut, examples, tokenizer, limits)
    name = BUILTIN if source == BUILTIN else str(Path(source).expanduser())
    return GeneralText(name, hashlib.sha256(content.encode()).hexdigest(), rows)
