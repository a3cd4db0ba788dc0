"""Tasks of lm-eval from a local folder, on a base and what was trained on it (trap 46)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lighten
from lighten.cli.evaluate import print_evaluation
from lighten.errors import MissingExtra, UserError
from lighten.evaluation import against
from lighten.runs import Run
from tests.tiny import save_tiny, tiny_tokenizer

CHOICES = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWERS = """
task: tiny_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CONTINUED = """
task: tiny_continued
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
TEXTS = """
task: tiny_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} {{{{choices[answer]}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
"""
TRANSLATED = ANSWERS.replace("tiny_answer", "tiny_translated").replace(
    "metric: exact_match, aggregation: mean", "metric: chrf, aggregation: chrf"
)
GROUP = """
group: {name}
task: {tasks}
aggregate_metric_list: [{{metric: acc, aggregation: mean, weight_by_size: {by_size}}}]
"""
GROUPS = {  # by name: what is in it, and whether a task counts by its documents
    "tiny_group": ("[tiny_choice, tiny_short]", "true"),
    "tiny_even": ("[tiny_choice, tiny_short]", "false"),
    "tiny_whole": ("[tiny_group, tiny_continued]", "true"),
}
FEW = {"max_examples": 2, "max_new_tokens": 2}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"What is {i} plus {i}?", "choices": [" the answer", " please", " no"],
         "answer": i % 3}
        for i in range(24)
    ]  # fmt: skip
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICES.format(data=data))
    (folder / "answer.yaml").write_text(ANSWERS.format(data=data))
    (folder / "continued.yaml").write_text(CONTINUED.format(data=data))
    (folder / "texts.yaml").write_text(TEXTS.format(data=data))
    (folder / "short.jsonl").write_text("".join(data.read_text().splitlines(keepends=True)[:5]))
    short = CHOICES.format(data=folder / "short.jsonl").replace("tiny_choice", "tiny_short")
    (folder / "short.yaml").write_text(short)
    for name, (members, by_size) in GROUPS.items():
        text = GROUP.format(name=name, tasks=members, by_size=by_size)
        (folder / f"{name}.yaml").write_text(text)
    (folder / "translated.yaml").write_text(TRANSLATED.format(data=data))
    return folder


@pytest.fixture(scope="module")
def run(tiny_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return lighten.train(
        model=str(tiny_folder), dataset=str(chat_file), dtype="float32", max_steps=4, val_size=8,
        learning_rate=5e-2, progress=False,
        output_dir=str(tmp_path_factory.mktemp("runs") / "run"),
    )  # fmt: skip


def test_choices_and_answers_are_scored_and_paired(
    run: Run, tasks: Path, tiny_folder: Path
) -> None:
    """Accuracy against likelihoods by transformers alone, without and with the template."""
    pytest.importorskip("lm_eval")
    from transformers import AutoModelForCausalLM

    options = {"include_path": str(tasks), "tasks": ["tiny_choice", "tiny_answer"], **FEW}
    evaluation = lighten.evaluate(run, tasks_chat_template=False, **options)
    choice, answer = evaluation.tasks
    assert (choice["task"], choice["metric"], choice["documents"]) == ("tiny_choice", "acc", 24)
    assert (answer["task"], answer["metric"]) == ("tiny_answer", "exact_match")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    tokenizer = tiny_tokenizer()
    correct = []
    for line in (tasks / "data.jsonl").read_text().splitlines():
        row = json.loads(line)
        start = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
        totals = []
        for text in row["choices"]:
            ids = start + tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            positions = range(len(start), len(ids))
            totals.append(sum(float(logits[position - 1, ids[position]]) for position in positions))
        correct.append(float(int(np.argmax(totals)) == row["answer"]))
    assert choice["values"]["base"] == correct
    change = choice["differences"]["default"]
    ours = choice["models"]["default"]["value"]
    assert change["value"] == pytest.approx(ours - np.mean(correct))
    assert evaluation.settings["lm_eval"]["chat_template"] is False
    rows = against.compare(evaluation.to_dict(), evaluation.to_dict(), "other")
    assert {"tiny_choice, acc"} <= {comparison["metric"] for comparison in rows}
    with_template = lighten.evaluate(run, **{**options, "tasks": ["tiny_choice"], "tasks_limit": 4})
    assert with_template.settings["lm_eval"]["chat_template"] is True
    with pytest.raises(UserError, match="of the tasks, chat_template is"):
        against.compare(with_template.to_dict(), evaluation.to_dict(), "other")


def test_figures_are_lm_evals_own(run: Run, tasks: Path, tiny_folder: Path) -> None:
    """Perplexities are no means over documents, and a corpus score has no scores of them."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ["tiny_continued", "tiny_texts", "tiny_translated"]
    options = {"include_path": str(tasks), "tasks": names, "tasks_chat_template": False, **FEW}
    evaluation = lighten.evaluate(run, **options)
    expected = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(tiny_folder), dtype="float32", device="cpu"),
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )["results"]  # fmt: skip
    rows = {(row["task"], row["metric"]): row for row in evaluation.tasks}
    assert {metric for _, metric in rows} == {
        "perplexity", "acc", "word_perplexity", "byte_perplexity", "bits_per_byte", "chrf",
    }  # fmt: skip
    for (task, metric), row in rows.items():
        base = row["models"]["base"]
        assert base["value"] == pytest.approx(expected[task][f"{metric},none"], rel=1e-4)
        if metric == "chrf":
            assert (base["low"], row["differences"]["default"]["verdict"]) == (None, "no interval")
        else:
            assert base["low"] <= base["value"] <= base["high"]
    # The loss of each word rose, and a perplexity that rises is worse.
    for key in (("tiny_continued", "perplexity"), ("tiny_texts", "bits_per_byte")):
        change = rows[key]["differences"]["default"]
        assert change["value"] > 0
        assert change["verdict"] == ("worse" if change["low"] > 0 else "no difference found")
        (compared,) = [
            row
            for row in against.compare(evaluation.to_dict(), evaluation.to_dict(), "other")
            if (row["model"], row["against"]) == ("default", "base")
            and row["metric"] == ", ".join(key)
        ]
        assert compared["difference"] == pytest.approx(change["value"])
        assert compared["low"] == pytest.approx(change["low"])


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_has_lm_evals_own_total(
    run: Run, tasks: Path, group: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over all documents where lm-eval counts tasks by them, else a figure without an interval."""
    pytest.importorskip("lm_eval")
    options = {"include_path": str(tasks), "tasks_chat_template": False, **FEW}
    evaluation = lighten.evaluate(run, tasks=[group], **options)
    rows = {(row["task"], row["metric"]): row for row in evaluation.tasks}
    totals = ["tiny_whole", "tiny_group"] if group == "tiny_whole" else [group]
    assert {row["task"] for row in evaluation.tasks[: len(totals)]} == set(totals)
    parts = ["tiny_choice", "tiny_short", *(["tiny_continued"] if group == "tiny_whole" else [])]
    sizes = [1 if group == "tiny_even" else rows[part, "acc"]["documents"] for part in parts]
    row = rows[group, "acc"]
    assert row["documents"] == sum(rows[part, "acc"]["documents"] for part in parts)
    for name in ("base", "default"):
        figures = [rows[part, "acc"]["models"][name]["value"] for part in parts]
        total = row["models"][name]
        assert total["value"] == pytest.approx(np.average(figures, weights=sizes))
        assert (total["low"] is None) == (group == "tiny_even")
    assert row["formula"] == (None if group == "tiny_even" else "mean")
    print_evaluation(evaluation.to_dict())
    assert group in capsys.readouterr().out


def test_tasks_of_one_name_that_ask_other_things_are_not_compared(run: Run, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    options = {"include_path": str(tasks), "tasks": ["tiny_choice"], **FEW}
    first = lighten.evaluate(run, **options).to_dict()
    data = tasks / "data.jsonl"
    before = data.read_text()
    try:
        data.write_text(before.replace("What is 3", "How much is 3"))
        reworded = lighten.evaluate(run, **options).to_dict()
        data.write_text("".join(before.splitlines(keepends=True)[:-1]))
        fewer = lighten.evaluate(run, **options).to_dict()
    finally:
        data.write_text(before)
    with pytest.raises(UserError, match="the documents of task tiny_choice are not the same"):
        against.compare(reworded, first, "other")
    with pytest.raises(UserError, match="task tiny_choice has 23 and 24 documents"):
        against.compare(fewer, first, "other")


def test_mistakes_are_told(
    run: Run, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(MissingExtra, match=r"pip install 'lighten\[lm-eval\]'"):
            lighten.evaluate(run, tasks=["tiny_choice"])
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="does not exist"):
        lighten.evaluate(run, tasks=["tiny_choice"], include_path=str(tmp_path / "none"))
    with pytest.raises(UserError, match="has no task 'other'"):
        lighten.evaluate(run, tasks=["other"], include_path=str(tasks), **FEW)


def test_more_is_better_where_no_task_says_otherwise(run: Run, tmp_path: Path) -> None:
    """lm-eval knows no direction of a user's own metric; what a task needs may not be installed."""
    pytest.importorskip("lm_eval")
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": f"What is {i}?", "choices": [" a"], "answer": 0}) + "\n"
            for i in range(24)
        )
    )

    def write_task(module: str) -> None:
        asked = ANSWERS.format(data=data).partition("metric_list")[0]
        (tmp_path / "scored.yaml").write_text(
            f"{asked}process_results: !function {module}.score\n"
            "metric_list: [{metric: own, aggregation: mean}]\n"
        )

    (tmp_path / "scored.py").write_text(
        "def score(doc, results):\n    return {'own': float(len(results[0]))}\n"
    )
    write_task("scored")
    options = {"include_path": str(tmp_path), "tasks": ["tiny_answer"], **FEW}
    (row,) = lighten.evaluate(run, **options).tasks
    assert (row["metric"], row["higher_is_better"]) == ("own", True)
    (tmp_path / "needy.py").write_text("import nothing_of_this_name\n")
    write_task("needy")
    measured: list[str] = []
    with pytest.raises(UserError, match=r"cannot load tiny_answer: .*nothing_of_this_name"):
        lighten.evaluate(run, progress=lambda what, *_: measured.append(what), **options)
    assert set(measured) <= {"encoding"}, "nothing is lost"


def test_answers_end_where_the_training_learnt_to_end_them(chat_file: Path, tmp_path: Path) -> None:
    """The base declares another end: what came behind the learnt one would be scored as well."""
    pytest.importorskip("lm_eval")
    from transformers import AutoModelForCausalLM

    folder, question, end = save_tiny(tmp_path / "model"), "What is 1?", 2
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = tiny_tokenizer()
    ids = tokenizer(question)["input_ids"]
    greedy = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=4)
    answer = greedy[0, len(ids) :].tolist()
    place = next(place for place in range(1, 4) if answer[place] not in answer[:place])
    with torch.no_grad():  # that token is the end now
        model.lm_head.weight[[answer[place], end]] = model.lm_head.weight[[end, answer[place]]]
    model.save_pretrained(folder)
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": question}))
    (tmp_path / "scored.py").write_text(
        "def score(doc, results):\n    return {'signs': float(len(results[0]))}\n"
    )
    asked = ANSWERS.format(data=tmp_path / "data.jsonl").partition("metric_list")[0]
    (tmp_path / "scored.yaml").write_text(
        f"{asked}process_results: !function scored.score\n".replace("{{choices[answer]}}", "")
        + "metric_list: [{metric: signs, aggregation: mean}]\n"
    )
    trained = lighten.train(
        model=str(folder), dataset=str(chat_file), dtype="float32", max_steps=1, val_size=8,
        progress=False, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    learnt = trained.info()["data"]
    trained.update(data={**learnt, "answers": {**learnt["answers"], "ends": [end]}})
    (row,) = lighten.evaluate(
        trained, include_path=str(tmp_path), tasks=["tiny_answer"], tasks_chat_template=False, **FEW
    ).tasks
    assert row["models"]["base"]["value"] == len(tokenizer.decode(answer[:place]))


def test_an_adapter_of_a_tied_head_answers_tasks(
    tasks: Path, chat_file: Path, tmp_path: Path
) -> None:
    """lm-eval would tie the head's weight anew, and something else is in its place."""
    pytest.importorskip("lm_eval")
    trained = lighten.train(
        model=str(save_tiny(tmp_path / "tied", "qwen2")), dataset=str(chat_file), dtype="float32",
        max_steps=2, val_size=8, modules_to_save=["lm_head"], progress=False,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    options = {"include_path": str(tasks), "tasks": ["tiny_choice"], **FEW}
    (row,) = lighten.evaluate(trained, **options).tasks
    assert set(row["models"]) == {"base", "default"}
