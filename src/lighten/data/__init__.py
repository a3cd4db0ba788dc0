"""Read examples, choose the chat template, encode with a mask, and batch by length."""

from lighten.data.asking import question_ids
from lighten.data.check import CheckReport, check
from lighten.data.conversation import Handling, Renderer
from lighten.data.encode import Encoded, NothingSupervised, encode, prompt_of
from lighten.data.examples import Example, Message
from lighten.data.findings import Findings
from lighten.data.read import BadRow, Dataset, left_out, read, with_split
from lighten.data.splits import FEWEST, Split, shared_prompts, split
from lighten.data.stops import LearntAnswers, end_token, learnt_answers, stop_tokens, writes_alike
from lighten.data.storage import EncodedRows, Row, lengths_of
from lighten.data.template import TemplateChoice, choose_template

__all__ = [
    "FEWEST",
    "BadRow",
    "CheckReport",
    "Dataset",
    "Encoded",
    "EncodedRows",
    "Example",
    "Findings",
    "Handling",
    "LearntAnswers",
    "Message",
    "NothingSupervised",
    "Renderer",
    "Row",
    "Split",
    "TemplateChoice",
    "check",
    "choose_template",
    "encode",
    "end_token",
    "learnt_answers",
    "left_out",
    "lengths_of",
    "prompt_of",
    "question_ids",
    "read",
    "shared_prompts",
    "split",
    "stop_tokens",
    "with_split",
    "writes_alike",
]
