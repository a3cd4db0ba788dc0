"""Eight adapters mixed against the base, in decoding and in prefill, engine by engine.

    python benchmarks/serve_vs_engines.py                       # the engines of `lighten serve`
    python benchmarks/serve_vs_engines.py --peer vllm=http://127.0.0.1:8001   # and a running server

Each engine serves SmolLM2-135M with eight adapters of rank 16 on all linear layers. A peer is a
server that is running already with the same base and adapters, `a0` to `a7` (of another tool, from
an environment of its own). Decoding: 16 clients, short prompts, 64 tokens. Prefill: 16 clients,
prompts of 400 words, one token. The last line is JSON: `mixed_vs_base` and `prefill_vs_base` of the
first engine, `mixed_vs_best_engine` against the fastest of the others (null where there is none),
and `identity_wrong`, the answers of all engines that were another model's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from lighten import adapters, hardware, models, runs
from lighten.adapters import AdapterSpec
from lighten.adapters.files import contents
from lighten.serve import checks
from lighten.serve.load import Load, Outcome, run
from lighten.serve.remote import Remote
from lighten.serve.running import ENGINES
from tests.serving import serving

MODEL, ADAPTERS, RANK, CLIENTS = "smollm2-135m", 8, 16, 16


def write_adapters(root: Path) -> None:
    """Adapters with random factors, large enough to change answers."""
    base = models.load(MODEL)
    names = [f"a{number}" for number in range(ADAPTERS)]
    cohort = adapters.attach(
        base.model, [AdapterSpec(name=name, r=RANK, alpha=2 * RANK) for name in names]
    )
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        for parameter in cohort.parameters(name).values():
            parameter.data.normal_(std=0.02)
        for file, data in contents(cohort, name, base_model=MODEL).items():
            runs.write_bytes(root / name / file, data)


def measured(url: str, requests: int, identity: int) -> dict[str, Any]:
    """Tokens per second of base and mixed adapters, and answers of another model."""
    remote = Remote(url)
    parents = remote.models()
    base = [name for name, parent in parents.items() if parent is None]
    mixed = [name for name, parent in parents.items() if parent is not None]
    decode = Load(requests, CLIENTS, None, 16, 64)
    prefill = Load(requests, CLIENTS, None, 400, 1)
    found: dict[str, Any] = {}
    for what, load in (("decode", decode), ("prefill", prefill)):
        for name, asked in (("base", base), ("mixed", mixed)):
            outcome = run(remote, name, asked, load)
            found[f"{what}_{name}"] = rate(outcome, what)
            found.setdefault("errors", []).extend(outcome.errors)
    found["identity_wrong"] = checks.identity(
        remote, [*base, *mixed], requests=identity, clients=CLIENTS
    ).wrong
    return found


def rate(outcome: Outcome, what: str) -> float:
    """Generated tokens per second, or tokens of prompts."""
    tokens = outcome.tokens if what == "decode" else outcome.prompt_tokens
    return tokens / outcome.seconds


def main() -> None:
    """Measure, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--identity", type=int, default=500)
    parser.add_argument("--threads", default="0", help="0: all cores")
    chosen = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_adapters(root)
        words = [MODEL, "--adapters", str(root), "--max-num-seqs", str(CLIENTS)]
        words += ["--max-model-len", "2048"]
        for engine in chosen.engines.split(","):
            threads = [] if chosen.threads == "0" else ["--threads", chosen.threads]
            with serving(
                *words, "--engine", engine, *threads, cache=hardware.cache_folder(), threads=None
            ) as server:
                results[engine] = measured(server.url, chosen.requests, chosen.identity)
    for peer in chosen.peer:
        name, _, url = peer.partition("=")
        results[name] = measured(url, chosen.requests, chosen.identity)
    for name, own in results.items():
        print(f"{name:12}", *(f"{key} {value}" for key, value in own.items()), sep="  ")
    first, *others = results.values()
    best = max((own["decode_mixed"] for own in others), default=None)
    line = {
        "mixed_vs_base": first["decode_mixed"] / first["decode_base"],
        "mixed_vs_best_engine": None if best is None else first["decode_mixed"] / best,
        "prefill_vs_base": first["prefill_mixed"] / first["prefill_base"],
        "identity_wrong": sum(own["identity_wrong"] for own in results.values()),
        "machine": hardware.machine().to_dict(), "engines": results,
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
