"""The messages of a conversation, in OpenAI's and in ShareGPT's keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lighten.data.examples import Message
from lighten.data.tools import tool_calls_of, written_calls
from lighten.data.values import BadRowError, check_nested, decoded, is_missing, text_of

_CALL = "function_call"  # ShareGPT's role of an answer that calls tools, as JSON
_ROLES = {"human": "user", "gpt": "assistant", "bard": "assistant", "model": "assistant",
          "chatgpt": "assistant", _CALL: "assistant", "observation": "tool",
          "function": "tool"}  # fmt: skip
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
# What says whether a message is learnt: ours, ms-swift's, Axolotl's; OpenAI's, ms-swift's.
_SWITCHES, _WEIGHTS = ("train", "loss", "training"), ("weight", "loss_scale")
_KEPT = ("tool_call_id", "name", "reasoning_content", "thinking")
_READ = {"role", "from", "content", "value", "tool_calls", _CALL, *_SWITCHES, *_WEIGHTS, *_KEPT}
_WORDS = {"content", "value", "tool_calls", _CALL}
# Who wrote a message when and where, and what was counted of it: nothing to learn or to leave out.
_ABOUT = {"id", "uuid", "message_id", "parent_id", "index", "turn", "timestamp", "created",
          "created_at", "date", "model", "source", "language", "lang", "author", "user_id",
          "metadata", "tokens", "token_count", "openai_id", "turn_identifier", "country",
          "hashed_ip", "header", "state", "toxic", "redacted", "temperature", "top_p",
          "token_counter"}  # fmt: skip
_LISTED = re.compile(r"\s*\[\s*\{")
# A list of messages as Python writes it, not JSON: what pandas puts into a CSV's cell.
_REPR = re.compile(r"\s*\[\{'(?:role|from|content|value)': ")


def chat_in(value: Any, name: str) -> list[Any] | None:
    """The messages that a value is: a list of them, JSON text of such a list, or one alone.

    None: it is something else. Text is a list of messages where each has a role and words: an
    answer may be JSON, too.

    Raises:
        BadRowError: It is such a list as Python writes it, not JSON.
    """
    if isinstance(value, Mapping):
        return [value] if "role" in value or "from" in value else None
    if isinstance(value, list):
        is_chat = any(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in value)
        return value if is_chat else None
    if not isinstance(value, str) or not _LISTED.match(value):
        return None
    if _REPR.match(value):
        decoded(value, name)  # which says what is wrong
    try:
        messages = decoded(value, name)
    except BadRowError:
        return None
    if isinstance(messages, list) and all(
        isinstance(m, Mapping) and {"role", "from"} & m.keys() and _WORDS & m.keys()
        for m in messages
    ):
        return messages
    return None


def answer_in(value: Any, name: str) -> str | None:
    """The answer that a value is or ends with: text, or a message of the assistant's; else None.

    Raises:
        BadRowError: It is a list of messages as Python writes it, not JSON.
    """
    chat = chat_in(value, name)
    if chat is None:
        return value.strip() if isinstance(value, str) else None
    last: Mapping[str, Any] = chat[-1] if isinstance(chat[-1], Mapping) else {}
    role, words = last.get("role", last.get("from")), last.get("content", last.get("value"))
    is_answer = isinstance(role, str) and _ROLES.get(role, role) == "assistant"
    return words.strip() if is_answer and isinstance(words, str) else None


def messages_of(value: Any, name: str, unread: set[str]) -> tuple[Message, ...]:
    """The messages of a list of objects.

    Args:
        value: The list.
        name: What it is called in the row, for errors.
        unread: Receives the keys of messages that hold something and that nothing reads.

    Raises:
        BadRowError: It is no such list, or one of its messages is broken.
    """
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{name} must be a list of at least one message")
    return tuple(
        _message(raw, f"{name}: message {place}", unread) for place, raw in enumerate(value, 1)
    )


def _message(raw: Any, name: str, unread: set[str]) -> Message:
    if not isinstance(raw, Mapping):
        raise BadRowError(f"{name} must be an object")
    role = raw.get("role")
    if is_missing(role):
        role = raw.get("from")
    calls_alone = role == _CALL
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in KNOWN_ROLES:
        raise BadRowError(f"{name} has the role {role!r}, not one of {', '.join(KNOWN_ROLES)}")
    content = raw.get("content")
    if is_missing(content):
        content = raw.get("value")
    if calls_alone and (written := written_calls(content)) is not None:
        raw, content = {**raw, "tool_calls": written}, None
    if len(raw) == 2 and isinstance(content, str):  # most messages: nothing else to look at
        return Message(role, text_of(content, name))
    for key in raw.keys() - _READ - _ABOUT:
        if not is_missing(raw[key]) and raw[key] not in ("", [], {}):
            unread.add(str(key))
    extra = [(key, raw[key]) for key in _KEPT if not is_missing(raw.get(key))]
    if isinstance(raw.get("thinking"), str) and is_missing(raw.get("reasoning_content")):
        # Templates other than gpt-oss's look for a thought under that name.
        extra.append(("reasoning_content", raw["thinking"]))
    calls = tool_calls_of(raw, name)
    if calls:
        extra.insert(0, ("tool_calls", calls))
        content = "" if is_missing(content) else content
    if extra:
        check_nested([value for _, value in extra], name)
    return Message(role, text_of(content, name), _trained(raw, name), tuple(extra))


def _trained(raw: Mapping[str, Any], name: str) -> bool | None:
    """What `train: false`, `weight: 0` and their like say of a message; the first that is there."""
    said: bool | None = None
    for key in (*_SWITCHES, *_WEIGHTS):
        value = raw.get(key)
        if is_missing(value):
            continue
        if key in _SWITCHES and not isinstance(value, bool):
            raise BadRowError(f"{name}: {key} must be true or false, not {value!r}")
        if value not in (0, 1):
            raise BadRowError(f"{name}: {key} must be 0 or 1, not {value!r}")
        said = bool(value) if said is None else said
    return said
