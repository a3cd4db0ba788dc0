"""Compose the Korean book recommendations from hand-written pieces.

    python examples/korean-books/make.py            # write data/*.jsonl
    python examples/korean-books/make.py --check    # frozen files as made, nothing twice?

`catalogue.tsv` holds real books (key, title, author, what the book gives a reader), `moments.tsv` a
feeling and situation, an opening sentence for it and the two books chosen for it. Both were written
by hand for this repository; this script only puts them together, the same way every time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
INSTRUCTIONS = (
    "지금 기분과 상황에 맞는 책을 추천해 주세요.",
    "이런 마음일 때 읽기 좋은 책을 골라 주세요.",
    "아래 상황에 어울리는 책 두 권을 알려 주세요.",
    "제 감정과 상황을 읽고 책을 추천해 주세요.",
    "이럴 때 어떤 책을 읽으면 좋을까요?",
    "오늘 같은 날 읽을 책을 추천해 줄래요?",
    "지금 저에게 필요한 책을 골라 주세요.",
    "다음 마음에 어울리는 책을 소개해 주세요.",
    "제 이야기를 듣고 책 두 권만 권해 주세요.",
    "이 기분에 곁에 두면 좋을 책이 있을까요?",
    "이런 날에는 무슨 책이 어울릴까요?",
    "제 상황에 맞는 책과 그 까닭을 알려 주세요.",
)
ENDINGS = (
    "마음 가는 책부터 천천히 펼쳐 보세요.",
    "부담 없이 몇 쪽만 읽어도 좋아요.",
    "읽는 동안 좋은 시간 보내시길 바라요.",
    "오늘은 이 두 권이 곁에 있기를 바라요.",
    "끌리는 쪽을 먼저 골라 보세요.",
)
# Of this many rows the first is kept for testing and the one in the middle watched in training.
CYCLE = 11
MIDDLE = 5


def rows() -> list[dict[str, str]]:
    """Every row, in the order of `moments.tsv`."""
    books = {key: rest for key, *rest in _table("catalogue.tsv")}
    made = []
    for number, (moment, opening, chosen) in enumerate(_table("moments.tsv")):
        first, second = (books[key] for key in chosen.split(","))
        made.append(
            {
                "instruction": INSTRUCTIONS[number % len(INSTRUCTIONS)],
                "input": f"{moment}.",
                "output": f"{opening} {_told(first)} {_told(second)} "
                f"{ENDINGS[number % len(ENDINGS)]}",
            }
        )
    return made


def splits() -> dict[str, list[dict[str, str]]]:
    """The rows by the file they go to."""
    made = rows()
    return {
        "train": [row for i, row in enumerate(made) if i % CYCLE not in (0, MIDDLE)],
        "valid": [row for i, row in enumerate(made) if i % CYCLE == MIDDLE],
        "test": [row for i, row in enumerate(made) if i % CYCLE == 0],
    }


def problems() -> list[str]:
    """What is wrong with the pieces or the frozen files; nothing, if all is well."""
    found = []
    books, moments = _table("catalogue.tsv"), _table("moments.tsv")
    columns = {
        "book key": [book[0] for book in books],
        "title": [book[1] for book in books],
        "moment": [moment for moment, _, _ in moments],
        "output": [row["output"] for row in rows()],
    }
    for name, values in columns.items():
        found += [f"{name} twice: {v}" for v, times in Counter(values).items() if times > 1]
    used = [chosen.split(",") for _, _, chosen in moments]
    found += [f"not two books: {pair}" for pair in used if len(set(pair)) != 2]
    unused = {book[0] for book in books} - {key for pair in used for key in pair}
    found += [f"never recommended: {key}" for key in sorted(unused)]
    # What lies in the files, not what would be written: the same input may stand in one only.
    frozen = {
        split: (HERE / "data" / f"{split}.jsonl").read_text(encoding="utf-8") for split in splits()
    }
    for split, own in splits().items():
        if frozen[split] != _lines(own):
            found.append(f"{split}.jsonl is not what this makes")
    inputs = [json.loads(line)["input"] for text in frozen.values() for line in text.splitlines()]
    found += [f"input twice: {v}" for v, times in Counter(inputs).items() if times > 1]
    return found


def _lines(made: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)


def _told(book: list[str]) -> str:
    title, author, gift = book
    return (
        f"『{title}』({author})은 {gift}." if _closed(title) else f"『{title}』({author})는 {gift}."
    )


def _closed(title: str) -> bool:
    """Whether the title's last syllable ends in a consonant, which chooses 은 over 는."""
    letters = [letter for letter in title if letter.isalnum()]
    code = ord(letters[-1]) - 0xAC00
    if not 0 <= code < 11172:
        return letters[-1] in "013678"  # 영, 일, 삼, 육, 칠, 팔
    return code % 28 != 0


def _table(name: str) -> list[list[str]]:
    text = (HERE / name).read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()]


def main() -> int:
    """Write the data, or verify it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="verify the frozen files")
    check = parser.parse_args().check
    if not check:
        for split, own in splits().items():
            path = HERE / "data" / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text(_lines(own), encoding="utf-8")
            print(f"{split}: {len(own)} rows")
    found = problems()
    for problem in found:
        print(problem, file=sys.stderr)
    if check and not found:
        print("the frozen files are what this makes; nothing stands twice")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
