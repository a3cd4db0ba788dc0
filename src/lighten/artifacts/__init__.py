"""What a run ships, opened without a training set-up: the door of export, receipts and serving."""

from lighten.artifacts.source import (
    COMPANIONS,
    NAMED_TEMPLATES,
    Artefact,
    added_words,
    copy_companions,
    copy_named_templates,
    new_tokens,
    open_source,
)

__all__ = [
    "COMPANIONS", "NAMED_TEMPLATES", "Artefact", "added_words", "copy_companions",
    "copy_named_templates", "new_tokens", "open_source",
]  # fmt: skip
