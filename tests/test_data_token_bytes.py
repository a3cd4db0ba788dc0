"""Places of tokens from their bytes, against the tokenizer's offsets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from lighten import data
from lighten.data import Example, Message, tokenise
from lighten.data.token_bytes import TokenBytes
from tests.tiny import tiny_tokenizer

PLAIN = tiny_tokenizer().backend_tokenizer
COMPOSING = tiny_tokenizer().backend_tokenizer
COMPOSING.normalizer = normalizers.NFC()
# A token that takes the spaces around it, and one of words.
STRIPPING = tiny_tokenizer().backend_tokenizer
STRIPPING.add_tokens([AddedToken("<cut>", lstrip=True, rstrip=True), AddedToken("질문")])
KINDS = {"plain": PLAIN, "composing": COMPOSING, "stripping": STRIPPING}
PIECES = [
    "the answer ", "  ", "\n", "한국어 ", "e\u0301", "\u1100\u1161", "👩‍💻", "<|im_end|>",
    "<cut>", " <cut>  x", "질문", "question", "\u00e9", ".",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=12).map("".join)


def by_offsets(backend: Tokenizer, text: str, begin: int, end: int) -> list[int]:
    offsets = backend.encode(text, add_special_tokens=False).offsets
    return [place for place, (a, b) in enumerate(offsets) if b > begin and a < end]


@pytest.mark.parametrize("backend_name", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, ends=st.tuples(st.integers(0, 40), st.integers(0, 40)))
def test_spans_are_those_of_offsets_or_nothing_is_said(
    backend_name: str, text: str, ends: tuple[int, int]
) -> None:
    backend = KINDS[backend_name]
    token_bytes = TokenBytes._read(backend)
    assert token_bytes is not None
    text = text.encode("utf-8", "replace").decode()
    begin, end = sorted(min(place, len(text)) for place in ends)
    ids = tokenise.np.asarray(backend.encode(text, add_special_tokens=False).ids, dtype="int32")
    token_ends = token_bytes.ends(ids, text)
    if token_ends is None:
        assert backend_name != "plain"
        return
    span = tokenise._ByBytes(text, token_ends).of(begin, end)
    assert list(range(*span.indices(len(ids)))) == (
        by_offsets(backend, text, begin, end) if begin < end else []
    )


def test_a_token_that_takes_spaces_with_it_is_left_to_offsets() -> None:
    token_bytes = TokenBytes._read(STRIPPING)
    assert token_bytes is not None
    for text, is_known in (("the <cut> answer", False), ("the<cut>answer", True), ("질문", True)):
        ids = tokenise.np.asarray(STRIPPING.encode(text, add_special_tokens=False).ids)
        assert (token_bytes.ends(ids, text) is not None) is is_known


def test_tokenizers_whose_tokens_are_no_plain_bytes_are_left_to_offsets() -> None:
    assert (
        TokenBytes._read(Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")))
        is None
    )
    pieces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    assert TokenBytes._read(pieces) is None
    prefixed = tiny_tokenizer().backend_tokenizer
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert TokenBytes._read(prefixed) is None
    changing = tiny_tokenizer().backend_tokenizer
    changing.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    assert TokenBytes._read(changing) is None


@pytest.mark.parametrize("backend", [COMPOSING, STRIPPING])
def test_marks_are_those_of_offsets(backend: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.normalizer = backend.normalizer
    tokenizer.add_tokens([AddedToken("<cut>", lstrip=True, rstrip=True)])
    answers = ["the answer", "  e\u0301 한국어", "x <cut> y", "", "👩‍💻 질문\n\n", "\u1100\u1161"]
    examples = [
        Example(
            "f",
            line,
            messages=(Message("user", f"question {answer}"), Message("assistant", answer)),
        )
        for line, answer in enumerate(answers, 1)
    ]
    quick = data.encode(examples, tokenizer, max_length=64)
    monkeypatch.setattr(TokenBytes, "of", lambda tokenizer: None)
    plain = data.encode(examples, tokenizer, max_length=64)
    assert [(row.input_ids, row.supervised) for row in quick.rows] == [
        (row.input_ids, row.supervised) for row in plain.rows
    ]
    assert quick.counts == plain.counts


def test_a_vocabulary_is_read_once_and_again_when_tokens_were_added() -> None:
    tokenizer = tiny_tokenizer()
    cached = TokenBytes.of(tokenizer)
    assert cached is TokenBytes.of(tokenizer)
    tokenizer.add_tokens([AddedToken("<new>")])
    text = "a<new>b"
    ids = tokenise.np.asarray(tokenizer.backend_tokenizer.encode(text).ids)
    token_bytes = TokenBytes.of(tokenizer)
    assert token_bytes is not None
    ends = token_bytes.ends(ids, text)
    assert ends is not None
    assert ends.tolist() == [1, 6, 7]
