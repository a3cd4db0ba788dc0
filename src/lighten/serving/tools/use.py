"""Tools of a request: does the model know any, how are its calls read, how is one forced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lighten.data import Message
from lighten.data.special import special_tokens
from lighten.serving.adapters import Model
from lighten.serving.requests import ChatRequest, Refused
from lighten.serving.tools.fields import NamedChoice
from lighten.serving.tools.formats import abilities
from lighten.serving.tools.grammar import call_grammar
from lighten.serving.tools.reader import CallFormat, CallReader


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request.

    Attributes:
        described: For the chat template.
        call_format: In which the model calls.
        functions: Those that it may call, with the schemas of their arguments.
        most: Calls of an answer; None: any number.
        shown: Special tokens that stand around calls.
        grammar: Of the answer, in llguidance's Lark; None: it is free.
        forced: Whether the answer has to be a call.
    """

    described: Sequence[dict[str, Any]]
    call_format: CallFormat
    functions: Mapping[str, Mapping[str, Any] | None]
    most: int | None
    shown: tuple[str, ...]
    grammar: str | None
    forced: bool

    def reader(self, *, thinking: bool) -> CallReader:
        """A reader of one answer.

        Args:
            thinking: Whether its prompt opened a thought.
        """
        thinking = thinking and self.grammar is None  # which has no place for a thought
        return CallReader(self.call_format, self.functions, most=self.most, thinking=thinking)


def tool_use(request: ChatRequest, model: Model) -> ToolUse | None:
    """The tools of a request; None where it has none or they are not to be called.

    Raises:
        Refused: The model does not know tools, or cannot be made to call them; names the field.
    """
    tools, choice = request.tools or [], request.tool_choice
    functions = [tool.function for tool in tools]
    callable_ones = list(range(len(functions)))
    if not functions and choice not in (None, "none", "auto"):
        raise Refused(400, "tool_choice needs tools", "tool_choice")
    if isinstance(choice, NamedChoice):
        named = choice.function.name
        callable_ones = [place for place in callable_ones if functions[place].name == named]
        if not callable_ones:
            raise Refused(400, f"tool_choice: {named!r} is none of tools, which are "
                          f"{', '.join(each.name for each in functions)}",
                          "tool_choice")  # fmt: skip
    if not functions or choice == "none":
        return None
    call_format = _format(model)
    forced = choice not in (None, "auto")
    if forced and request.thinking:
        raise Refused(400, "tool_choice: an answer that has to be a call begins with no thought; "
                      "leave chat_template_kwargs.enable_thinking out, or tool_choice",
                      "tool_choice")  # fmt: skip
    most = 1 if isinstance(choice, NamedChoice) or request.parallel_tool_calls is False else None
    schema = None if request.response_format is None else request.response_format.schema_wanted()
    if call_format.is_bare and schema is not None and not forced:
        raise Refused(400, f"response_format: calls of {model.name} are JSON without a mark, which "
                      "cannot be told from an answer by a schema; leave out tools or "
                      "response_format", "response_format")  # fmt: skip
    grammar = None
    if forced or schema is not None:
        content = None if forced else schema
        grammar = call_grammar(
            model.asking.tokenizer, call_format, functions, callable_ones, most, content
        )
    special = special_tokens(model.asking.tokenizer).texts
    return ToolUse(
        [tool.described() for tool in tools], call_format,
        {each.name: each.parameters for each in functions}, most,
        tuple(token for token in special if token in call_format.marks),
        grammar, forced,
    )  # fmt: skip


def require_written(messages: Sequence[Message], model: Model) -> None:
    """Refuse calls and results of tools that the chat template would leave out.

    Raises:
        Refused: Names the message.
    """
    for place, message in enumerate(messages):
        field = "tool_calls" if dict(message.extra).get("tool_calls") else "role"
        if field == "role" and message.role != "tool":
            continue
        able = abilities(model.asking.tokenizer, model.asking.end_texts)
        if not (able.writes_calls if field == "tool_calls" else able.writes_results):
            kind = "calls of tools" if field == "tool_calls" else "messages of role tool"
            raise Refused(400, f"messages[{place}].{field}: the chat template of {model.name} "
                          f"writes no {kind}", f"messages[{place}].{field}")  # fmt: skip


def _format(model: Model) -> CallFormat:
    able = abilities(model.asking.tokenizer, model.asking.end_texts)
    if not able.describes:
        raise Refused(400, f"tools: the chat template of {model.name} does not know tools; it "
                      "writes the same prompt with and without them", "tools")  # fmt: skip
    if able.calls is None:
        raise Refused(400, f"tools: the form in which the chat template of {model.name} writes "
                      "calls is not understood by this server", "tools")  # fmt: skip
    return able.calls
