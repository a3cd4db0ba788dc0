"""`lighten serve` against other engines and against its own bars, part by part.

    python benchmarks/serve_vs_engines.py                          # all parts, about 75 minutes
    python benchmarks/serve_vs_engines.py --only identity          # or some: decode,prefill,...
    python benchmarks/serve_vs_engines.py --only identity --engines lighten
    python benchmarks/serve_vs_engines.py --only soak --minutes 5
    python benchmarks/serve_vs_engines.py --small                  # each part at its smallest

Our engine serves SmolLM2-135M with adapters of rank 16 on all linear layers. Parts, with minutes on
two cores:

- `decode` (10): 16 clients, 64 tokens each; eight adapters mixed against the base, in turns; the
  same of the peers: llama.cpp's own server, PEFT's mixed batch, and vLLM where `make vllm` made it.
- `prefill` (8): prompts of 400 words, one token.
- `rank64` (4), `many` (5): eight adapters of rank 64; 64 adapters.
- `identity` (10): 500 answers of each of `--engines` while adapters change, against each adapter
  alone.
- `logprobs` (4): first tokens of mixed requests against PEFT in float32.
- `front` (3): our front before llama.cpp against its bare server.
- `broken` (3): throughput while broken clients come.
- `soak` (20, `--minutes`): arrivals at 80 % of capacity, adapters loaded and unloaded.

Rates are tokens per second of the server's processor time, and of the clock. A ratio is the median
over rounds with the smallest and the largest. The last line is JSON: `mixed_vs_base`,
`mixed_vs_best_engine`, `prefill_vs_base` (per processor second), `identity_wrong`, `logprob_mean`
(the largest mean difference over its bar), `front_cost`, `broken_wrong`, `throughput_kept`,
`soak_errors`, `soak_growth`; null where the part was not run. A part that fails is told as such,
the next ones run, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import serve_parts as parts
from lighten.machine import containers, hardware

PARTS: dict[str, Callable[[parts.Bench], dict[str, Any]]] = {
    "decode": lambda bench: parts.speed(bench, "decode"),
    "prefill": lambda bench: parts.speed(bench, "prefill"),
    "rank64": lambda bench: parts.speed(bench, "decode", rank=64),
    "many": lambda bench: parts.speed(bench, "decode", count=64),
    "identity": parts.identity,
    "logprobs": parts.logprobs,
    "front": parts.front,
    "broken": parts.broken,
    "soak": parts.soak,
}


def headline(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that the bars are about; null where they were not measured."""

    def ratio(part: str) -> float | None:
        spread = results.get(part, {}).get("lighten", {}).get("mixed_vs_base_cpu")
        return None if spread is None else float(spread["median"])

    identity = results.get("identity", {})
    return {
        "mixed_vs_base": ratio("decode"),
        "mixed_vs_best_engine": _against_best(results.get("decode", {})),
        "prefill_vs_base": ratio("prefill"),
        "identity_wrong": sum(report["wrong"] for report in identity.values())
        if identity and "failed" not in identity else None,
        "logprob_mean": _against_bars(results.get("logprobs", {})),
        "front_cost": results.get("front", {}).get("cost_wall"),
        **_of_long_loads(results.get("broken", {}), results.get("soak", {})),
    }  # fmt: skip


def _against_bars(logprobs: dict[str, Any]) -> float | None:
    """The largest mean difference of an engine and format, as a share of what it may be."""
    shares = [
        max(part["mean_base"], part["mean_adapters"]) / part["at_most"]
        for part in logprobs.values() if isinstance(part, dict)
    ]  # fmt: skip
    return max(shares, default=None)


def _of_long_loads(broken: dict[str, Any], soak: dict[str, Any]) -> dict[str, Any]:
    throughput = broken.get("throughput_kept")
    return {
        "broken_wrong": len(broken["wrong"]) if "wrong" in broken else None,
        "throughput_kept": None if throughput is None else throughput["median"],
        "soak_errors": sum(soak["errors"].values()) if "errors" in soak else None,
        "soak_growth": soak.get("growth"),
    }


def _against_best(decode: dict[str, Any]) -> float | None:
    """Our mixed rate over the best peer's, medians of tokens per processor second."""
    rates = {
        name: sorted(figures["mixed_per_cpu_s"])[len(figures["mixed_per_cpu_s"]) // 2]
        for name, figures in decode.items()
        if "mixed_per_cpu_s" in figures
    }
    ours = rates.pop("lighten", None)
    return None if ours is None or not rates else ours / max(rates.values())


def main() -> None:
    """Measure, print a line for each part and the figures at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--peers", default="llamacpp,peft,vllm", help="'' for none")
    parser.add_argument("--engines", default="lighten,llamacpp", help="of the part identity")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=48, help="of a round")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--identity", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=20.0, help="of the soak")
    parser.add_argument("--threads", type=int, default=containers.cores())
    parser.add_argument("--small", action="store_true", help="see that it runs; no figures")
    parser.add_argument("--output", type=Path, help="file of the results")
    arguments = parser.parse_args()
    requested = [name for name in arguments.only.split(",") if name]
    if unknown := set(requested) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; use {', '.join(PARTS)}")
    if arguments.small:
        arguments.rounds, arguments.requests, arguments.tokens, arguments.clients = 1, 8, 8, 4
        arguments.identity, arguments.minutes = 40, 0.2
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        bench = parts.Bench(
            arguments.model, Path(scratch), hardware.cache_folder(), arguments.threads,
            arguments.rounds, arguments.requests, arguments.tokens, arguments.clients,
            arguments.identity, arguments.minutes,
            [name for name in arguments.peers.split(",") if name],
            [name for name in arguments.engines.split(",") if name],
        )  # fmt: skip
        for name in requested:
            began = time.perf_counter()
            try:
                results[name] = PARTS[name](bench)
            except Exception as error:  # the other parts are worth their hour
                traceback.print_exc()
                results[name] = {"failed": f"{type(error).__name__}: {error}"}
            took = time.perf_counter() - began
            print(f"{name} ({took:.0f} s): {json.dumps(results[name])}", flush=True)
    result = {
        **headline(results), "parts": results, "small": arguments.small,
        "machine": hardware.machine().to_dict(),
    }  # fmt: skip
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    sys.exit(int(any("failed" in part for part in results.values())))


if __name__ == "__main__":
    main()
