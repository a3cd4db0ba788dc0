"""The run folder: whole files, torn lines, and what a comparison shows."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lighten import path_checks, runs
from lighten.adapters.shards import Shard
from lighten.artifacts import open_source
from lighten.errors import UserError
from lighten.evaluation import model_alone
from lighten.models import names
from lighten.recipe import Recipe, start
from lighten.runs import Run
from tests.report_fixture import write_run


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "f.json"
    runs.write_json(path, {"a": 1, "nan": math.nan})
    assert json.loads(path.read_text()) == {"a": 1, "nan": None}
    runs.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file_and_says_what_was_missing(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    path.write_bytes(b"old")
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from lighten import runs\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try: runs.write_bytes(Path(sys.argv[1]), b'x' * 5000)\n"
        "except ValueError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert f"the disk is full: {path} could not be written, 4000 bytes were missing" in out.stdout
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_are_written_as_any_other_file(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(600.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
    runs.write_bytes(tmp_path / "plain", b"x")
    runs.write_bytes(tmp_path / "w.safetensors", Shard(tensors))
    loaded = load_file(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "safetensors lets nobody else read what it writes"
    with runs.whole_folder(tmp_path / "folder") as partial:
        save_file(tensors, partial / "w.safetensors")
    assert (tmp_path / "folder" / "w.safetensors").stat().st_mode in modes


def test_a_full_disk_ends_the_writing_of_tensors_as_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from lighten import runs; from lighten.adapters.shards import Shard\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try: runs.write_bytes(Path(sys.argv[1]), Shard({'a': torch.ones(5000)}))\n"
        "except ValueError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert f"the disk is full: {path} could not be written" in out.stdout
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    try:
        runs.write_bytes(tmp_path / "f", b"old")
        with pytest.raises(UserError, match=r"the disk is full: .*/f could not be written"):
            runs.write_bytes(tmp_path / "f", b"x" * 200_000)
        assert (tmp_path / "f").read_bytes() == b"old"
        with pytest.raises(UserError, match="the disk is full"):
            runs.append_line(tmp_path / "lines", {"x": "y" * 200_000})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_torn_last_line_is_passed_over_and_cut_off_on_resume(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    path = run.folder / "metrics.jsonl"
    intact_metrics = run.metrics()
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 99')
    assert run.metrics() == intact_metrics
    run.truncate_metrics(10)
    assert run.metrics() == [line for line in intact_metrics if line["step"] <= 10]
    runs.append_line(path, {"kind": "train", "step": 11})
    assert run.metrics()[-1] == {"kind": "train", "step": 11}


def test_runs_are_found_and_compared(tmp_path: Path) -> None:
    run_a = write_run(tmp_path / "a", learning_rate=1e-4, started="2026-01-02")
    run_b = write_run(tmp_path / "b", learning_rate=2e-4, started="2026-01-01")
    (tmp_path / "no-run").mkdir()
    assert [run.name for run in runs.find(tmp_path)] == ["b", "a"]
    rows = {row["what"]: row for row in runs.compare([run_a, run_b])}
    assert rows["learning_rate"] == {
        "what": "learning_rate", "kind": "setting", "values": [1e-4, 2e-4],
    }  # fmt: skip
    assert "lora_r" not in rows
    assert rows["default: chrf"]["values"][0]["value"] > 0


def test_a_folder_that_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run: it has no recipe\.yaml"):
        Run(tmp_path)


def test_an_ended_run_is_moved_aside_and_an_unfinished_one_is_kept(
    tmp_path: Path, chat_file: Path
) -> None:
    recipe = Recipe.from_values(
        {"model_name_or_path": "m", "dataset": str(chat_file), "output_dir": str(tmp_path / "r")}
    )
    run = Run.create(recipe)
    run.update(status="running")
    runs.append_line(run.folder / "metrics.jsonl", {"step": 1})
    with pytest.raises(UserError, match="unfinished run; go on with: lighten train --resume"):
        Run.create(recipe)
    for number in (1, 2):
        run.update(status="finished")
        assert Run.create(recipe).metrics() == []
        assert Run(tmp_path / f"r-{number}").metrics() == [{"step": 1}]
        assert f"which is now {tmp_path / f'r-{number}'}" in recipe.notices[-1]
        runs.append_line(run.folder / "metrics.jsonl", {"step": 1})


def test_a_training_in_a_sweeps_folder_leaves_the_sweep_whole(
    tmp_path: Path, chat_file: Path
) -> None:
    """It wrote its own recipe, adapters and metrics among those of the sweep."""
    recipe = Recipe.from_values(
        {"model_name_or_path": "m", "dataset": str(chat_file), "output_dir": str(tmp_path / "s")}
    )
    sweep = Run.create(recipe.changed({"lora_r": 2}))
    (sweep.folder / "sweep.json").write_text("{}")
    for status, resume in (("running", False), ("running", True), ("finished", True)):
        sweep.update(status=status)
        with pytest.raises(UserError, match="holds a sweep; go on with: lighten sweep --resume"):
            Run.create(recipe, resume=resume)
    run = Run.create(recipe)
    assert run.recipe().lora_r == 8
    assert not (run.folder / "sweep.json").exists()
    moved = Run(tmp_path / "s-1")
    assert (moved.folder / "sweep.json").is_file()
    assert moved.recipe().lora_r == 2


def test_folders_that_a_killed_process_left_unfinished_go_and_others_stay(tmp_path: Path) -> None:
    """An export that was killed leaves gigabytes under a hidden name."""
    code = (
        "import os, sys, pathlib\n"
        "from lighten.runs import whole_folder\n"
        "with whole_folder(pathlib.Path(sys.argv[1])) as partial:\n"
        "    (partial / 'weights').write_bytes(b'x' * 1000)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "q4")], check=False)
    assert killed.returncode == -9
    assert (tmp_path / ".q4.partial" / "weights").is_file()
    with runs.whole_folder(tmp_path / "q8") as partial_q8:
        (partial_q8 / "a").write_text("a")
        assert not (tmp_path / ".q4.partial").exists()
        with runs.whole_folder(tmp_path / "other") as partial_other:  # at work at the same time
            (partial_other / "b").write_text("b")
            assert (partial_q8 / "a").is_file()
    assert (tmp_path / "q8" / "a").read_text() == "a"
    assert (tmp_path / "other" / "b").read_text() == "b"
    assert not list(tmp_path.glob(".*"))


def test_processes_that_fill_one_folder_take_turns_and_leave_no_lock_behind(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from lighten.whole_files import whole_folder\n"
        "for _ in range(30):\n"
        "    with whole_folder(pathlib.Path(sys.argv[1])) as partial:\n"
        "        (partial / sys.argv[2]).touch()\n"
        "        assert len(list(partial.iterdir())) == 1\n"
    )
    locks, folder = tmp_path / "tmp", tmp_path / "written" / "q4"
    locks.mkdir()
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), name], text=True,
                         stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(locks)})
        for name in "abc"
    ]  # fmt: skip
    for writer in writers:
        _, said = writer.communicate(timeout=120)
        assert writer.returncode == 0, said
    assert len(list(folder.iterdir())) == 1
    assert list(folder.parent.iterdir()) == [folder]
    assert not list(locks.iterdir())


def test_a_run_of_another_version_is_read_or_refused_in_words(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = run.folder / "recipe.yaml"
    text = path.read_text()
    path.write_text(text.replace("workers: auto", "lanes: 2"))  # its name before 0.1.0
    assert "lanes: 2" in path.read_text()
    assert run.recipe().workers == 2
    path.write_text(text + "of_next_year: 3\n")
    with pytest.raises(UserError, match=r"recipe.yaml: this version .* of_next_year"):
        run.recipe()


@pytest.mark.parametrize(("stored", "typed"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_runs_name_is_found_in_either_form_of_its_letters(
    stored: str, typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {form: unicodedata.normalize(form, "café-한국어") for form in (stored, typed)}
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs" / names[stored])
    for name in (names[typed], f"runs/{names[typed]}", str(tmp_path / "runs" / names[typed])):
        assert path_checks.run_of(name).folder.samefile(run.folder)
        assert Path(str(path_checks.source_of(name))).samefile(run.folder)
        assert path_checks.is_run(name)


@pytest.mark.parametrize(("stored", "typed"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_models_and_adapters_are_found_in_either_form_of_their_letters(
    stored: str, typed: str, tmp_path: Path
) -> None:
    """Folders that were copied from a Mac have their letters apart, and typed ones have not."""
    for name, file in (("모델", "config.json"), ("어댑터", "adapter_config.json")):
        folder = tmp_path / unicodedata.normalize(stored, name)
        folder.mkdir()
        (folder / file).write_text('{"peft_type": "LORA"}')
    model, adapter = (str(tmp_path / unicodedata.normalize(typed, n)) for n in ("모델", "어댑터"))
    source, found = names.resolve(model)
    assert (source, found is not None and found.samefile(names.public_name(model))) == (
        "folder", True,
    )  # fmt: skip
    assert Path(names.public_name(model)).is_dir()
    for folder in (path_checks.adapter_folder(adapter), start.find(adapter),
                   model_alone.adapter_folder(adapter)):  # fmt: skip
        assert folder is not None
        assert (folder / "adapter_config.json").is_file()
    with pytest.raises(UserError, match="does not name its base"):
        open_source(adapter)


def test_a_runs_name_is_found_beside_a_folder_that_is_called_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs" / "books")
    Path("books").mkdir()
    assert path_checks.run_of("books").folder.samefile(run.folder)
    assert path_checks.source_of("books") == "books"  # it may be a model


def test_a_run_finds_its_relative_data_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "data" / "rows.jsonl").write_text("{}")
    run = write_run(project / "runs" / "demo")
    path = run.folder / "recipe.yaml"
    said = re.sub(r"(?m)^dataset: .*$", "dataset: data/rows.jsonl#1", path.read_text())
    path.write_text(re.sub(r"(?m)^chat_template: .*$", "chat_template: '{# all #}'", said))
    monkeypatch.chdir(project)
    assert run.recipe().dataset == "data/rows.jsonl#1"
    monkeypatch.chdir(tmp_path)
    assert run.recipe().dataset == f"{project.resolve()}/data/rows.jsonl#1"
    assert run.recipe().chat_template == "{# all #}"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}")
    assert run.recipe().dataset == "data/rows.jsonl#1"  # what is here comes first
