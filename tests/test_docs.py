"""Every command that the documents show runs, in the order they show it."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from lighten.machine import hardware
from tests import once
from tests.caches import new_cache
from tests.processes import call, python

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
# Enough to see that a command works; the figures are the demo's business.
SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "1", "--max_eval_samples", "4",
         "--evaluate.max_examples", "4", "--evaluate.max_new_tokens", "4"]  # fmt: skip
# What a search is for takes more trials than its command, which draws four at a time.
FEW_TRIALS = ["--trials", "5"]
# Options that need a package which the tests do without where it is not installed.
NEEDS = {
    "lighten serve": "xllamacpp",
    "bench serve": "xllamacpp",
    "--url": "xllamacpp",
    "--search": "optuna",
    "--executor": "ray",
    "int8-dynamic-act-int4-weight": "torchao",
    "runs/qat": "torchao",
    "--as executorch": "executorch",
}


# A model of the real one's kind with its tokenizer and vocabulary: pages show what commands take
# and print. Rows are no multiple of 256 here either, which K-quants ask for.
SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 384,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def can_run(command: str) -> bool:
    return all(
        importlib.util.find_spec(module) for word, module in NEEDS.items() if word in command
    )


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("lighten ")]


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path) -> Path:
    """A cache whose `smollm2-135m` is a small random one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(cache: Path) -> None:
        folder = new_cache(cache) / smollm2_folder.relative_to(hardware.cache_folder())
        shutil.copytree(
            smollm2_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.gguf")
        )
        config = AutoConfig.from_pretrained(smollm2_folder, **SMALL)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        # save_pretrained leaves out what is the default, and writes what transformers reads.
        written = json.loads((folder / "config.json").read_text())
        assert {key: written[key] for key in SMALL} == SMALL

    return once.folder(tmp_path_factory, "small-cache", make)


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path: Path, small_cache: Path) -> None:
    """The way of a first day; the README's Python goes its way on the whole model."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with ExitStack() as servers:
        run_all(commands(README), tmp_path, servers, small_cache)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_runs(page: Path, tmp_path: Path, small_cache: Path) -> None:
    """What the README shows already is run there: a page's other commands must do without it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    elsewhere = set(commands(README))
    with ExitStack() as servers:
        page_commands = [command for command in commands(page) if command not in elsewhere]
        run_all(page_commands, tmp_path, servers, small_cache)


def run_all(commands: list[str], tmp_path: Path, servers: ExitStack, cache: Path) -> None:
    """Run commands one after another; a server stays for those after it, at a free port."""
    url = ""
    for command in filter(can_run, commands):
        words = shlex.split(command.replace("http://127.0.0.1:8000", url or "nowhere"))[1:]
        if words[0] == "serve" and "--plan" not in words:
            from tests.serving import serving  # needs the extra

            running = serving(*words[1:], cache=cache, cwd=tmp_path)
            url = servers.enter_context(running).url
            continue
        short = SHORT if words[0] in ("run", "train", "sweep") else []
        short = [*short, *FEW_TRIALS] if "--trials" in words else short
        stdin = "hello\n/exit\n" if words[0] == "chat" else ""
        result = call(
            *words, *short, cwd=tmp_path, stdin=stdin, environment={"LIGHTEN_CACHE": str(cache)}
        )
        assert result.returncode == 0, f"{command}\n{result.stderr[-2000:]}"


def examples(page: Path) -> list[tuple[str, list[str]]]:
    """Commands that a page shows with what they print: `$ command`, then its lines."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    split = [re.split(r"^\$ ", block, flags=re.M)[1:] for block in blocks]
    return [
        (example.splitlines()[0], example.splitlines()[1:]) for block in split for example in block
    ]


def pattern(lines: list[str]) -> str:
    """A regular expression of lines in their order, between which others may be left out.

    Widths of columns do not count, and an ellipsis leaves out words of a line.
    """
    patterns = (re.escape(" ".join(line.split())) for line in lines if line.strip(" …─"))
    return ".*?".join(line.replace("…", ".*?").replace(r"\ ", r"\s+") for line in patterns)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "output"), [example for page in PAGES for example in examples(page)],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_a_page_shows_of_a_command_is_what_it_prints(
    command: str, output: list[str], tmp_path: Path
) -> None:
    assert output, f"{command}: what it prints is not shown"
    result = call(*shlex.split(command)[1:], cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(pattern(output), result.stdout, flags=re.S), result.stdout


def test_the_python_of_the_readme_runs_and_its_run_is_shipped(
    tmp_path: Path, smollm2_folder: Path
) -> None:
    """On the whole model, to a file that llama.cpp answers from as the run does."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    short = code.replace(
        "learning_rate=1e-3", "learning_rate=1e-3, max_steps=1, max_eval_samples=4, "
        "**{'evaluate.max_examples': 2, 'evaluate.max_new_tokens': 2}",
    )  # fmt: skip
    assert short != code
    result = python(short, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "docstrings" / "report.html").is_file()
    if importlib.util.find_spec("xllamacpp"):
        result = call("export", "runs/docstrings", "--as", "gguf:q8_0", cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-2000:]


def test_make_targets_that_the_readme_promises_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    promised = set(re.findall(r"`make (\w+)", pages))
    assert promised >= {"demo", "test"}
    for target in promised:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_cleaning_leaves_what_was_trained() -> None:
    made = subprocess.run(
        ["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ".venv" in made.stdout
    assert "runs" not in made.stdout.split()


def test_every_link_in_the_documents_leads_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
