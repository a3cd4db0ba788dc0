"""The longest row that trains within a memory: lighten against TRL + PEFT, for `audit_check.py`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender
from benchmarks.steps import encoded, slices
from lighten.jobs import held_bytes

LEAST = 1024
# The search ends when what trains and what does not are this near to each other.
NEAR = 0.0625
# Two engines with rounded products: their losses on the same row.
AGREEMENT = 2e-2
# TRL's ways to train a long row in little memory: its loss is in chunks, layers are recomputed.
PEERS = {
    f"trl, {attention}, {'autocast' if autocast else 'no autocast'}": Contender(
        "trl", {"gradient_checkpointing": True, "bf16": autocast}, dtype="bfloat16",
        attention=attention,
    )
    for attention, autocast in (("sdpa", False), ("sdpa", True))
}  # fmt: skip
OURS = Contender("lighten", {
    "gradient_checkpointing": True, "dtype": "bfloat16", "per_device_train_batch_size": 1,
    "tokens_per_microbatch": None, "max_length": 2**20,
})  # fmt: skip
OFFLOADING = Contender("lighten", {**OURS.settings, "activation_offload": True})
CONTENDERS = {**PEERS, "lighten": OURS, "lighten, activations offloaded": OFFLOADING}


class Longest:
    """Searches by trying, each try in a process that is ended when it holds too much.

    Args:
        model: Folder of a model whose positions are enough.
        text: Rows that long ones are cut from.
        adapter: Folder of the adapter that all begin with.
        peers: Interpreter of TRL's environment.
        memory_bytes: What a process may hold.
        timeout_s: A try that takes longer counts as one that does not train.
        scratch: A folder that is thrown away.
    """

    def __init__(
        self, model: str, text: list[Any], adapter: str, peers: Path, memory_bytes: int,
        timeout_s: float, scratch: Path,
    ) -> None:  # fmt: skip
        self.model, self.text, self.adapter, self.peers = model, text, adapter, peers
        self.memory_bytes, self.timeout_s, self.scratch = memory_bytes, timeout_s, scratch

    def search(self, name: str, least: int, most: int) -> dict[str, Any]:
        """The longest row of a contender, from so many tokens to so many, and every try."""
        tries: list[dict[str, Any]] = []

        def fits(tokens: int) -> bool:
            outcome = self.attempt(CONTENDERS[name], tokens)
            tries.append({"tokens": tokens, **outcome})
            status = outcome["why_not"] or f"loss {outcome['loss']:.4f}"
            print(f"{name}, {tokens} tokens: {outcome['held_bytes'] / 2**30:.2f} GiB, "
                  f"{outcome['seconds']:.0f} s, {status}", flush=True)  # fmt: skip
            return outcome["why_not"] is None

        return {"longest": longest(fits, least, most), "tries": tries}

    def attempt(self, contender: Contender, tokens: int) -> dict[str, Any]:
        """One step on one row of so many tokens."""
        step = [slices(self.text, tokens, 1)]
        job = contender.job(step, self.model, self.adapter, "cpu")
        path = self.scratch / "job.json"
        job |= {"scratch": str(self.scratch / "out"), "began": time.time()}
        path.write_text(json.dumps(job), encoding="utf-8")
        python = sys.executable if contender.engine == "lighten" else str(self.peers)
        command = [python, str(Path(__file__).with_name(contender.script)), str(path)]
        began, peak_bytes, why = time.monotonic(), 0, None
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            worker = subprocess.Popen(command, stdout=output, stderr=errors, text=True)
            while worker.poll() is None:
                peak_bytes = max(peak_bytes, held_bytes(worker.pid))
                if peak_bytes > self.memory_bytes:
                    why = f"it holds more than {self.memory_bytes / 2**30:.2f} GiB"
                elif time.monotonic() - began > self.timeout_s:
                    why = f"it takes more than {self.timeout_s:.0f} s"
                if why:
                    worker.kill()
                    break
                time.sleep(0.05)
            worker.wait()
            output.seek(0)
            errors.seek(0)
            lines, error_text = output.read().strip().splitlines(), errors.read()
        seconds = time.monotonic() - began
        if why is None and worker.returncode:
            why = (error_text.strip().splitlines() or [f"exit {worker.returncode}"])[-1]
        losses: Any = [] if why else json.loads(lines[-1])["losses"]
        if isinstance(losses, dict):
            losses = losses["default"]
        return {"why_not": why, "held_bytes": peak_bytes, "seconds": seconds,
                "loss": losses[0] if losses else None}  # fmt: skip


def longest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The longest that fits: doubled until one does not, then halved between."""
    low, high, tokens = 0, most + 1, least
    while tokens <= most:
        if not fits(tokens):
            high = tokens
            break
        low, tokens = tokens, min(2 * tokens, most) if tokens < most else most + 1
    while low and high - low > NEAR * low and high <= most:
        middle = (low + high) // 2 // 128 * 128
        if middle <= low:
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None


def compare(
    model: str, adapter: str, peers: Path, scratch: Path, *, memory_bytes: int, timeout_s: float,
    least: int, most: int, contenders: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The best of ours over the best of TRL's, on the same text; null where losses differ.

    Args:
        model: Folder of the base.
        adapter: Folder of the adapter that all begin with.
        peers: Interpreter of TRL's environment.
        scratch: A folder that is thrown away.
        memory_bytes: What a process may hold.
        timeout_s: For one try.
        least: Row that is tried first.
        most: Longest row that is tried.
        contenders: Whose rows are searched, of `CONTENDERS`.
    """
    stretched = with_positions(Path(model), scratch / "model", most)
    search = Longest(
        str(stretched), encoded(model), adapter, peers, memory_bytes, timeout_s, scratch
    )
    searches = {name: search.search(name, least, most) for name in contenders}
    ours = [result for name, result in searches.items() if CONTENDERS[name].engine == "lighten"]
    theirs = [result for name, result in searches.items() if CONTENDERS[name].engine != "lighten"]
    difference = loss_difference(ours, theirs)
    lengths = [
        max((result["longest"] or 0 for result in group), default=0) for group in (ours, theirs)
    ]
    why = None
    if not all(lengths):
        why = "one of the two trains no row"
    elif difference is None or difference > AGREEMENT:
        why = f"losses are {difference} apart on rows that both train"
    return {
        "ratio": None if why else lengths[0] / lengths[1], "why_not": why,
        "ours": lengths[0], "theirs": lengths[1], "loss_difference": difference,
        "contenders": searches,
        # A try that took too long says nothing of memory.
        "timed_out": any("takes more" in (attempt["why_not"] or "")
                         for result in searches.values() for attempt in result["tries"]),
    }  # fmt: skip


def loss_difference(ours: list[Any], theirs: list[Any]) -> float | None:
    """Largest relative difference on rows that both have trained; None: there are none."""
    our_losses, their_losses = (
        {
            attempt["tokens"]: attempt["loss"]
            for result in group
            for attempt in result["tries"]
            if attempt["loss"]
        }
        for group in (ours, theirs)
    )
    shared = our_losses.keys() & their_losses.keys()
    return max(
        (abs(our_losses[t] - their_losses[t]) / their_losses[t] for t in shared), default=None
    )


def with_positions(model: Path, folder: Path, positions: int) -> Path:
    """The same model, said to have more positions: its rotary ones are computed anyway."""
    shutil.copytree(model, folder, symlinks=False)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = positions
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
