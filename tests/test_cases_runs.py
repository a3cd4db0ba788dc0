"""Folders belong to people: what a run may write into, move and empty; and who is writing."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lighten import api, folders, locks, runs
from lighten.errors import UserError
from lighten.recipe import Recipe
from lighten.runs import Run
from tests import processes


def recipe_for(folder: Path | str, data: Path) -> Recipe:
    return Recipe.from_values(
        {"model_name_or_path": "m", "dataset": str(data), "output_dir": str(folder)}
    )


def broken_model(folder: Path) -> Path:
    """A folder that looks like a model until it is read."""
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "config.json").write_text('{"model_type": "nothing"}')
    return folder / "broken"


FOREIGN = (
    "recipe.yaml", "train.jsonl", "notes/todo.txt", ".git/HEAD", ".env", "mine.html", ".venv/x",
    ".recipe.yaml.swp", "data/recipe.yaml",
)  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("with_run", [False, True])
def test_a_folder_with_somebodys_files_is_refused_and_stays(
    name: str, with_run: bool, tmp_path: Path, chat_file: Path
) -> None:
    folder = tmp_path / "project"
    if with_run:
        if name == "recipe.yaml":
            pytest.skip("a run's folder has its recipe")
        run = Run.create(recipe_for(folder, chat_file))
        runs.append_line(run.folder / runs.METRICS, {"step": 1})
        run.update(status="finished")
        locks.release(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="holds files that are not a run's"):
        Run.create(recipe_for(folder, chat_file))
    assert sorted(tmp_path.rglob("*")) == before
    assert (folder / name).read_text() == "mine"


@pytest.mark.parametrize("where", [".", "..", "~", "file", "link-to-nothing"])
def test_what_is_no_folder_for_a_run_is_refused(
    where: str, tmp_path: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "inside").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "work" / "inside")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("file").write_text("mine")
    Path("link-to-nothing").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="output_dir: "):
        Run.create(recipe_for(where, chat_file))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "info", ['{"scripts": {}}', "[1]", "not json", ""], ids=["other", "list", "torn", "empty"]
)
def test_somebodys_run_json_makes_no_run(info: str, tmp_path: Path, chat_file: Path) -> None:
    (tmp_path / "run.json").write_text(info)
    (tmp_path / "recipe.yaml").write_text("flour: 500 g")
    with pytest.raises(UserError, match="holds files that are not a run's"):
        Run.create(recipe_for(tmp_path, chat_file))
    assert (tmp_path / "recipe.yaml").read_text() == "flour: 500 g"


@pytest.mark.parametrize("name", [".DS_Store", ".metrics.jsonl.12.tmp", ".model.partial"])
def test_what_a_kill_or_a_file_manager_leaves_does_not_stop_a_run(
    name: str, tmp_path: Path, chat_file: Path
) -> None:
    (tmp_path / name).write_text("")
    assert Run.create(recipe_for(tmp_path, chat_file)).folder == tmp_path


def test_everything_that_a_run_and_its_tracker_leave_is_a_runs(
    tiny_folder: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("WANDB_PROJECT", "a project of mine")
    settings = {
        "model": str(tiny_folder), "dataset": str(chat_file), "output_dir": str(tmp_path / "r"),
        "max_steps": 1, "lora_r": 2, "report_to": ["tensorboard"], "max_length": 64,
        "progress": False, "planned": False,
    }  # fmt: skip
    run = api.run(**settings, **{"evaluate.max_examples": 2, "evaluate.max_new_tokens": 1})
    assert list(run.folder.glob("logs/**/events.out*"))
    folders.require_ours(run.folder)
    assert not (run.folder / locks.LOCK).exists()
    # A mistake in the next one gives the ended run its name back.
    broken_model(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="broken"):
        api.train(**{**settings, "model": str(broken_model(tmp_path))})
    assert sorted(tmp_path.rglob("*")) == before
    api.train(**settings)
    assert Run(tmp_path / "r-1").evaluation() is not None


def go_on(ports: str, file: str) -> None:
    """A rank: notes what it is told of."""
    for settings, notes in processes.runs_of_rank(ports, file):
        told: dict[str, object] = {}
        api.run(**settings, resume=True, done=told.__setitem__)
        notes["told"] = list(told)


def test_each_step_of_a_run_is_told_and_one_rank_alone_takes_those_after_the_training(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    settings = {
        "model": str(tiny_folder), "dataset": str(chat_file), "output_dir": str(tmp_path / "r"),
        "max_steps": 1, "lora_r": 2, "max_length": 64, "progress": False, "planned": False,
        "evaluate.max_examples": 2, "evaluate.max_new_tokens": 1,
    }  # fmt: skip
    finished = api.train(**settings)
    assert finished.evaluation() is None
    ranks = tmp_path / "ranks.json"
    processes.wait_for(processes.start_ranks(go_on, [settings], ranks))
    assert [notes["told"] for notes in processes.notes_of(ranks, 0)] == [["evaluate", "report"], []]
    told: dict[str, object] = {}
    api.run(**settings, resume=True, done=told.__setitem__)
    assert list(told) == ["evaluate", "report"]
    assert told["evaluate"].to_dict() == finished.evaluation()  # type: ignore[attr-defined]
    assert told["report"] == finished.folder / "report.html"


def test_copies_of_several_adapters_are_refused_before_the_training(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"trains 2 adapters \(r2, r4\); .* --adapter r2"):
        api.run(
            model=str(tiny_folder), dataset=str(chat_file), output_dir=str(tmp_path / "r"),
            lora_r=[2, 4], max_steps=1, progress=False, planned=False, quantize={"to": "gguf:q4_0"},
        )  # fmt: skip
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("lora_r", [2, [2, 4]])
def test_a_refused_run_takes_back_only_what_was_made_for_it(
    lora_r: object, tmp_path: Path, chat_file: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".DS_Store").write_text("x")
    begin = api.sweep if isinstance(lora_r, list) else api.train
    model = broken_model(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for folder in (tmp_path / "mine", tmp_path / "new" / "below"):
        with pytest.raises(UserError, match="broken"):
            begin(
                model_name_or_path=str(model), dataset=str(chat_file), output_dir=str(folder),
                lora_r=lora_r, progress=False,
            )  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lock_of_another_machine_says_how_to_go_on(tmp_path: Path, chat_file: Path) -> None:
    run = Run.create(recipe_for(tmp_path / "r", chat_file))
    run.update(status="running")
    lock = run.folder / locks.LOCK
    lock.write_text(json.dumps({"pid": 7, "began": 1.0, "host": "elsewhere"}))
    with pytest.raises(UserError, match=f"by process 7 on elsewhere; .* delete {lock}, "):
        Run.create(recipe_for(run.folder, chat_file), resume=True)
    locks.release(run.folder)
    lock.unlink()
    assert Run.create(recipe_for(run.folder, chat_file), resume=True).folder == run.folder


def test_a_lock_of_another_container_with_this_host_name_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither sees the other's processes: with --network host both have the machine's name."""
    monkeypatch.setattr(locks, "TOUCHED_S", 0.05)
    elsewhere = {**locks._this_process(), "pid": 2**22 + 1, "pid_namespace": "pid:[1]"}
    with monkeypatch.context() as there:
        there.setattr(locks, "_this_process", lambda: elsewhere)
        locks.acquire(tmp_path)
    with pytest.raises(UserError, match="by process 4194305 in another container"):
        locks.acquire(tmp_path)
    locks.release(tmp_path)  # it is not ours, and stays
    assert locks.holder(tmp_path) == elsewhere
    monkeypatch.setattr(locks, "WATCHED_S", 0.2)
    locks.acquire(tmp_path)  # nobody touches it any more
    locks.release(tmp_path)


def test_a_lock_that_another_machine_left_when_it_was_taken_away_is_taken_over(
    tmp_path: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run = Run.create(recipe_for(tmp_path / "r", chat_file))
    locks.release(run.folder)
    monkeypatch.setattr(locks, "TOUCHED_S", 0.05)
    elsewhere = {"pid": 7, "began": 1.0, "host": "elsewhere", "touched": True}
    with monkeypatch.context() as there:
        there.setattr(locks, "_this_process", lambda: elsewhere)
        locks.acquire(run.folder)
    with pytest.raises(UserError, match="by process 7 on elsewhere"):  # it is seen to be touched
        Run.create(recipe_for(run.folder, chat_file), resume=True)
    locks.release(run.folder)  # the machine is gone, and its lock stays
    assert (run.folder / locks.LOCK).absolute() not in locks._touched
    time.sleep(0.1)
    monkeypatch.setattr(locks, "WATCHED_S", 1.0)
    caplog.clear()
    assert Run.create(recipe_for(run.folder, chat_file), resume=True).folder == run.folder
    assert caplog.text.count("looking for 1 s") == 1  # before the lock is taken, and not then too
    assert locks.holder(run.folder)["pid"] == os.getpid()
    locks.release(run.folder)


def test_of_processes_that_take_a_dead_lock_at_once_one_gets_it(tmp_path: Path) -> None:
    code = (
        "import os, sys, json, platform, time; from pathlib import Path\n"
        "from lighten import locks; from lighten.errors import UserError\n"
        "folder = Path(sys.argv[1])\n"
        "said = {'pid': 2**22 + 1, 'began': 0.0, 'host': platform.node()}\n"
        "(folder / locks.LOCK).write_text(json.dumps(said))\n"
        "go, back = os.pipe()\n"
        "for _ in range(8):\n"
        "    if not os.fork():\n"
        "        os.read(go, 1)\n"
        "        try: locks.acquire(folder); os.write(1, b'got ')\n"
        "        except UserError: pass\n"
        "        time.sleep(1); os._exit(0)\n"
        "os.write(back, b'........')\n"
        "for _ in range(8): os.wait()\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert result.stdout == b"got ", result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [locks.LOCK]


def test_home_is_expanded(tmp_path: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = Run.create(recipe_for("~/runs/x", chat_file))
    assert run.folder == tmp_path / "home" / "runs" / "x"
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("parent", ["/proc", "/proc/self", "file.txt/below"])
def test_a_parent_that_cannot_be_written_is_one_sentence(
    parent: str, tmp_path: Path, chat_file: Path
) -> None:
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(UserError, match="cannot write"):
        Run.create(recipe_for(tmp_path / parent / "run", chat_file))


def test_a_link_to_an_ended_run_is_not_moved(tmp_path: Path, chat_file: Path) -> None:
    run = Run.create(recipe_for(tmp_path / "real", chat_file))
    runs.append_line(run.folder / runs.METRICS, {"step": 1})
    run.update(status="finished")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match="is a link"):
        Run.create(recipe_for(tmp_path / "link", chat_file))
    assert Run(tmp_path / "real").metrics() == [{"step": 1}]


def test_a_run_that_another_process_writes_is_refused_and_a_killed_one_is_called_so(
    tmp_path: Path, chat_file: Path
) -> None:
    folder = tmp_path / "r"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from lighten.recipe import Recipe; from lighten.runs import Run\n"
        "run = Run.create(Recipe.from_values(dict(model_name_or_path='m', dataset=sys.argv[1],"
        " output_dir=sys.argv[2])))\n"
        "run.update(status='running'); print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(chat_file), str(folder)], stdout=subprocess.PIPE
    ) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            for resume in (False, True):
                with pytest.raises(UserError, match=f"being written by process {writer.pid}"):
                    Run.create(recipe_for(folder, chat_file), resume=resume)
            assert Run(folder).info()["status"] == "running"
        finally:
            writer.kill()
    assert Run(folder).info()["status"] == "killed"
    Run.create(recipe_for(folder, chat_file), resume=True)
    assert locks.is_held(folder)


@pytest.mark.parametrize(
    "lock_text",
    ["", "[]", "not json", '{"pid": "x"}',
     json.dumps({"pid": os.getpid(), "began": time.time() - 1e6, "host": os.uname().nodename})],
    ids=["empty", "list", "no-json", "no-number", "given-again"],
)  # fmt: skip
def test_a_torn_lock_and_one_whose_process_id_was_given_again_hold_nothing(
    lock_text: str, tmp_path: Path
) -> None:
    (tmp_path / locks.LOCK).write_text(lock_text)
    locks.acquire(tmp_path)
    assert locks.is_held(tmp_path)
    locks.release(tmp_path)
    assert not (tmp_path / locks.LOCK).exists()


@pytest.mark.parametrize("model", ["no/such-model", "./nowhere", "smollm2-1"])
def test_a_mistyped_model_leaves_no_run_behind(model: str, tmp_path: Path, chat_file: Path) -> None:
    with pytest.raises(UserError):
        api.train(
            model_name_or_path=model, dataset=str(chat_file), output_dir=str(tmp_path / "r" / "x"),
            progress=False,
        )  # fmt: skip
    assert not (tmp_path / "r" / "x").exists()


def test_a_finished_run_says_so_and_is_not_trained_again(
    tiny_folder: Path, chat_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "model": str(tiny_folder), "dataset": str(chat_file), "output_dir": str(tmp_path / "r"),
        "max_steps": 2, "save_steps": 1, "lora_r": 2, "max_length": 64, "planned": False,
    }  # fmt: skip
    run = api.train(**settings)
    ended = run.info()
    capfd.readouterr()
    assert api.train(resume=True, **settings).folder == run.folder
    output = " ".join(capfd.readouterr().err.split())
    assert output.startswith(f"{run.folder} is finished: nothing is left to train")
    assert run.info() == ended
    with pytest.raises(UserError, match="max_steps was 2 and is now 3"):
        api.train(resume=True, **{**settings, "max_steps": 3})
    # Without what it trained there is something to do.
    (run.folder / "adapters" / "default" / "adapter_model.safetensors").unlink()
    again = api.train(resume=True, **settings)
    assert "going on after step 2" in capfd.readouterr().err
    assert again.is_finished()


@pytest.mark.parametrize("name", ["r", "my run", "it's", "실험"])
def test_what_goes_on_is_a_command_that_can_be_typed(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    words = shlex.split(folders.resume_command(folder))
    assert words == ["lighten", "train", "--resume", str(folder)]
    (tmp_path / "sweep.json").write_text("{}")
    for place in (folder, tmp_path / "tune" / name, tmp_path):
        words = shlex.split(folders.resume_command(place))
        assert words == ["lighten", "sweep", "--resume", str(tmp_path)]


def test_a_mistake_that_the_plan_meets_too_is_told_once(
    chat_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as error:
        api.train(
            model=str(broken_model(tmp_path)), dataset=str(chat_file),
            output_dir=str(tmp_path / "r"),
        )  # fmt: skip
    assert "broken" in str(error.value)
    assert "no plan" not in capfd.readouterr().err


def test_paths_are_looked_at_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    calls = [
        "api.evaluate('none')", "api.report('none')", "api.adapter_info('none')",
        "path_checks.require_answerable('./none')", "api.plan(model='./none')",
        "api.plan_serve('./none')", "api.plan_limits(model='./none')",
        "api.plan_serve(Path('none.gguf'))", "api.plan_quantize(Path('none.gguf'))",
        "api.serve(Path('none.gguf'))",
        f"api.train(model='./none', dataset={str(data)!r})",
        f"api.train(model='no.gguf', dataset={str(data)!r})",
        f"api.train(model='a/b', dataset={str(data)!r}, output_dir='.')",
        f"api.sweep(model='./none', dataset={str(data)!r}, lora_r=[2, 4])",
        "cli.data_check('none.jsonl', model='a/b')", "cli.data_check('none.jsonl', model='./no')",
    ]  # fmt: skip
    code = (
        "import sys\nfrom pathlib import Path\nfrom lighten import api, path_checks\n"
        "from lighten.cli import main as cli\nfrom lighten.errors import UserError\n"
    )
    for call in calls:
        code += f"try:\n    {call}\nexcept UserError as error:\n    print(error)\n"
    code += "cli.models()\nheavy = {'torch', 'transformers', 'peft', 'sacrebleu'}\n"
    code += "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    messages = result.stdout.splitlines()[: len(calls)]
    assert all(
        re.search("is not a run|does not exist|not a folder of its own", message)
        for message in messages
    )


def test_a_run_goes_on_from_any_folder(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project, elsewhere):
        folder.mkdir()
    shutil.copy(chat_file, project / "chat.jsonl")
    words = ["dataset=chat.jsonl", "max_steps=2", "save_steps=1", "dtype=float32", "val_size=0"]
    done = processes.call("train", f"model={tiny_folder}", *words, "output_dir=runs/a", cwd=project)
    assert done.returncode == 0, done.stderr
    run = project / "runs" / "a"
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**info, "status": "interrupted"}))
    for part in (run / "adapters", run / "checkpoints" / "checkpoint-2"):
        shutil.rmtree(part)
    done = processes.call("train", "--resume", str(run), cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert "going on after step 1" in done.stderr
    assert Run(run).info()["status"] == "finished"
