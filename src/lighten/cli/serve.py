"""The commands `lighten serve` and `lighten bench serve`: parse, call the API, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lighten.cli.console import Json

_Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapters", "--lora-modules", "--adapter",
        help="NAME=PATH, a run, an adapter, a folder of them or a hub id; several after one flag.",
    ),
]  # fmt: skip


def serve(
    ctx: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="A model; or a run that is one.")],
    adapters: _Adapters = None,
    engine: Annotated[str, typer.Option(help="auto, llamacpp, lighten or vllm.")] = "auto",
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the base; default as given.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address; others than loopback need --api-key.")]
    = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    storage: Annotated[
        str, typer.Option(help="Format of the base: q8_0, f16, bf16, f32.")
    ] = "q8_0",
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of a prompt with its answer.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Answers made at the same time.")] = 8,
    max_cpu_loras: Annotated[int, typer.Option(help="Adapters at most.")] = 64,
    max_waiting: Annotated[int, typer.Option(help="Answers under way and waiting at most.")] = 512,
    threads: Annotated[int | None, typer.Option(help="Of the processor.")] = None,
    gpu_layers: Annotated[int, typer.Option(help="Layers on a GPU; -1 for all.")] = -1,
    adapter_dir: Annotated[
        Path | None, typer.Option(help="Folder that adapters may be loaded from at run time.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key of clients; better in LIGHTEN_API_KEY.")
    ] = None,
    admin_key: Annotated[
        list[str] | None,
        typer.Option(help="Key for loading adapters; better in LIGHTEN_ADMIN_KEY."),
    ] = None,
    engine_flag: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of llama.cpp's or vLLM's settings.")
    ] = None,
    prefix_caching: Annotated[
        bool, typer.Option(help="Compute beginnings that prompts of one adapter share once.")
    ] = True,
    revision: Annotated[str | None, typer.Option(help="Of a model of the hub.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Of the base: a .jinja file, alpaca, chatml or plain.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what memory it will take, and end.")
    ] = False,
) -> None:  # fmt: skip
    """Serve a base and many adapters behind one OpenAI-compatible address."""
    from lighten import api

    options: dict[str, Any] = {
        "adapters": _adapters([*(adapters or ()), *ctx.args]), "engine": engine,
        "served_name": served_model_name, "host": host, "port": port, "storage": storage,
        "context": max_model_len, "slots": max_num_seqs, "threads": threads,
        "gpu_layers": gpu_layers, "adapter_dir": adapter_dir, "most_adapters": max_cpu_loras,
        "api_keys": api_key or (), "admin_keys": admin_key or (), "waiting": max_waiting,
        "engine_flags": _flags(engine_flag or []), "prefix_caching": prefix_caching,
        "revision": revision, "chat_template": chat_template,
    }  # fmt: skip
    if plan:
        _plan(base, options)
        return
    api.serve(base, log=lambda line: typer.echo(line, err=True), **options)


def bench_serve(
    url: Annotated[str, typer.Argument(help="Of an OpenAI-compatible server.")],
    requests: Annotated[int, typer.Option(help="Of each load.")] = 64,
    clients: Annotated[int, typer.Option(help="At the same time.")] = 16,
    rate: Annotated[
        float | None, typer.Option(help="Arrivals per second, whatever is answered.")
    ] = None,
    prompt_words: Annotated[int, typer.Option(help="Words of a prompt.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 64,
    popularity: Annotated[str, typer.Option(help="Of adapters: one, uniform, zipf.")] = "uniform",
    identity_requests: Annotated[int, typer.Option(help="Answers compared with those alone.")] = 64,
    seed: Annotated[int, typer.Option(help="Of prompts' words, arrivals and adapters.")] = 0,
    api_key: Annotated[str | None, typer.Option(help="Better in LIGHTEN_API_KEY.")] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where bench-serve.json and .svg go.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Load a server from many clients, and check that its answers are right.

    Exit code 1: another adapter answered than was named, a field was dropped without a word, or
    a load got no answer at all.
    """
    from lighten import api

    result = api.bench_serve(
        url, key=api_key or _client_key(), output_dir=output_dir,
        identity_requests=identity_requests, log=lambda line: typer.echo(line, err=as_json),
        requests=requests, clients=clients, rate=rate, prompt_words=prompt_words,
        max_tokens=max_tokens, popularity=popularity, seed=seed,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result))
    wrong = bool((result["identity"] or {}).get("wrong", 0))
    refused = not all(check["passed"] for check in result["checks"])
    unanswered = not all(load["answered"] for load in result["loads"])
    raise typer.Exit(int(wrong or refused or unanswered))


def chat(
    target: str | None, url: str | None, adapter: str | None, compare: bool, system: str | None,
    max_new_tokens: int, temperature: float, thinking: Any,
) -> None:  # fmt: skip
    """`lighten chat --url`."""
    from lighten.errors import UserError

    if url is None or target is not None:
        raise UserError("give a run, a model, or --url of a server: lighten chat --url URL")
    if thinking is not None:
        raise UserError("--thinking is the server's to choose; leave it out with --url")
    from lighten.serving.talk import talk

    talk(
        url, key=_client_key(), adapter=adapter, compare=compare,
        system=system, max_new_tokens=max_new_tokens, temperature=temperature,
    )  # fmt: skip


def _client_key() -> str | None:
    """The first of the keys in the environment, any of which opens a server that has them all."""
    from lighten.serving.options import keys

    return next(iter(keys((), "LIGHTEN_API_KEY")), None)


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    # Words after `--adapters A` that are no flags are more adapters.
    app.command(context_settings={"allow_extra_args": True})(serve)


def _adapters(words: list[str]) -> list[str]:
    from lighten.errors import UserError

    for word in words:
        if word.startswith("-"):
            raise UserError(f"{word} is not known; see: lighten serve --help")
    return words


def _flags(words: list[str]) -> dict[str, Any]:
    import yaml

    from lighten.errors import UserError

    flags = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--engine-flag {word!r}: write NAME=VALUE")
        try:
            flags[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"--engine-flag {word!r}: the value is not valid YAML; put it in quotes"
            ) from error
    return flags


def _plan(base: str, options: dict[str, Any]) -> None:
    from lighten import api
    from lighten.cli.console import console, print_table
    from lighten.cli.plan import exit_code
    from lighten.planning import text

    sizes, memory = api.plan_server(base, **options)
    for line in (sizes.sentence(), text.serving_verdict(memory)):
        console().print(line, highlight=False, markup=False, soft_wrap=True)
    print_table(["memory by part", "GiB", ""], text.serving_rows(memory))
    raise typer.Exit(exit_code(memory.fits()))
