"""A model that nothing was trained on here is measured as it is, and beside runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lighten
from lighten import api
from lighten.artifacts import open_source
from lighten.errors import UserError
from lighten.evaluation import model_alone
from lighten.evaluation.chat import Conversation
from lighten.recipe import Recipe
from lighten.reporting import comparison
from lighten.runs import Run
from lighten.serving import adapters
from tests.conftest import HUB_COMMIT
from tests.processes import call
from tests.tiny import save_tiny

MEASURED = {"max_new_tokens": 4, "bootstrap_samples": 100}


@pytest.fixture(scope="module")
def run(tiny_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    trained = lighten.train(
        model=str(tiny_folder), dataset=str(chat_file), dtype="float32", lora_r=2, max_steps=2,
        output_dir=str(tmp_path_factory.mktemp("runs") / "run"), val_size=0.5, progress=False,
    )  # fmt: skip
    lighten.evaluate(trained, **MEASURED)
    return trained


def measured(model: Path | str, data: Path, output: Path, **options: Any) -> Any:
    return lighten.evaluate(
        str(model), dataset=str(data), val_size=0.5, output_dir=str(output),
        **{"dtype": "float32", **MEASURED, **options},
    )  # fmt: skip


def test_a_base_alone_has_the_figures_that_it_has_beside_an_adapter(
    run: Run, tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    """On the examples that the run holds out, so that the two can be compared."""
    evaluation = measured(tiny_folder, chat_file, tmp_path / "alone", against=run)
    beside = run.evaluation()
    assert beside is not None
    (base,) = evaluation.models
    assert base["losses"] == beside["models"][0]["losses"]
    assert evaluation.dataset["examples_sha256"] == beside["dataset"]["examples_sha256"]
    assert not any("asks what" in note for note in evaluation.dataset["notes"])
    differences = {
        row["against"]: row["difference"]
        for row in evaluation.comparisons if row["metric"] == "loss"
    }  # fmt: skip
    trained = beside["models"][1]
    assert differences["base"] == 0
    assert differences[trained["name"]] == pytest.approx(
        base["metrics"]["loss"]["value"] - trained["metrics"]["loss"]["value"]
    )
    page = lighten.report(tmp_path / "alone").read_text(encoding="utf-8")
    assert "A model as it is" in page
    against = page.partition(f"<h2>Against {run.name}</h2>")[2].partition("</section>")[0]
    assert f'<td data-label="that run">{trained["name"]}</td>' in against
    assert '<td data-label="that run">base</td>' not in against
    both = lighten.report(run, tmp_path / "alone", output=tmp_path / "both.html")
    assert "Not evaluated" not in both.read_text(encoding="utf-8")
    ours, alone, untouched = comparison.compare([run, Run(tmp_path / "alone")]).entries
    assert (ours.is_base, alone.is_base, untouched.is_base) == (False, False, True)
    assert alone.figures["loss"] == untouched.figures["loss"] == base["metrics"]["loss"]["value"]


def test_all_rows_of_a_file_are_measured(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    """Where it is named as what is held out; nothing was trained, so nothing was asked before."""
    evaluation = lighten.evaluate(
        str(tiny_folder), eval_dataset=str(chat_file), output_dir=str(tmp_path / "alone"),
        **MEASURED,
    )  # fmt: skip
    rows = len(chat_file.read_text(encoding="utf-8").splitlines())
    assert evaluation.dataset["rows"] == rows
    assert evaluation.dataset["shared_prompts"] == 0


def test_what_is_measured_again_takes_its_folders_place_and_a_trained_runs_stays(
    run: Run, tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    measured(tiny_folder, chat_file, alone)
    again = measured(tiny_folder, chat_file, alone, max_examples=1)
    assert again.dataset["rows"] == 1
    assert json.loads((alone / "evaluation.json").read_text())["dataset"]["rows"] == 1
    lighten.evaluate(alone, **MEASURED)
    with pytest.raises(UserError, match="holds a run that trains"):
        measured(tiny_folder, chat_file, run.folder)
    other = tmp_path / chat_file.name
    other.write_text(chat_file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match="has figures on other data"):
        measured(tiny_folder, other, alone)
    with pytest.raises(UserError, match=r"eval_dataset was not set and is now .*chat\.jsonl"):
        lighten.evaluate(
            str(tiny_folder), dataset=str(chat_file), eval_dataset=str(other),
            output_dir=str(alone), **MEASURED,
        )  # fmt: skip
    with pytest.raises(UserError, match="no training to go on with"):
        lighten.train(alone / "recipe.yaml", resume=True, progress=False)
    lighten.train(
        model=str(tiny_folder), dataset=str(chat_file), output_dir=str(alone), max_steps=1,
        val_size=0.5, progress=False,
    )  # fmt: skip
    assert Run(alone).evaluation() is None
    assert Run(tmp_path / "alone-1").is_model_alone(), "what was measured is moved aside"


@pytest.mark.usefixtures("forked_jobs")
def test_what_trained_nothing_is_not_talked_to_as_if_it_had(run: Run, tmp_path: Path) -> None:
    """The base answered, without a word that nothing trained was there."""
    stopped = Run(Path(shutil.copytree(run.folder, tmp_path / "a stop")))
    shutil.rmtree(stopped.folder / "adapters")
    asked = (
        lambda: Conversation(str(stopped.folder)),
        lambda: api.adapter_info(stopped),
        lambda: adapters.resolve([str(stopped.folder)]),
    )
    for ask in asked:
        with pytest.raises(UserError, match=r"a stop has no(thing|) .* yet; train it first"):
            ask()
    stopped.update(status="interrupted")
    for ask in asked:
        with pytest.raises(UserError, match=r"yet; go on with: lighten train --resume '.*a stop'"):
            ask()
    with pytest.raises(UserError, match=r"checkpoint holds: '.*adapters/default'\)$") as caught:
        Conversation(str(stopped.folder))
    kept = str(caught.value).rpartition("holds: ")[2].strip("')")
    assert Conversation(kept).names == ("default",)
    (stopped.folder / "sweep.json").write_text("{}")
    for ask in asked:
        with pytest.raises(UserError, match="a stop is a sweep; what it trained is in runs"):
            ask()


def test_quantised_folders_and_gguf_files_are_models_too(chat_file: Path, tmp_path: Path) -> None:
    """INT8 is for the head too, of which torchao forms no product by itself."""
    base = save_tiny(tmp_path / "base", hidden_size=128, intermediate_size=256)
    lighten.quantize(base, "int8,nf4,gguf:f16", output_dir=tmp_path / "smaller", tokens=16,
                     questions=0, dataset=str(chat_file))  # fmt: skip
    alone = tmp_path / "alone"
    losses = {}
    for name in ("base", "int8", "nf4", "gguf-f16/base.f16.gguf"):
        model = base if name == "base" else tmp_path / "smaller" / name
        dtype = "auto" if name in ("int8", "nf4") else "float32"
        folder = alone / name.partition("/")[0]
        evaluation = measured(model, chat_file, folder, dtype=dtype)
        losses[name] = evaluation.models[0]["metrics"]["loss"]["value"]
    assert losses["gguf-f16/base.f16.gguf"] == pytest.approx(losses["base"], rel=1e-3)
    assert losses["int8"] == pytest.approx(losses["base"], rel=0.02)
    assert losses["nf4"] == pytest.approx(losses["base"], rel=0.1)
    assert len(set(losses.values())) == 4, "each by its own weights"
    with pytest.raises(UserError, match="has the figures of"):
        measured(tmp_path / "smaller" / "nf4", chat_file, alone / "base")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "is not a run .*name the data"),
        ({"dataset": "nowhere"}, "does not exist"),
        ({"dataset": "data", "max_exmples": 2}, "max_exmples is not a setting"),
        ({"dataset": "data", "judge": "http://127.0.0.1:9/v1", "judge_model": "m"}, "one model"),
    ],
)
def test_a_model_that_cannot_be_measured_leaves_nothing(
    options: dict[str, Any], message: str, tiny_folder: Path, chat_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(chat_file.read_text(encoding="utf-8"), encoding="utf-8")
    given = {**options}
    if given.get("dataset") == "data":
        given["dataset"] = "data.jsonl"
    with pytest.raises(UserError, match=message):
        lighten.evaluate(str(tiny_folder), **given)
    assert not (tmp_path / "runs").exists()


def test_an_adapter_alone_has_the_figures_that_it_has_in_its_run(
    run: Run, chat_file: Path, tmp_path: Path
) -> None:
    """Where it lies there, and copied to elsewhere: its tokens and template lie beside it."""
    ((name, folder),) = run.adapters().items()
    beside = run.evaluation()
    assert beside is not None
    shutil.copytree(folder, tmp_path / "copied")
    for adapter in (folder, tmp_path / "copied"):
        alone = tmp_path / f"of {adapter.name}"
        evaluation = measured(adapter, chat_file, alone)
        base, trained = evaluation.models
        assert trained["name"] == adapter.name
        assert base["losses"] == beside["models"][0]["losses"]
        assert trained["losses"] == beside["models"][1]["losses"]
        (row,) = (d for d in evaluation.differences if d["metric"] == "loss")
        assert row["adapter"] == adapter.name
        assert evaluation.dataset["shared_prompts"] is None
        assert any("training data is not known" in note for note in evaluation.dataset["notes"])
        assert adapter.name in lighten.report(alone).read_text(encoding="utf-8")
    assert name == folder.name
    again = lighten.evaluate(alone, **MEASURED)
    assert again.models[1]["losses"] == trained["losses"]
    page = lighten.report(alone).read_text(encoding="utf-8")
    assert "held-out perplexity" in page.lower()
    assert "nothing was trained" not in page
    with pytest.raises(UserError, match="has the figures of"):
        measured(folder, chat_file, alone)
    shutil.rmtree(tmp_path / "copied")
    with pytest.raises(UserError, match=r"no longer in .*copied"):
        lighten.evaluate(alone, **MEASURED)
    assert lighten.report(alone).is_file()


@pytest.mark.parametrize("by", ["the base", "the adapter"])
def test_an_adapter_of_any_kind_is_measured_over_a_base_that_is_named(
    by: str, tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    """DoRA, which PEFT's own modules carry out: as the model that PEFT merges it into."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    config = LoraConfig(use_dora=True, target_modules="all-linear", init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "dora")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    for path in tiny_folder.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "merged")
    shutil.copy(tiny_folder / "chat_template.jinja", tmp_path / "merged")
    settings = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "somebody/another-model"
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps(settings))

    merged = measured(tmp_path / "merged", chat_file, tmp_path / "of merged").models[0]["metrics"]
    adapter, base = str(tmp_path / "dora"), str(tiny_folder)
    if by == "the base":
        subject, named = base, {"adapter_name_or_path": adapter}
    else:
        subject, named = adapter, {"base_model": base}
    evaluation = measured(subject, chat_file, tmp_path / "of dora", **named)
    untouched, trained = evaluation.models
    assert trained["name"] == "dora"
    assert trained["metrics"]["loss"]["value"] == pytest.approx(merged["loss"]["value"], rel=1e-4)
    assert trained["metrics"]["loss"]["value"] != pytest.approx(
        untouched["metrics"]["loss"]["value"], rel=1e-3
    )


def test_tokens_and_template_that_lie_beside_an_adapter_are_taken(
    run: Run, chat_file: Path, tmp_path: Path
) -> None:
    (folder,) = run.adapters().values()
    shutil.copytree(folder, tmp_path / "copied")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<call>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "copied")
    recipe, adapter, _ = model_alone.recipe_of(
        str(tmp_path / "copied"), {"dataset": str(chat_file)}
    )
    assert adapter is not None
    assert recipe.added_tokens == ["<call>"]
    assert recipe.chat_template == str(tmp_path / "copied" / "chat_template.jinja")
    assert recipe.run_folder == Path("runs") / f"copied-{chat_file.stem}-as-it-is"
    # Older tokenizers keep the template among their settings.
    (tmp_path / "copied" / "chat_template.jinja").unlink()
    settings = tmp_path / "copied" / "tokenizer_config.json"
    kept = {**json.loads(settings.read_text()), "chat_template": tokenizer.chat_template}
    settings.write_text(json.dumps(kept), encoding="utf-8")
    recipe, _, _ = model_alone.recipe_of(str(tmp_path / "copied"), {"dataset": str(chat_file)})
    assert recipe.chat_template == tokenizer.chat_template


def test_an_adapter_of_the_hub_is_measured_and_talked_to_by_its_id(
    run: Run, chat_file: Path, tmp_path: Path, hub_model: str
) -> None:
    (folder,) = run.adapters().values()
    repository = tmp_path / "hub" / "models--someone--helper"
    shutil.copytree(folder, repository / "snapshots" / HUB_COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(HUB_COMMIT)
    assert model_alone.adapter_folder("someone/helper") == repository / "snapshots" / HUB_COMMIT
    assert model_alone.adapter_folder(hub_model) is None
    assert model_alone.adapter_folder("someone/nothing") is None
    evaluation = measured("someone/helper", chat_file, tmp_path / "alone")
    beside = run.evaluation()
    assert beside is not None
    assert [model["name"] for model in evaluation.models] == ["base", "helper"]
    assert evaluation.models[1]["losses"] == beside["models"][1]["losses"]
    assert Conversation("someone/helper").names == ("helper",)


def test_a_configuration_beside_an_adapter_makes_no_model_of_it(
    run: Run, tiny_folder: Path, chat_file: Path, tmp_path: Path, hub_model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Axolotl saves it there; with weights too a folder is that model, for every verb."""
    (folder,) = run.adapters().values()
    shutil.copytree(folder, tmp_path / "copied")
    shutil.copy(tiny_folder / "config.json", tmp_path / "copied")
    shutil.copytree(tmp_path / "copied", tmp_path / "whole")
    shutil.copy(tiny_folder / "model.safetensors", tmp_path / "whole")
    alone, whole = str(tmp_path / "copied"), str(tmp_path / "whole")
    assert model_alone.adapter_folder(alone) == tmp_path / "copied"
    assert open_source(alone).adapter == tmp_path / "copied"
    recipe = Recipe.from_values({"model": alone, "dataset": str(chat_file)})
    assert (recipe.model_name_or_path, recipe.adapter_name_or_path) == (str(tiny_folder), alone)
    assert model_alone.adapter_folder(whole) is None
    assert open_source(whole).adapter is None
    assert open_source(whole, base=str(tiny_folder)).adapter == tmp_path / "whole"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, source in (("alone", alone), ("whole", whole)):
        repository = tmp_path / "hub" / f"models--someone--{name}"
        shutil.copytree(source, repository / "snapshots" / HUB_COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(HUB_COMMIT)
    snapshot = tmp_path / "hub" / "models--someone--alone" / "snapshots" / HUB_COMMIT
    assert model_alone.adapter_folder("someone/alone") == snapshot
    assert model_alone.adapter_folder("someone/whole") is None


def test_the_command_talks_to_an_adapters_folder(run: Run, tmp_path: Path) -> None:
    (folder,) = run.adapters().values()
    shutil.copytree(folder, tmp_path / "copied")
    result = call("chat", "copied", "--max-new-tokens", "2", cwd=tmp_path, stdin="hello\n")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (None, {"dataset": "data"}, "does not name its base"),
        ("nowhere", {"dataset": "data"}, "nowhere"),
        ("base", {}, "to measure it as an adapter, name the data"),
        ("base", {"dataset": "data", "adapter_name_or_path": "other"}, "name one"),
    ],
)
def test_an_adapter_that_cannot_be_measured_leaves_nothing(
    base: str | None, options: dict[str, Any], message: str, run: Run, tiny_folder: Path,
    chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (folder,) = run.adapters().values()
    shutil.copytree(folder, tmp_path / "copied")
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = {"base": str(tiny_folder)}.get(str(base), base)
    (tmp_path / "copied" / "adapter_config.json").write_text(json.dumps(settings))
    given = {key: str(chat_file) if key == "dataset" else value for key, value in options.items()}
    with pytest.raises(UserError, match=message):
        lighten.evaluate("copied", **given)
    assert not (tmp_path / "runs").exists()


def test_the_command_takes_a_model(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    """Its figures are under `runs/`, in a folder that is called after model and data."""
    words = ("--data", str(chat_file), "--val_size", "0.5", "--max_new_tokens", "4")
    result = call("evaluate", str(tiny_folder), *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "perplexity" in result.stdout
    folder = tmp_path / "runs" / f"{tiny_folder.name}-{chat_file.stem}-as-it-is"
    assert (folder / "evaluation.json").is_file()
    listed = call("runs", "list", cwd=tmp_path)
    assert "model alone" in listed.stdout
