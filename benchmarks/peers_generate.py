"""transformers + PEFT on a set of examples: losses and greedy answers in padded batches.

    python peers_generate.py JOB.json

The peer of `audit_check.py`; it imports nothing of lighten. The job names the model folder, the
adapter, rows with their mask, prompts and the batch size; the last line printed is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places of like length together, longest first."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.inference_mode()
def losses(model: Any, rows: Sequence[Any], size: int, pad: int) -> list[float]:
    """Summed loss of each row's supervised tokens, rows padded on the right."""
    row_losses = [0.0] * len(rows)
    for batch in batches([len(ids) for ids, _ in rows], size):
        width = max(len(rows[place][0]) for place in batch)
        ids = torch.full((len(batch), width), pad)
        labels = torch.full((len(batch), width), -100)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(batch):
            row_ids, marks = rows[place]
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            mask[row, : len(row_ids)] = 1
            labels[row, : len(row_ids)] = torch.tensor(
                [token if on else -100 for token, on in zip(row_ids, marks, strict=True)]
            )
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        token_losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        ).view(len(batch), -1)
        for row, place in enumerate(batch):
            row_losses[place] = float(token_losses[row].sum())
    return row_losses


@torch.inference_mode()
def answers(model: Any, prompts: Sequence[list[int]], job: dict[str, Any]) -> list[list[int]]:
    """Greedy answers, prompts padded on the left."""
    outputs: list[list[int]] = [[] for _ in prompts]
    stops = set(job["stops"])
    for batch in batches([len(prompt) for prompt in prompts], job["batch_size"]):
        width = max(len(prompts[place]) for place in batch)
        ids = torch.full((len(batch), width), job["pad"])
        mask = torch.zeros_like(ids)
        for row, place in enumerate(batch):
            ids[row, width - len(prompts[place]) :] = torch.tensor(prompts[place])
            mask[row, width - len(prompts[place]) :] = 1
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=job["new_tokens"],
            do_sample=False, eos_token_id=job["stops"], pad_token_id=job["pad"],
        )  # fmt: skip
        for place, answer in zip(batch, out[:, width:].tolist(), strict=True):
            end = next((at for at, token in enumerate(answer) if token in stops), len(answer))
            outputs[place] = answer[:end]
    return outputs


def main() -> None:
    """Measure base and adapter, and print what was found."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    began = time.perf_counter()
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"]).eval()
    model = PeftModel.from_pretrained(base, job["adapter"]).eval()
    figures: dict[str, Any] = {}
    for name in ("base", "adapter"):
        if name == "base":
            with model.disable_adapter():
                result = _measure(model, job)
        else:
            result = _measure(model, job)
        figures[name] = result
    print(json.dumps({"seconds": time.perf_counter() - began, "models": figures}))


def _measure(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    return {
        "losses": losses(model, job["rows"], job["batch_size"], job["pad"]),
        "answers": answers(model, job["prompts"], job),
    }


if __name__ == "__main__":
    main()
