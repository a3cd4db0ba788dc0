"""Making and measuring one artefact in a process of its own, so that its memory is its own."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lighten.errors import UserError
from lighten.jobs import MODELS, in_child
from lighten.machine.containers import cores
from lighten.machine.heap import drop_mapped_weights
from lighten.models.resident import load_code, resident_bytes
from lighten.quantization.scores import EvaluationRow, score, speeds, summary
from lighten.quantization.targets import GROUP_SIZE


def call(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a child process and return its result.

    Raises:
        UserError: What the job raised, or that the process was killed.
    """
    outcome = in_child(
        "lighten.quantization.child", {"job": job}, libraries=libraries_of(job["kind"])
    )
    if outcome.error is not None and outcome.out_of_memory:
        raise UserError(f"{job['name']} failed: {outcome.error}")
    if outcome.error is not None:
        raise UserError(
            outcome.error if outcome.is_user_error else f"{job['name']} failed: {outcome.error}"
        )
    return outcome.records[-1]


def libraries_of(kind: str) -> tuple[str, ...]:
    """What every job of a kind imports; GGUF is written and read without PyTorch."""
    return () if kind == "gguf" else MODELS


def run(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Do a job.

    Args:
        job: `do` is `make` or `measure`; the rest is what it takes.

    Raises:
        UserError: Something the user can mend.
    """
    from safetensors import SafetensorError

    from lighten.whole_files import cannot_write

    try:
        yield _make(job) if job["do"] == "make" else _measure(job)
    except OSError as error:
        raise cannot_write(error, Path(job["folder"])) from error
    except SafetensorError as error:  # how its files tell of a full disk
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise cannot_write(OSError(int(number[1]), str(error)), Path(job["folder"])) from error


def _make(job: dict[str, Any]) -> dict[str, Any]:
    from lighten.machine.hardware import high_water

    model, folder = Path(job["model"]), Path(job["folder"])
    notes: list[str] = []
    if job["kind"] == "gguf":
        from lighten.quantization.gguf_model import write_gguf

        began = time.perf_counter()
        file_name = f"{job['label']}.{job['type']}.gguf"  # as `export` calls it
        write_gguf(model, folder / file_name, job["type"], name=job["label"])
    elif job["kind"] == "executorch":
        from lighten.quantization.executorch_program import write_program
        from lighten.quantization.executorch_rounding import ProgramRounding

        began = time.perf_counter()
        notes = write_program(
            model, Path(job["file"]), context_tokens=job["context"], ends=job["ends"],
            rounding=ProgramRounding(**job["rounding"]),
            keep=Path(job["keep"]) if job["keep"] else None,
        )  # fmt: skip
    elif job["kind"] == "rounding":
        from lighten.quantization.executorch_program import rounded_model
        from lighten.quantization.executorch_rounding import ProgramRounding

        began = time.perf_counter()
        rounding = ProgramRounding(**job["rounding"])
        rounded_model(model, rounding, Path(job["keep"]))
    else:
        from lighten.quantization.weights import make

        began = time.perf_counter()
        groups = job.get("group_size", GROUP_SIZE)
        make(job["kind"], model, folder, job["calibration"], group_size=groups)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_bytes": high_water(), "notes": notes}


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    rows = [EvaluationRow(row["ids"], row["supervised"]) for row in job["rows"]]
    result = _measure_gguf(job, rows) if job["kind"] == "gguf" else _measure_folder(job, rows)
    statistics = result.pop("statistics")
    return {**(summary(statistics) if rows else {}), **result, "rows": statistics}


def _store(job: dict[str, Any]) -> Path | None:
    return None if job["store"] is None else Path(job["store"])


def _measure_folder(job: dict[str, Any], rows: Sequence[EvaluationRow]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lighten.models.stored import on_processor

    tokenizer = AutoTokenizer.from_pretrained(job["folder"], local_files_only=True)
    load_code(job["folder"])
    resident_before = resident_bytes()
    model: Any = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=torch.bfloat16, local_files_only=True,
        **on_processor(Path(job["folder"])),
    ).eval()  # fmt: skip

    @torch.inference_mode()
    def log_probabilities(ids: list[int]) -> Any:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        return torch.log_softmax(logits.float(), -1).numpy()

    log_probabilities(job["prompt"][:8])  # some weights are repacked when they are first used
    drop_mapped_weights()
    log_probabilities(job["prompt"][:8])
    resident = resident_bytes() - resident_before

    @torch.inference_mode()
    def prefill(ids: list[int]) -> Any:
        return model(input_ids=torch.tensor([ids]), logits_to_keep=1)

    def decode(ids: list[int], most: int) -> int:
        return len(_greedy(model, ids, most, stops=[]))

    statistics = score(rows, log_probabilities, _store(job), reference=job["reference"])
    stops = _stops(model, tokenizer)
    answers = [
        _greedy(model, ids, room, stops)
        for ids, room in zip(job["prompts"], job["rooms"], strict=True)
    ]
    return {
        "resident_bytes": resident, "statistics": statistics, "answers": answers,
        **speeds(job["prompt"], prefill, decode, job.get("repeats", 1)),
    }  # fmt: skip


def _stops(model: Any, tokenizer: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    end_ids = list(ends) if isinstance(ends, list) else [ends]
    return [end for end in [*end_ids, tokenizer.eos_token_id] if end is not None]


def _greedy(model: Any, ids: list[int], most: int, stops: list[int]) -> list[int]:
    """The likeliest next tokens, by the model's own cache; nothing else has a say."""
    import torch

    answer: list[int] = []
    cache, input_ids = None, torch.tensor([ids])
    with torch.inference_mode():
        while len(answer) < most:
            output = model(
                input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache, token = output.past_key_values, int(output.logits[0, -1].argmax())
            if token in stops:
                break
            answer.append(token)
            input_ids = torch.tensor([[token]])
    return answer


def _measure_gguf(job: dict[str, Any], rows: Sequence[EvaluationRow]) -> dict[str, Any]:
    from lighten.quantization.llamacpp import Runtime, library

    library()
    longest = max([len(row.ids) for row in rows] + [len(job["prompt"])]
                  + [len(ids) for ids in job["prompts"]])  # fmt: skip
    resident_before = resident_bytes()
    file = next(Path(job["folder"]).glob("*.gguf"))
    room = max([64, *job["rooms"]])
    # More threads than are free for them wait for each other at every product.
    threads = int(os.environ.get("OMP_NUM_THREADS", "0").partition(",")[0]) or cores()
    runtime = Runtime(file, context_tokens=longest + room, threads=threads, cache="f16")
    runtime.logits(job["prompt"][:8])
    resident = resident_bytes() - resident_before
    statistics = score(rows, runtime.log_probabilities, _store(job), reference=job["reference"])
    answers = []
    for ids, room in zip(job["prompts"], job["rooms"], strict=True):
        answer = runtime.greedy(ids, room) if room else []
        if answer and runtime.ends(answer[-1]):
            answer.pop()
        answers.append(answer)
    rates = speeds(
        job["prompt"],
        lambda ids: runtime.greedy(ids, 1),
        lambda ids, most: len(runtime.greedy(ids, most, stop=False)),
        job.get("repeats", 1),
    )
    return {"resident_bytes": resident, "statistics": statistics, "answers": answers, **rates}
