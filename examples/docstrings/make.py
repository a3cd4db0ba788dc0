"""Make the docstring data set from the Python standard library of the running interpreter.

    python examples/docstrings/make.py                 # write data/*.jsonl
    python examples/docstrings/make.py --check         # verify the frozen files

Each example asks for the one-line docstring of a function, given its module and signature; the
answer is the first line of the docstring that stands in the library. Splits are made by module,
so that functions of one file, which resemble each other, never stand on both sides.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
DATA = HERE / "data"
INSTRUCTION = "Write the one-line docstring of this Python function."
# Vendored, generated, or tests: their docstrings are not the library's own voice.
SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "ensurepip", "site-packages", "turtledemo",
    "__pycache__", "pydoc_data", "distutils", "msilib",
}  # fmt: skip
# Bounds of a useful line, in characters.
SHORTEST, LONGEST, LONGEST_SIGNATURE = 16, 110, 220
# A few modules document hundreds of functions alike; no module gives more than this.
MOST_PER_MODULE = 40
WORTHLESS = re.compile(
    r"(?i)deprecated|see (also|help|the)\b|^(todo|fixme|xxx|return self|override|internal|"
    r"same as|like |private|helper|initialize self|constructor)|:(param|return)|>>>|\bpep \d+"
)


def examples_of(source: str, module: str) -> Iterator[dict[str, str]]:
    """Prompt and completion of each documented function in a module's source."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for owner, node in _functions(tree, None):
        line = first_line(ast.get_docstring(node) or "")
        signature = _signature(node, owner)
        private = node.name.startswith("_") and not node.name.startswith("__")
        if line is None or private or len(signature) > LONGEST_SIGNATURE:
            continue
        yield {
            "prompt": f"{INSTRUCTION}\n\n# {module}\n{signature}",
            "completion": line,
            "module": module,
        }


def first_line(docstring: str) -> str | None:
    """The docstring's first sentence if it is one good line, else None."""
    paragraph = docstring.strip().split("\n\n")[0]
    line = " ".join(paragraph.split())
    # Some docstrings begin with the signature again: "name(args) -> what it does."
    line = re.sub(r"^[\w.]+\([^)]*\)\s*(->|--|:)\s*\S*\s*", "", line)
    sentence = re.match(r"(.+?[.!])(?=\s+[A-Z]|$)", line)
    line = sentence.group(1) if sentence else line
    if not SHORTEST <= len(line) <= LONGEST or WORTHLESS.search(line):
        return None
    if not line[0].isupper() or not line.isascii() or len(line.split()) < 3:
        return None
    if line.endswith((":", "..", ",", ":.")):
        return None
    return line if line[-1] in ".!" else f"{line}."


def _functions(
    tree: ast.AST, owner: str | None
) -> Iterator[tuple[str | None, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, node.name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, node
        elif isinstance(node, ast.If | ast.Try):
            yield from _functions(node, owner)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, owner: str | None) -> str:
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{kind} {node.name}({ast.unparse(node.args)}){returns}:"
    return f"class {owner}:\n    {line}" if owner else line


def collect(library: Path) -> list[dict[str, str]]:
    """Examples of a whole library, no prompt and no answer twice."""
    found: list[dict[str, str]] = []
    prompts: set[str] = set()
    answers: set[str] = set()
    counts: Counter[str] = Counter()
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED & set(relative.parts) or path.name.startswith("_"):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for example in examples_of(path.read_text(encoding="utf-8", errors="ignore"), module):
            answer = re.sub(r"\W+", " ", example["completion"]).casefold()
            if example["prompt"] in prompts or answer in answers:
                continue
            if counts[module] == MOST_PER_MODULE:
                continue
            counts[module] += 1
            prompts.add(example["prompt"])
            answers.add(answer)
            found.append(example)
    return without_twins(found)


def without_twins(examples: list[dict[str, str]]) -> list[dict[str, str]]:
    """Training examples without those whose signature is asked for in another split.

    `threading` and `asyncio`, or `posixpath` and `ntpath`, document the same functions alike.
    """
    asked = {signature_of(e) for e in examples if split_of(e["module"]) != "train"}
    seen: set[str] = set()
    kept = []
    for example in examples:
        signature = signature_of(example)
        if split_of(example["module"]) == "train":
            if signature not in asked:
                kept.append(example)
        elif signature not in seen:
            seen.add(signature)
            kept.append(example)
    return kept


def signature_of(example: dict[str, str]) -> str:
    """The prompt without its module."""
    return example["prompt"].partition("# ")[2].partition("\n")[2]


def split_of(module: str) -> str:
    """Which split a module belongs to, by a hash of its name."""
    number = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100
    return "test" if number < 12 else "valid" if number < 25 else "train"


def write(examples: list[dict[str, str]]) -> None:
    """Freeze the splits and their checksums."""
    DATA.mkdir(exist_ok=True)
    sums = []
    for split in ("train", "valid", "test"):
        rows = [e for e in examples if split_of(e["module"]) == split]
        text = "".join(
            json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) + "\n"
            for row in rows
        )
        (DATA / f"{split}.jsonl").write_text(text, encoding="utf-8")
        sums.append(f"{hashlib.sha256(text.encode()).hexdigest()}  {split}.jsonl")
        print(f"{split}: {len(rows)} examples, {len(text)} bytes")
    (DATA / "SHA256SUMS").write_text("\n".join(sums) + "\n", encoding="utf-8")


def check() -> list[str]:
    """What is wrong with the frozen files: nothing, if all is well."""
    faults = []
    seen: dict[str, str] = {}
    for line in (DATA / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, name = line.split()
        content = (DATA / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            faults.append(f"{name} has changed since it was frozen")
        for number, row in enumerate(map(json.loads, content.decode().splitlines()), 1):
            for key in (row["prompt"], row["completion"].casefold()):
                if key in seen:
                    faults.append(f"{name}:{number} repeats {seen[key]}")
                seen[key] = f"{name}:{number}"
    return faults


def main() -> int:
    """Write the data set, or verify it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="verify the frozen files")
    if parser.parse_args().check:
        faults = check()
        print("\n".join(faults) or "the frozen files are as they were made")
        return 1 if faults else 0
    write(collect(Path(sysconfig.get_path("stdlib"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
