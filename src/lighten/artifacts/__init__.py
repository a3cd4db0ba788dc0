"""What a run ships, opened without a training set-up: the door of export, receipts and serving."""

from lighten.artifacts.source import (
    COMPANIONS,
    Artefact,
    added_words,
    copy_companions,
    new_tokens,
    open_source,
)

__all__ = [
    "COMPANIONS", "Artefact", "added_words", "copy_companions", "new_tokens", "open_source",
]  # fmt: skip
