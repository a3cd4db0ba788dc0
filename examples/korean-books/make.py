"""Compose the Korean book recommendations from hand-written pieces.

    python examples/korean-books/make.py            # write data/*.jsonl
    python examples/korean-books/make.py --check    # are the frozen files what it makes?

`catalogue.tsv` holds real books (key, title, author, what the book gives a reader), `moments.tsv` a
feeling and situation, an opening sentence for it and the two books chosen for it. Both were written
by hand for this repository; this script only puts them together, the same way every time.
"""

from __future__ import annotations

import argparse
import json
import sys
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
)
ENDINGS = (
    "마음 가는 책부터 천천히 펼쳐 보세요.",
    "부담 없이 몇 쪽만 읽어도 좋아요.",
    "읽고 나면 마음이 한결 나아지길 바라요.",
    "오늘은 이 두 권이 곁에 있기를 바라요.",
)
# One row in this many is kept for testing.
TEST_EVERY = 11


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
        "train": [row for i, row in enumerate(made) if i % TEST_EVERY],
        "test": [row for i, row in enumerate(made) if i % TEST_EVERY == 0],
    }


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
    same = True
    for split, own in splits().items():
        path = HERE / "data" / f"{split}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own)
        if check:
            same &= path.read_text(encoding="utf-8") == text
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{split}: {len(own)} rows")
    if check:
        print("the frozen files are what this makes" if same else "the frozen files differ")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
