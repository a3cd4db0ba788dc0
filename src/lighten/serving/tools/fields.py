"""Fields of a chat that speak of tools, as OpenAI's clients send them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    StrictBool,
    StrictStr,
    model_validator,
)


class Function(BaseModel):
    """What a model is told of a function."""

    model_config = ConfigDict(extra="allow")  # templates show whatever is there
    # Of any language, as Python's; OpenAI's are the ASCII ones of 64 letters.
    name: StrictStr = Field(pattern=r"^[\w.:/-]{1,128}$")
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(BaseModel):
    """One of `tools`."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: Function
    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _kept(cls, value: Any, handler: ModelWrapValidatorHandler[Tool]) -> Tool:
        tool = handler(value)
        tool._sent = value
        return tool

    def described(self) -> dict[str, Any]:
        """As it was sent, in its order, for chat templates: without what is for servers alone."""
        function = {
            key: value
            for key, value in self._sent["function"].items()
            if value is not None and key != "strict"
        }
        return {**self._sent, "function": function}


class _Named(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: StrictStr


class NamedChoice(BaseModel):
    """The function that has to be called."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: _Named


class _SentFunction(BaseModel):
    name: StrictStr = Field(min_length=1)
    arguments: StrictStr | dict[str, Any] | None = None


class SentCall(BaseModel):
    """A call of an earlier answer, as a client sends it back."""

    type: Literal["function"] = "function"
    id: StrictStr | None = None
    function: _SentFunction

    def described(self) -> dict[str, Any]:
        """As training data have it."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {**({"id": self.id} if self.id else {}), "type": self.type, "function": function}
