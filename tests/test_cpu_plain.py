"""`LIGHTEN_CPU=plain`: everything runs without what only a processor has, with the same results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lighten import cpu
from lighten.cpu import allocator, norms
from lighten.engine.batching import choose_packing
from lighten.errors import UserError
from lighten.models.attention_setting import set_attention
from lighten.runs import Run
from tests.processes import call, python
from tests.tiny import save_tiny, tiny_model

TRAINED = {"llama": "float32", "gemma3_text": "float32", "qwen3": "bfloat16"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> dict[str, dict[str, Run]]:
    """Runs of tiny models, planned, trained and evaluated with the switch and without."""
    folder = tmp_path_factory.mktemp("plain")
    models = {arch: save_tiny(folder / arch, arch) for arch in TRAINED}
    trained: dict[str, dict[str, Run]] = {}
    for name, switch in (("quick", ""), ("plain", cpu.PLAIN)):
        environment = {
            cpu.SWITCH: switch, "LIGHTEN_PLAN": "on",
            "LIGHTEN_CALIBRATION": str(folder / "calibration.json"),
        }  # fmt: skip
        trained[name] = {}
        for arch, dtype in TRAINED.items():
            output = folder / name / arch
            for words in (
                ("train", str(models[arch]), str(chat_file), "--max_steps", "4",
                 "--val_size", "0.2", "--per_device_train_batch_size", "4", "--learning_rate",
                 "0.01", "--dtype", dtype, "--output_dir", str(output)),
                ("evaluate", str(output), "--max-new-tokens", "8"),
            ):  # fmt: skip
                completed = call(*words, environment=environment)
                assert completed.returncode == 0, completed.stderr[-2000:]
            trained[name][arch] = Run(output)
    return trained


@pytest.mark.parametrize("arch", TRAINED)
def test_a_run_learns_and_answers_the_same(runs: dict[str, dict[str, Run]], arch: str) -> None:
    both = runs["quick"][arch], runs["plain"][arch]
    assert all(run.plan() is not None for run in both)
    losses, plain_losses = ([m["loss"] for m in run.metrics()] for run in both)
    assert len(losses) == 5, "four steps and a validation"
    in_float32 = TRAINED[arch] == "float32"
    assert plain_losses == pytest.approx(losses, rel=1e-5 if in_float32 else 2e-3)
    evaluation, plain_evaluation = (run.evaluation() for run in both)
    assert evaluation is not None
    assert plain_evaluation is not None
    for model, plain_model in zip(evaluation["models"], plain_evaluation["models"], strict=True):
        loss, plain_loss = (m["metrics"]["loss"]["value"] for m in (model, plain_model))
        assert plain_loss == pytest.approx(loss, rel=1e-5 if in_float32 else 2e-3)
    if in_float32:  # in bfloat16 the likeliest of random tokens may be another
        answers, plain_answers = (
            [example["answers"] for example in e["examples"]]
            for e in (evaluation, plain_evaluation)
        )
        assert answers == plain_answers
        assert len(answers) == 8


def test_a_run_records_the_switch(runs: dict[str, dict[str, Run]]) -> None:
    recorded = [
        {choice["what"]: choice for choice in runs[name]["llama"].info()["choices"]}
        for name in ("quick", "plain")
    ]
    assert "cpu" not in recorded[0]
    assert recorded[1]["cpu"]["value"] == "plain"
    assert recorded[1]["attention"]["value"] == "sdpa"
    assert recorded[1]["memory"]["value"] == "as it is"
    assert all(cpu.OFF in recorded[1][what]["reason"] for what in ("cpu", "attention", "memory"))


def test_nothing_of_the_room_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.SWITCH, cpu.PLAIN)
    assert norms.quicken(nn.Sequential(LlamaRMSNorm(8))) == 0
    assert allocator.keep_pages("cpu").reason == cpu.OFF
    assert not allocator.has_arena()
    model = tiny_model("llama")
    set_attention(model, "sdpa", "cpu")
    assert model.config._attn_implementation == "sdpa"
    assert choose_packing("auto", model).value == "off"
    with pytest.raises(UserError, match=f"unset {cpu.SWITCH}"):
        choose_packing(True, model)
    completed = python(
        "from lighten.cpu import dropout, kernels; from lighten.generation import kernels as more;"
        "from lighten.cpu.kernels import float32;"
        "obstacles = [room.obstacle() for room in (kernels, float32, more)];"
        "print(*obstacles, dropout.library(), sep='; ')"
    )
    assert completed.stdout.strip() == f"{cpu.OFF}; {cpu.OFF}; {cpu.OFF}; None"


@pytest.mark.parametrize("words", [("doctor",), ("train", "{model}", "{data}", "--max_steps", "1")])
def test_an_unknown_value_is_one_sentence(
    words: tuple[str, ...], tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    filled = [word.format(model=tiny_folder, data=chat_file) for word in words]
    completed = call(*filled, cwd=tmp_path, environment={cpu.SWITCH: "fast", "LIGHTEN_PLAN": "on"})
    assert completed.returncode == 2
    (line,) = completed.stderr.strip().splitlines()
    assert line.startswith("error: LIGHTEN_CPU: 'fast' means nothing; set it to plain")
    assert not list(tmp_path.iterdir())


def test_doctor_says_that_it_is_set() -> None:
    shown = call("doctor", environment={cpu.SWITCH: cpu.PLAIN}).stdout
    assert f"none: {cpu.OFF}" in shown
    facts = json.loads(call("doctor", "--json", environment={cpu.SWITCH: cpu.PLAIN}).stdout)
    assert facts["switched_off"] == cpu.OFF
    assert json.loads(call("doctor", "--json").stdout)["switched_off"] is None
