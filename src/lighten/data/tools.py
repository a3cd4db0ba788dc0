"""Tools and tool calls in the encodings that people have, as chat templates want them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.data.examples import Message
from lighten.data.values import BadRowError, check_nested, decoded, is_missing


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The row's tool descriptions: a list, a JSON text of one, or a list of JSON texts.

    Raises:
        BadRowError: They are none of these.
    """
    tools = decoded(row.get("tools"), "tools")
    if is_missing(tools):
        tools = decoded(row.get("functions"), "functions")  # OpenAI's older form
    if is_missing(tools):
        return None
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list):
        raise BadRowError("tools must be a list of tool descriptions")
    described = [decoded(tool, "tools") for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in described):
        raise BadRowError("tools must be a list of tool descriptions, each an object")
    check_nested(described, "tools")
    return [_wrapped(tool) for tool in described] or None


def _wrapped(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function's description where templates, and who serves the model, have it."""
    is_bare = "name" in tool and not {"type", "function"} & tool.keys()
    return {"type": "function", "function": tool} if is_bare else tool


def tool_calls_of(message: Mapping[str, Any], name: str) -> list[Any] | None:
    """A message's tool calls, their arguments as objects.

    Raises:
        BadRowError: They are no list of objects, or their arguments no object.
    """
    calls = decoded(message.get("tool_calls"), f"{name}: tool_calls")
    if is_missing(calls):
        legacy_call = message.get("function_call")  # OpenAI's older form, one call
        if not isinstance(legacy_call, Mapping):
            return None
        calls = [{"type": "function", "function": legacy_call}]
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise BadRowError(f"{name}: tool_calls must be a list")
    return [_call(decoded(call, f"{name}: tool_calls"), name) for call in calls]


def written_calls(text: Any) -> list[Any] | None:
    """Tool calls that an answer's text is, as JSON; None where it is something else."""
    try:
        calls = decoded(text, "")
    except BadRowError:
        return None
    calls = calls if isinstance(calls, list) else [calls]
    named = all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls)
    return calls if calls and named else None


def call_names(message: Message) -> list[str]:
    """Names of the functions that a message calls."""
    names = []
    for call in dict(message.extra).get("tool_calls") or ():
        about = call.get("function", call) if isinstance(call, dict) else {}
        name = about.get("name") if isinstance(about, dict) else None
        names += [name] if isinstance(name, str) else []
    return names


def _call(call: Any, name: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise BadRowError(f"{name}: each of tool_calls must be an object")
    if "function" in call:
        function = decoded(call["function"], f"{name}: function")
        if not isinstance(function, Mapping):
            raise BadRowError(f"{name}: function must be an object")
        return {**call, "function": _with_arguments(function, name)}
    if "name" in call:  # the call itself; templates look for it under "function"
        return {"type": "function", "function": _with_arguments(call, name)}
    return _with_arguments(call, name)


def _with_arguments(function: Mapping[str, Any], name: str) -> dict[str, Any]:
    if "arguments" not in function:
        return dict(function)
    arguments = decoded(function["arguments"], f"{name}: arguments")
    arguments = {} if is_missing(arguments) else arguments
    if not isinstance(arguments, Mapping):
        raise BadRowError(f"{name}: arguments must be an object, not {type(arguments).__name__}")
    return {**function, "arguments": arguments}
