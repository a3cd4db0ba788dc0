"""Adapters whose loss or weights are no numbers any more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten import wording
from lighten.adapters import ops
from lighten.errors import UserError
from lighten.recipe import Recipe
from lighten.runs import Run
from lighten.training import checkpoints, loop
from lighten.training.run import train as train_verb
from tests.tiny_runs import eight_steps, train


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return eight_steps(tiny_folder, chat_file, tmp_path / "run")


def test_a_diverging_run_fails_truthfully(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="lower learning_rate"):
        train(settings, learning_rate=1e30, max_grad_norm=None, lr_scheduler_type="constant")
    info = Run(settings["output_dir"]).info()
    assert info["status"] == "failed"
    assert "learning_rate" in info["error"]


class Onlooker:
    """A pruner that lets everybody train on and notes who diverged."""

    def __init__(self) -> None:
        self.diverged_names: list[str] = []

    def leaving(self, step: int, losses: Any, active: Any) -> list[str]:
        return []

    def diverged(self, step: int, name: str) -> None:
        self.diverged_names.append(name)


@pytest.fixture(params=[False, True], ids=["apart", "one product"])
def together(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """As on a processor; and as on a GPU, where rows of all adapters are one product."""
    if request.param:
        monkeypatch.setattr(ops, "launches_cost", lambda _: True)
        settings["tokens_per_microbatch"] = None


@pytest.mark.usefixtures("together")
def test_in_float16_an_adapter_that_diverges_leaves_and_the_others_finish(
    settings: dict[str, Any],
) -> None:
    pruner = Onlooker()
    settings |= {"dtype": "float16", "lora_r": [2, 2, 2], "learning_rate": [1e-3, 1e10, 2e-3],
                 "lora_dropout": 0.0, "max_steps": 5, "eval_steps": 5}  # fmt: skip
    run = train_verb(Recipe.from_values(settings), progress=False, pruner=pruner)
    info = run.info()
    assert info["status"] == "finished"
    (diverged,) = pruner.diverged_names
    steps = {adapter["name"]: adapter["steps"] for adapter in info["adapters"]}
    assert [adapter["name"] for adapter in info["adapters"]].index(diverged) == 1
    assert steps.pop(diverged) < 5
    assert set(steps.values()) == {5}
    state = checkpoints.read_state(checkpoints.listing(run.folder / "checkpoints")[-1])
    assert {saved["scale"] for name, saved in state.scaler.items() if name != diverged} == {2.0**16}


@pytest.mark.usefixtures("together")
def test_weights_that_are_infinite_at_a_checkpoint_take_out_their_adapter_alone(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"save_steps": 1, "max_steps": 4, "lora_dropout": 0.0, "warmup_steps": 0}
    cohort = train(settings, lora_r=[2, 2], learning_rate=[1e-2, 1e39])
    good, bad = cohort.info()["adapters"]
    assert (good["steps"], good["diverged"]) == (4, False)
    assert (bad["steps"], bad["diverged"], bad["file_bytes"]) == (1, True, 0)
    assert list(cohort.adapters()) == [good["name"]]
    assert cohort.is_finished()
    alone = train(settings, lora_r=2, output_dir=str(tmp_path / "alone"))
    cohort_losses = [m["loss"] for m in cohort.metrics() if m["adapter"] == good["name"]]
    assert cohort_losses == pytest.approx([m["loss"] for m in alone.metrics()], rel=2e-5)
    shutil.rmtree(cohort.folder / "checkpoints" / "checkpoint-4")
    shutil.rmtree(cohort.folder / "adapters")
    cohort.update(status="interrupted")
    resumed = train(settings, lora_r=[2, 2], learning_rate=[1e-2, 1e39], resume=True)
    assert list(resumed.adapters()) == [good["name"]]
    with pytest.raises(UserError, match="weights that are not finite after step 1"):
        train(settings, lora_r=2, learning_rate=1e39, output_dir=str(tmp_path / "lost"))


@pytest.mark.usefixtures("together")
def test_an_adapter_that_is_no_number_is_never_the_best_nor_measured_once_it_left(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"save_steps": 10, "eval_steps": 1, "max_steps": 3, "lora_dropout": 0.0,
                 "warmup_steps": 0, "lora_r": [2, 2], "learning_rate": [1e-2, 1e39]}  # fmt: skip
    run = train(settings, load_best_model_at_end=True)
    good, bad = run.info()["adapters"]
    assert good["best_step"] is not None
    assert (bad["best_step"], bad["diverged"], bad["file_bytes"]) == (None, True, 0)
    # Without a checkpoint that would find them, its weights are seen by the next step's loss.
    run = train(settings, output_dir=str(tmp_path / "again"))
    evaluations = [m for m in run.metrics() if m["kind"] == "eval"]
    assert [m["step"] for m in evaluations if m["adapter"] == bad["name"]] == [1]


@pytest.mark.parametrize("when", ["a step", "the last checkpoint"])
def test_an_adapter_that_was_stopped_early_is_kept_where_the_last_other_one_diverges(
    settings: dict[str, Any], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"early_stopping_patience": 1, "eval_steps": 1, "save_steps": 100, "max_steps": 6,
                 "learning_rate": [1e-12, 3e-3], "lr_scheduler_type": "constant"}  # fmt: skip
    plain, broken_in = loop.train_step, {"a step": 4, "the last checkpoint": 6}[when]

    def breaking(batches: Any, adapters: Any, *args: Any, **options: Any) -> Any:
        """Weights that are no numbers, before a step or after the last one."""
        last = adapters[-1]
        report = None
        if when == "the last checkpoint":
            report = plain(batches, adapters, *args, **options)
        if last.progress.steps + (report is None) == broken_in:
            for parameter in last.parameters.values():
                parameter.data.fill_(float("inf"))
        return report or plain(batches, adapters, *args, **options)

    monkeypatch.setattr(loop, "train_step", breaking)
    run = train(settings)
    stopped, diverged = run.info()["adapters"]
    assert run.info()["status"] == "finished"
    assert (stopped["steps"], stopped["diverged"]) == (2, False)
    assert (diverged["steps"], diverged["diverged"]) == (broken_in - (when == "a step"), True)
    assert list(run.adapters()) == [stopped["name"]]
    newest, _ = checkpoints.newest_complete(run.folder / "checkpoints")
    assert newest is not None
    assert checkpoints.read_state(newest).members[diverged["name"]].diverged
    run.update(status="interrupted")
    shutil.rmtree(run.folder / "adapters")
    assert list(train(settings, resume=True).adapters()) == [stopped["name"]]


def test_what_diverged_with_finite_weights_is_told_wherever_it_goes(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Its run, card, exports and quantised copies said nothing of it."""
    run = train(settings, learning_rate=[1e-2, 1e30], lora_dropout=0.0, warmup_steps=0,
                max_grad_norm=None, max_steps=4, eval_steps=1, save_steps=1)  # fmt: skip
    good, bad = run.info()["adapters"]
    assert (good["diverged"], bad["diverged"], bad["steps"]) == (False, True, 1)
    assert run.is_finished()
    assert list(run.adapters()) == [good["name"], bad["name"]]
    sentence = "Its training diverged after 1 step; its weights are those before that."
    exported = lighten.export(
        run, "adapter", adapter=bad["name"], output_dir=tmp_path / "bad", verify=False
    )
    assert sentence in exported.notes
    assert json.loads((tmp_path / "bad" / "export.json").read_text(encoding="utf-8"))["diverged"]
    for place in (run.adapters()[bad["name"]], tmp_path / "bad"):
        assert sentence in (place / "README.md").read_text(encoding="utf-8")
    table = lighten.quantize(
        run, "gguf:bf16", adapter=bad["name"], output_dir=tmp_path / "table", tokens=100,
        questions=0,
    )  # fmt: skip
    assert table.notes[0] == sentence
    card = Path(table.format("gguf:bf16")["folder"]) / "README.md"
    assert sentence in card.read_text(encoding="utf-8")
    other = lighten.export(
        run, "merged", adapter=good["name"], output_dir=tmp_path / "good", verify=False
    )
    assert "diverged" not in (other.folder / "README.md").read_text(encoding="utf-8")
    best = "Its training diverged after 4 steps; its weights are those of step 2, its best."
    assert wording.diverged(4, 2) == best


def test_adapters_that_all_diverged_leave_no_finished_run(settings: dict[str, Any]) -> None:
    """What is no number has no gain, and must not count as stopped early."""
    with pytest.raises(UserError, match="weights that are not finite after step 1"):
        train(settings, lora_r=2, learning_rate=1e39, warmup_steps=0, eval_steps=1,
              early_stopping_patience=1)  # fmt: skip
    assert Run(settings["output_dir"]).info()["status"] == "failed"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_on_a_gpu_an_adapter_that_diverges_leaves_and_the_others_finish(
    settings: dict[str, Any], dtype: str
) -> None:
    pruner = Onlooker()
    settings |= {"dtype": dtype, "lora_r": [2, 2, 2], "learning_rate": [1e-3, 1e30, 2e-3],
                 "lora_dropout": 0.0, "max_steps": 5, "eval_steps": 5}  # fmt: skip
    run = train_verb(Recipe.from_values(settings), progress=False, pruner=pruner)
    steps = [adapter["steps"] for adapter in run.info()["adapters"]]
    assert (steps[0], steps[2], len(pruner.diverged_names)) == (5, 5, 1)
