"""The thought that an answer may begin with."""

from __future__ import annotations

import re
from dataclasses import replace

from lighten.data.examples import Message
from lighten.data.spans import EMPTY_THOUGHT

# Keys of a message that hold its thought.
THOUGHT_KEYS = ("reasoning_content", "thinking")
# A thought with what stands around it, as models of several families write it.
_THOUGHT = re.compile(
    r"\s*(?:<(think|thinking|thought|reasoning)>.*?</\1>|\[THINK\].*?\[/THINK\])\s*", re.DOTALL
)
# Where the opening mark stands in the prompt, the answer only closes the thought.
_CLOSED = re.compile(
    r"^(?:(?!<(?:think|thinking|thought|reasoning)>).)*?</(think|thinking|thought|reasoning)>\s*",
    re.DOTALL,
)


def thought_of(message: Message) -> str:
    """The words of an answer's thought, empty without one."""
    if message.role != "assistant":
        return ""
    reasoning = dict(message.extra).get("reasoning_content")
    if isinstance(reasoning, str) and reasoning.strip():
        return reasoning.strip()
    if "</" not in message.content and "[/THINK]" not in message.content:
        return ""  # most answers: nothing closes a thought
    match = _THOUGHT.match(message.content) or _CLOSED.match(message.content)
    if not match or EMPTY_THOUGHT.fullmatch(match[0]):
        return ""
    return re.sub(r"</?\w+>|\[/?THINK\]", "", match[0]).strip()


def without_thought(message: Message) -> Message:
    """A message without its thought."""
    if not thought_of(message):
        return message
    extra = tuple(entry for entry in message.extra if entry[0] not in THOUGHT_KEYS)
    if _THOUGHT.match(message.content):  # and those between its words
        content = _THOUGHT.sub("\n\n", message.content).strip()
    else:
        content = _CLOSED.sub("", message.content, count=1)
    return replace(message, content=content, extra=extra)


def raw_answer(message: Message) -> str:
    """An answer with its thought, as a model would write it."""
    reasoning = dict(message.extra).get("reasoning_content")
    if isinstance(reasoning, str) and reasoning.strip():
        return f"<think>\n{reasoning.strip()}\n</think>\n\n{message.content.strip()}"
    return message.content.strip()
