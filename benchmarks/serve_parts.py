"""What `serve_vs_engines.py` measures, a function for each part."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import random
import shutil
import socket
import statistics
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel

from benchmarks import serve_identity, serve_peers
from benchmarks.serve_load import Compared, Round, Shape, in_turns, one_round
from lighten import adapters, models, runs
from lighten.adapters import AdapterSpec
from lighten.adapters.files import contents
from lighten.errors import UserError
from lighten.serving.remote import Remote, ServerError
from tests.serving import ADMIN, Server, serving

CONTEXT = 2048
# What a float32 and a rounded server may be off by in the mean, in log-probability.
CLOSE = {"float32": 0.01, "bfloat16": 0.06, "q8_0": 0.06}


@dataclass(frozen=True)
class Bench:
    """What all parts share.

    Attributes:
        base: The base.
        root: Where adapters are written.
        cache: Of conversions.
        threads: Of each server.
        rounds: Of each kind, after one that warms up.
        requests: Of a round of decoding.
        tokens: Of an answer.
        clients: At the same time, and slots of each server.
        identity: Answers compared for each engine.
        minutes: Of the soak.
        peers: Which others are measured.
        engines: Whose answers are compared with each adapter's alone.
    """

    base: str
    root: Path
    cache: Path
    threads: int
    rounds: int
    requests: int
    tokens: int
    clients: int
    identity: int
    minutes: float
    peers: Sequence[str]
    engines: Sequence[str]

    def shape(self, what: str) -> Shape:
        """Of a round."""
        if what == "decode":
            return Shape(self.requests, self.clients, 16, self.tokens)
        return Shape(max(self.clients, self.requests // 4), self.clients, 400, 1)

    def adapters(self, count: int, rank: int = 16, first: int = 0) -> Path:
        """A folder of adapters with random factors, large enough to change answers."""
        folder = self.root / f"r{rank}-{count}-{first}"
        if not folder.is_dir():
            write_adapters(self.base, folder, [f"a{place}" for place in range(count)], rank, first)
        return folder

    @contextlib.contextmanager
    def server(self, engine: str, *words: str) -> Iterator[Server]:
        """`lighten serve` with all slots."""
        with serving(
            self.base, "--served-model-name", "base", "--engine", engine, "--max-num-seqs",
            str(self.clients), "--max-model-len", str(CONTEXT), "--max-cpu-loras", "96", *words,
            cache=self.cache, threads=self.threads,
        ) as running:  # fmt: skip
            yield running


def write_adapters(base: str, folder: Path, names: Sequence[str], rank: int, first: int) -> None:
    """Adapters on all linear layers; the seed of each is its place after `first`."""
    opened = models.load(base, device="cpu")
    # One at a time: 64 at once would not fit beside the base.
    cohort = adapters.attach(opened.model, [AdapterSpec(name="one", r=rank, alpha=2 * rank)])
    for place, name in enumerate(names):
        torch.manual_seed(first + place)
        for parameter in cohort.parameters("one").values():
            parameter.data.normal_(std=0.02)
        for file, data in contents(cohort, "one", base_model=base).items():
            runs.write_bytes(folder / name / file, data)


def _rounds(server: Server, shape: Shape, **options: Any) -> Callable[[Sequence[str]], Any]:
    remote = Remote(server.url)
    pid = server.process.pid
    return lambda names: lambda seed: one_round(remote, names, shape, pid=pid, seed=seed, **options)


def _summary(compared: Compared, kind: str = "mixed") -> dict[str, Any]:
    return {
        **compared.to_dict(),
        f"{kind}_vs_base_cpu": compared.ratio(kind, "base", "cpu"),
        f"{kind}_vs_base_wall": compared.ratio(kind, "base", "wall"),
    }


def speed(bench: Bench, what: str, *, count: int = 8, rank: int = 16) -> dict[str, Any]:
    """Mixed adapters against the same engine's base, and against the peers' mixed adapters."""
    folder = bench.adapters(count, rank)
    names = sorted(path.name for path in folder.iterdir())
    shape = bench.shape(what)
    results: dict[str, Any] = {}
    with bench.server("lighten", "--adapters", str(folder)) as server:
        rounds = _rounds(server, shape)
        kinds = {"base": rounds(["base"]), "mixed": rounds(names)}
        results["lighten"] = _summary(in_turns(what, kinds, bench.rounds))
    for peer in bench.peers if count == 8 and rank == 16 else ():
        try:
            with _peer(bench, peer, folder, rank) as running:
                kinds = {
                    "base": lambda seed, run=running.run: run([None], shape, seed),
                    "mixed": lambda seed, run=running.run: run(names, shape, seed),
                }
                results[peer] = _summary(in_turns(what, kinds, bench.rounds))
        except UserError as error:
            results[peer] = {"missing": str(error)}
    return results


def _peer(
    bench: Bench, name: str, folder: Path, rank: int
) -> contextlib.AbstractContextManager[serve_peers.Peer]:
    if name == "llamacpp":
        return serve_peers.llamacpp(bench.base, folder, slots=bench.clients, context=CONTEXT,
                                    threads=bench.threads)  # fmt: skip
    if name == "vllm":
        return serve_peers.vllm(bench.base, folder, slots=bench.clients, context=CONTEXT, rank=rank)
    return serve_peers.peft(bench.base, folder, threads=bench.threads)


def identity(bench: Bench) -> dict[str, Any]:
    """Each engine under load while adapters are loaded anew, against each content alone."""
    # Of few requests few contents are asked, for each is asked alone first.
    full = bench.identity >= 100
    count, prompts = (
        (8, serve_identity.questions()) if full else (2, serve_identity.questions()[::2])
    )
    reports = {}
    for engine in bench.engines:
        folder = bench.root / f"identity-{engine}"
        shutil.copytree(bench.adapters(count), folder)
        changing = bench.adapters(count // 2, first=100)
        for adapter in changing.iterdir():  # the first half have another content
            shutil.copytree(folder / adapter.name, folder / f"{adapter.name}-1")
            shutil.copytree(adapter, folder / f"{adapter.name}-2")
        names = [f"a{place}" for place in range(count)]
        versions = {
            name: [f"{name}-1", f"{name}-2"] if place < count // 2 else [name]
            for place, name in enumerate(names)
        }
        folders: dict[str, str | None] = {
            content: content for contents in versions.values() for content in contents
        }
        words = ["--adapter-dir", str(folder)]
        # llama.cpp with 8-bit weights rounds a row's activations to 8 bits, too, so that a sum in
        # another order becomes 0.1 to 0.2 of a log-probability: nothing could be told from it.
        words += ["--storage", "f32"] if engine == "llamacpp" else []
        with bench.server(engine, *words, "--no-prefix-caching") as server:
            alone = serve_identity.references(
                Remote(server.url), Remote(server.url, ADMIN), {"base": None, **folders}, prompts
            )
        adapter_flags = [f"{name}={folder / name}" for name in names]
        with bench.server(engine, *words, "--adapters", *adapter_flags) as server:
            report = serve_identity.under_load(
                Remote(server.url), Remote(server.url, ADMIN), folder,
                {"base": ["base"], **versions}, alone, prompts,
                requests=bench.identity, clients=bench.clients, pause_s=1.0,
                tie=0.0 if engine == "lighten" else serve_identity.TIE,
            )  # fmt: skip
        reports[engine] = report.to_dict()
    return reports


def logprobs(bench: Bench) -> dict[str, Any]:
    """First tokens of mixed requests against PEFT in float32, each adapter alone."""
    folder = bench.adapters(8)
    names = ["base", *sorted(path.name for path in folder.iterdir())]
    prompts = [*serve_identity.questions()[::3], "What is the capital of France?", "Hello"]
    expected = _expected(bench.base, folder, names, prompts)
    results = {}
    for engine, storage in (("lighten", "f32"), ("lighten", "bf16"), ("llamacpp", "q8_0")):
        with bench.server(engine, "--storage", storage, "--adapters", str(folder)) as server:
            remote = Remote(server.url)
            pairs = [(name, question) for name in names for question in prompts]
            random.Random(1).shuffle(pairs)
            with ThreadPoolExecutor(bench.clients) as pool:
                answers = list(pool.map(functools.partial(_first_token, remote), pairs))
        errors: dict[str, list[float]] = {"base": [], "adapters": []}
        greedy = missing = 0
        for pair, ours in zip(pairs, answers, strict=True):
            if not ours:  # its first token ended it, or is a part of a character (llama.cpp)
                missing += 1
                continue
            exact = expected[pair]
            kind = "base" if pair[0] == "base" else "adapters"
            errors[kind] += [abs(p - exact[token]) for token, p in ours.items() if token in exact]
            greedy += pair[0] == "base" and max(ours, key=lambda t: ours[t]) == max(
                exact, key=lambda t: exact[t]
            )
        name = {"f32": "float32", "bf16": "bfloat16"}.get(storage, storage)
        results[f"{engine} {name}"] = {
            **{f"mean_{kind}": statistics.mean(values) for kind, values in errors.items()},
            "largest": max(max(values) for values in errors.values()), "at_most": CLOSE[name],
            "base_answers": f"{greedy} of {len(prompts)}", "untold": missing,
        }  # fmt: skip
    return results


def _first_token(remote: Remote, pair: tuple[str, str]) -> dict[str, float]:
    """Log-probabilities of the first token by its bytes: of a model and a question."""
    name, question = pair
    answer = remote.chat(
        name, [{"role": "user", "content": question}], temperature=0, max_tokens=1, logprobs=True,
        top_logprobs=10,
    )  # fmt: skip
    items = answer["choices"][0]["logprobs"]["content"]
    return {str(top["bytes"]): top["logprob"] for top in items[0]["top_logprobs"]} if items else {}


def _expected(
    base: str, folder: Path, names: Sequence[str], prompts: Sequence[str]
) -> dict[tuple[str, str], dict[str, float]]:
    from lighten.serving.texts import Texts

    opened = models.load(base, dtype="float32", device="cpu")
    texts = Texts(opened.tokenizer)
    model: Any = opened.model
    expected = {}
    for name in names:
        if name != "base" and model is opened.model:
            model = PeftModel.from_pretrained(model, str(folder / name), adapter_name=name)
            model.eval()
        elif name != "base":
            model.load_adapter(str(folder / name), name)
            model.set_adapter(name)
        for question in prompts:
            ids = opened.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True,
                return_tensors="pt", return_dict=True,
            )["input_ids"]  # fmt: skip
            with torch.inference_mode():
                row = model(ids).logits[0, -1].log_softmax(-1)
            values, tokens = row.topk(40)
            expected[name, question] = {
                str(list(texts.bytes_of(token))): value
                for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
            }
    return expected


def front(bench: Bench) -> dict[str, Any]:
    """The front before llama.cpp against llama.cpp's own server, in streams, in turns."""
    folder = bench.adapters(1)
    shape = bench.shape("decode")
    with (
        bench.server("llamacpp", "--adapters", str(folder)) as server,
        serve_peers.llamacpp(
            bench.base, folder, slots=bench.clients, context=CONTEXT, threads=bench.threads,
            streamed=True,
        ) as bare,
    ):  # fmt: skip
        rounds = _rounds(server, shape, streamed=True)
        kinds = {"base": lambda seed: bare.run([None], shape, seed), "front": rounds(["base"])}
        compared = in_turns("decode", kinds, bench.rounds)
    wall = compared.ratio("front", "base", "wall")
    return {
        **compared.to_dict(),
        "cost_wall": None if wall is None else 1 - wall["median"],
        "front_vs_bare_wall": wall,
        "front_vs_bare_cpu": compared.ratio("front", "base", "cpu"),
    }


def soak(bench: Bench) -> dict[str, Any]:
    """Arrivals at 80 % of capacity while adapters are loaded and unloaded."""
    folder = bench.root / "soak"
    if not folder.is_dir():
        shutil.copytree(bench.adapters(8), folder)
        shutil.copytree(folder / "a0", folder / "other-1")
        shutil.copytree(folder / "a1", folder / "other-2")
    names = ["base", *(f"a{place}" for place in range(8))]
    adapter_flags = [f"a{place}={folder / f'a{place}'}" for place in range(8)]
    shape = Shape(bench.requests, bench.clients, 16, bench.tokens // 2)
    with bench.server(
        "lighten", "--adapter-dir", str(folder), "--adapters", *adapter_flags
    ) as server:  # fmt: skip
        remote, admin = Remote(server.url), Remote(server.url, ADMIN)
        one_round(remote, names, shape, pid=None, seed=1)
        closed = one_round(remote, names, shape, pid=None, seed=2)
        rate = 0.8 * len(closed.latencies) / closed.seconds
        errors, memory, changes, answered = _soak(bench, server, remote, admin, names, shape, rate)
    fifth = max(1, len(memory) // 5)
    early, late = (statistics.median(part) for part in (memory[fifth : 2 * fifth] or memory,
                                                        memory[-fifth:]))  # fmt: skip
    return {
        "minutes": bench.minutes, "arrivals_per_s": rate, "answered": answered, "errors": errors,
        "adapters_changed": changes, "memory_mib_early": early / 2**20,
        "memory_mib_late": late / 2**20, "growth": late / early - 1,
    }  # fmt: skip


def _soak(
    bench: Bench, server: Server, remote: Remote, admin: Remote, names: Sequence[str],
    shape: Shape, rate: float,
) -> tuple[dict[str, int], list[int], int, int]:  # fmt: skip
    rng, end = random.Random(3), time.monotonic() + 60 * bench.minutes
    errors: Counter[str] = Counter()
    memory: list[int] = []
    changes, answered = [0], [0]
    process = psutil.Process(server.process.pid)

    def change() -> None:
        while time.monotonic() < end:
            for path in ("other-1", "other-2"):
                try:
                    serve_identity.load(admin, "other", path)
                    answer = _chat(remote, "other", "1: hello", 4)
                    assert answer["usage"]["completion_tokens"] > 0
                except ServerError as error:
                    errors[f"changing: {error}"[:200]] += 1
                changes[0] += 1
                time.sleep(0.5)
            serve_identity.unload(admin, "other")
            memory.append(process.memory_full_info().uss)

    def send(number: int, name: str) -> None:
        try:
            _chat(remote, name, f"{number}: write a long story", shape.tokens)
            answered[0] += 1
        except ServerError as error:
            errors[f"{error.status}: {error}"[:200]] += 1

    changing = threading.Thread(target=change)
    changing.start()
    with ThreadPoolExecutor(256) as pool:
        number = 0
        while time.monotonic() < end:
            pool.submit(send, number, rng.choice(names))
            number += 1
            time.sleep(rng.expovariate(rate))
    changing.join()
    return dict(errors), memory, changes[0], answered[0]


def _chat(remote: Remote, name: str, question: str, tokens: int, **options: Any) -> Any:
    return remote.chat(name, [{"role": "user", "content": question}], max_tokens=tokens, **options)


def broken(bench: Bench) -> dict[str, Any]:
    """Throughput while broken clients come, and what each of them is answered."""
    folder = bench.adapters(8)
    names = sorted(path.name for path in folder.iterdir())
    answers: Counter[str] = Counter()
    wrong: list[str] = []
    with bench.server(
        "lighten", "--adapter-dir", str(folder), "--adapters", str(folder)
    ) as server:  # fmt: skip
        url = urllib.parse.urlsplit(server.url)
        stop = threading.Event()

        def come(paused: threading.Event) -> None:
            for place in range(10**9):
                if stop.is_set():
                    return
                paused.wait(1)
                if not paused.is_set():
                    continue
                name, status, expected = _BROKEN[place % len(_BROKEN)](str(url.hostname), url.port)
                answers[f"{name}: {status}"] += 1
                if status not in expected:
                    wrong.append(f"{name}: {status}, not {expected}")
                time.sleep(0.05)

        coming = threading.Event()
        client = threading.Thread(target=come, args=(coming,))
        client.start()
        rounds = _rounds(server, bench.shape("decode"))

        def with_broken(seed: int) -> Round:
            coming.set()
            try:
                result: Round = rounds(names)(seed)
                return result
            finally:
                coming.clear()

        compared = in_turns("decode", {"base": rounds(names), "broken": with_broken}, bench.rounds)
        stop.set()
        client.join()
        alive = Remote(server.url).request("GET", "/ready")
    return {
        **compared.to_dict(), "throughput_kept": compared.ratio("broken", "base", "wall"),
        "answers": dict(answers), "wrong": wrong[:10], "ready_after": alive,
    }  # fmt: skip


def _sent(
    name: str, path: str, body: Any, expected: Sequence[int], key: str | None = None
) -> Callable[[str, int | None], tuple[str, int, Sequence[int]]]:
    """A broken client: its name, and what it is answered."""

    def run(host: str, port: int | None) -> tuple[str, int, Sequence[int]]:
        connection = http.client.HTTPConnection(host, port, timeout=60)
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request("POST", path, content, headers)
            return name, connection.getresponse().status, expected
        except OSError:
            return name, 0, (*expected, 0)  # it hung up before all of a large body was sent
        finally:
            connection.close()

    return run


def _half(host: str, port: int | None) -> tuple[str, int, Sequence[int]]:
    """A client that dies in the middle of its request."""
    with socket.create_connection((host, port or 80)) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                       b"application/json\r\nContent-Length: 1000\r\n\r\n{")  # fmt: skip
    return "half a request", 0, (0,)


def _abandoned(host: str, port: int | None) -> tuple[str, int, Sequence[int]]:
    """A client that leaves its stream."""
    body = json.dumps({"model": "a0", "stream": True, "max_tokens": 500,
                       "messages": [{"role": "user", "content": "a story"}]}).encode()  # fmt: skip
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
            f"application/json\r\nContent-Length: {len(body)}\r\n\r\n")  # fmt: skip
    with socket.create_connection((host, port or 80)) as client:
        client.sendall(head.encode() + body)
        client.settimeout(60)
        client.recv(100)
    return "left its stream", 0, (0,)


_CHAT = "/v1/chat/completions"
_LOAD = "/v1/load_lora_adapter"
_HELLO = [{"role": "user", "content": "hello"}]
_BROKEN = (
    _sent("oversized prompt", _CHAT, {"model": "a0", "messages": [
        {"role": "user", "content": "word " * 20_000}]}, (400,)),
    _sent("oversized body", _CHAT, b'"' + b"a" * 9_000_000 + b'"', (413,)),
    _sent("unknown adapter", _CHAT, {"model": "nobody", "messages": _HELLO}, (404,)),
    _sent("no JSON", _CHAT, b"{", (400,)),
    _sent("unknown field", _CHAT, {"model": "a0", "messages": _HELLO, "oops": 1}, (400,)),
    _sent("missing key", _LOAD, {"lora_name": "x", "lora_path": "a0"}, (401,)),
    _sent("path outside", _LOAD, {"lora_name": "x", "lora_path": "../../etc"}, (403,), ADMIN),
    _sent("schema that is none", _CHAT, {"model": "a0", "messages": _HELLO, "response_format": {
        "type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}, (400,)),
    _half, _abandoned,
)  # fmt: skip


def environment(cache: Path) -> None:
    """Conversions of the peers go to the same cache."""
    os.environ["LIGHTEN_CACHE"] = str(cache)
