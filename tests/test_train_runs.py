"""Whole runs on a tiny model: resume, kill, disk, early stop, ranks, trackers, new tokens."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lighten
from lighten import adapters, models
from lighten.errors import UserError
from lighten.machine import stops
from lighten.parallel import spawn
from lighten.recipe import Recipe
from lighten.runs import Run
from lighten.training import checkpoints, interrupt
from lighten.training.interrupt import Interrupted
from lighten.training.loop import Loop
from lighten.training.run import train as train_verb
from tests import processes
from tests.cut_runs import cut_short, losses, weights
from tests.processes import Forked, python
from tests.tiny import CHATML


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of eight steps in three epochs with two adapters and dropout."""
    return {
        "model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "dtype": "float32",
        "output_dir": str(tmp_path / "run"), "lora_r": [2, 4], "lora_dropout": 0.1,
        "learning_rate": 1e-2, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2,
        "max_steps": 8, "save_steps": 2, "eval_steps": 4, "val_size": 0.2, "save_total_limit": 10,
    }  # fmt: skip


def train(settings: dict[str, Any], *, resume: bool = False, **changes: Any) -> Run:
    return lighten.train(resume=resume, progress=False, **{**settings, **changes})


def same_tensors(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(tensors) == set(expected) and all(
        torch.equal(tensors[k], expected[k]) for k in expected
    )


def start(settings: dict[str, Any], *words: str, **environment: str) -> Forked:
    """The command line in its own process, with as many threads as here: sums depend on them."""
    flags = [f"{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in settings.items()]
    return processes.start("train", *flags, *words, **environment)


def wait_for(path: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.01)


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


def test_trap38_a_resumed_run_ends_bitwise_as_an_uninterrupted_one(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    uninterrupted = train(settings)
    for count in (1, 2, 3):  # the second is in the middle of the second epoch's window of batches
        cut = cut_short(uninterrupted, tmp_path / f"cut-{count}", keep=slice(count))
        resumed = train(settings, resume=True, output_dir=str(cut.folder))
        assert losses(resumed) == losses(uninterrupted)
        assert same_tensors(weights(resumed), weights(uninterrupted))


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_and_ends_bitwise_the_same(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"max_steps": 40, "save_steps": 1, "eval_steps": 10}
    uninterrupted = train(settings, output_dir=str(tmp_path / "whole"))
    folder = Path(settings["output_dir"])
    for kill_at in ("checkpoint-1", "checkpoint-9", "checkpoint-23"):
        process = start(settings, "--resume")
        wait_for(folder / "checkpoints" / kill_at)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert Run(folder).info()["status"] == "killed"
    resumed = train(settings, resume=True)
    assert losses(resumed) == losses(uninterrupted)
    assert same_tensors(weights(resumed), weights(uninterrupted))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_run_saves_says_so_and_resumes(
    settings: dict[str, Any], number: signal.Signals
) -> None:
    settings |= {"max_steps": 5000, "save_steps": 5000, "eval_steps": 5000}
    process = start(settings)
    folder = Path(settings["output_dir"])
    wait_for(folder / "metrics.jsonl")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"the state is saved, go on with: lighten train --resume {folder}" in output.replace(
        "\n", " "
    )
    assert "Traceback" not in output
    run = Run(folder)
    assert run.info()["status"] == "interrupted"
    newest, broken = checkpoints.newest_complete(folder / "checkpoints")
    assert newest is not None
    assert not broken
    assert checkpoints.read_state(newest).step == run.metrics()[-1]["step"]
    with pytest.raises(UserError, match="unfinished run"):
        train(settings)


def test_an_interrupt_in_the_same_process_raises_interrupted(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lighten.training import loop

    plain, sent = loop.train_step, []

    def interrupting(*args: Any, **options: Any) -> Any:
        if not sent:  # a second one would stop at once
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return plain(*args, **options)

    monkeypatch.setattr(loop, "train_step", interrupting)
    with pytest.raises(Interrupted, match="stopped by SIGINT after step 1"):
        train(settings)
    monkeypatch.undo()
    run = train(settings, resume=True)
    assert run.info()["status"] == "finished"


def test_a_stop_that_a_launcher_passes_on_again_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` tells its command, and then the group that it is in; so does `deepspeed`."""
    # Ignored, as in a shell's background jobs, it would not be raised.
    of_others = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in stops.STOPS]
    with interrupt.StopSignals() as signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)  # to this thread: another one would tell it later
        assert signals.received == signal.SIGINT
        monkeypatch.setattr(interrupt, "AGAIN_S", 0.0)  # somebody has waited, and presses again
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in stops.STOPS] == before
    signal.signal(signal.SIGINT, of_others)


def test_under_nohup_a_run_outlives_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt.StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
        monkeypatch.setattr(sys, "executable", shutil.which("true"))
        ended = spawn._Ranks(["train"], 1, Path(), device="cpu", shown=True)
        with ended.forwarding():
            os.kill(os.getpid(), signal.SIGHUP)
            assert ended.wait() is None
        assert ended._stopped is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("damage", ["truncate weights", "truncate state", "remove optimizer"])
def test_trap39_a_torn_checkpoint_is_passed_over_and_said(
    settings: dict[str, Any], damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(settings)
    expected = (losses(run), weights(run))
    newest = checkpoints.listing(run.folder / "checkpoints")[-1]
    if damage == "truncate weights":
        path = newest / "adapters" / "r4" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "truncate state":
        path = newest / "trainer_state.json"
        path.write_bytes(path.read_bytes()[:-30])
    else:
        (newest / "optimizer.safetensors").unlink()
    run.update(status="interrupted")
    resumed = lighten.train(resume=True, **settings)
    output = " ".join(capfd.readouterr().err.split())
    assert "checkpoint-8 is not whole" in output
    assert "going on after step 6" in output
    assert losses(resumed) == expected[0]
    assert same_tensors(weights(resumed), expected[1])


def test_torn_checkpoints_take_no_place_of_whole_ones(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one checkpoint at most, the one just written stays, not a torn one of a later step."""
    from lighten.training import loop

    run = cut_short(train(settings), tmp_path / "cut", keep=slice(3))
    folder = run.folder / "checkpoints"
    for torn in checkpoints.listing(folder)[1:]:
        (torn / "optimizer.safetensors").unlink()
    plain = loop.train_step

    def killed_in_step_5(batches: Any, adapters: Any, *args: Any, **options: Any) -> Any:
        if adapters[0].progress.steps == 4:
            raise KeyboardInterrupt
        return plain(batches, adapters, *args, **options)

    monkeypatch.setattr(loop, "train_step", killed_in_step_5)
    with pytest.raises(KeyboardInterrupt):
        train(settings, resume=True, output_dir=str(run.folder), save_total_limit=1)
    newest, _ = checkpoints.newest_complete(folder)
    assert newest == folder / "checkpoint-4"
    assert checkpoints.listing(folder) == [newest]


def test_trap39_a_full_disk_leaves_the_older_checkpoint_and_names_the_file(
    settings: dict[str, Any],
) -> None:
    run = train(settings, max_steps=2)
    before, _ = checkpoints.newest_complete(run.folder / "checkpoints")
    code = (
        "import lighten, json, sys, resource\n"
        "from lighten.training import checkpoints\n"
        "plain = checkpoints.save\n"
        "def full(*a, **k):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))\n"
        "    return plain(*a, **k)\n"
        "checkpoints.save = full\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "lighten.train(progress=False, **json.loads(sys.argv[1]))\n"
    )
    # The limit on a file's size ends a write in the middle, as a full disk does.
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    folder = Path(settings["output_dir"]).with_name("full")
    shutil.copytree(run.folder / "checkpoints", folder / "checkpoints")
    shutil.copy(run.folder / "run.json", folder)  # a run's folder, without what it has measured
    child = python(code, json.dumps({**settings, "output_dir": str(folder)}))
    assert child.returncode == 1
    assert "the disk is full" in child.stderr
    assert "optimizer.safetensors could not be written" in child.stderr
    assert "bytes were missing" in child.stderr
    assert before is not None
    newest, broken = checkpoints.newest_complete(folder / "checkpoints")
    assert newest is not None
    assert newest.name == before.name
    assert not broken
    assert not list((folder / "checkpoints").glob(".*"))


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
    child = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
         "-m", "lighten", "train", *flags],
        capture_output=True, text=True, timeout=180, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LIGHTEN_DEVICE": "cpu"},
    )  # fmt: skip
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


def test_a_diverging_run_fails_truthfully(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="lower learning_rate"):
        train(settings, learning_rate=1e30, max_grad_norm=None, lr_scheduler_type="constant")
    info = Run(settings["output_dir"]).info()
    assert info["status"] == "failed"
    assert "learning_rate" in info["error"]


def test_resuming_with_another_recipe_is_refused_with_the_key(settings: dict[str, Any]) -> None:
    train(settings, max_steps=2)
    with pytest.raises(UserError, match=r"learning_rate was 0\.01 and is now 0\.02"):
        train(settings, max_steps=2, learning_rate=0.02, resume=True)


def test_what_a_launcher_starts_again_goes_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"max_steps": 4}
    whole = train(settings)
    settings["output_dir"] = str(cut_short(whole, tmp_path / "cut").folder)
    with pytest.raises(UserError, match="holds an unfinished run"):
        train(settings)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert losses(train(settings)) == losses(whole)
    again = train(settings)  # a run that is finished is no run to go on with
    assert again.folder == tmp_path / "cut"
    assert (tmp_path / "cut-1" / "run.json").is_file()


def test_what_changes_no_result_may_change_where_a_run_goes_on(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Its memory ran out, or another machine has more of it."""
    settings |= {"max_steps": 4, "lora_dropout": 0.0}
    whole = train(settings)
    settings["output_dir"] = str(cut_short(whole, tmp_path / "cut").folder)
    smaller = {"per_device_train_batch_size": 3, "gradient_checkpointing": True, "workers": 1,
               "offload_base": "disk", "save_steps": 3}  # fmt: skip
    with pytest.raises(UserError, match="per_device_train_batch_size was 6 and is now 3"):
        train(settings, resume=True, **smaller)  # a step of other examples
    resumed = train(settings, resume=True, gradient_accumulation_steps=4, **smaller)
    for line, expected in zip(losses(resumed), losses(whole), strict=True):
        assert line[:3] == expected[:3]
        assert line[3] == pytest.approx(expected[3], rel=1e-5)


def test_resuming_on_changed_data_is_refused(
    settings: dict[str, Any], chat_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data.jsonl"
    copy.write_bytes(chat_file.read_bytes())
    train(settings, max_steps=2, dataset=str(copy))
    Run(settings["output_dir"]).update(status="interrupted")
    copy.write_bytes(chat_file.read_bytes().replace(b"please", b"kindly"))
    with pytest.raises(UserError, match=r"the dataset .* has changed since the run began"):
        train(settings, max_steps=2, dataset=str(copy), resume=True)


def test_resuming_with_other_held_out_data_or_another_template_is_refused(
    settings: dict[str, Any], chat_file: Path, tmp_path: Path
) -> None:
    watched, template = tmp_path / "valid.jsonl", tmp_path / "t.jinja"
    before = {watched: chat_file.read_bytes(), template: CHATML.encode()}
    for path, content in before.items():
        path.write_bytes(content)
    settings |= {"eval_dataset": str(watched), "chat_template": str(template), "max_steps": 2}
    del settings["val_size"]
    run = train(settings)
    for path, old, new, label in (
        (watched, b"please", b"kindly", "the set of held-out examples"),
        (template, b"assistant", b"helper", r"the chat template \(t\.jinja\)"),
    ):
        run.update(status="interrupted")
        path.write_bytes(before[path].replace(old, new))
        with pytest.raises(UserError, match=f"{label} has changed since the run began"):
            train(settings, resume=True)
        path.write_bytes(before[path])
    run.update(status="interrupted")
    shutil.rmtree(run.folder / "adapters")
    assert train(settings, resume=True).info()["status"] == "finished"


def test_resuming_with_an_edited_tokenizer_is_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(settings["model_name_or_path"], base)
    settings |= {"model_name_or_path": str(base), "max_steps": 2}
    run = train(settings)
    file = base / "tokenizer.json"
    before = json.loads(file.read_text(encoding="utf-8"))
    for edit in (
        {"normalizer": {"type": "Lowercase"}},
        {"added_tokens": [{**token, "lstrip": True} for token in before["added_tokens"]]},
    ):
        run.update(status="interrupted")
        file.write_text(json.dumps({**before, **edit}), encoding="utf-8")
        with pytest.raises(UserError, match="the tokenizer has changed since the run began"):
            train(settings, resume=True)
    # Written otherwise it is the same, and what another version of the library wrote is unknown.
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
               "pad_id": 0, "pad_type_id": 0, "pad_token": "?"}  # fmt: skip
    for edit, version in (
        ({"padding": padding}, None),
        ({"normalizer": {"type": "Lowercase"}}, "0"),
    ):
        file.write_text(json.dumps({**before, **edit}, indent=1), encoding="utf-8")
        data = run.info()["data"]
        data["tokenizer"]["tokenizers"] = version or data["tokenizer"]["tokenizers"]
        run.update(status="interrupted", data=data)
        shutil.rmtree(run.folder / "adapters")
        assert train(settings, resume=True).info()["status"] == "finished"


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


def test_trackers_get_every_adapter_and_wandb_stays_offline(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    run = train(settings, report_to=["wandb", "tensorboard"], max_steps=2, eval_steps=1)
    assert list(run.folder.glob("wandb/offline-run-*/*.wandb"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: dict[str, list[float]] = {}
    for events in {path.parent for path in run.folder.rglob("events.out*")}:
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        scalars |= {
            tag: [event.value for event in accumulator.Scalars(tag)]
            for tag in accumulator.Tags()["scalars"]
        }
    expected = [m["loss"] for m in run.metrics() if m["adapter"] == "r4" and m["kind"] == "train"]
    assert scalars["train/r4/loss"] == pytest.approx(expected)
    assert "eval/r2/loss" in scalars


@pytest.mark.parametrize("logged_in", [False, True])
def test_wandb_sends_figures_after_wandb_login_and_without_says_where_they_stay(
    logged_in: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key is in a file then. In a process of its own: W&B keeps what it has read."""
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text(f"default login user password {'a' * 40}\n" * logged_in)
    result = python(
        "import os\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from lighten.training import trackers\n"
        "accelerator = SimpleNamespace(log_with=['wandb'], is_main_process=True,\n"
        "    init_trackers=lambda *_, **options: print(options['init_kwargs'], dict(os.environ)))\n"
        "print(trackers.start(accelerator, Path('r'), {'report_to': ['wandb']}))\n"
    )
    assert result.returncode == 0, result.stderr
    *_, options, note = result.stdout.splitlines()
    assert ("'offline'" in options, "wandb sync" in note) == (not logged_in, not logged_in)


def test_a_missing_tracker_is_named_with_its_install_command(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "trackio" else real(name, *a)
    )
    with pytest.raises(UserError, match=r"pip install 'lighten\[track\]'"):
        train(settings, report_to="trackio")


class Onlooker:
    """A pruner that lets everybody train on and notes who diverged."""

    def __init__(self) -> None:
        self.diverged_names: list[str] = []

    def leaving(self, step: int, losses: Any, active: Any) -> list[str]:
        return []

    def diverged(self, step: int, name: str) -> None:
        self.diverged_names.append(name)


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
