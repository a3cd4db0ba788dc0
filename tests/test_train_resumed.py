"""Runs that are stopped, killed or torn go on, with what they began with alone."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten.errors import UserError
from lighten.machine import stops
from lighten.parallel import spawn
from lighten.runs import Run
from lighten.training import checkpoints, interrupt
from lighten.training.interrupt import Interrupted
from tests import processes
from tests.cut_runs import cut_short, losses, same_tensors, weights
from tests.processes import Forked, python
from tests.tiny import CHATML
from tests.tiny_runs import eight_steps, train


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return eight_steps(tiny_folder, chat_file, tmp_path / "run")


def start(settings: dict[str, Any], *words: str, **environment: str) -> Forked:
    """The command line in its own process, with as many threads as here: sums depend on them."""
    flags = [f"{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in settings.items()]
    return processes.start("train", *flags, *words, **environment)


def wait_for(path: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.01)


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
    settings |= {"max_steps": 20, "save_steps": 1, "eval_steps": 5}
    uninterrupted = train(settings, output_dir=str(tmp_path / "whole"))
    folder = Path(settings["output_dir"])
    for kill_at in ("checkpoint-1", "checkpoint-5", "checkpoint-11"):
        process = start(settings, "--resume")
        wait_for(folder / "checkpoints" / kill_at)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert Run(folder).info()["status"] == "killed"
    resumed = train(settings, resume=True)
    assert losses(resumed) == losses(uninterrupted)
    assert same_tensors(weights(resumed), weights(uninterrupted))


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
)
def test_a_stopped_run_saves_says_so_and_resumes(
    settings: dict[str, Any], number: signal.Signals
) -> None:
    if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("these tests run under nohup, which a run heeds")
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


def test_a_scheduler_s_warning_is_heard_unless_somebody_else_listens_to_it() -> None:
    """SLURM sends what `--signal=USR1@120` says; submitit starts the job again by it."""
    with interrupt.StopSignals() as signals:
        signal.raise_signal(signal.SIGUSR1)
    assert signals.received == signal.SIGUSR1
    heard_by_others = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard_by_others.append(number))
    try:
        with interrupt.StopSignals() as signals:
            signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert signals.received is None
    assert heard_by_others == [signal.SIGUSR2]


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


def test_a_checkpoint_that_cannot_be_read_is_passed_over(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector, or a file server that lost it."""
    folder = train(settings, max_steps=4).folder / "checkpoints"
    checksum = checkpoints._checksum

    def failing(path: Path) -> str:
        if "checkpoint-4" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return checksum(path)

    monkeypatch.setattr(checkpoints, "_checksum", failing)
    newest, (sentence,) = checkpoints.newest_complete(folder)
    assert newest == folder / "checkpoint-2"
    assert "cannot be read: Input/output error" in sentence


def test_a_checkpoint_of_another_version_is_refused_and_stays(settings: dict[str, Any]) -> None:
    """It is no torn one: a run from the first step on would delete it."""
    run = train(settings, max_steps=2)
    (checkpoint,) = checkpoints.listing(run.folder / "checkpoints")
    state = json.loads((checkpoint / checkpoints.STATE).read_text())
    name = next(iter(state["members"]))
    newer_state = {**state, "kind_of_clock": 1}
    newer_member = {
        **state, "members": {**state["members"], name: {**state["members"][name], "age": 1}}
    }  # fmt: skip
    run.update(status="interrupted")
    for written, key in ((newer_state, "kind_of_clock"), (newer_member, "age")):
        (checkpoint / checkpoints.STATE).write_text(json.dumps(written))
        with pytest.raises(UserError, match=f"another version of lighten: .*'{key}'"):
            train(settings, max_steps=2, resume=True)
        assert checkpoint.is_dir()


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path / "another disk"
    for folder in (elsewhere, *(tmp_path / "run" / f"checkpoint-{step}" for step in (2, 3, 4))):
        folder.mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-1").symlink_to(elsewhere)
    delete = shutil.rmtree

    def failing(path: Path) -> None:
        if path.name == "checkpoint-2":  # another program has a file of it open, over NFS
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        delete(path)

    monkeypatch.setattr(shutil, "rmtree", failing)
    checkpoints.prune(tmp_path / "run", 1, [], tmp_path / "run" / "checkpoint-4")
    left = [path.name for path in checkpoints.listing(tmp_path / "run")]
    assert left == ["checkpoint-2", "checkpoint-4"]
    assert elsewhere.is_dir()
    assert "checkpoint-2 could not be deleted (Directory not empty) and stays" in caplog.text


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


def test_a_job_that_is_started_again_keeps_what_it_has_finished_and_goes_on_with_what_failed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"max_steps": 4}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    whole = train(settings)
    failed = cut_short(whole, tmp_path / "cut")
    failed.update(status="failed")
    settings["output_dir"] = str(failed.folder)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for _ in range(2):  # the second time nothing is left to train
        assert losses(train(settings)) == losses(whole)
    assert not (tmp_path / "cut-1").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    train(settings)
    assert (tmp_path / "cut-1" / "run.json").is_file()


@pytest.mark.parametrize("job", ["a", "none"])
def test_torchrun_goes_on_with_its_run_where_its_count_here_is_0(
    job: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its agents counts for itself, and not the starts for machines that come or go."""
    settings |= {"max_steps": 4}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    whole = train(settings)
    settings["output_dir"] = str(cut_short(whole, tmp_path / "cut").folder)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    with pytest.raises(UserError, match="holds an unfinished run"):
        train(settings)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    assert losses(train(settings)) == losses(whole)


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
    before = Run(settings["output_dir"]).update(status="interrupted")
    copy.write_bytes(chat_file.read_bytes().replace(b"please", b"kindly"))
    with pytest.raises(UserError, match=r"the dataset .* has changed since the run began"):
        train(settings, max_steps=2, dataset=str(copy), resume=True)
    # It is as it was, and not replaced by a new one.
    assert Run(settings["output_dir"]).info() == before
    with pytest.raises(UserError, match="holds an unfinished run"):
        train(settings, max_steps=2, dataset=str(copy))


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


def test_a_best_checkpoint_that_is_gone_or_torn_is_said_and_sought_anew(
    settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings |= {"load_best_model_at_end": True, "eval_steps": 2, "lora_r": [2, 2],
                 "lr_scheduler_type": "constant", "learning_rate": [3e-3, 1e-12]}  # fmt: skip
    run = train(settings)
    falling, flat = run.info()["adapters"]
    assert (falling["best_step"], flat["best_step"]) == (8, 2)
    cut = cut_short(run, tmp_path / "cut", keep=slice(2))  # steps 2 and 4
    shutil.rmtree(cut.folder / "checkpoints" / "checkpoint-2")
    resumed = lighten.train(resume=True, **{**settings, "output_dir": str(cut.folder)})
    said = " ".join(capfd.readouterr().err.split())
    sentence = "checkpoint-2, cannot be put back (it is gone)"
    assert f"the best state of {flat['name']}, {sentence}" in said
    assert f"the best state of {falling['name']}" not in said
    falling, flat = resumed.info()["adapters"]
    assert falling["best_step"] == 8
    assert flat["best_step"] in (6, 8)
    assert weights(resumed)
