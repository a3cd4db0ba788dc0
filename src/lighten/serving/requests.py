"""What clients send: OpenAI's bodies. A field that is not applied is refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
)

from lighten.data import Message
from lighten.data.tools import tool_calls_of
from lighten.data.values import BadRowError, check_nested
from lighten.generation.settings import LEAST_TEMPERATURE, Sampling
from lighten.serving.tools.fields import NamedChoice, SentCall, Tool

MOST_ANSWERS = 16  # `n`
MOST_STOPS = 16
MOST_LOGPROBS = 20

# Fields that change no answer, and values at which others change none: many clients send them.
_LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "store": (False,), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "parallel_tool_calls": (True, False), "service_tier": ("auto", "default"), "echo": (False,),
    "suffix": ("",), "best_of": (1,), "modalities": (["text"],),
    "add_generation_prompt": (True,), "continue_final_message": (False,),  # vLLM's
}  # fmt: skip
_ROLES = {"system", "developer", "user", "assistant", "tool"}
# Who speaks is the template's to write: agents' names come with their messages (LangGraph's).
_OF_ROLE = {"assistant": {"tool_calls", "name"}, "tool": {"tool_call_id", "name"}}


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: What is wrong and what to do.
        param: Which field.
        code: OpenAI's word for it.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        error_type = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 401:
            error_type = "authentication_error"
        return {"error": {"message": self.message, "type": error_type, "param": self.param,
                          "code": self.code}}  # fmt: skip


class _JsonSchema(BaseModel):
    model_config = ConfigDict(extra="ignore")  # name, strict and description change no grammar
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """`response_format`."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    def schema_wanted(self) -> dict[str, Any] | None:
        """The JSON schema that the answer has to follow."""
        if self.type != "json_schema" and self.json_schema is not None:
            raise Refused(400, f"response_format: json_schema is not applied where the type is "
                          f"{self.type}; say type json_schema", "response_format.json_schema",
                          "unsupported_parameter")  # fmt: skip
        if self.type == "json_object":
            return {"type": "object"}
        if self.type == "json_schema":
            if self.json_schema is None:
                raise Refused(400, "response_format: json_schema needs json_schema.schema",
                              "response_format.json_schema")  # fmt: skip
            return self.json_schema.json_schema
        return None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool | None = None
    # OpenAI's padding against eavesdroppers and vLLM's usage in each event: neither is made here.
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


# A whole number is one too; true and "0.5" are none, though pydantic would take them.
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Fraction = Annotated[_Number, Field(ge=0, le=1)]
_Penalty = Annotated[_Number, Field(ge=-2, le=2)]
_Bias = Annotated[_Number, Field(ge=-100, le=100)]


class _Common(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: StrictStr
    adapter_id: StrictStr | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[_Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] | None = None
    min_p: _Fraction | None = None
    repetition_penalty: Annotated[_Number, Field(ge=0.01, le=10)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: StrictInt | None = None
    logit_bias: dict[str, _Bias] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stream: StrictBool | None = None
    stream_options: _StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    stop_token_ids: list[StrictInt] | None = None
    ignore_eos: StrictBool | None = None

    @field_validator("stop")
    @classmethod
    def _usable_stops(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else list(value or ())
        if len(stops) > MOST_STOPS:
            raise ValueError(f"at most {MOST_STOPS} texts")
        if "" in stops:
            raise ValueError("an empty text would end every answer at once")
        return stops

    @property
    def stops(self) -> Sequence[str]:
        """Texts that end the answer."""
        return self.stop or ()

    @property
    def answers(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def most_tokens(self) -> int | None:
        """Tokens at most, None for as many as there is room for."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Log-probabilities: alternatives for each token; None: none at all."""
        raise NotImplementedError

    @property
    def prompt_alternatives(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs

    def sampling(self, vocabulary: int, answer: int) -> Sampling:
        """How tokens are chosen.

        Args:
            vocabulary: Tokens that the model knows.
            answer: Which of `n` answers; each has a seed of its own.
        """
        bias: dict[int, float] = {}
        for token, value in (self.logit_bias or {}).items():
            # More digits than the largest id has are no number that Python would read.
            digits = token.isascii() and token.isdecimal() and len(token) <= len(str(vocabulary))
            if not digits or int(token) >= vocabulary:
                raise Refused(400, f"logit_bias: {token[:20]!r} is no token of this model, which "
                              f"has ids from 0 to {vocabulary - 1}", "logit_bias")  # fmt: skip
            bias[int(token)] = value
        temperature = self.temperature
        if temperature is not None and temperature < LEAST_TEMPERATURE:
            temperature = 0.0
        settings = {
            "temperature": temperature, "top_p": self.top_p, "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "seed": None if self.seed is None else self.seed + answer,
        }  # fmt: skip
        return Sampling(
            logit_bias=bias,
            **{key: value for key, value in settings.items() if value is not None},  # type: ignore[arg-type]
        )


class _TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: StrictStr


class _Turn(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: StrictStr
    content: StrictStr | list[_TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: list[SentCall] | None = None
    tool_call_id: StrictStr | None = None

    def message(self, place: int) -> Message:
        where = f"messages[{place}]"
        if self.role not in _ROLES:
            raise Refused(400, f"{where}.role: {self.role!r} is not applied by this server; use "
                          f"{', '.join(sorted(_ROLES))}", f"{where}.role")  # fmt: skip
        known = {"name": self.name, "tool_calls": self.tool_calls,
                 "tool_call_id": self.tool_call_id}  # fmt: skip
        given = {
            key: value for key, value in {**known, **(self.model_extra or {})}.items() if value
        }
        extra = given.keys() - _OF_ROLE.get(self.role, {"name"})
        if extra:
            name = min(extra)
            raise Refused(400, f"{where}.{name} is not applied by this server; leave it out",
                          f"{where}.{name}", "unsupported_parameter")  # fmt: skip
        if self.content is None and not self.tool_calls:
            raise Refused(400, f"{where}.content is missing", f"{where}.content")
        parts = self.content if isinstance(self.content, list) else []
        text = "\n".join(part.text for part in parts) if parts else self.content
        for_template: list[tuple[str, Any]] = [
            (key, given[key]) for key in sorted(given.keys() - {"tool_calls"})
        ]
        if self.tool_calls:
            calls = {"tool_calls": [call.described() for call in self.tool_calls]}
            try:
                for_template.append(("tool_calls", tool_calls_of(calls, where)))
                check_nested(for_template, f"{where}.tool_calls")
            except BadRowError as error:
                raise Refused(400, str(error), f"{where}.tool_calls") from error
        # OpenAI's newer name for the same.
        role = "system" if self.role == "developer" else self.role
        return Message(role, str(text or ""), extra=tuple(for_template))


class _TemplateOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    enable_thinking: StrictBool | None = None


class ChatRequest(_Common):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[_Turn], Field(min_length=1), FailFast()]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    chat_template_kwargs: _TemplateOptions | None = None  # vLLM's
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: StrictBool | None = None

    @property
    def most_tokens(self) -> int | None:
        """See `_Common`."""
        limits = {value for value in (self.max_completion_tokens, self.max_tokens) if value}
        if len(limits) > 1:
            raise Refused(400, "max_tokens and max_completion_tokens say different things; keep "
                          "one", "max_tokens")  # fmt: skip
        return next(iter(limits), None)

    @property
    def alternatives(self) -> int | None:
        """See `_Common`."""
        if not self.logprobs:
            if self.top_logprobs:
                raise Refused(400, "top_logprobs needs logprobs: true", "top_logprobs")
            return None
        return self.top_logprobs or 0

    @property
    def thinking(self) -> bool | None:
        """Whether the answer begins with a thought; None: as the model's do."""
        options = self.chat_template_kwargs
        return None if options is None else options.enable_thinking

    def conversation(self) -> list[Message]:
        """The messages; behind an assistant's comes another answer, as at OpenAI and in vLLM."""
        return [turn.message(place) for place, turn in enumerate(self.messages)]


class CompletionRequest(_Common):
    """The body of `/v1/completions`."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def alternatives(self) -> int | None:
        """See `_Common`."""
        return self.logprobs

    @property
    def prompt_alternatives(self) -> int | None:
        """See `_Common`."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((most for most in wanted if most is not None), default=None)

    @property
    def each_prompt(self) -> Sequence[str | list[int]]:
        """The prompts, as texts or token ids."""
        prompts: Any = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        return [prompts] if prompts and isinstance(prompts[0], int) else prompts

    def prompts(self, encode: Callable[[str], list[int]], vocabulary: int) -> list[list[int]]:
        """Token ids of each prompt."""
        if not self.each_prompt:
            raise Refused(400, "prompt is empty", "prompt")
        token_ids = []
        for prompt in self.each_prompt:
            ids = encode(prompt) if isinstance(prompt, str) else list(prompt)
            if not ids:
                raise Refused(400, "prompt is empty", "prompt")
            require_tokens(ids, vocabulary, "prompt")
            token_ids.append(ids)
        return token_ids

    @property
    def most_tokens(self) -> int:
        """OpenAI's default is 16 here."""
        return 16 if self.max_tokens is None else self.max_tokens


def require_tokens(ids: Sequence[int], vocabulary: int, field: str) -> None:
    """Refuse ids that are no tokens.

    Raises:
        Refused: Names the field.
    """
    if not all(0 <= token < vocabulary for token in ids):
        raise Refused(400, f"{field} holds ids that are no tokens of this model, which has "
                      f"ids from 0 to {vocabulary - 1}", field)  # fmt: skip


Parsed = TypeVar("Parsed", bound=BaseModel)
Body = TypeVar("Body", bound=_Common)


def validated(request_type: type[Parsed], body: Any) -> Parsed:
    """A body of some kind.

    Raises:
        Refused: It is not valid, or has a field that is not applied.
    """
    if not isinstance(body, dict):
        raise Refused(400, "the body has to be a JSON object")
    try:
        request = request_type.model_validate(body)
    except ValidationError as error:
        raise _first(error) from error
    for name, value in (request.model_extra or {}).items():
        if value is None or name in _LABELS or _is_without_effect(name, value):
            continue
        raise Refused(400, f"{name} is not applied by this server; leave it out", name,
                      "unsupported_parameter")  # fmt: skip
    return request


def parse(request_type: type[Body], body: Any) -> Body:
    """A body as one of the above.

    Raises:
        Refused: It is not valid, or asks for what is not applied.
    """
    request = validated(request_type, body)
    if request.stream_options is not None and not request.stream:
        raise Refused(400, "stream_options needs stream: true", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise Refused(400, "prompt_logprobs are given with whole answers; leave stream out",
                      "prompt_logprobs")  # fmt: skip
    asks_for_prompt = getattr(request, "echo", None) or request.prompt_logprobs is not None
    if request.max_tokens == 0 and not asks_for_prompt:
        raise Refused(400, "max_tokens: 0 needs echo: true or prompt_logprobs, without which "
                      "nothing is answered", "max_tokens")  # fmt: skip
    return request


def _is_without_effect(name: str, value: Any) -> bool:
    """Whether a field that is not applied has a value at which it changes nothing."""
    same = (other for other in _WITHOUT_EFFECT.get(name, ()) if other == value)
    return any(type(other) is type(value) for other in same)  # true is no 1


def _first(error: ValidationError) -> Refused:
    """The first thing that is wrong.

    Of a value that may be a text or a list, pydantic tells first why it is no text; what is wrong
    inside the list lies deeper.
    """
    errors = error.errors(include_url=False, include_context=False)
    same = [other for other in errors if other["loc"][:1] == errors[0]["loc"][:1]]
    first = max(same, key=lambda other: len(other["loc"]))
    field = ".".join(str(part) for part in first["loc"] if not _is_variant(part))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":  # it would name our class
        message = "Input should be an object"
    return Refused(400, f"{field}: {message}", field)


def _is_variant(part: int | str) -> bool:
    """Whether part of an error's place is pydantic's name of a union's member."""
    return isinstance(part, str) and (
        "[" in part or part in ("str", "int", "float", "constrained-str", NamedChoice.__name__)
    )
