"""The messages of a conversation, in OpenAI's and in ShareGPT's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.data.examples import Message
from lighten.data.tools import tool_calls_of, written_calls
from lighten.data.values import BadRowError, check_nested, is_missing, text_of

_CALL = "function_call"  # ShareGPT's role of an answer that calls tools, as JSON
_ROLES = {"human": "user", "gpt": "assistant", "bard": "assistant", "model": "assistant",
          "chatgpt": "assistant", _CALL: "assistant", "observation": "tool",
          "function": "tool"}  # fmt: skip
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
# What says whether a message is learnt: ours, ms-swift's, Axolotl's; OpenAI's, ms-swift's.
_SWITCHES, _WEIGHTS = ("train", "loss", "training"), ("weight", "loss_scale")
_KEPT = ("tool_call_id", "name", "reasoning_content", "thinking")
_READ = {"role", "from", "content", "value", "tool_calls", _CALL, *_SWITCHES, *_WEIGHTS, *_KEPT}
# Who wrote a message when and where, and what was counted of it: nothing to learn or to leave out.
_ABOUT = {"id", "uuid", "message_id", "parent_id", "index", "turn", "timestamp", "created",
          "created_at", "date", "model", "source", "language", "lang", "author", "user_id",
          "metadata", "tokens", "token_count", "openai_id", "turn_identifier", "country",
          "hashed_ip", "header", "state", "toxic", "redacted", "temperature", "top_p",
          "token_counter"}  # fmt: skip


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
    said = None
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
