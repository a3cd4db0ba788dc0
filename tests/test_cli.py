"""The command line as a user meets it: real processes, exit codes, clean errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lighten
from lighten import api
from lighten.cli.console import console, print_table
from lighten.cli.main import _recipe_arguments as recipe_arguments
from lighten.cli.main import app, overrides
from lighten.errors import UserError
from lighten.runs import Run
from tests.processes import call, python


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['lighten', '--help']\n"
        "from lighten.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'peft', 'matplotlib', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for verb in ("run", "train", "plan", "evaluate", "report", "chat", "doctor", "models", "runs",
                 "data"):  # fmt: skip
        assert f"\n  {verb}" in result.stdout


def test_settings_come_in_every_usual_form() -> None:
    words = ["--learning_rate", "1e-4", "--lora_r=8,16", "max_steps=3", "--skip-bad-rows",
             "--evaluate.max-examples", "5", "--lora_target_modules", "[q_proj, v_proj]",
             "gradient_checkpointing=true", "--eval_dataset", "null"]  # fmt: skip
    assert overrides(words) == {
        "learning_rate": 1e-4, "lora_r": [8, 16], "max_steps": 3, "skip_bad_rows": True,
        "evaluate.max_examples": 5, "lora_target_modules": ["q_proj", "v_proj"],
        "gradient_checkpointing": True, "eval_dataset": None,
    }  # fmt: skip
    assert overrides(["--revision", "12e4567", "output_dir=[abc", "--dataset", "a,b.jsonl"]) == {
        "revision": "12e4567", "output_dir": "[abc", "dataset": "a,b.jsonl",
    }  # fmt: skip
    with pytest.raises(UserError, match="'stray' is not a setting"):
        overrides(["stray"])
    # Folders may be called by a year, and files have commas, by other tools' names too.
    assert overrides(["--data", "2024", "--train_file", "a,b.jsonl"]) == {
        "data": "2024", "train_file": "a,b.jsonl",
    }  # fmt: skip


@pytest.mark.parametrize(
    "words", [["--output_dir"], ["--output_dir", "lr=1e-4"], ["--chat-template", "--packing"]]
)
def test_a_path_without_its_value_is_no_folder_called_true(words: list[str]) -> None:
    with pytest.raises(UserError, match="needs a value"):
        overrides(words)


@pytest.mark.parametrize("words", [["learning_rate="], ["--lr", ""], ["--output_dir", " "]])
def test_a_variable_that_is_not_set_is_no_setting_left_out(words: list[str]) -> None:
    """`learning_rate=$RATE` would train at the default rate."""
    with pytest.raises(UserError, match="is given an empty value; write"):
        overrides(words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["m/m", "a.jsonl", "--dataset", "b.jsonl"], "a.jsonl and --dataset b.jsonl both set the"),
        (["m/m", "a.jsonl", "--model", "n/n"], "m/m and --model n/n both set the same thing; keep"),
        (["m/m", "--base_model", "n/n", "--dataset", "d"], "m/m and --base_model n/n both set"),
        (["m/m", "--dataset", "a.jsonl", "--dataset", "b.jsonl"],
         "--dataset is given twice; several data sets are one list: --dataset a.jsonl,b.jsonl"),
        (["m/m", "a.jsonl", "b.jsonl"], "several data sets are one list: m/m a.jsonl,b.jsonl"),
        (["r.yaml", "a.jsonl"], "r.yaml is a recipe, which names its own data; to take others: "
                                "--dataset a.jsonl"),
        (["r.yaml", "-lora_r", "8"], "'-lora_r' is not a setting; write --name value"),
        (["m/m", "-o"], "'-o' is not a setting; write --name value or name=value"),
    ],
)  # fmt: skip
def test_words_that_are_no_model_and_data_are_told_as_what_they_are(
    words: list[str], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        recipe_arguments(words)


def test_a_folder_with_a_recipe_is_that_recipe_and_no_place_for_its_run(tmp_path: Path) -> None:
    """A run would have its files between the project's, and was refused."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "recipe.yaml").write_text("model: m/m\ndataset: d/d\n")
    recipe, settings = recipe_arguments([str(project), "--max_steps", "3"])
    assert (recipe, settings) == (project / "recipe.yaml", {"max_steps": 3})


def test_from_python_a_run_its_folder_and_a_mapping_are_recipes(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    settings = {"model": str(tiny_folder), "dataset": chat_file, "max_steps": 3}
    recipe = api.plannable(settings, lora_r=2)
    assert (recipe.dataset, recipe.max_steps, recipe.lora_r) == (str(chat_file), 3, 2)
    begun = Run.create(recipe.changed({"output_dir": str(tmp_path / "a run")}))
    begun.update(status="finished")
    for form in (begun, begun.folder, str(begun.folder)):
        again = api.plannable(form, lora_r=4)
        assert (again.max_steps, again.lora_r, again.run_folder) == (3, 4, begun.folder)
    (tmp_path / "project").mkdir()
    (tmp_path / "project/recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert api.plannable(tmp_path / "project").name == "project"
    with pytest.raises(UserError, match=r"no-model is neither a recipe .* model='no-model'"):
        lighten.train("no-model")
    planned = call("plan", str(begun.folder), "--device", "cpu", "--json", cwd=tmp_path)
    assert json.loads(planned.stdout)["steps"] == 3


def test_the_whole_way_from_a_recipe_to_a_report(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        f"base_model: {tiny_folder}\ndataset: {chat_file}\nmax_steps: 3\nval_size: 0.2\n"
        "evaluate:\n  max_new_tokens: 4\n"
    )
    result = call("run", str(recipe), "--lora_r", "2,4", "output_dir=out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "base_model is called model_name_or_path here" in result.stderr
    assert "step 3/3" in result.stderr
    assert "perplexity" in result.stdout
    run = Run(tmp_path / "out")
    assert run.info()["status"] == "finished"
    assert list(run.adapters()) == ["r2", "r4"]
    assert "<svg" in (run.folder / "report.html").read_text()

    again = call("evaluate", "out", "--max_new_tokens", "2", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["settings"]["max_new_tokens"] == 2
    chatted = call("chat", "out", "--adapter", "r4", "--max-new-tokens", "3", cwd=tmp_path,
                   stdin="hello\n")  # fmt: skip
    assert chatted.returncode == 0, chatted.stderr
    assert "Traceback" not in chatted.stderr
    assert call("runs", "list", ".", cwd=tmp_path).stdout.count("finished") == 1
    compared = call("runs", "compare", "out", "out", "--json", cwd=tmp_path)
    assert {row["what"] for row in json.loads(compared.stdout)} >= {"tokens/s", "r2: chrf"}
    assert call("report", "out", "out", "--output", "two.html", cwd=tmp_path).returncode == 0
    assert (tmp_path / "two.html").exists()
    alone = (run.folder / "report.html").read_bytes()
    assert call("report", "out", "out", cwd=tmp_path).returncode == 0
    assert (run.folder / "report.html").read_bytes() == alone
    assert "<svg" in (run.folder / "comparison.html").read_text()


def test_training_needs_no_recipe(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    """In a Python that nothing prepared."""
    words = ["-m", "lighten", "train", str(tiny_folder), str(chat_file), "--max_steps", "1"]
    result = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    assert Run(tmp_path / "runs" / "llama-chat").info()["status"] == "finished"


def test_words_in_brackets_and_between_colons_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """`lighten[quant]` and a folder's name are words; rich would take them for its markup."""
    words = "pip install 'lighten[quant]' for runs/[dim]a[/b] with :key:"
    console().print(words)
    assert words in capsys.readouterr().out
    print_table(["[bold]a"], [[words]])
    shown = capsys.readouterr().out
    assert words in shown
    assert "[bold]a" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "m", "nowhere.jsonl"), "error: recipe: dataset: 'nowhere.jsonl' does not exist"),
        (("train", "missing.yaml"), "error: cannot read the recipe missing.yaml"),
        (("train", "a", "b", "c"), "error: b, c behind the model a: several data sets are"),
        (("train", "--resume", "runs/nothing"), "error: runs/nothing is neither a run's folder"),
        (("run", "some/model"), "data set beside it: lighten train some/model DATA"),
        (("train", "m", "--dataset", "n.jsonl"), "error: recipe: dataset: 'n.jsonl' does not"),
        (("train", "m", "--train_file=n.jsonl"), "error: recipe: dataset: 'n.jsonl' does not"),
        (("evaluate", "nothing"), "error: nothing is not a run"),
        (("report", "nothing"), "error: nothing is not a run"),
        (("chat", "./nothing"), "error: the model ./nothing does not exist"),
        (("chat", "runs/nothing"), "error: runs/nothing is not a run"),
        (("export", "runs/nothing"), "error: runs/nothing is not a run"),
        (("serve", "runs/nothing"), "error: runs/nothing is not a run"),
        (("bench", "runs/nothing"), "error: runs/nothing is not a run"),
        (("data", "check", "x.jsonl", "--model", "./no"), "error: the model ./no does not exist"),
        (("data", "check", "x", "--model", "./no", "--max_length", "60"), "error: the model ./no"),
        (("export", "runs/nothing", "--output-dir", "x"), "error: runs/nothing is not a run"),
        (("bench", "runs/nothing", "--new_tokens", "8"), "error: runs/nothing is not a run"),
        (("runs", "compare", "a", "b"), "error: a is not a run"),
        (("train", "m", "d", "--output_dir"), "error: --output_dir needs a value"),
    ],
)
def test_a_mistake_is_one_clean_line_and_exit_code_2(
    words: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    result = call(*words, cwd=tmp_path)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_models_and_schema_print_json() -> None:
    assert json.loads(call("models", "--json").stdout)[0]["name"] == "smollm2-135m"
    assert "lora_r" in json.loads(call("schema").stdout)["properties"]


def test_data_check_shows_the_mask(tiny_folder: Path, chat_file: Path) -> None:
    result = call(
        "data", "check", str(chat_file), "--model", str(tiny_folder), "--max-length", "60"
    )
    assert result.returncode == 0, result.stderr
    assert "⟦The answer is 0.<|im_end|>⟧" in result.stdout
    assert "rows cut" in result.stdout
    report = json.loads(
        call("data", "check", str(chat_file), "--model", str(tiny_folder), "--json").stdout
    )
    assert report["counts"]["supervised_tokens"] > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--row", "99"), r"--row 99: .* rows; the first is 0"),
        (("--row", "-5"), "greater than or equal to 0"),
        (("--max-length", "1"), "greater than or equal to 2"),
    ],
)
def test_data_check_shows_no_other_row_than_the_one_named(
    words: tuple[str, ...], says: str, tiny_folder: Path, chat_file: Path
) -> None:
    result = call("data", "check", str(chat_file), "--model", str(tiny_folder), *words)
    assert result.returncode == 2
    assert re.search(says, result.stderr)
    assert "Traceback" not in result.stderr


def test_a_broken_data_file_names_its_line(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    result = call("train", str(tiny_folder), str(path), cwd=tmp_path)
    assert result.returncode == 2
    assert f"{path}:2: not valid JSON" in result.stderr.replace("\n", " ")
    fine = call("train", str(tiny_folder), str(path), "--skip-bad-rows", "max_steps=1",
                "val_size=0", "output_dir=out", cwd=tmp_path)  # fmt: skip
    assert fine.returncode == 0, fine.stderr
    assert Run(tmp_path / "out").info()["data"]["bad_rows"] == 1


def test_the_verbs_are_functions_whatever_is_imported_first() -> None:
    code = (
        "import lighten\n"
        "import lighten.engine.schedule, lighten.reporting.charts\n"
        "assert all(map(callable, (lighten.train, lighten.evaluate, lighten.report)))\n"
        "assert lighten.engine.schedule.warmup_length(100, 0.03, None) == 3\n"
        "from lighten import Recipe, Run, UserError, train\n"
        "try: train(model='m', dataset='nowhere')\n"
        "except UserError as error: assert 'does not exist' in str(error)\n"
        "else: raise AssertionError\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    commands = {
        command.name or getattr(command.callback, "__name__", "")
        for command in app.registered_commands if not command.hidden
    }  # fmt: skip
    of_the_terminal = {"chat", "doctor", "models", "schema", "settings"}
    assert {*commands, "bench"} - of_the_terminal <= {*lighten.__all__}


def test_a_run_that_goes_on_is_evaluated_as_it_is_told_now(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    words = ["max_steps=1", "val_size=0.5", "dtype=float32", "evaluate.max_new_tokens=1"]
    folder = tmp_path / "run"
    call("run", str(tiny_folder), str(chat_file), f"output_dir={folder}", *words,
         "evaluate.max_examples=2")  # fmt: skip
    evaluation = Run(folder).evaluation()
    assert evaluation is not None
    assert evaluation["dataset"]["rows"] == 2
    call("run", "--resume", str(folder), "--evaluate.max_examples", "3")
    evaluation = Run(folder).evaluation()
    assert evaluation is not None
    assert evaluation["dataset"]["rows"] == 3
