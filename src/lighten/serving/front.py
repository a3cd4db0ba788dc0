"""The routes: checks, names and limits; the engine makes the tokens."""

from __future__ import annotations

import asyncio
import functools
import hmac
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lighten.data.asking import OPENED
from lighten.errors import UserError
from lighten.serving.adapters import Model, spelt
from lighten.serving.answering import Answering, Disconnected, Front, chained, unless_disconnected
from lighten.serving.answers import ChatForm, CompletionForm, Form
from lighten.serving.echo import Echo, echoes
from lighten.serving.engine import EngineFailed, Generation
from lighten.serving.oversize import require_answers_fit, require_few, require_texts_fit
from lighten.serving.page import page
from lighten.serving.requests import (
    ChatRequest,
    CompletionRequest,
    Refused,
    parse,
    require_tokens,
    validated,
)
from lighten.serving.tokens import DetokenizeRequest, TokenizeText, as_chat
from lighten.serving.tools.use import ToolUse, require_written, tool_use

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)
# In a body's bytes; most are halves of whole pairs, as emoji are written.
_HALF_CHARACTER = re.compile(rb"\\u[dD][89abAB]|\\u[dD][c-fC-F]")
_LONG_TEXT = 16_384  # bytes of a body above which it is read in a thread
_END = 8  # tokens of a prompt, more than a thought's opening mark has


@dataclass(frozen=True)
class Reply:
    """What a route answers.

    Attributes:
        body: JSON, a text, or the events of a stream.
        status: Of HTTP.
        media: Kind of content.
        headers: More of them.
    """

    body: dict[str, Any] | str | AsyncIterator[str]
    status: int = 200
    media: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        """As the web framework sends it."""
        from starlette.responses import JSONResponse, Response, StreamingResponse

        if isinstance(self.body, dict):
            return JSONResponse(self.body, self.status, dict(self.headers))
        response_class = Response if isinstance(self.body, str) else StreamingResponse
        return response_class(self.body, self.status, dict(self.headers), self.media)


def application(front: Front, lifespan: Any = None) -> Starlette:
    """The server's routes."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    routes = [
        ("/", "GET", _page), ("/health", "GET", _health), ("/ready", "GET", _ready),
        ("/metrics", "GET", _metrics), ("/v1/models", "GET", _models),
        ("/v1/models/{name:path}", "GET", _model),
        ("/v1/chat/completions", "POST", _chat), ("/v1/completions", "POST", _completions),
        ("/tokenize", "POST", _tokenize), ("/detokenize", "POST", _detokenize),
        ("/v1/load_lora_adapter", "POST", _load), ("/v1/unload_lora_adapter", "POST", _unload),
    ]  # fmt: skip
    app = Starlette(
        routes=[Route(path, _guarded(call), methods=[method]) for path, method, call in routes],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    app.state.front = front
    return app


_Call = Callable[["Request", Front], Awaitable[Reply]]


def _guarded(call: _Call) -> Callable[[Request], Awaitable[Response]]:
    """A route with its checks; whatever happens is answered in OpenAI's form."""
    from starlette.requests import ClientDisconnect

    async def route(request: Request) -> Response:
        front: Front = request.app.state.front
        response = None
        try:
            _check(request, front, call)
            reply = await call(request, front)
            response = reply.response()
        except Refused as refused:
            headers = {429: {"Retry-After": "1"}, 503: {"Retry-After": "1"},
                       401: {"WWW-Authenticate": "Bearer"}}.get(refused.status, {})  # fmt: skip
            reply = Reply(refused.body(), refused.status, headers=headers)
        except EngineFailed as error:  # while adapters are loaded
            reply = Reply(Refused(503, str(error)).body(), 503, headers={"Retry-After": "1"})
        except (Disconnected, ClientDisconnect):
            reply = Reply("", 499, "text/plain")  # nobody reads it
        except Exception:
            log.exception("a request failed")
            reply = Reply(Refused(500, "the server failed; see its log").body(), 500)
        front.metrics.count("http_responses", status=str(reply.status), path=_path_of(request))
        return reply.response() if response is None else response

    return route


def _path_of(request: Request) -> str:
    """The route's own path, so that a client cannot invent labels."""
    path = request.scope["path"]
    return "/v1/models" if path.startswith("/v1/models") else str(path)


def _name_of_host(header: str) -> str:
    """A `Host` header without its port; the address of IPv6 stands in brackets."""
    name = header.partition("]")[0] if header.startswith("[") else header.rsplit(":", 1)[0]
    return name.strip("[]").lower()


def _check(request: Request, front: Front, call: _Call) -> None:
    """Host, key and kind of body.

    A page of another origin can send a browser's user here: it cannot send JSON without being
    asked for leave, which is never given, nor pass as another host.
    """
    host = _name_of_host(request.headers.get("host", ""))
    if front.hosts is not None and host not in front.hosts:
        raise Refused(421, "this server answers to requests for this machine alone; see "
                      "--host and --api-key to serve others")  # fmt: skip
    admin = call in (_load, _unload)
    keys = front.admin_keys if admin else front.api_keys
    if admin and not keys:
        raise Refused(403, "loading adapters is turned off; start the server with --admin-key")
    if keys and (request.url.path.startswith("/v1/") or request.method == "POST"):
        scheme, _, key_sent = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key_sent:
            raise Refused(401, "a key is missing: send it as 'Authorization: Bearer KEY'",
                          None, "missing_api_key")  # fmt: skip
        # A header's bytes are read as Latin-1, whatever a client wrote.
        sent = key_sent.strip().encode("latin-1")
        if not any(hmac.compare_digest(sent, key.encode()) for key in keys):
            raise Refused(401, "the key is not known here", None, "invalid_api_key")
    if request.method == "POST":
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise Refused(415, "the body has to be sent as 'Content-Type: application/json'")


# What clients of OpenAI may ask for that is not here, and what is instead.
_ELSEWHERE = {
    "/v1/embeddings": "embeddings are not served: this server writes text, at /v1/chat/completions "
                      "and /v1/completions",
    "/v1/responses": "the Responses API is not served: send the conversation as messages to "
                     "/v1/chat/completions",
}  # fmt: skip


async def _http_error(request: Request, error: Exception) -> Response:
    status: int = getattr(error, "status_code", 500)
    nowhere = "there is no such path; see /v1/models, /v1/chat/completions, /v1/completions"
    message = {404: _ELSEWHERE.get(request.url.path.rstrip("/"), nowhere),
            405: "this path takes another method"}.get(status, str(error))  # fmt: skip
    return Reply(Refused(status, message).body(), status).response()


async def _body(request: Request, front: Front) -> Any:
    """The JSON of a request, as far as the limit."""
    limit = front.limits.body_bytes
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise Refused(413, f"the body is larger than {limit:,} bytes, the limit here")
        parts.append(part)
    text = b"".join(parts)
    try:
        body = json.loads(text.decode("utf-8-sig"))
        if _HALF_CHARACTER.search(text):
            _require_whole_characters(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not valid JSON: {error}") from error
    return body


def _require_whole_characters(body: Any) -> None:
    """Refuse half of a character: JSON can write one, and no text can hold it."""
    for name, value in body.items() if isinstance(body, dict) else [("", body)]:
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            field = name.encode(errors="replace").decode()
            message = (
                f"{field or 'the body'} holds half of a character, an escape from \\ud800 to "
                "\\udfff without the other one of its pair"
            )
            raise Refused(400, message, field or None) from error


async def _page(_: Request, front: Front) -> Reply:
    security = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                "connect-src 'self'; frame-ancestors 'none'")  # fmt: skip
    return Reply(page(front.registry.name), 200, "text/html",
                 {"Content-Security-Policy": security})  # fmt: skip


async def _health(_: Request, front: Front) -> Reply:
    facts = {"status": front.engine.obstacle() or "ok", **front.engine.facts()}
    return Reply(facts, 200 if front.engine.alive() else 503)


async def _ready(_: Request, front: Front) -> Reply:
    obstacle = front.obstacle()
    if obstacle is None:
        return Reply({"ready": True})
    return Reply({"ready": False, "reason": obstacle}, 503)


async def _metrics(_: Request, front: Front) -> Reply:
    facts, slots = front.engine.facts(), front.engine.slots
    gauges = {
        "requests_running": min(front.answering, slots),
        "requests_waiting": max(0, front.answering - slots),
        "ready": float(front.obstacle() is None),
        "engine_up": float(front.engine.obstacle() is None),
        "adapters": len(front.registry.models) - 1,
        "engine_restarts": facts.get("restarts", 0), "engine_slots": slots,
    }  # fmt: skip
    return Reply(front.metrics.text(gauges), 200, "text/plain; version=0.0.4")


def _describe(model: Model, front: Front) -> dict[str, Any]:
    base = front.registry.name
    return {
        "id": model.name, "object": "model", "created": model.created, "owned_by": "lighten",
        "root": base if model.adapter is None else model.adapter.key,
        "parent": None if model.adapter is None else base,
        "max_model_len": front.engine.context,
    }  # fmt: skip


async def _models(_: Request, front: Front) -> Reply:
    descriptions = [_describe(model, front) for model in front.registry.models.values()]
    return Reply({"object": "list", "data": descriptions})


async def _model(request: Request, front: Front) -> Reply:
    return Reply(_describe(front.registry.named(request.path_params["name"]), front))


async def _load(request: Request, front: Front) -> Reply:
    body = await _body(request, front)
    # vLLM's: a name that is loaded already is loaded anew here, unless a client forbids it.
    inplace = body.pop("load_inplace", None) if isinstance(body, dict) else None
    name, path = _text_fields(body, "lora_name", "lora_path")
    name = spelt(name)
    if inplace is not None and not isinstance(inplace, bool):
        raise Refused(400, "load_inplace must be true or false", "load_inplace")
    if inplace is False and name in front.registry.models:
        raise Refused(400, f"{name} is loaded already; load_inplace: true loads it anew",
                      "load_inplace")  # fmt: skip
    return Reply({"message": await front.registry.load(name, path, front.engine)})


async def _unload(request: Request, front: Front) -> Reply:
    (name,) = _text_fields(await _body(request, front), "lora_name")
    name = spelt(name)
    message = await front.registry.unload(name, front.engine)
    front.metrics.forget(name)
    return Reply({"message": message})


def _text_fields(body: Any, *names: str) -> list[str]:
    for name in names:
        if not isinstance(body, dict) or not isinstance(body.get(name), str) or not body[name]:
            raise Refused(400, f"{name} is missing", name)
    given = {key for key, value in body.items() if value is not None}
    if extra := sorted(given - {*names}):
        raise Refused(400, f"{extra[0]} is not applied by this server; leave it out", extra[0])
    return [body[name] for name in names]


async def _chat(request: Request, front: Front) -> Reply:
    context = front.engine.context
    body = await _body(request, front)
    require_few(body, context, front.limits.waiting)
    chat_request = parse(ChatRequest, body)
    model = front.registry.named(chat_request.model, chat_request.adapter_id)
    ids, tools = await _conversation(chat_request, model, context)
    alternatives, of_prompt = chat_request.alternatives, chat_request.prompt_logprobs
    form = ChatForm(model.name, alternatives is not None, of_prompt)
    return await _answer(request, front, model, chat_request, [ids], form, tools)


async def _conversation(
    chat_request: ChatRequest, model: Model, context: int
) -> tuple[list[int], ToolUse | None]:
    """The tokens of a conversation up to its answer, and the tools that this may call."""
    messages = chat_request.conversation()

    def encoded() -> tuple[list[int], ToolUse | None]:
        # Thoughts in an assistant's messages may be left out; other messages are not.
        texts = [message.content for message in messages if message.role != "assistant"]
        require_texts_fit(texts, "messages", context, model.asking.text)
        require_written(messages, model)
        tools = tool_use(chat_request, model)
        if tools is None:
            return model.asking.conversation(messages, chat_request.thinking), None
        described = json.dumps(tools.described, ensure_ascii=False)
        require_texts_fit([described], "tools", context, model.asking.text)
        thinking = False if tools.forced else chat_request.thinking
        return model.asking.conversation(messages, thinking, tools.described), tools

    long = sum(len(message.content) for message in messages) > _LONG_TEXT
    in_thread = long or bool(chat_request.tools)
    try:
        ids, tools = await asyncio.to_thread(encoded) if in_thread else encoded()
    except UserError as error:  # the line of a data file, of which this has none
        raise Refused(400, str(error).removeprefix("chat:1: "), "messages") from error
    if not ids:
        raise Refused(400, "the chat template writes nothing of these messages", "messages")
    return ids, tools


async def _tokenize(request: Request, front: Front) -> Reply:
    context, base = front.engine.context, front.registry.name
    body = await _body(request, front)
    if isinstance(body, dict) and body.get("messages") is not None:
        chat_request, texts_wanted = as_chat(body, base)
        model = front.registry.named(chat_request.model, chat_request.adapter_id)
        ids, _ = await _conversation(chat_request, model, context)
    else:
        text_request = validated(TokenizeText, body)
        model, text = front.registry.named(text_request.model or base), text_request.prompt
        texts_wanted = bool(text_request.return_token_strs)
        encode = (
            model.asking.plain if text_request.add_special_tokens is False else model.asking.text
        )
        require_texts_fit([text], "prompt", context, encode)
        ids = await asyncio.to_thread(encode, text)
    texts = model.asking.tokenizer.convert_ids_to_tokens(ids) if texts_wanted else None
    return Reply({"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": texts})


async def _detokenize(request: Request, front: Front) -> Reply:
    body = await _body(request, front)
    parsed = validated(DetokenizeRequest, body)
    model = front.registry.named(parsed.model or front.registry.name)
    require_tokens(parsed.tokens, front.registry.vocabulary, "tokens")
    text = await asyncio.to_thread(model.asking.tokenizer.decode, parsed.tokens)
    return Reply({"prompt": text})


async def _completions(request: Request, front: Front) -> Reply:
    context, most = front.engine.context, front.limits.waiting
    body = await _body(request, front)
    require_few(body, context, most)
    completion_request = parse(CompletionRequest, body)
    model = front.registry.named(completion_request.model, completion_request.adapter_id)
    require_answers_fit(len(completion_request.each_prompt), completion_request.answers, most)

    sent, answers = completion_request.each_prompt, completion_request.answers

    def encoded() -> tuple[list[list[int]], list[Echo] | None]:
        texts = [prompt for prompt in sent if isinstance(prompt, str)]
        require_texts_fit(texts, "prompt", context, model.asking.text)
        prompts = completion_request.prompts(model.asking.text, front.registry.vocabulary)
        if not completion_request.echo:
            return prompts, None
        each = echoes(model.asking.tokenizer, sent, prompts)
        return prompts, [echo for echo in each for _ in range(answers)]

    prompts, shown = await asyncio.to_thread(encoded)
    form = CompletionForm(
        model.name, completion_request.alternatives, completion_request.prompt_logprobs, shown
    )
    return await _answer(request, front, model, completion_request, prompts, form)


async def _answer(
    request: Request, front: Front, model: Model, parsed: ChatRequest | CompletionRequest,
    prompts: Sequence[Sequence[int]], form: Form, tools: ToolUse | None = None,
) -> Reply:  # fmt: skip
    """Generate every answer of a request, whole or streamed."""
    require_answers_fit(len(prompts), parsed.answers, front.limits.waiting)
    if parsed.prompt_alternatives is not None and not front.engine.tells_prompts:
        field = "echo" if parsed.prompt_logprobs is None else "prompt_logprobs"
        raise Refused(400, f"{field}: {front.engine.name} gives no log-probabilities of prompts; "
                      f"leave {'logprobs' if field == 'echo' else 'it'} out, or start the server "
                      "with --engine lighten", field)  # fmt: skip
    generations = [
        _generation(front, model, parsed, prompt, number, tools)
        for prompt in prompts
        for number in range(parsed.answers)
    ]
    if (obstacle := front.obstacle()) is not None:
        raise Refused(503, f"{obstacle}; try again in a few seconds")
    if front.answering + len(generations) > front.limits.waiting:
        raise Refused(429, f"{front.answering} answers are under way or wait; try again later",
                      None, "rate_limit_exceeded")  # fmt: skip
    calls = None
    if tools is not None:
        opened = bool(OPENED.search(model.asking.tokenizer.decode(prompts[0][-_END:])))
        calls = functools.partial(tools.reader, thinking=opened)
    run = Answering(front, model, generations, parsed.stops, parsed.answers, calls)
    run.reserve()  # before anything is waited for, in which another request could take the room
    try:
        if parsed.stream:
            options = parsed.stream_options
            events = run.events(form, usage=options is not None and bool(options.include_usage))
            # Errors before the first token are answered as such; after it the status is sent.
            first = await unless_disconnected(request, anext(events))
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return Reply(chained(first, events), 200, "text/event-stream", headers)
        choices = await unless_disconnected(request, run.collect())
    except BaseException:
        run.release()
        raise
    return Reply(form.full_body(choices, run.usage(choices)))


def _generation(
    front: Front, model: Model, parsed: ChatRequest | CompletionRequest, prompt: Sequence[int],
    number: int, tools: ToolUse | None,
) -> Generation:  # fmt: skip
    context = front.engine.context
    room, most = context - len(prompt), parsed.most_tokens
    if room < 1:
        raise Refused(400, f"the prompt has {len(prompt)} tokens; prompt and answer may have "
                      f"{context} together here (--max-model-len)",
                      "prompt" if isinstance(parsed, CompletionRequest) else "messages",
                      "context_length_exceeded")  # fmt: skip
    echo = isinstance(parsed, CompletionRequest) and bool(parsed.echo)
    if parsed.max_tokens is None and isinstance(parsed, CompletionRequest):
        most = min(16, room)
    if most is not None and most > room:
        field = "max_completion_tokens" if parsed.max_tokens is None else "max_tokens"
        raise Refused(400, f"{field}: {most} are more than the {room} that the prompt's "
                      f"{len(prompt)} tokens leave of a context of {context}", field,
                      "context_length_exceeded")  # fmt: skip
    stop_ids, response_format = parsed.stop_token_ids or (), parsed.response_format
    require_tokens(stop_ids, front.registry.vocabulary, "stop_token_ids")
    schema = None if response_format is None else response_format.schema_wanted()
    grammar = None if tools is None else tools.grammar
    shown = () if tools is None else tools.shown
    return Generation(
        prompt,
        None if model.adapter is None else model.adapter.key,
        room if most is None else most,
        parsed.sampling(front.registry.vocabulary, number),
        model.asking.ends(parsed.stops, stop_ids, usual=not parsed.ignore_eos),
        tuple(dict.fromkeys((*model.asking.shown, *shown))),
        parsed.alternatives,
        schema if grammar is None else None,
        grammar,
        continues=isinstance(parsed, CompletionRequest),
        prompt_logprobs=parsed.prompt_alternatives,
        tells_end=echo,
        ignores_ends=bool(parsed.ignore_eos),
    )
