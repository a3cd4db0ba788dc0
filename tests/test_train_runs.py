"""Whole runs on a tiny model: checkpoints, early stop, ranks, new tokens, time."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lighten import adapters, models
from lighten.recipe import Recipe
from lighten.runs import Run
from lighten.training import checkpoints
from lighten.training.loop import Loop
from tests.cut_runs import same_tensors, weights
from tests.processes import call, python
from tests.tiny_runs import eight_steps, train


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return eight_steps(tiny_folder, chat_file, tmp_path / "run")


def test_a_run_leaves_what_the_design_promises(settings: dict[str, Any]) -> None:
    run = train(settings)
    info = run.info()
    assert info["status"] == "finished"
    assert info["data"]["supervised_tokens"] > 0
    assert [adapter["name"] for adapter in info["adapters"]] == ["r2", "r4"]
    assert {line["kind"] for line in run.metrics()} == {"train", "eval"}
    assert len([m for m in run.metrics() if m["kind"] == "train"]) == 16
    assert info["training"]["tokens"] == sum(m.get("tokens", 0) for m in run.metrics())
    first, last = run.metrics()[0]["loss"], [m for m in run.metrics() if m["kind"] == "train"][-1]
    assert last["loss"] < first - 0.3
    for folder in run.adapters().values():
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md",
                "chat_template.jinja", "generation_config.json"} <= names  # fmt: skip
    assert run.recipe().completed() == Recipe.from_values(settings).completed()


def test_trap40_the_limit_deletes_the_oldest_but_never_the_best(settings: dict[str, Any]) -> None:
    run = train(
        settings, save_steps=1, eval_steps=1, save_total_limit=2, load_best_model_at_end=True,
        learning_rate=3.0, lr_scheduler_type="constant",
    )  # fmt: skip
    best = {adapter["name"]: adapter["best_step"] for adapter in run.info()["adapters"]}
    steps = {int(p.name.partition("-")[2]) for p in checkpoints.listing(run.folder / "checkpoints")}
    assert {7, 8} <= steps
    assert set(best.values()) <= steps
    assert len(steps) <= 4
    for name, step in best.items():
        evals = {m["step"]: m["loss"] for m in run.metrics()
                 if m["kind"] == "eval" and m["adapter"] == name}  # fmt: skip
        assert evals[step] == min(evals.values())
        saved = run.folder / "checkpoints" / f"checkpoint-{step}" / "adapters" / name
        shipped = load_file(run.adapters()[name] / "adapter_model.safetensors")
        assert same_tensors(shipped, load_file(saved / "adapter_model.safetensors"))


def test_a_damaged_best_state_leaves_the_last_one(settings: dict[str, Any]) -> None:
    """It was shipped as it was, or ended the run each time that it was resumed."""
    settings |= {"save_steps": 1, "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 4,
                 "learning_rate": 1e-30}  # fmt: skip
    run = train(settings)
    best = {adapter["name"]: adapter["best_step"] for adapter in run.info()["adapters"]}
    (name, step), *_ = best.items()
    assert step == 1  # no later one is lower
    places = [run.folder / "checkpoints" / f"checkpoint-{n}" / "adapters" / name for n in (step, 4)]
    damaged, last = (place / "adapter_model.safetensors" for place in places)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x3f")
    shutil.rmtree(run.folder / "adapters")
    run.update(status="interrupted")
    resumed = train(settings, resume=True)
    after = {adapter["name"]: adapter for adapter in resumed.info()["adapters"]}
    assert {key: facts["best_step"] for key, facts in after.items()} == {**best, name: None}
    shipped = load_file(resumed.adapters()[name] / "adapter_model.safetensors")
    assert same_tensors(shipped, load_file(last))
    (evaluated,) = (m["loss"] for m in resumed.metrics()
                    if m["kind"] == "eval" and (m["adapter"], m["step"]) == (name, 4))  # fmt: skip
    assert after[name]["eval_loss"] == evaluated


def test_shares_of_the_steps_say_how_often_and_no_limit_keeps_every_checkpoint(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"eval_steps": 0.5, "save_steps": 0.25, "logging_steps": 0.3}
    tracked: list[int] = []

    def line(loop: Loop, values: dict[str, Any], *, track: bool) -> None:
        if track and values["kind"] == "train":
            tracked.append(values["step"])
        write(loop, values, track=track)

    write = Loop._line
    monkeypatch.setattr(Loop, "_line", line)
    run = train(settings, save_total_limit=None, lora_r=2)
    saved = [path.name for path in checkpoints.listing(run.folder / "checkpoints")]
    assert saved == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert [m["step"] for m in run.metrics() if m["kind"] == "eval"] == [4, 8]
    assert tracked == [3, 6]
    assert (
        run.recipe().completed()
        == Recipe.from_values({**settings, "lora_r": 2, "save_total_limit": None}).completed()
    )


def test_trap45_early_stopping_takes_an_adapter_out_when_its_loss_stops_falling(
    settings: dict[str, Any],
) -> None:
    run = train(
        settings, eval_steps=1, early_stopping_patience=2, learning_rate=[3e-3, 1e-12],
        lr_scheduler_type="constant", max_steps=8,
    )  # fmt: skip
    names = [adapter["name"] for adapter in run.info()["adapters"]]
    steps = {adapter["name"]: adapter["steps"] for adapter in run.info()["adapters"]}
    assert steps[names[0]] == 8
    assert steps[names[1]] == 3  # one evaluation to compare with, two without gain
    evals = [m["loss"] for m in run.metrics() if m["kind"] == "eval" and m["adapter"] == names[0]]
    assert evals == sorted(evals, reverse=True)


def test_a_cohort_ends_with_the_weights_that_each_adapter_gets_alone(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    together = weights(train(settings, seed=[1, 2]))
    for r, seed in ((2, 1), (4, 2)):
        alone = train(settings, lora_r=r, seed=seed, output_dir=str(tmp_path / f"alone{r}"))
        for key, value in weights(alone).items():
            cohort_value = together[key.replace("default", f"r{r}-seed{seed}")]
            assert float((cohort_value - value).abs().max()) < 2e-5, key


def test_gradient_checkpointing_and_token_budgets_change_no_result(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    plain = train(settings, max_steps=3, max_grad_norm=None)
    for number, change in enumerate(
        [{"gradient_checkpointing": True}, {"tokens_per_microbatch": 150},
         {"packing": False}, {"packing": False, "tokens_per_microbatch": None},
         {"attn_implementation": "eager"}]
    ):  # fmt: skip
        changed_run = train(
            settings, max_steps=3, max_grad_norm=None, output_dir=str(tmp_path / f"{number}"),
            **change,
        )  # fmt: skip
        for record, plain_record in zip(changed_run.metrics(), plain.metrics(), strict=True):
            assert record["loss"] == pytest.approx(plain_record["loss"], rel=1e-4)


# `torchrun`, its own imports made already.
TORCHRUN = """
import os, runpy
os.environ["LIGHTEN_DEVICE"] = "cpu"
runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trap3_two_ranks_train_as_one_process_and_trap41_an_odd_last_batch_ends(
    settings: dict[str, Any], tmp_path: Path, checkpointing: bool
) -> None:
    settings |= {"max_train_samples": 13, "val_size": 0, "max_steps": 6, "eval_steps": None,
                 "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
                 "gradient_checkpointing": checkpointing,
                 # AdamW moves what has next to no gradient by its rounding alone.
                 "adam_epsilon": 1e-6}  # fmt: skip
    # Thirteen rows in steps of four: the last step of an epoch has one row, none for rank 1.
    one_rank = train(settings, gradient_accumulation_steps=2, output_dir=str(tmp_path / "one"))
    flags = [f"{k}={json.dumps(v)}" for k, v in settings.items()]
    if checkpointing:  # torchrun starts Python for each rank, which takes long: once is enough
        child = call("train", *flags, "--processes", "2", environment={"LIGHTEN_DEVICE": "cpu"})
    else:
        child = python(
            TORCHRUN, "--nproc-per-node=2", "--standalone", "-m", "lighten", "train", *flags
        )
    assert child.returncode == 0, child.stderr[-3000:]
    two_ranks = Run(settings["output_dir"])
    assert two_ranks.info()["status"] == "finished"
    assert len(two_ranks.metrics()) == len(one_rank.metrics())
    for record, reference in zip(two_ranks.metrics(), one_rank.metrics(), strict=True):
        assert record["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
        assert record["supervised_tokens"] == reference["supervised_tokens"]
    expected_weights = weights(one_rank)
    for key, value in weights(two_ranks).items():
        assert float((value - expected_weights[key]).abs().max()) < 2e-5


def test_trap19_a_new_token_is_trained_saved_and_reloaded(
    settings: dict[str, Any], tmp_path: Path, tiny_folder: Path
) -> None:
    data = tmp_path / "new.jsonl"
    lines = [{"prompt": f"say {i}", "completion": f"<|new|> {i}"} for i in range(12)]
    data.write_text("\n".join(map(json.dumps, lines)))
    base = models.load(str(tiny_folder), dtype="float32")
    rows = base.model.get_input_embeddings().weight.shape[0]
    # More tokens than the embedding has spare rows, so that it has to grow.
    tokens = ["<|new|>", *(f"<|extra{i}|>" for i in range(rows - len(base.tokenizer) + 3))]
    run = train(
        settings, dataset=str(data), added_tokens=tokens, lora_r=2,
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    folder = run.adapters()["default"]
    saved = load_file(folder / "adapter_model.safetensors")
    embedding = saved["base_model.model.model.embed_tokens.weight"]
    tokenizer = models.load_tokenizer(str(tiny_folder))
    tokenizer = type(tokenizer).from_pretrained(folder)
    new = tokenizer.convert_tokens_to_ids("<|new|>")
    assert embedding.shape[0] == len(tokenizer)
    mean = base.model.get_input_embeddings().weight.mean(0)
    if new >= rows:
        assert float((embedding[new] - mean).abs().max()) > 1e-4
    else:
        assert float((embedding[new] - base.model.get_input_embeddings().weight[new]).abs().max())
    cohort = adapters.load(models.load(str(tiny_folder), dtype="float32").model, {"a": folder})
    ids = torch.tensor([[5, new, 7]])
    with torch.no_grad(), cohort.using("a"):
        assert cohort.model(input_ids=ids).logits.shape[-1] == len(tokenizer)


def test_trap19_a_new_token_that_cannot_learn_is_said(settings: dict[str, Any]) -> None:
    run = train(settings, added_tokens=["<|new|>"], max_steps=1)
    choices = {choice["what"]: choice for choice in run.info()["choices"]}
    assert choices["added_tokens"]["value"] == "untrained"


def test_the_best_is_the_lowest_loss_whatever_counts_as_gain(settings: dict[str, Any]) -> None:
    run = train(
        settings, eval_steps=1, save_steps=8, early_stopping_patience=6,
        early_stopping_threshold=10.0, load_best_model_at_end=True, lr_scheduler_type="constant",
    )  # fmt: skip
    for adapter in run.info()["adapters"]:
        evals = {m["step"]: m["loss"] for m in run.metrics()
                 if m["kind"] == "eval" and m["adapter"] == adapter["name"]}  # fmt: skip
        assert len(evals) == 7  # one to compare with, six without such a gain
        assert adapter["eval_loss"] == min(evals.values())
        assert evals[adapter["best_step"]] == min(evals.values())


class Clock:
    """Time that goes on by so many seconds at each look."""

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self, step_s: float) -> None:
        self.now, self.step_s = 0.0, step_s

    def monotonic(self) -> float:
        self.now += self.step_s
        return self.now


def test_a_default_run_of_one_epoch_is_saved_by_time_before_its_end(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {key: value for key, value in settings.items() if key not in
                ("max_steps", "save_steps", "eval_steps")}  # fmt: skip
    settings |= {"per_device_train_batch_size": 2, "lora_r": 2}  # one epoch of eight steps

    def saved(**changes: Any) -> list[str]:
        run = train({**settings, "output_dir": settings["output_dir"] + str(changes)}, **changes)
        return [path.name for path in checkpoints.listing(run.folder / "checkpoints")]

    assert saved() == ["checkpoint-8"]
    # Looks at the clock: two at the start, one a step, two at a save: the third step ends 640 s
    # after the first look.
    monkeypatch.setattr("lighten.training.loop.time", Clock(160.0))
    assert saved(save_every=None) == ["checkpoint-8"]
    monkeypatch.setattr("lighten.training.loop.time", Clock(160.0))
    first_saved, *_, last_saved = saved()
    assert (first_saved, last_saved) == ("checkpoint-3", "checkpoint-8")


def test_a_slow_disk_is_not_written_to_all_the_time(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A save takes 70 s here: the next one waits for 1400, whatever save_every says.
    monkeypatch.setattr("lighten.training.loop.time", Clock(70.0))
    run = train(settings, save_steps=100, eval_steps=100, lora_r=2, save_every="1m")
    names = [path.name for path in checkpoints.listing(run.folder / "checkpoints")]
    assert names == ["checkpoint-1", "checkpoint-8"]
