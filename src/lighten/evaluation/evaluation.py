"""The verb `evaluate`: what training changed, on held-out examples, with intervals."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lighten import data, runs
from lighten.cpu import allocator
from lighten.data import Example
from lighten.data.batches import TokenRow
from lighten.errors import NoHeldOut, UserError
from lighten.evaluation import against as comparing
from lighten.evaluation import answer_length, forgetting, harness, metrics, registry
from lighten.evaluation.bootstrap import Array
from lighten.evaluation.forgetting import GeneralText
from lighten.evaluation.generate import Answers, as_shown, generate
from lighten.evaluation.judge import MOST_SIGNS, Judge, judged
from lighten.evaluation.likelihood import measure_loss, most_tokens
from lighten.evaluation.partial_results import PartialResults, digest_of, key_of
from lighten.evaluation.result import Evaluation, Measured
from lighten.evaluation.run_models import Models, Opened
from lighten.evaluation.summary import summarise
from lighten.evaluation.together import Disagrees, Pass
from lighten.generation import slotted
from lighten.machine import hardware
from lighten.models import Base, limits_of
from lighten.paths import expanded
from lighten.recipe import EvaluateOptions, Recipe
from lighten.runs import Run
from lighten.training import held_out_data
from lighten.training.held_out_data import HeldOutData
from lighten.wording import counted, first_line

Progress = Callable[[str, int, int], None]


def evaluate_run(
    run: Run, *, against: Run | None = None, progress: Progress | None = None,
    eval_dataset: Any = None, **options: Any,
) -> Evaluation:  # fmt: skip
    """Measure the base and what a run trained, if anything, and write `evaluation.json`.

    Args:
        run: The run.
        against: Another one, evaluated already, whose models these are compared with.
        progress: Log what is being done, how far it is, and of how much.
        eval_dataset: Data to measure on, as a recipe names them; None: what the run held out.
        options: Settings of the recipe's `evaluate` section.

    Raises:
        UserError: Nothing trained in the run, no held-out example, or `against` was measured
            differently.
    """
    recipe = run.recipe()
    settings = recipe.with_evaluate(options)
    require(settings)
    if eval_dataset is not None:
        recipe = recipe.changed({"eval_dataset": eval_dataset})
    theirs = None if against is None else comparing.read(against)
    if theirs is not None:
        comparing.require_same_settings(settings, theirs)
    judge, alone, adapter = _judge_of(settings), run.is_model_alone(), run.adapter_alone()
    if judge is not None and alone and adapter is None:
        raise UserError("a judge compares answers with the base's, and here is one model alone")
    if judge is not None:
        judge.check()
    transformers_logging.disable_progress_bar()
    device = hardware.choose_device().value
    memory = allocator.measure_peak(device)
    models = Models(run, device, keep=False)
    if not models.names and not alone:
        what = "model" if recipe.method == "full" else "adapter"
        raise run.untrained(f"no trained {what}")
    if adapter is not None and not models.names:
        raise UserError(f"the adapter that {run.folder} measures is no longer in {adapter}")
    # Where data are named, a test set that lies beside the training data is not meant.
    trained_on = run.info().get("data", {}).get("sha256")
    raw_data = held_out_examples(recipe, trained_on, test=eval_dataset is None)
    if alone:
        # What an adapter of elsewhere was asked in its training is not known.
        raw_data = replace(raw_data, trained_prompts=None if models.names else frozenset())
    template, base = models.open(None).template, models.open(None).base
    tokenizer, limits = base.tokenizer, limits_of(base.model)
    partial = _earlier_results(run, base, settings)
    if alone:
        run.update(base=base.facts())
    del base  # another may be opened in its place
    encoding = None if progress is None else functools.partial(progress, "encoding")
    encoded_data = held_out_data.encoded(
        recipe, raw_data, tokenizer, limits, settings.max_examples, encoding, "max_examples"
    )
    answered, unasked = askable(encoded_data.examples, recipe, tokenizer)
    settings, reference_tokens = answer_length.settled(settings, answered, recipe, tokenizer)
    assert settings.max_new_tokens is not None
    if theirs is not None:
        comparing.require_same_settings(settings, theirs)
    general = None
    if settings.forgetting is not None:
        general = forgetting.encoded(settings.forgetting, recipe, tokenizer, limits)
    examples_sha256 = digest_of_examples(encoded_data.examples)
    if theirs is not None:
        comparing.require_same_data(theirs, encoded_data, examples_sha256, template, general)
    tasks = harness.begin(settings, tokenizer) if settings.tasks else None
    results = []
    for model_name in (None, *models.names):
        results.append(
            measure(models, model_name, encoded_data, answered, recipe, settings, memory, progress,
                    partial, general)
        )  # fmt: skip
        if tasks is not None:
            opened = models.open(model_name)
            using = opened.trained.using(opened.adapter)
            harness.score(
                tasks, model_name or "base", opened.base.model, tokenizer, settings, using,
                models.learnt.ends,
            )  # fmt: skip
    evaluation = summarise(results, answered, settings)
    if tasks is not None:
        evaluation.settings["lm_eval"] = tasks.settings
        evaluation.tasks = harness.summary(tasks, settings)
    evaluation.settings["chat_template"] = template
    if general is not None:
        evaluation.settings["general_text"] = general.facts
    if recipe.qat is not None:
        evaluation.settings["qat"] = f"{recipe.qat}, groups of {recipe.qat_group_size}"
    shortened = max(result.answers.shortened for result in results)
    evaluation.dataset = {
        "path": encoded_data.name,
        "rows": len(encoded_data.examples),
        "examples_sha256": examples_sha256,
        "answered": len(answered),
        "left_out": encoded_data.left_out + encoded_data.bad_rows,
        "shared_prompts": encoded_data.shared,
        "shortened": shortened,
        "limited": {result.name: result.answers.limited for result in results},
        "references_beyond_limit": sum(
            tokens > settings.max_new_tokens for tokens in reference_tokens
        ),
        # What is to be said wherever the figures are shown.
        "notes": [
            *encoded_data.sentences(),
            *unasked,
            *shortened_sentence(shortened, results),
            *answer_length.sentences(settings.max_new_tokens, reference_tokens, results),
            *broken_sentences(results),
            *_qat_sentence(recipe),
        ],
    }
    path = run.folder / runs.EVALUATION
    runs.write_json(path, evaluation.to_dict())
    try:
        if theirs is not None and against is not None:
            name = comparing.name_of(against, run)
            evaluation.comparisons = comparing.compare(evaluation.to_dict(), theirs, name)
            runs.write_json(path, evaluation.to_dict())
        if judge is not None:
            evaluation.judged = _judge_answers(
                judge, answered, evaluation.examples, results, settings, progress
            )
            runs.write_json(path, evaluation.to_dict())
    except UserError as error:
        raise UserError(f"{error}; all else that was measured is in {path}") from error
    partial.forget()  # not before a judge has replied: who asks one again need not measure again
    return evaluation


def _earlier_results(run: Run, base: Base, settings: EvaluateOptions) -> PartialResults:
    """What an evaluation of the run measured that was ended, with the same models and settings."""
    recipe, model = run.recipe(), run.model()
    # What is asked beside, or made of the answers, may be another at the next try.
    values = [
        recipe.completed(), settings.max_new_tokens, settings.batch_size, run.info().get("data"),
        hardware.versions(), base.revision, base.dtype.value,
    ]  # fmt: skip
    base_folder = expanded(recipe.model_name_or_path)
    folders = [base_folder, *run.adapters().values(), *([] if model is None else [model])]
    return PartialResults(run.folder / runs.EVALUATION_PARTS, digest_of(values, folders))


def require(settings: EvaluateOptions) -> None:
    """What is measured can be: told before anything heavy is loaded.

    Raises:
        UserError: A metric, a file, an extra or a setting is missing.
    """
    for name in settings.extra_metrics:
        registry.extra(name)
    if settings.forgetting is not None:
        forgetting.read(settings.forgetting)
    if settings.tasks:
        harness.require(settings)
    if (settings.judge is None) != (settings.judge_model is None):
        raise UserError(
            "a judge is an address and a model there: give both, "
            "--judge http://127.0.0.1:8000/v1 --judge_model NAME"
        )


def _judge_of(settings: EvaluateOptions) -> Judge | None:
    """The judge that is asked for, if one is."""
    if settings.judge is None or settings.judge_model is None:
        return None
    return Judge(settings.judge, settings.judge_model, settings.judge_max_tokens)


def digest_of_examples(examples: Sequence[Example]) -> str:
    """Of what the examples say: figures on others are no comparison, however many tokens agree."""
    keys = "\n".join(example.content_key for example in examples)
    return hashlib.sha256(keys.encode()).hexdigest()


def _question(example: Example) -> str:
    """What an example asks, as a judge reads it: the last turn, after those that it goes on from.

    The first turns are left out where all are more than a judge is given.
    """
    *earlier, asked = example.messages[:-1] or example.messages
    question = asked.content
    if not earlier:
        return question
    question = f"{asked.role}: {question}"
    for message in reversed(earlier):
        longer = f"{message.role}: {message.content}\n\n{question}"
        if len(longer) > MOST_SIGNS:
            break
        question = longer
    return question


def _judge_answers(
    judge: Judge, answered: Sequence[Example], examples: Sequence[Mapping[str, Any]],
    results: Sequence[Measured], settings: EvaluateOptions, progress: Progress | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What a judge says of each adapter's answers beside the base's."""
    texts = (
        [_question(example) for example in answered],
        [example["reference"] for example in examples],
    )
    base, *trained = results
    return [
        {
            "adapter": result.name, "against": base.name,
            **judged(
                judge, *texts, result.answers.texts, base.answers.texts,
                samples=settings.bootstrap_samples, seed=settings.seed,
                progress=progress and functools.partial(progress, f"{result.name}: judge"),
            ),
        }
        for result in trained if examples
    ]  # fmt: skip


def _qat_sentence(recipe: Recipe) -> list[str]:
    """What of a quantisation-aware run is measured."""
    if recipe.qat is None:
        return []
    return [
        f"what was trained is measured as it will be once quantised ({recipe.qat}, groups of "
        f"{recipe.qat_group_size}): weights and activations are rounded; the base is not"
    ]


def askable(
    examples: Sequence[Example], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], list[str]]:
    """The examples that end with an answer which the chat template shows, and why others are not.

    Returns:
        Examples that can be asked, and a sentence per reason for the others: they count for the
        loss alone.
    """
    handling = data.Handling(recipe.system_role, recipe.thinking)
    answerable: list[Example] = []
    reasons: dict[str, list[str]] = {}
    for example in examples:
        try:
            data.prompt_of(example, tokenizer, handling)
        except UserError as error:
            reason = first_line(error).replace(example.where, "").lstrip(": ")
            reasons.setdefault(reason, []).append(example.where)
            continue
        answerable.append(example)
    return answerable, [
        f"{counted(len(rows), 'held-out example')} {'is' if len(rows) == 1 else 'are'} not asked "
        f"and count for the loss alone: {rows[0]} {reason}"
        for reason, rows in reasons.items()
    ]


def broken_sentences(results: Sequence[Measured]) -> list[str]:
    """What it means that a model's loss is no number."""
    return [
        f"the loss of {result.name} is not a number: its weights or what it computes are broken, "
        "and its answers say nothing"
        for result in results
        if not np.isfinite(result.statistics["loss"]).all()
    ]


def shortened_sentence(shortened: int, results: Sequence[Measured]) -> list[str]:
    """What it means that answers ended where the model's positions end."""
    if not shortened:
        return []
    whose = max(results, key=lambda result: result.answers.shortened)
    return [
        f"{counted(shortened, 'answer')} of {whose.name} {'ends' if shortened == 1 else 'end'} "
        f"where the model's positions end, before max_new_tokens: long prompts leave no room"
    ]


def held_out_examples(recipe: Recipe, trained_on: str | None, *, test: bool = True) -> HeldOutData:
    """Examples that the recipe's training never saw: the best set there is.

    Args:
        recipe: The run's recipe.
        trained_on: SHA-256 of the data that the run was trained on.
        test: A test set, if there is one; else the set that the loss is watched on, by which
            settings may be chosen.

    Raises:
        NoHeldOut: There is none.
        UserError: The data has changed so that the split would be another.
    """
    for split in ("test", "valid") if test else ("valid",):
        held_out_set = held_out_data.separate(recipe, None, split)
        if held_out_set is not None:
            return held_out_data.beside_training(recipe, held_out_set, trained_on)
    if not recipe.val_size:
        raise NoHeldOut(
            "the run has no held-out examples to evaluate on; set eval_dataset, or val_size above 0"
        )
    training = held_out_data.read_as(recipe, recipe.dataset, "train")
    if trained_on not in (None, training.sha256):
        raise UserError(
            f"{training.name} has changed since the run was trained, so rows it learnt might be "
            "taken for held-out ones; put the file back, or train again"
        )
    _, held_out_set = held_out_data.split_off(recipe, training)
    if not held_out_set.examples:
        raise NoHeldOut(f"the run has no held-out examples to evaluate on: {held_out_set.notes[0]}")
    return held_out_set


def measure(
    models: Models,
    model_name: str | None,
    scored: HeldOutData,
    answered: Sequence[Example],
    recipe: Recipe,
    settings: EvaluateOptions,
    memory: hardware.PeakMemory,
    progress: Progress | None = None,
    partial: PartialResults | None = None,
    general: GeneralText | None = None,
) -> Measured:
    """Likelihood and answers of one model (model_name None: the untouched base).

    Args:
        models: The run's.
        model_name: Which of them.
        scored: The examples whose likelihood is measured.
        answered: Those that it answers.
        recipe: Of the run.
        settings: Of answers, with the longest of them.
        memory: Restarted for this model.
        progress: Log what is being done, how far it is, and of how much.
        partial: What an earlier session measured before it was ended; new parts are added.
        general: Text beside the task.
    """
    name, opened = model_name or "base", models.open(model_name)
    partial = None if partial is None else partial.of_model(name, memory)
    base, trained, adapter = opened.base, opened.trained, opened.adapter
    memory.restart()
    assert scored.rows is not None
    rows = scored.rows.rows
    assert settings.max_new_tokens is not None  # settled from the references
    prompts, references = [], []
    handling = data.Handling(recipe.system_role, recipe.thinking)
    for example in answered:
        prompt, reference = data.prompt_of(example, base.tokenizer, handling)
        prompts.append(prompt)
        references.append(as_shown(reference, base.tokenizer))

    combined = _together(opened, models, rows, prompts, recipe, settings, name, progress, partial)
    if combined is None:
        loss = _likelihood(opened, rows, recipe, name, progress, partial)
        with trained.using(adapter):
            answers = generate(
                base.model, base.tokenizer, prompts,
                max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
                learnt=models.learnt, limits=limits_of(base.model), partial=partial,
                progress=None if progress is None else functools.partial(
                    progress, f"{name}: answers"
                ),
            )  # fmt: skip
    else:
        loss, answers = combined
    statistics = {"loss": loss, "perplexity": loss}
    if general is not None:
        statistics[forgetting.METRIC] = _likelihood(
            opened, general.rows.rows, recipe, f"{name}, general text", progress, partial
        )
    if answered:
        registry.require_pairs(answers.texts, references)
        answer_texts, reference_texts = registry.nfc(answers.texts), registry.nfc(references)
        for metric in (*registry.OF_ANSWERS, *settings.extra_metrics):
            statistics[metric] = registry.scorer(metric).statistics(answer_texts, reference_texts)
    peak = memory.read() if partial is None else partial.peak()
    return Measured(name, model_name, statistics, answers, references, peak)


def _together(
    opened: Opened, models: Models, rows: Sequence[TokenRow], prompts: Sequence[Sequence[int]],
    recipe: Recipe, settings: EvaluateOptions, name: str, progress: Progress | None,
    partial: PartialResults | None,
) -> tuple[Array, Answers] | None:  # fmt: skip
    """Statistics of the loss and answers by one pass; None where this machine or model has none."""
    base, trained = opened.base, opened.trained
    separate = base.feed is not None or recipe.packing is False or trained.no_packing is not None
    if not prompts or separate or slotted.obstacle(base.model) is not None:
        return None
    assert settings.max_new_tokens is not None
    label = f"{name}: loss and answers"
    single_pass = Pass(
        base.model, base.tokenizer, trained, opened.adapter, models.learnt,
        settings.max_new_tokens, recipe.per_device_eval_batch_size, most_tokens(base, recipe),
        settings.batch_size, None if progress is None else functools.partial(progress, label),
        partial,
    )  # fmt: skip
    try:
        losses, answers = single_pass.run(rows, prompts)
    except Disagrees:
        return None
    return metrics.likelihood_statistics(losses.nll, losses.tokens), answers


def _likelihood(
    opened: Opened, rows: Sequence[TokenRow], recipe: Recipe, name: str,
    progress: Progress | None, partial: PartialResults | None,
) -> Array:  # fmt: skip
    """Statistics of the loss on encoded rows, or what an earlier session kept of them."""
    key = key_of("loss", [row.input_ids for row in rows])
    before = None if partial is None else partial.get(key)
    if before is not None:
        return metrics.likelihood_statistics(before["nll"], before["tokens"])
    losses = measure_loss(
        opened.base, opened.trained, rows, opened.adapter, recipe,
        progress=None if progress is None else functools.partial(progress, f"{name}: loss"),
    )  # fmt: skip
    if partial is not None:
        partial.put(key, {"nll": losses.nll, "tokens": losses.tokens})
    return metrics.likelihood_statistics(losses.nll, losses.tokens)
