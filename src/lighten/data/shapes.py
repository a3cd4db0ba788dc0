"""From a row of a file to an example, its shape recognised by its columns.

Shapes: Alpaca (`instruction`, `input`, `output`, with `system` and `history`), chat (`messages`),
ShareGPT (`conversations`), prompt-completion, `text`, and ready tokens (`input_ids`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lighten.data.examples import Example, Message
from lighten.data.messages import answer_in, chat_in, messages_of
from lighten.data.tools import tools_of
from lighten.data.values import (
    BadRowError,
    decoded,
    is_missing,
    optional_text,
    text_of,
    without_missing,
)

SHAPES = "instruction/output, messages, conversations, prompt/completion, text, or input_ids/labels"
# Which shape each column belongs to; the others (system, tools) go with several.
_SHAPE_OF = {
    **dict.fromkeys(("instruction", "input", "output", "history"), "alpaca"),
    **dict.fromkeys(("prompt", "completion"), "prompt-completion"),
    **dict.fromkeys(("input_ids", "labels", "attention_mask"), "tokens"),
    "messages": "messages", "conversations": "conversations", "text": "text",
}  # fmt: skip
COLUMNS = (*_SHAPE_OF, "system", "tools")
# What other data sets call a question and its answer; offered, never taken unasked.
_QUESTIONS = ("question", "query", "prompt", "instruction", "problem", "input", "user", "질문",
              "문제", "지시문", "입력")  # fmt: skip
_ANSWERS = ("response", "answer", "output", "completion", "solution", "target", "chosen",
            "assistant", "reply", "답변", "답", "정답", "응답", "출력")  # fmt: skip
_CONTEXTS = ("context", "passage", "문맥", "지문")
_CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_TEXTS = ("text", "content", "document", "body")
# Columns of which one is in every row that has an answer.
_ANSWERED = {"messages", "conversations", "output", "completion"}
# Where the answer of a row stands, by the column of what is asked.
_ANSWER_OF = {"messages": "messages", "conversations": "conversations", "instruction": "output",
              "prompt": "completion"}  # fmt: skip
# Columns of what stands beside the text where a model sees or hears.
_MEDIA = ("images", "videos", "audios")
# Ids beyond any vocabulary would not fit the arrays that hold them.
_LARGEST_ID = 2**31 - 1


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our names for its columns, without columns of other shapes."""
    shapes = {_SHAPE_OF[name] for name in columns if name in _SHAPE_OF}
    sources = set(columns.values())
    remaining = {
        name: value
        for name, value in row.items()
        if name not in sources and (name not in _SHAPE_OF or _SHAPE_OF[name] in shapes)
    }
    return remaining | {name: row[column] for name, column in columns.items() if column in row}


def example_of(row: Any, file: str, line: int, unread: set[str]) -> tuple[str, Example]:
    """Shape and example of a row.

    Args:
        row: The row.
        file: Where it stood.
        line: Its line there.
        unread: Receives the keys of messages that hold something and that nothing reads.

    Raises:
        BadRowError: The row is broken.
    """
    if not isinstance(row, Mapping):
        raise BadRowError(f"a row must be an object, not {type(row).__name__}")
    values = without_missing(row)
    if media := [name for name in _MEDIA if values.get(name) not in (None, [], {}, "", "[]")]:
        raise BadRowError(f"holds {media[0]}; only text can be trained here")
    if bad := [name for name in _marks(values) if _is_false(values.get(name))]:
        raise BadRowError(
            f"{bad[0]} is false: its answer is one that is not to be learnt; a column that says "
            "something else needs another name"
        )
    if "input_ids" in values:
        return "tokens", _tokens(values, file, line)
    if "chosen" in values and "rejected" in values:
        _require_chosen(values)
    for shape in ("messages", "conversations"):
        if shape in values:
            messages = _after_system(
                values, messages_of(decoded(values[shape], shape), shape, unread)
            )
            return shape, Example(file, line, messages, tools=tools_of(values))
    if "instruction" in row or "output" in row:
        messages, single = _alpaca(values, row)
        return "alpaca", Example(file, line, messages, single_turn=single, tools=tools_of(values))
    if "prompt" in row and "completion" in row:
        return "prompt-completion", _prompt_completion(row, file, line, unread)
    if "text" in row:
        text = text_of(row["text"], "text")
        if not text.strip():
            raise BadRowError("text is empty")
        return "text", Example(file, line, text=text)
    raise BadRowError(_describe_unknown_shape(row))


def _marks(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns of KTO's data that say whether an answer is a good one: LLaMA-Factory's and TRL's.

    ms-swift has TRL's beside messages. Beside a text alone a label is its class.
    """
    return ("kto_tag", "label") if values.keys() & _ANSWERED else ("kto_tag",)


def _is_false(value: Any) -> bool:
    """False itself, or the word, as tables write it; 0 is a class of many."""
    return value is False or (isinstance(value, str) and value.strip().lower() == "false")


def _require_chosen(values: Mapping[str, Any]) -> None:
    """Refuse a row of preferences, unless what would be learnt of it is its chosen answer."""
    chosen = answer_in(values["chosen"], "chosen")
    for question, answer in _ANSWER_OF.items():
        if question not in values:
            continue
        if chosen is not None and answer_in(values.get(answer), answer) == chosen:
            return
        chat = chat_in(values["chosen"], "chosen")
        if chat and answer_in(chat[:1], "chosen") is None:  # it begins with what was asked
            columns = "messages: chosen"
        elif question == "instruction":
            columns = "instruction: instruction, output: chosen"
        else:
            columns = f"prompt: {question}, completion: chosen"
        raise BadRowError(
            "has a chosen and a rejected answer, and preferences are not built; set "
            f"dataset_columns: {{{columns}}} to learn the chosen ones"
        )


def _describe_unknown_shape(row: Mapping[str, Any]) -> str:
    """What to do about columns that no shape has."""
    names = [str(name) for name in row]
    question = next((name for name in names if name.lower() in _QUESTIONS), None)
    answer = next((name for name in names if name.lower() in _ANSWERS and name != question), None)
    chat = next((name for name in names if name.lower() in _CHATS), None)
    text = next((name for name in names if name.lower() in _TEXTS), None)
    message = f"unknown shape, its columns are {', '.join(names) or 'none'}; "
    if question and answer:
        return f"{message}set dataset_columns: {{instruction: {question}, output: {answer}}}"
    if chat and (keys := _keys_of_turns(row[chat])) is not None:
        if {"role", "from"} & set(keys):
            return f"{message}set dataset_columns: {{messages: {chat}}}"
        return (
            f"{message}the entries of {chat} have {', '.join(keys) or 'no keys'}; write each turn "
            "as {role: user or assistant, content: its text}, in a column messages"
        )
    if text:
        return f"{message}set dataset_columns: {{text: {text}}} to learn it whole"
    return f"{message}a row needs {SHAPES} (dataset_columns says which column is which)"


def _of_pair(values: Mapping[str, Any]) -> str:
    """Which columns of half an Alpaca row may be its question, what that is about, its answer."""
    columns = {}
    for ours, words in (("instruction", _QUESTIONS), ("input", _CONTEXTS), ("output", _ANSWERS)):
        known = (name for name in (ours, *values) if name in values and name.lower() in words)
        if (name := next(known, None)) is not None:
            columns[ours] = name
    if not {"instruction", "output"} <= columns.keys():
        return ""
    named = ", ".join(f"{ours}: {name}" for ours, name in columns.items())
    return f"; set dataset_columns: {{{named}}}"


def _keys_of_turns(value: Any) -> list[str] | None:
    """The keys of a conversation's first entry; None where a column holds no list of objects."""
    try:
        entries = decoded(value, "")
    except BadRowError:
        return None
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], Mapping):
        return None
    return [str(key) for key in entries[0]]


def _alpaca(values: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[tuple[Message, ...], bool]:
    """The conversation, and whether it is a single pair."""
    for key in ("instruction", "output"):
        if key not in values:
            if key in row:
                raise BadRowError(f"{key} must be text, not nothing (null or NaN)")
            raise BadRowError(
                f"{key} is missing beside {', '.join(map(str, row))}{_of_pair(values)}"
            )
    parts = [text_of(values["instruction"], "instruction"), optional_text(values, "input")]
    messages: list[Message] = []
    if system := optional_text(values, "system"):
        messages.append(Message("system", system))
    history = decoded(values.get("history"), "history")
    if is_missing(history):
        history = []
    if not isinstance(history, list):
        raise BadRowError("history must hold [question, answer] pairs")
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRowError("history must hold [question, answer] pairs")
        messages += [
            Message("user", text_of(pair[0], "history")),
            Message("assistant", text_of(pair[1], "history")),
        ]
    messages.append(Message("user", "\n".join(part for part in parts if part)))
    messages.append(Message("assistant", text_of(values["output"], "output")))
    return tuple(messages), not history


def _prompt_completion(row: Mapping[str, Any], file: str, line: int, unread: set[str]) -> Example:
    sides: list[tuple[Message, ...]] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        chat = chat_in(row[key], key)
        sides.append(
            (Message(role, text_of(row[key], key)),)
            if chat is None
            else messages_of(chat, key, unread)
        )
    prompt = tuple(replace(m, train=False) if m.role == "assistant" else m for m in sides[0])
    messages = _after_system(row, prompt + sides[1])
    return Example(file, line, messages, single_turn=True, tools=tools_of(row))


def _after_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages after the row's own system message, unless they begin with one."""
    system = optional_text(row, "system")
    if not system or messages[0].role == "system":
        return messages
    return (Message("system", system), *messages)


def _tokens(values: Mapping[str, Any], file: str, line: int) -> Example:
    """Ready tokens without their padding; a label is its token or -100."""
    ids = _integers(values["input_ids"], "input_ids", "token ids")
    if not ids:
        raise BadRowError("input_ids is empty")
    if min(ids) < 0 or max(ids) > _LARGEST_ID:
        raise BadRowError(f"input_ids must be token ids, from 0 to {_LARGEST_ID}")
    begin, end = 0, len(ids)
    if "attention_mask" in values:
        mask = decoded(values["attention_mask"], "attention_mask")
        if isinstance(mask, list):
            mask = [int(flag) if isinstance(flag, bool) else flag for flag in mask]
        mask = _integers(mask, "attention_mask", "0 and 1", len(ids))
        if set(mask) - {0, 1} or 1 not in mask:
            raise BadRowError("attention_mask must hold 1 for each token and 0 for padding")
        begin, end = mask.index(1), len(mask) - mask[::-1].index(1)
        if 0 in mask[begin:end]:
            raise BadRowError(
                f"attention_mask hides token {mask.index(0, begin) + 1}, which stands between "
                "others; only padding at an end can be left out"
            )
    labels: Sequence[int] = list(ids)
    if "labels" in values:
        labels = _integers(
            values["labels"], "labels", "token ids, or -100 where a token is not supervised",
            len(ids),
        )  # fmt: skip
    for place in range(begin, end):
        if labels[place] not in (ids[place], -100):
            shifted = labels[: len(ids) - 1] == ids[1:] or labels[place] == (*ids, None)[place + 1]
            raise BadRowError(
                f"label {place + 1} is {labels[place]} where the token is {ids[place]}; a label is "
                "the token itself or -100"
                + (", for training shifts them by itself" if shifted else "")
            )
    return Example(file, line, input_ids=tuple(ids[begin:end]), labels=tuple(labels[begin:end]))


def _integers(value: Any, name: str, description: str, size: int | None = None) -> Sequence[int]:
    numbers = decoded(value, name)
    if size is not None and (not isinstance(numbers, list) or len(numbers) != size):
        raise BadRowError(f"{name} must be as long as input_ids ({size})")
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise BadRowError(f"{name} must be {'a list of ' * (size is None)}{description}")
    return numbers
