"""The bodies of `/tokenize` and `/detokenize`, which are vLLM's."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, StrictBool, StrictInt, StrictStr

from lighten.serving.requests import ChatRequest, Refused, parse


class _Named(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())
    model: StrictStr | None = None  # the base, unless an adapter is named


class TokenizeText(_Named):
    """A text, as `/v1/completions` takes it."""

    prompt: StrictStr
    add_special_tokens: StrictBool | None = None
    return_token_strs: StrictBool | None = None


class DetokenizeRequest(_Named):
    """Token ids."""

    tokens: list[StrictInt]


def as_chat(body: dict[str, Any], base: str) -> tuple[ChatRequest, bool]:
    """A conversation, as `/v1/chat/completions` takes it, and whether tokens are wanted as texts.

    Args:
        body: With `messages`.
        base: Its name, which is the model unless one is named.

    Raises:
        Refused: It is not valid, or asks for what is not applied.
    """
    options = {"return_token_strs": False, "add_generation_prompt": True,
               "add_special_tokens": False, "continue_final_message": False}  # fmt: skip
    for name, usual in options.items():
        value = body.get(name)
        if value is None or value is usual or (name == "return_token_strs" and value is True):
            continue
        raise Refused(400, f"{name}: {value!r} is not applied by this server; conversations are "
                      "read up to the answer, as the chat template writes them", name)  # fmt: skip
    rest = {name: value for name, value in body.items() if name not in options}
    request = parse(ChatRequest, {**rest, "model": rest.get("model") or base})
    return request, body.get("return_token_strs") is True
