"""Whether `lighten audit` keeps its promises, and what stands behind two of its claims.

    lighten audit smollm2-135m --data examples/docstrings --budget 25m
    python benchmarks/train_vs_peers.py --setup    # once: TRL into an environment of its own
    python benchmarks/audit_check.py               # the last line is JSON

`rows_explained` is the share of the audit's rows that are measured or say why not, 0 where it took
longer than its budget; `plan_max_error` the largest error of a predicted peak over its measured
rows. `longest_context_vs_trl` is the longest row that trains within 8 GiB over TRL's at its best;
`evaluate_vs_transformers` the time of `lighten evaluate` over that of transformers' `generate` in
padded batches of the best size, the larger of float32 and bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import audit_context, audit_evaluation, machine
from benchmarks.train_vs_peers import PEERS, first_adapter

PARTS = ("audit", "context", "evaluate")


def rows_of(path: Path) -> dict[str, Any]:
    """What the audit's file says of its rows."""
    audit = json.loads(path.read_text(encoding="utf-8"))
    return check(audit)


def check(audit: dict[str, Any]) -> dict[str, Any]:
    """Rows that are explained, and the plan's errors.

    Args:
        audit: `audit.json`.
    """
    rows = audit["rows"]
    explained = [row for row in rows if row["status"] == "measured" or row.get("why")]
    in_time = audit["spent_s"] <= audit["settings"]["budget_s"] and audit["status"] == "finished"
    measured = [row for row in rows if row["status"] == "measured"]
    errors = {
        f"{row['group']}: {row['name']}": row["plan_error"]
        for row in measured if row.get("plan_error") is not None
    }  # fmt: skip
    return {
        "rows_explained": len(explained) / len(rows) if rows and in_time else 0.0,
        "rows_measured": len(measured), "rows": len(rows), "spent_s": audit["spent_s"],
        "plan_errors": errors, "unplanned": len(measured) - len(errors),
        "plan_max_error": max(map(abs, errors.values()), default=None),
    }  # fmt: skip


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="examples/docstrings/data")
    parser.add_argument("--audit", type=Path, default=Path("runs/audit-smollm2-135m/audit.json"))
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--memory-gib", type=float, default=8.0)
    parser.add_argument("--least-tokens", type=int, default=audit_context.LEAST,
                        help="of a long row: the first that is tried")  # fmt: skip
    parser.add_argument("--most-tokens", type=int, default=2**17)
    parser.add_argument("--contender", action="append", choices=audit_context.CONTENDERS,
                        help="whose long rows are searched; all, unless it is given")  # fmt: skip
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="of a long row's step")
    parser.add_argument("--examples", type=int, default=160)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--peers-venv", type=Path, default=PEERS)
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(unknown)}")
    peers = arguments.peers_venv / "bin" / "python"
    contenders = arguments.contender or list(audit_context.CONTENDERS)
    needs_peers = any(name in audit_context.PEERS for name in contenders)
    if "context" in parts and needs_peers and not peers.exists():
        parser.error(f"no environment at {arguments.peers_venv}: run train_vs_peers.py --setup")
    before = machine.before_start()
    results: dict[str, Any] = {"audit": None, "context": None, "evaluate": {}}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        if "audit" in parts:
            results["audit"] = rows_of(arguments.audit)
        if "context" in parts:
            model, _ = first_adapter(arguments.model, scratch)
            results["context"] = audit_context.compare(
                model, str(scratch / "adapter"), peers, scratch,
                memory_bytes=int(arguments.memory_gib * 2**30), timeout_s=arguments.timeout_s,
                least=arguments.least_tokens, most=arguments.most_tokens, contenders=contenders,
            )  # fmt: skip
        for dtype in arguments.dtypes.split(",") if "evaluate" in parts else ():
            results["evaluate"][dtype] = audit_evaluation.compare(
                arguments.model, arguments.data, dtype, scratch, examples=arguments.examples,
                new_tokens=arguments.new_tokens,
            )  # fmt: skip
            print(f"evaluate, {dtype}: {results['evaluate'][dtype]}", flush=True)
    ratios = [evaluation["ratio"] for evaluation in results["evaluate"].values()]
    headline = {
        "rows_explained": (results["audit"] or {}).get("rows_explained"),
        "plan_max_error": (results["audit"] or {}).get("plan_max_error"),
        "longest_context_vs_trl": (results["context"] or {}).get("ratio"),
        "evaluate_vs_transformers": max(ratios) if ratios and all(ratios) else None,
    }
    why_not = {
        "parts were left out": set(parts) != set(PARTS) or bool(arguments.contender),
        "examples were left out": arguments.examples < 160,
        "a long row took too long": bool((results["context"] or {}).get("timed_out")),
    }
    machine.store(
        "audit_check", {**headline, **results, "asked": _plain(arguments)}, before, why_not
    )
    print(json.dumps(headline))


def _plain(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {key: value for key, value in vars(arguments).items() if key != "peers_venv"}
    return {
        key: str(value) if isinstance(value, Path) else value for key, value in settings.items()
    }


if __name__ == "__main__":
    main()
