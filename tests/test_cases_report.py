"""What people meet beside the training: help, settings, comparisons, pages, notebooks."""

from __future__ import annotations

import inspect
import json
import random
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.testing

import lighten
from lighten import locks
from lighten.adapters import spectrum
from lighten.cli import main as cli
from lighten.cli.settings import matching, settings
from lighten.errors import UserError
from lighten.evaluation.result import Evaluation
from lighten.machine import hardware
from lighten.planning.result import Memory, MemoryPart, Plan, Shape
from lighten.recipe import EvaluateOptions, QuantizeOptions, SweepOptions, aliases, other_tools
from lighten.recipe.fields import RecipeFields
from lighten.reporting import charts, comparison
from lighten.reporting.page import next_commands
from lighten.runs import Run
from lighten.sweeps.result import SweepResult
from lighten.wording import counted, with_article
from tests.processes import call
from tests.report_fixture import write_run
from tests.test_sweep_table import arm

ROOT = Path(__file__).parents[1]


def cli_output(*words: str, code: int = 0, **environment: str) -> str:
    """What the command prints, in a wide terminal."""
    result = typer.testing.CliRunner().invoke(
        cli.app, list(words), env={"COLUMNS": "120", **environment}, prog_name="lighten"
    )
    assert result.exit_code == code, result.output
    return result.output


def test_every_setting_is_listed_with_type_default_and_help() -> None:
    by_name = {setting.name: setting for setting in settings()}
    sections = ("evaluate", "quantize", "sweep")
    declared = {name for name in RecipeFields.model_fields if name not in sections}
    declared |= {f"quantize.{name}" for name in QuantizeOptions.model_fields}
    declared |= {f"evaluate.{name}" for name in EvaluateOptions.model_fields}
    declared |= {f"sweep.{name}" for name in SweepOptions.model_fields}
    assert set(by_name) == declared
    assert all(
        setting.type not in ("", "any") and setting.help and setting.default
        for setting in by_name.values()
    )
    assert by_name["lora_r"].type == "whole number from 1 or a list of these"
    assert by_name["dtype"].type == "auto | float32 | bfloat16 | float16"
    assert by_name["dataset"].default == "required"
    assert "cutoff_len" in by_name["max_length"].aliases


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["qlora"], "load_in_4bit"),
        (["lora_rank"], "lora_r"),
        (["--micro-batch-size"], "per_device_train_batch_size"),
        (["held-out", "share"], "val_size"),
        (["Optuna"], "sweep.search"),
        (["bf16"], "dtype"),
        (["deepspeed"], "strategy"),
        (["quantization_bit"], "load_in_4bit"),
        (["eval_strategy"], "eval_steps"),
    ],
)
def test_settings_are_searched_by_name_alias_and_meaning(words: list[str], name: str) -> None:
    assert name in [setting.name for setting in matching(words, settings())]


@pytest.mark.parametrize(
    ("word", "near"),
    [("lerning_rate", "learning_rate"), ("max_lenght", "max_length"), ("bacth_size", "batch_size"),
     ("budgett", "sweep.budget")],
)  # fmt: skip
def test_a_mistyped_setting_is_offered_the_nearest(word: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"did you mean .*{near}"):
        matching([word], settings())


@pytest.mark.parametrize(
    ("word", "answer"),
    [("neftune_noise_alpha", "it is not built"), ("plot_loss", "changes nothing"),
     ("save_only_model", "a checkpoint has what resuming needs")],
)  # fmt: skip
def test_a_setting_of_another_tool_that_is_none_here_is_answered(word: str, answer: str) -> None:
    with pytest.raises(UserError, match=rf"{word} is another tool's setting .*{answer}"):
        matching([word], settings())


def test_every_name_that_a_recipe_may_say_finds_its_setting() -> None:
    every = settings()
    for name in (*aliases.RENAMED, *aliases.SPECIAL, *other_tools.RHYTHMS):
        assert matching([name], every), name
    bf16 = next(setting for setting in every if setting.name == "dtype")
    assert ("torch_dtype" in bf16.aliases, "bf16" in bf16.set_by) == (True, True)


def test_a_word_about_nothing_points_at_the_list() -> None:
    with pytest.raises(UserError, match="lighten settings lists them all"):
        matching(["zzzzqqqq"], settings())


def test_settings_print_in_groups_and_as_json() -> None:
    output = cli_output("settings", "early")
    assert "early_stopping_patience  (whole number from 1; default none)" in output
    assert [
        setting["name"] for setting in json.loads(cli_output("settings", "lora_r", "--json"))
    ] == ["lora_r"]
    groups = {setting["group"] for setting in json.loads(cli_output("settings", "--json"))}
    assert groups == {"model", "data", "training", "run", "lora", "evaluate", "quantize",
                      "sweep"}  # fmt: skip


def test_a_console_that_says_it_has_no_columns_is_written_to() -> None:
    assert "lora_r  (whole number" in cli_output("settings", "lora_r", COLUMNS="0")
    assert "smollm2-135m" in cli_output("models", COLUMNS="0")


def test_help_names_the_settings_and_the_flags_of_a_sweep() -> None:
    for verb in ("train", "run"):
        output = cli_output(verb, "-h")
        assert "lighten settings" in output
        assert all(setting.name in output for setting in settings() if setting.group == "lora")
    output = cli_output("sweep", "-h")
    for name in SweepOptions.model_fields.keys() - {"grid"}:
        assert f"--{name}" in output


@pytest.mark.parametrize(
    "words", [(), ("plan",), ("runs",), ("runs", "compare"), ("data", "check"), ("adapter",)]
)
def test_the_short_form_of_help_is_known_everywhere(words: tuple[str, ...]) -> None:
    assert cli_output(*words, "-h") == cli_output(*words, "--help")


def test_the_version_is_printed() -> None:
    assert cli_output("--version") == f"lighten {lighten.__version__}\n"


@pytest.mark.parametrize(("typed", "full"), [("sett", "settings"), ("tra", "train"),
                                             ("runs comp", "compare")])  # fmt: skip
def test_the_tab_key_completes(typed: str, full: str) -> None:
    words = ["lighten", *typed.split()]
    output = cli_output(_LIGHTEN_COMPLETE="complete_bash", COMP_WORDS=" ".join(words),
                 COMP_CWORD=str(len(words) - 1))  # fmt: skip
    assert full in output.split()


def test_only_extras_that_something_uses_are_offered() -> None:
    """An extra that no code reads would be installed for nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(hardware.EXTRAS.values()) == set(extras) - {"dev"}
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "src").rglob("*.py")
        if path.name != "hardware.py"
    )
    for module, extra in hardware.EXTRAS.items():
        packages = [
            re.split(r"[\[>=<]", requirement)[0].replace("-", "_") for requirement in extras[extra]
        ]
        assert module in packages
        assert re.search(rf"import {module}\b|from {module}\b|\"{module}\"", sources), module


def compared_runs(
    root: Path, shifts: list[float], *, rows: int = 160, recorded: bool = True, **settings: object
) -> list[Run]:
    """Runs whose held-out losses differ by the shifts, example by example, but for a little."""
    runs = []
    for place, shift in enumerate(shifts):
        run = write_run(root / f"run-{place}", **{"learning_rate": 1e-4 * (place + 1), **settings})
        evaluation = json.loads((run.folder / "evaluation.json").read_text())
        common, single = random.Random(0), random.Random(100 + place)
        for model in evaluation["models"]:
            mean = 3.6 if model["name"] == "base" else 2.4 + shift
            losses = [
                [8 * (mean + common.gauss(0, 0.5) + single.gauss(0, 0.05)), 8] for _ in range(rows)
            ]
            value = sum(nll for nll, _ in losses) / (8 * rows)
            model["metrics"]["loss"] |= {"value": value, "low": value - 0.08, "high": value + 0.08}
            if recorded:
                model["losses"] = losses
            common = random.Random(0)
        evaluation["dataset"]["rows"] = rows
        (run.folder / "evaluation.json").write_text(json.dumps(evaluation))
        runs.append(run)
    return runs


@pytest.mark.parametrize(
    "setting",
    [
        {"peft": {"peft_type": "IA3"}},
        {"rank_pattern": {"q_proj": 4}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"alpha_pattern": {"v_proj": 3.0}},
        {"added_tokens": ["<a>"]},
    ],
    ids=lambda setting: next(reversed(setting)),
)
def test_runs_that_differ_in_a_mapping_are_compared(
    tmp_path: Path, setting: dict[str, object]
) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", **setting)
    output = cli_output("runs", "compare", str(first.folder), str(second.folder))
    name = next(reversed(setting))
    assert f"{name} " in output
    page = lighten.report([first, second], output=tmp_path / "page.html").read_text("utf-8")
    assert name in page


def test_a_comparison_tells_best_worse_and_what_cannot_be_told_apart(tmp_path: Path) -> None:
    runs = compared_runs(tmp_path, [0.0, 0.006, 0.2])
    compared = comparison.compare(runs)
    assert [entry.verdict for entry in compared.entries] == [
        "lowest",
        "cannot be told apart",
        "worse",
        "",
    ]
    assert compared.sentences[0].startswith("run-0 has the lowest held-out loss (2.4")
    assert "run-1 cannot be told apart from it; run-2 is worse" in compared.sentences[0]
    assert compared.best["loss"] == {0}
    assert compared.best["chrf"] == set(), "all are equal"
    for entry, shift in zip(compared.entries[1:3], (0.006, 0.2), strict=True):
        assert entry.difference is not None
        assert entry.difference[1] < shift < entry.difference[2] + 0.01
    output = cli_output("runs", "compare", *(str(run.folder) for run in runs))
    assert re.search(r"run-0 +2\.4\d\*", output)
    assert "cannot be told apart" in output


def test_a_comparison_names_only_the_settings_that_count(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "r8"),
        write_run(tmp_path / "r16", lora_r=16),
        write_run(tmp_path / "ia3", peft={"peft_type": "IA3"}),
        write_run(tmp_path / "full", method="full", learning_rate=2e-4),
        write_run(tmp_path / "last", method="full", trainable_layers="last_1", learning_rate=2e-4),
    ]
    ia3 = 'peft {"peft_type": "IA3"}'
    compared = comparison.compare(runs)
    assert [entry.differs for entry in compared.entries if not entry.is_base] == [
        "method lora; lora_r 8", "method lora; lora_r 16", f"method lora; {ia3}", "method full",
        "method full; trainable_layers last_1",
    ]  # fmt: skip
    pair = comparison.compare([runs[0], runs[2]])
    assert [entry.differs for entry in pair.entries[:2]] == ["peft not set", ia3]


def test_what_reads_alike_is_not_called_best(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    for run, seconds, file_bytes in zip(
        runs, (0.2501, 0.2549, 700.0), (632, 36_200, 60_000), strict=True
    ):
        info = run.info()
        info["training"] |= {"seconds": seconds}
        info["adapters"][0] |= {"file_bytes": file_bytes}
        run.update(**info)
    compared = comparison.compare(runs)
    assert compared.best["seconds"] == {0, 1}
    assert compared.best["file_bytes"] == {0}
    columns = {column.name: column for column in compared.columns}
    assert columns["seconds"].text(0.2501) == columns["seconds"].text(0.2549) == "0.25 s"
    assert [columns["file_bytes"].text(size) for size in (632, 36_200, 1.2e6)] == [
        "0.6 kB", "36.2 kB", "1.2 MB",
    ]  # fmt: skip


def test_pairing_finds_what_single_intervals_cannot(tmp_path: Path) -> None:
    """An evaluation without each example's loss is compared too, with wider bounds."""
    wide = comparison.compare(compared_runs(tmp_path / "w", [0.0, 0.05], recorded=False))
    narrow = comparison.compare(compared_runs(tmp_path / "n", [0.0, 0.05]))
    assert [compared.entries[1].verdict for compared in (wide, narrow)] == [
        "cannot be told apart", "worse",
    ]  # fmt: skip


def test_bounds_widen_with_the_number_of_runs(tmp_path: Path) -> None:
    reach = []
    for count in (2, 8):
        compared = comparison.compare(compared_runs(tmp_path / str(count), [0.0] + [0.1] * count))
        difference = compared.entries[1].difference
        assert difference is not None
        reach.append(difference[2] - difference[1])
    assert reach[1] > 1.15 * reach[0]


def test_among_equal_runs_one_is_called_worse_in_one_of_twenty_at_most() -> None:
    """Which is the lowest of eight equals is chance, and the bounds have to hold for that."""
    draw, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        hard, tokens = draw.gamma(2.0, 0.5, 100), draw.integers(5, 30, 100)
        entries = [
            comparison.Entry(
                "r", str(i), is_base=False, measured_on=(100,),
                losses=[[(nll + draw.normal(0, 0.05)) * n, n]
                        for nll, n in zip(hard, tokens, strict=True)],
            )
            for i in range(8)
        ]  # fmt: skip
        for entry in entries:
            nll, count = np.asarray(entry.losses).sum(0)
            entry.figures["loss"] = nll / count
        comparison._conclusions(entries)
        wrong += any(entry.verdict == "worse" for entry in entries)
    # Two standard errors of a binomial share of 5 % over 200 draws are 3.1 %.
    assert wrong / 200 <= 0.081


def test_metrics_that_were_asked_for_are_compared_too(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    for run, figure in zip(runs, (40.0, 60.0), strict=True):
        stored = run.evaluation() or {}
        stored["settings"]["extra_metrics"] = ["rougeL"]
        for model in stored["models"]:
            model["metrics"]["rougeL"] = {"value": figure, "se": 1.0, "low": 38.0, "high": 62.0}
        (run.folder / "evaluation.json").write_text(json.dumps(stored))
    compared = comparison.compare(runs)
    assert [column.label for column in compared.columns if column.name == "rougeL"] == ["ROUGE-L"]
    assert compared.best["rougeL"] == {1}
    html = notebook_html(Evaluation(**(runs[0].evaluation() or {})))
    assert "ROUGE-L" in html
    stored["settings"]["max_new_tokens"] = 99
    (runs[1].folder / "evaluation.json").write_text(json.dumps(stored))
    assert comparison.compare(runs).best["rougeL"] == set()


def test_what_cannot_be_compared_gets_no_verdict(tmp_path: Path) -> None:
    few = comparison.compare(compared_runs(tmp_path / "few", [0.0, 0.3], rows=8))
    assert few.entries[1].verdict == "too few examples"
    runs = compared_runs(tmp_path / "o", [0.0]) + compared_runs(tmp_path / "p", [0.0], rows=90)
    compared = comparison.compare(runs)
    assert "different held-out examples" in compared.sentences[0]
    assert compared.best["loss"] == set()
    assert [entry.run for entry in compared.entries][:2] == [str(run.folder) for run in runs]
    unevaluated = write_run(tmp_path / "bare", evaluated=False)
    compared = comparison.compare([*compared_runs(tmp_path / "q", [0.0]), unevaluated])
    assert "Not evaluated: bare" in compared.sentences[-1]


def test_figures_that_were_measured_differently_are_not_called_best(tmp_path: Path) -> None:
    runs = compared_runs(tmp_path, [0.0, 0.3])

    def change(place: int, section: str, chrf: float, **values: Any) -> None:
        path = runs[place].folder / "evaluation.json"
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored[section].update(values)
        stored["models"][1]["metrics"]["chrf"]["value"] = chrf
        path.write_text(json.dumps(stored), encoding="utf-8")

    change(0, "settings", 30.0, max_new_tokens=16)
    change(1, "settings", 40.0, max_new_tokens=16)
    assert comparison.compare(runs).best["chrf"] == {1}
    change(1, "settings", 40.0, max_new_tokens=64)
    compared = comparison.compare(runs)
    assert (compared.best["loss"], compared.best["chrf"]) == ({0}, set())
    assert any("The answers were measured with other settings" in s for s in compared.sentences)
    # As many examples with as many tokens need not be the same ones.
    change(0, "dataset", 30.0, examples_sha256="a")
    assert comparison.compare(runs).best["loss"] == {0}, "of the other it is not known"
    change(1, "dataset", 40.0, examples_sha256="b")
    compared = comparison.compare(runs)
    assert compared.best["loss"] == set()
    assert "different held-out examples" in compared.sentences[0]


def test_twelve_runs_have_twelve_colours(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{place}", steps=20) for place in range(12)]
    page = lighten.report(*runs, output=tmp_path / "page.html").read_text(encoding="utf-8")
    legend = page.partition('<ul class="legend">')[2].partition("</ul>")[0]
    inks = re.findall(r"--series-(\d+)", legend)
    assert len(inks) == len(set(inks)) == 12
    style = page.partition("<style>")[2].partition("</style>")[0]
    for theme in style.split("--paper:")[1:]:
        values = re.findall(r"--series-\d+: (#\w+)", theme)
        assert len(values) == len(set(values)) == 12


OUTSIDE = """() => {
  const out = [];
  for (const svg of document.querySelectorAll('svg[role=img]')) {
    const box = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll('text')) {
      const own = text.getBoundingClientRect();
      if (own.width && (own.left < box.left - 1 || own.right > box.right + 1 ||
          own.top < box.top - 1 || own.bottom > box.bottom + 1)) out.push(text.textContent);
    }
  } return out; }"""
HIDDEN = """() => [...document.querySelectorAll('.scroll')]
  .filter(e => e.scrollWidth > e.clientWidth + 1).length"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    seven = compared_runs(folder, [0.01 * place for place in range(7)])
    two = write_run(folder / "two", adapters=("small", "large"), steps=3)
    memory = {"expected": 3.1 * 2**30, "low": 2.9 * 2**30, "high": 3.4 * 2**30, "parts": [
        {"name": "base weights", "bytes": 2.4 * 2**30}, {"name": "adapters", "bytes": 0.1 * 2**30},
        {"name": "activations: linear", "bytes": 0.6 * 2**30}]}  # fmt: skip
    plan = {"memory": memory, "model": "smollm2-135m", "device": "rtx4090 of the lab",
            "method": "lora", "capacity": int(3.5 * 2**30), "fits": True}  # fmt: skip
    (two.folder / "plan.json").write_text(json.dumps(plan))
    two.update(prediction={"memory": {"predicted": 3.1 * 2**30, "measured": 3.0 * 2**30}})
    return {"two": lighten.report(two), "seven": lighten.report(*seven, output=folder / "7.html")}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["two", "seven"])
def test_a_phone_shows_every_label_and_column(
    browser: Any, pages: dict[str, Path], name: str, scheme: str
) -> None:
    context = browser.new_context(
        offline=True, viewport={"width": 360, "height": 800}, color_scheme=scheme
    )
    tab = context.new_page()
    tab.goto(pages[name].as_uri())
    tab.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    assert tab.evaluate(OUTSIDE) == []
    assert tab.evaluate(HIDDEN) == 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()


def test_answers_stand_under_the_headline_and_then_what_to_do_next(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my run")
    page = lighten.report(run).read_text(encoding="utf-8")
    heads = re.findall(r"<h2>([^<]+)", page)
    assert heads[:3] == ["Answers", "What next", "Loss"]
    for command in ("chat", "adapter resize", "runs compare"):
        assert re.search(rf"lighten {command} &#39;[^<]*my run&#39;", page), command
    unevaluated = write_run(tmp_path / "bare", evaluated=False)
    assert "lighten evaluate" in lighten.report(unevaluated).read_text(encoding="utf-8")
    stopped = write_run(tmp_path / "stopped", status="interrupted", evaluated=False)
    assert "lighten train --resume" in lighten.report(stopped).read_text(encoding="utf-8")


@pytest.mark.parametrize("setting", [{"peft": {"peft_type": "IA3"}}, {"method": "full"},
                                     {"use_dora": True}])  # fmt: skip
def test_resizing_is_offered_for_plain_lora_alone(
    tmp_path: Path, setting: dict[str, object]
) -> None:
    page = lighten.report(write_run(tmp_path / "r", **setting)).read_text(encoding="utf-8")
    assert "lighten chat" in page
    assert "adapter resize" not in page


def axis(chart: str, anchor: str) -> list[str]:
    return re.findall(rf'class="tick"[^>]*text-anchor="{anchor}">([\d.,]+)<', chart)


@pytest.mark.parametrize("steps", [[1], [1, 2], [1, 2, 3], list(range(1, 8)), [5, 4000]])
def test_steps_are_whole_numbers_and_amounts_start_at_zero(steps: list[int]) -> None:
    values = [3.5 + step / 1e5 for step in steps]
    chart = charts.line_chart([charts.Series("peak", steps, values)], title="t", x_label="x",
                              y_label="GiB", from_zero=True)  # fmt: skip
    assert all("." not in label for label in axis(chart, "middle"))
    assert float(axis(chart, "end")[0]) == 0
    free = charts.line_chart(
        [charts.Series("loss", steps, values)], title="t", x_label="x", y_label="y"
    )
    assert float(axis(free, "end")[0]) > 0


@pytest.mark.parametrize("same_rows", [True, False])
def test_watched_losses_of_other_examples_have_no_best(same_rows: bool, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, steps=2, evaluated=False) for name in ("a", "b")]
    for run, loss in zip(runs, (2.0, 1.0), strict=True):
        info = run.info()
        rows = 60 if same_rows else int(60 * loss)
        run.update(
            adapters=[{**adapter, "eval_loss": loss} for adapter in info["adapters"]],
            data={**info["data"], "eval_rows": rows, "eval_supervised_tokens": 10 * rows},
        )
    best = comparison.compare(runs).best["watched"]
    assert best == ({1} if same_rows else set())


@pytest.mark.parametrize(("count", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"),
                                             (1200, "1,200 rows")])  # fmt: skip
def test_one_thing_is_not_called_several(count: int, text: str) -> None:
    assert counted(count, "row") == text


@pytest.mark.parametrize(
    "phrase",
    ["an IA3", "an Embedding", "a LoRA", "a DoRA", "an NF4", "a BOFT", "an OFT", "a VERA", "a LOHA",
     "an LN_TUNING", "a FOURIERFT", "an ADALORA", "an X-LoRA", "a str", "an int", "a Unigram",
     "a Linear", "an RMSNorm", "a QLoRA adapter", "a Conv1D", "an L2 norm"],
)  # fmt: skip
def test_an_article_is_that_of_the_spoken_noun(phrase: str) -> None:
    assert with_article(phrase.partition(" ")[2]) == phrase


def test_an_ia3_adapter_is_refused_in_english(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3", "base_model": null}')
    with pytest.raises(UserError, match="an IA3"):
        spectrum.read(tmp_path)


def test_a_page_calls_one_step_one_step_and_each_line_its_own_name(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", steps=1)
    info = run.info()
    info["data"] |= {"truncated": 1}
    choices = [
        {"what": what, "value": "x", "reason": "y"} for what in ("method", "template", "memory")
    ]
    run.update(data=info["data"], choices=[*info["choices"], *choices])
    page = lighten.report(run).read_text(encoding="utf-8")
    assert not re.search(r"\b1 (rows|steps|examples|tokens)\b", page)
    section = page.partition("How it was made")[2].partition("</article>")[0]
    labels = re.findall(r"<dt>([^<]+)</dt>", section)
    assert len(labels) == len(set(labels)), labels


def test_dir_lists_the_verbs_and_help_knows_their_parameters() -> None:
    names = set(dir(lighten))
    assert {"plan", "train", "sweep", "evaluate", "report", "run", "adapter_info"} <= names
    assert "importlib" not in names
    assert "learning_rate" not in names
    assert "resume" in inspect.signature(lighten.train).parameters
    assert "device" in inspect.signature(lighten.plan).parameters


def notebook_html(value: Any) -> str:
    """How a notebook shows it, after what must hold of every drawing."""
    html: str = value._repr_html_()
    assert html.startswith('<div class="lighten-card"')
    assert "<script" not in html
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|\bbody\b", html)
    assert len(repr(value)) < 160
    assert "\n" not in repr(value)
    return html


@pytest.mark.parametrize(
    ("status", "evaluated", "steps"),
    [("finished", True, 40), ("finished", False, 40), ("failed", False, 0), ("running", False, 1)],
)
def test_a_run_draws_itself(tmp_path: Path, status: str, evaluated: bool, steps: int) -> None:
    run = write_run(tmp_path / "<script>", status=status, evaluated=evaluated, steps=steps)
    if status == "running":
        locks.acquire(run.folder)
    html = notebook_html(run)
    assert status in html
    assert "&lt;script&gt;" in html
    assert ("39.3 → 12.2" in html) == evaluated
    assert ("<svg" in html) == (steps > 0)


def test_an_evaluation_draws_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", adapters=("small", "큰"))
    evaluation = Evaluation(**(run.evaluation() or {}))
    evaluation.models[1]["name"] = "<script>"
    html = notebook_html(evaluation)
    assert "&lt;script&gt;" in html
    assert html.count("<tr>") == 6
    assert "큰" in html
    assert "3.670" in repr(evaluation)


def test_a_sweep_draws_itself(tmp_path: Path) -> None:
    arms = [{**arm(f"r{rank}", rank * 10**6, 2.0 + rank / 100), "curve": [[1, 3.0, 0.1]]}
            for rank in (8, 32)]  # fmt: skip
    (tmp_path / "recipe.yaml").write_text("sweep: {metric: chrf}\n")
    data = {"arms": arms, "settings": [], "recommendation": {"arm": "r8", "reasons": ["Take <r8>"]}}
    result = SweepResult(tmp_path, data)
    html = notebook_html(result)
    assert "Take &lt;r8&gt;" in html
    assert html.count("<tr>") == 3
    assert "2 arms, recommended='r8'" in repr(result)


def test_a_plan_is_one_short_line(tmp_path: Path) -> None:
    memory = Memory((MemoryPart("base weights", 2**31),), 2**31, 3 * 2**30, 2**32, "loss", None)
    plan = Plan("smollm2-135m", "t4", "lora", Shape(1, 8, 1), memory, None, 16 * 2**30, 0, 0, None,
                {}, ())  # fmt: skip
    assert repr(plan) == "Plan(smollm2-135m, lora, on t4: 3.00 of 16.00 GiB, fits)"


@pytest.mark.parametrize("where", ["runs/a run", "elsewhere/b", "책"])
def test_the_command_that_a_stopped_run_shows_goes_on(
    where: str, tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    """Killed after its checkpoint: as the page says, `train --resume FOLDER` ends it."""
    common = ("train", str(tiny_folder), str(chat_file), "--output_dir", where, "--max_steps", "4",
              "--save_steps", "2", "--no-plan", "--val_size", "0")  # fmt: skip
    trained = call(*common, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    run = Run(tmp_path / where)
    run.update(status="interrupted")
    run.truncate_metrics(2)
    shutil.rmtree(sorted((run.folder / "checkpoints").iterdir())[-1])
    shutil.rmtree(run.folder / "adapters")
    ((command, _),) = next_commands(run, run.info(), evaluated=False)
    resumed = call(*shlex.split(command)[1:], "--no-plan", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert Run(tmp_path / where).info()["status"] == "finished"
    assert [line["step"] for line in run.metrics() if line["kind"] == "train"] == [1, 2, 3, 4]
