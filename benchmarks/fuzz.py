"""Recipes, data files and adapter folders with bytes cut, flipped and reordered: errors in words.

    python benchmarks/fuzz.py                     # 10,000 inputs; the last line is JSON
    python benchmarks/fuzz.py --inputs 500 --seed 7 --only data

Every input is a whole one that was damaged. It must be read, or refused with a `UserError`: any
other exception, a reading that takes longer than its limit, or a change to a file beside the input
is a failure, and its input is kept. The command ends with 1 if there was one.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lighten import api, data
from lighten.errors import UserError
from lighten.recipe import Recipe

LIMIT_S = 5.0
# What a reader's author thinks of too late, put among the bytes.
TOKENS = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b'"', b"'", b"{", b"}", b"[",
    b"]", b",", b":", b"#", b"~", b"NaN", b"null", b"-1", b"1e999", b"\\ud800", b"\xe2\x80\xa8",
    b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"&a *a", b"!!python/object:os.system",
    b"18446744073709551616", b"true", b'""',
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
)


class TooLongError(Exception):
    """An input took longer than its limit."""


@dataclass
class Outcome:
    """What came of the inputs.

    Attributes:
        inputs: How many were tried.
        read: How many of them could be read all the same.
        refused: How many were refused in words.
        failures: What went wrong, one line per kind, with the inputs that show it.
    """

    inputs: int = 0
    read: int = 0
    refused: int = 0
    failures: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
        name: What `--only` calls it.
        files: A whole input's files by their names, several inputs.
        read: Reads the folder that holds a damaged one.
    """

    name: str
    files: list[dict[str, bytes]]
    read: Callable[[Path], None]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: it encodes anything."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: place for place, word in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=words, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    fast_tokenizer.chat_template = TEMPLATE
    return fast_tokenizer


def data_target() -> Target:
    """Data files of every format and shape; what is read is encoded too."""
    call = {"type": "function", "function": {"name": "w", "arguments": '{"city": "Seoul"}'}}
    chat = [{"role": "user", "content": "비?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "assistant", "content": "so", "train": True, "weight": 1}]  # fmt: skip
    shapes: list[list[dict[str, Any]]] = [
        [{"instruction": f"say {i}", "input": "", "output": f"sea {i}", "system": "s"}
         for i in range(4)],
        [{"messages": chat, "tools": json.dumps([call])}, {"messages": chat[:1] + chat[2:]}],
        [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}] * 2,
        [{"prompt": "é\u2028", "completion": "b"}, {"prompt": "c", "completion": "d"}],
        [{"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": [-100, 6, 7, 0]}],
        [{"text": "a\r\nb"}, {"text": "c;d,e"}],
    ]  # fmt: skip
    files: list[dict[str, bytes]] = []
    for rows in shapes:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files += [
            {"train.jsonl": lines.encode()},
            {"train.json": json.dumps(rows, indent=1).encode()},
            {"train.json": json.dumps({"data": rows}).encode()},
            {"data/train-00000-of-00002.jsonl": lines.encode(),
             "data/train-00001-of-00002.jsonl": lines.encode()},
            {"train.parquet": _parquet(rows)},
        ]  # fmt: skip
        if all(isinstance(value, str) for row in rows for value in row.values()):
            files += [{"train.csv": _csv(rows, mark)} for mark in ",;\t"]
            columns = {key: {str(i): row[key] for i, row in enumerate(rows)} for key in rows[0]}
            files.append({"train.json": json.dumps(columns).encode()})
    reader = tokenizer()

    def read(folder: Path) -> None:
        for skip in (False, True):
            try:
                dataset = data.read(str(folder), skip_bad_rows=skip)
            except UserError:
                if skip:
                    raise
                continue
            data.encode(dataset.examples, reader, max_length=64, skip_bad_rows=skip)
            return

    return Target("data", files, read)


def _csv(rows: list[dict[str, Any]], mark: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=mark)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def recipe_target() -> Target:
    """Recipe files, with the sections and forms that recipes have."""
    recipes = (
        "model_name_or_path: m\ndataset: d.jsonl\nlora_r: [8, 16]\nlearning_rate: 1e-4\nseed: 3\n",
        "base_model: m\ntrain_file: d.jsonl\nsequence_len: 512\n"
        "adapter: qlora\nval_set_size: 0.1\n",
        "model_name_or_path: m\ndataset: d.jsonl\ndataset_columns: {instruction: q, output: a}\n"
        "adapters:\n  - name: a\n    lora_r: 4\n  - {name: b, lora_alpha: 8}\n"
        "evaluate:\n  max_examples: 5\nrank_pattern: {q_proj: 4}\n",
        "model_name_or_path: m\ndataset: d.jsonl\nsweep:\n  lora_r: {min: 8, max: 64, factor: 2}\n"
        "  learning_rate: [1e-4, 2e-4]\n  budget: 30m\n",
        "model_name_or_path: m\ndataset: d.jsonl\npeft:\n  peft_type: IA3\nmethod: lora\n"
        "gradient_checkpointing: true\ngradient_checkpointing_kwargs: {use_reentrant: false}\n",
    )
    files = [{"recipe.yaml": text.encode(), "d.jsonl": b'{"text": "a"}\n'} for text in recipes]

    def read(folder: Path) -> None:
        recipe = Recipe.from_file(folder / "recipe.yaml")
        recipe.to_yaml()
        recipe.cohort()
        str(recipe.run_folder)

    return Target("recipe", files, read)


def adapter_target() -> Target:
    """Adapter folders in PEFT's format."""
    import torch
    from safetensors.torch import save

    def folder(kind: torch.dtype, **changes: Any) -> dict[str, bytes]:
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "m",
            "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"], **changes,
        }  # fmt: skip
        weights = {}
        for layer in range(2):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            weights[f"{name}.lora_A.weight"] = torch.randn(4, 16).to(kind)
            weights[f"{name}.lora_B.weight"] = torch.randn(16, 4).to(kind)
        return {"adapter_config.json": json.dumps(config, indent=2).encode(),
                "adapter_model.safetensors": save(weights)}  # fmt: skip

    files = [folder(torch.float32), folder(torch.bfloat16, use_rslora=True),
             folder(torch.float16, rank_pattern={"layers.0.self_attn.q_proj": 4})]  # fmt: skip

    def read(place: Path) -> None:
        json.dumps(api.adapter_info(str(place)))

    return Target("adapter", files, read)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The bytes with one to three places cut, flipped, moved, doubled or replaced."""
    bytes_ = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        size = len(bytes_)
        at, upto = sorted((chance.randint(0, size), chance.randint(0, size)))
        piece = bytes_[at : min(upto, at + chance.choice((1, 4, 64, size + 1)))]
        end = at + len(piece)
        match chance.randrange(7):
            case 0:
                del bytes_[at:end]
            case 1:
                del bytes_[at:]
            case 2 if size:
                bytes_[min(at, size - 1)] ^= 1 << chance.randrange(8)
            case 3:
                del bytes_[at:end]
                place = chance.randint(0, len(bytes_))
                bytes_[place:place] = piece
            case 4:
                bytes_[at:at] = piece
            case 5:
                bytes_[at:end] = chance.choice(TOKENS)
            case _:
                bytes_[at:at] = chance.choice(TOKENS)
    return bytes(bytes_)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TooLongError` in what takes longer.

    Raises:
        TooLongError: It did.
    """

    def stop(*_: Any) -> None:
        raise TooLongError(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time of change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fuzz(target: Target, inputs: int, seed: int, work: Path, failures_folder: Path) -> Outcome:
    """Try damaged inputs of a kind.

    Args:
        target: The kind.
        inputs: How many.
        seed: Of the damage; each input has its own, so that one can be tried alone.
        work: A folder for the inputs; home and working directory are beside them.
        failures_folder: Where inputs that fail are put.
    """
    outcome = Outcome()
    place = work / "input"
    for files in target.files:  # whole ones can be read; and what is imported late, is now
        _write(files, place)
        target.read(place)
    for number in range(inputs):
        chance = random.Random(f"{target.name}/{seed}/{number}")
        files = dict(chance.choice(target.files))
        name = chance.choice(sorted(files))
        files[name] = damaged(files[name], chance)
        _write(files, place)
        before = state(work)
        outcome.inputs += 1
        try:
            with limited(LIMIT_S):
                target.read(place)
            outcome.read += 1
        except UserError:
            outcome.refused += 1
        except Exception as error:  # what this looks for: it is counted, kept and told
            frame = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            _keep_failure(outcome, target, why, number, place, failures_folder)
        if state(work) != before:
            _keep_failure(outcome, target, "changed files", number, place, failures_folder)
    return outcome


def _write(files: dict[str, bytes], place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    for path, content in files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(content)


def _keep_failure(
    outcome: Outcome, target: Target, why: str, number: int, place: Path, failures_folder: Path
) -> None:
    destination = failures_folder / f"{target.name}-{number}"
    shutil.copytree(place, destination, dirs_exist_ok=True)
    outcome.failures.setdefault(f"{target.name}: {why}", []).append(str(destination))


TARGETS: dict[str, Callable[[], Target]] = {
    "recipe": recipe_target, "data": data_target, "adapter": adapter_target,
}  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Run it; the exit code says whether anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(TARGETS))
    parser.add_argument("--kept", type=Path, help="where failing inputs are put")
    arguments = parser.parse_args(words)
    failures_folder = arguments.kept or Path(tempfile.mkdtemp(prefix="lighten-fuzz-"))
    names = [arguments.only] if arguments.only else list(TARGETS)
    started = time.monotonic()
    outcomes = {}
    home, start_folder = os.environ.get("HOME"), os.getcwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work = Path(folder)
        (work / "home").mkdir()
        (work / "home" / "recipe.yaml").write_text("a user's own\n")
        os.environ["HOME"] = str(work / "home")
        os.chdir(work / "home")
        try:
            for place, name in enumerate(names):
                share = arguments.inputs * (place + 1) // len(
                    names
                ) - arguments.inputs * place // len(names)
                outcomes[name] = fuzz(TARGETS[name](), share, arguments.seed, work, failures_folder)
        finally:
            os.chdir(start_folder)
            if home is not None:
                os.environ["HOME"] = home
    failures = {
        why: inputs for outcome in outcomes.values() for why, inputs in outcome.failures.items()
    }
    for why, inputs in sorted(failures.items()):
        print(f"{why}: {len(inputs)} inputs, first {inputs[0]}")
    print(json.dumps({
        "inputs": sum(outcome.inputs for outcome in outcomes.values()),
        "read": sum(outcome.read for outcome in outcomes.values()),
        "refused": sum(outcome.refused for outcome in outcomes.values()),
        "failures": sum(map(len, failures.values())),
        "seconds": round(time.monotonic() - started, 1),
    }))  # fmt: skip
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
