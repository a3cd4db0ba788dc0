"""`lighten evaluate` against plain transformers on the same examples, for `audit_check.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import machine

BATCH_SIZES = (8, 16, 32, 64)
# Examples that the peer's batch size is chosen on, and how far two losses may be apart.
TRIED = 32
AGREEMENT = {"float32": 1e-4, "bfloat16": 2e-2}
# Answers that are the same: greedy choices near a tie go another way by rounding.
SAME_ANSWERS = {"float32": 0.9, "bfloat16": 0.5}


def compare(
    model: str, data: str, dtype: str, scratch: Path, *, examples: int, new_tokens: int
) -> dict[str, Any]:
    """Both on a freshly trained adapter and its base.

    Args:
        model: The base.
        data: Its examples; those held out are measured on.
        dtype: Of the base.
        scratch: A folder that is thrown away.
        examples: How many are measured on.
        new_tokens: Of an answer at most.
    """
    import lighten

    run = lighten.train(
        model_name_or_path=model, dataset=data, dtype=dtype, output_dir=str(scratch / dtype),
        max_steps=4, max_length=256, max_eval_samples=8, progress=False, planned=False,
    )  # fmt: skip
    job = _job(run, dtype, examples, new_tokens)
    few = {**job, "prompts": job["prompts"][:TRIED], "rows": job["rows"][:TRIED]}
    times: dict[int, float] = {}
    for size in BATCH_SIZES:
        result = machine.in_fresh_process("peers_generate.py", {**few, "batch_size": size}, scratch)
        if "error" not in result:
            times[size] = result["seconds"]
    if not times:
        return {"ratio": None, "why_not": result["error"]}
    best = min(times, key=lambda size: times[size])
    theirs = machine.in_fresh_process("peers_generate.py", {**job, "batch_size": best}, scratch)
    our_job = {"run": str(run.folder), "examples": examples, "new_tokens": new_tokens}
    ours = machine.in_fresh_process("evaluate_worker.py", our_job, scratch)
    for measurement in (theirs, ours):
        if "error" in measurement:
            return {"ratio": None, "why_not": measurement["error"], "tried": times}
    return {"batch_size": best, "tried": times, **judged(ours, theirs, run, dtype)}


def _job(run: Any, dtype: str, examples: int, new_tokens: int) -> dict[str, Any]:
    """What the peer is given: the tokens that `lighten evaluate` measures on."""
    from lighten import data, models
    from lighten.evaluation.evaluation import askable, held_out_examples
    from lighten.evaluation.generate import stop_tokens
    from lighten.models import limits
    from lighten.training import held_out_data

    recipe = run.recipe()
    base = models.load(recipe.model_name_or_path)
    data.choose_template(base.tokenizer, recipe.chat_template)
    held_out = held_out_examples(recipe, run.info()["data"]["sha256"])
    encoded = held_out_data.encoded(
        recipe, held_out, base.tokenizer, limits(recipe.model_name_or_path), examples
    )
    assert encoded.rows is not None
    handling = data.Handling(recipe.system_role, recipe.thinking)
    askable_examples, _ = askable(encoded.examples, recipe, base.tokenizer)
    learnt = data.LearntAnswers.of(run.info())
    stops = stop_tokens(base.model, base.tokenizer, learnt)
    return {
        "model": str(base.path), "adapter": str(next(iter(run.adapters().values()))),
        "dtype": dtype, "new_tokens": new_tokens, "stops": stops,
        "pad": base.tokenizer.pad_token_id,
        "rows": [
            ([int(token) for token in row.input_ids], [bool(mark) for mark in row.supervised])
            for row in encoded.rows.rows
        ],
        "prompts": [
            [int(token) for token in data.prompt_of(example, base.tokenizer, handling)[0]]
            for example in askable_examples
        ],
    }  # fmt: skip


def judged(ours: Any, theirs: Any, run: Any, dtype: str) -> dict[str, Any]:
    """The ratio of times; null where the two did not measure the same.

    Args:
        ours: Losses and texts of both models.
        theirs: Losses and token ids of both.
        run: Whose tokenizer makes texts of them.
        dtype: Of the base.
    """
    from lighten.models import load_tokenizer

    tokenizer = load_tokenizer(run.recipe().model_name_or_path)
    difference, same_answers, count = 0.0, 0, 0
    for name, our_figures in ours["models"].items():
        their_figures = theirs["models"][name]
        total = sum(their_figures["losses"])
        difference = max(difference, abs(sum(our_figures["losses"]) - total) / total)
        texts = [
            tokenizer.decode(ids, skip_special_tokens=True) for ids in their_figures["answers"]
        ]
        same_answers += sum(
            a.strip() == b.strip() for a, b in zip(our_figures["texts"], texts, strict=True)
        )
        count += len(texts)
    why = None
    if difference > AGREEMENT[dtype]:
        why = f"the losses are {difference:.1e} apart"
    elif same_answers < SAME_ANSWERS[dtype] * count:
        why = f"{same_answers} of {count} answers alone are the same"
    return {
        "ratio": None if why else ours["seconds"] / theirs["seconds"], "why_not": why,
        "ours_s": ours["seconds"], "theirs_s": theirs["seconds"],
        "loss_difference": difference, "same_answers": same_answers / count,
    }  # fmt: skip
