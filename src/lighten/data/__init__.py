"""Read examples, choose the chat template, encode with a mask, and batch by length."""

from lighten.data.check import CheckReport, check
from lighten.data.encode import Encoded, Row, encode, prompt_of
from lighten.data.examples import Example, Message, split
from lighten.data.read import BadRow, Dataset, has_split, read
from lighten.data.template import TemplateChoice, choose_template

__all__ = [
    "BadRow",
    "CheckReport",
    "Dataset",
    "Encoded",
    "Example",
    "Message",
    "Row",
    "TemplateChoice",
    "check",
    "choose_template",
    "encode",
    "has_split",
    "prompt_of",
    "read",
    "split",
]
