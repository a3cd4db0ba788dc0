"""Templates and masks: what is supervised, token by token (traps 9 to 18 of TRAPS.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lighten.data import Example, Message, Row, choose_template, encode, prompt_of
from lighten.data.template import NAMED
from lighten.errors import UserError
from lighten.models import Base
from tests.tiny import CHATML, tiny_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: thoughts are cut out of earlier turns, and the last turn gets an empty one.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set said = m['content'].split('</think>')[-1].lstrip() %}"
    "{% if loop.last %}{% if '<think>' in m['content'] %}{{ m['content'] }}"
    "{% else %}<think>\n\n</think>\n\n{{ said }}{% endif %}{% else %}{{ said }}{% endif %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] | upper }}<|im_end|>"
    "{% if add_generation_prompt %}?{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA,
             "thinking": THINKING, "tagged": TAGGED, "alpaca": NAMED["alpaca"],
             "plain": NAMED["plain"]}  # fmt: skip


def tokenizer_for(template: str, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(**options)
    tokenizer.chat_template = template
    return tokenizer


def chat(*turns: str, system: str | None = None) -> Example:
    start = [Message("system", system)] if system else []
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], text) for i, text in enumerate(turns)]
    return Example("f.jsonl", 1, (*start, *messages))


def encode_one(example: Example, tokenizer: Any, **options: Any) -> Row:
    return encode([example], tokenizer, **{"max_length": 10_000, **options}).rows[0]


def supervised_text(row: Row, tokenizer: Any) -> str:
    supervised_ids = [i for i, s in zip(row.input_ids, row.supervised, strict=True) if s]
    return str(tokenizer.decode(supervised_ids))


words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn", "Co")), min_size=1,
    max_size=30,
).filter(lambda text: text.strip() == text and "<" not in text and "[" not in text)  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@given(question=words, answer=words, followup=words, last_answer=words)
@settings(deadline=None, max_examples=25)
def test_the_supervised_text_is_each_answer_and_its_end(
    name: str, question: str, answer: str, followup: str, last_answer: str
) -> None:
    tokenizer = tokenizer_for(TEMPLATES[name])
    row = encode_one(chat(question, answer, followup, last_answer), tokenizer)
    end = "<|im_end|>"
    text = supervised_text(row, tokenizer)
    assert "".join(text.split()) == "".join(f"{answer}{end}{last_answer}{end}".split())
    assert not row.supervised[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_trap10_the_last_target_of_each_turn_is_the_terminator(name: str) -> None:
    tokenizer = tokenizer_for(TEMPLATES[name])
    row = encode_one(chat("What?", "That.", "And?", "Done 안녕 🎉"), tokenizer)
    ends = [
        row.input_ids[i]
        for i, on in enumerate(row.supervised)
        if on and (i + 1 == len(row.supervised) or not row.supervised[i + 1])
    ]
    assert ends == [tokenizer.convert_tokens_to_ids("<|im_end|>")] * 2


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma", "alpaca", "plain"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_trap9_there_is_exactly_one_bos(name: str, add_bos: bool) -> None:
    tokenizer = tokenizer_for(TEMPLATES[name], add_bos=add_bos)
    row = encode_one(chat("hi", "hello"), tokenizer)
    prompt, _ = prompt_of(chat("hi", "hello"), tokenizer)
    for ids in (row.input_ids, prompt):
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_trap9_plain_text_has_the_tokenizers_own_bos_and_one_eos() -> None:
    tokenizer = tokenizer_for(CHATML, add_bos=True)
    row = encode_one(Example("f", 1, text="some text"), tokenizer)
    assert row.input_ids.count(tokenizer.bos_token_id) == 1
    assert row.input_ids[-1] == tokenizer.eos_token_id
    assert row.supervised == [False] + [True] * (len(row.input_ids) - 1)


def test_trap11_a_pad_token_that_is_eos_leaves_the_end_supervised() -> None:
    tokenizer = tokenizer_for(CHATML, pad_is_eos=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = encode_one(chat("hi", "hello"), tokenizer)
    last_place = max(i for i, on in enumerate(row.supervised) if on)
    assert row.input_ids[last_place] == tokenizer.eos_token_id


def test_trap12_a_template_without_generation_tags_masks_by_prefix() -> None:
    tagged, plain = tokenizer_for(TAGGED), tokenizer_for(CHATML)
    example = chat("one", "two", "three", "four", system="be brief")
    assert encode_one(example, tagged).supervised == encode_one(example, plain).supervised
    assert encode_one(example, tagged).input_ids == encode_one(example, plain).input_ids


def test_trap13_a_template_that_rewrites_history_still_finds_each_answer() -> None:
    tokenizer = tokenizer_for(THINKING)
    row = encode_one(chat("a", "first", "b", "<think>\nhm\n</think>\n\nsecond"), tokenizer)
    text = supervised_text(row, tokenizer)
    assert text == "first<|im_end|><think>\nhm\n</think>\n\nsecond<|im_end|>"


def test_trap13_an_answer_that_cannot_be_found_is_reported_with_its_row() -> None:
    good, bad = tokenizer_for(CHATML), tokenizer_for(REWRITING)
    encode([chat("hi", "hello")], good, max_length=99)
    with pytest.raises(UserError, match=r"f\.jsonl:1: an answer cannot be found"):
        encode([chat("hi", "hello")], bad, max_length=99)


def test_trap13_every_row_that_cannot_be_aligned_counts_as_such() -> None:
    rows = [Example("f.jsonl", i, chat("hi", "hello").messages) for i in (5, 1, 2)]
    with pytest.raises(UserError, match=r"f\.jsonl:5: an answer cannot be found"):
        encode(rows, tokenizer_for(REWRITING), max_length=99)


def test_trap14_an_empty_thought_of_the_template_is_not_learnt() -> None:
    tokenizer = tokenizer_for(THINKING)
    row = encode_one(chat("q", "plain answer"), tokenizer)
    assert "<think>" in tokenizer.decode(row.input_ids)
    assert supervised_text(row, tokenizer) == "plain answer<|im_end|>"


@pytest.mark.parametrize(("question", "answer"), [("foo ", " bar"), ("the answ", "er is the")])
def test_trap15_merges_across_the_border_follow_the_offsets(question: str, answer: str) -> None:
    border = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_for(border)
    row = encode_one(chat(question, answer), tokenizer)
    offsets = tokenizer(question + answer + "<|im_end|>", add_special_tokens=False,
                        return_offsets_mapping=True)["offset_mapping"]  # fmt: skip
    start = len(question)
    assert row.supervised == [b > start and i > 0 for i, (_, b) in enumerate(offsets)]
    prompt, _ = prompt_of(chat(question, answer), tokenizer)
    assert question.startswith(tokenizer.decode(prompt))


def test_trap16_what_truncation_costs_is_counted_and_the_choice_is_honoured() -> None:
    tokenizer = tokenizer_for(CHATML)
    rows = [chat("q " * 40, "an answer that is cut"), chat("hi", "short")]
    uncut = encode(rows, tokenizer, max_length=10_000)
    full = [row.supervised_tokens for row in uncut.rows]
    length = len(uncut.rows[0].input_ids)

    cut = encode(rows, tokenizer, max_length=length - 4)
    assert cut.counts.truncated == 1
    assert cut.counts.lost_supervised_tokens == full[0] - cut.rows[0].supervised_tokens > 0
    assert "supervised tokens are lost" in cut.problems[0]

    answerless = encode(rows, tokenizer, max_length=40)
    assert (answerless.counts.dropped, answerless.counts.lost_supervised_tokens) == (1, full[0])

    dropped = encode(rows, tokenizer, max_length=length - 4, truncation_strategy="drop")
    assert (dropped.counts.rows, dropped.counts.lost_supervised_tokens) == (1, full[0])

    with pytest.raises(UserError, match=rf"f\.jsonl:1 has {length} tokens, over max_length"):
        encode(rows, tokenizer, max_length=length - 4, truncation_strategy="raise")


@pytest.mark.parametrize("name", TEMPLATES)
def test_trap18_the_prompt_of_an_answer_is_what_training_saw(name: str) -> None:
    tokenizer = tokenizer_for(TEMPLATES[name])
    example = chat("one", "two", "three", "four")
    row = encode_one(example, tokenizer)
    prompt, reference = prompt_of(example, tokenizer)
    assert reference == "four"
    assert row.input_ids[: len(prompt)] == prompt
    assert row.supervised[len(prompt)]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "alpaca"])
def test_trap18_chat_asks_as_training_did(name: str) -> None:
    tokenizer = tokenizer_for(TEMPLATES[name])
    prompt, _ = prompt_of(chat("one", "two"), tokenizer)
    chat_text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer(chat_text, add_special_tokens=False)["input_ids"] == prompt


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (chat("hi", ""), "has no answer to learn from"),
        (Example("f.jsonl", 7, (Message("user", "hi"),)), r"f\.jsonl:7 has no answer"),
        (chat("long question " * 20, "x"), "supervised tokens are lost"),
    ],
)
def test_trap6_nothing_to_learn_is_an_error_with_the_real_reason(
    example: Example, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        encode([example], tokenizer_for(CHATML), max_length=30)


def test_trap6_the_reason_is_what_befell_most_rows() -> None:
    endless = tokenizer_for(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    rows = [chat("q " * 60, "cut off"), chat("q " * 70, "cut off"), chat("hi", "")]
    with pytest.raises(UserError, match=r"over max_length 30: .* supervised tokens are lost"):
        encode(rows, endless, max_length=30)
    with pytest.raises(UserError, match="there are no examples"):
        encode([], endless, max_length=30)


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "tagged", "alpaca"])
def test_a_conversation_that_the_assistant_begins_supervises_no_header(name: str) -> None:
    tokenizer = tokenizer_for(TEMPLATES[name])
    turns = (Message("assistant", "Welcome!"), Message("user", "hi"), Message("assistant", "ho"))
    row = encode_one(Example("f", 1, turns), tokenizer)
    text = supervised_text(row, tokenizer)
    assert "".join(text.split()) == "Welcome!<|im_end|>ho<|im_end|>"


def test_a_template_that_ignores_the_generation_prompt_supervises_no_header() -> None:
    tokenizer = tokenizer_for(CHATML.partition("{% if add_generation_prompt")[0])
    assert supervised_text(encode_one(chat("hi", "ho"), tokenizer), tokenizer) == "ho<|im_end|>"


def test_trap14_tags_round_an_empty_thought_or_answer_do_not_teach_it() -> None:
    answer_part = "{{ m['content'] }}<|im_end|>{% endgen"
    thinking = TAGGED.replace(answer_part, "<think>\n\n</think>\n\n" + answer_part)
    tokenizer = tokenizer_for(thinking)
    assert (
        supervised_text(encode_one(chat("q", "plain"), tokenizer), tokenizer) == "plain<|im_end|>"
    )
    with pytest.raises(UserError, match="no answer to learn from"):
        encode([chat("q", "")], tokenizer_for(TAGGED), max_length=99)


def test_trap9_a_text_that_brings_its_bos_does_not_get_another() -> None:
    tokenizer = tokenizer_for(CHATML, add_bos=True)
    row = encode_one(Example("f", 1, text="<s>some text"), tokenizer)
    assert row.input_ids.count(tokenizer.bos_token_id) == 1


def test_a_base_model_without_chatml_tokens_gets_a_template_that_ends_with_eos() -> None:
    tokenizer = tiny_tokenizer(template=None)
    tokenizer.eos_token = "</s>"
    assert "<|im_end|>" not in tokenizer.all_special_tokens
    assert choose_template(tokenizer, None).name == "alpaca"
    row = encode_one(chat("hi", "ho"), tokenizer)
    assert supervised_text(row, tokenizer) == "ho</s>"


def test_a_template_that_refuses_names_the_row() -> None:
    with pytest.raises(UserError, match=r"f\.jsonl:1: the chat template refuses.*System role"):
        encode(
            [chat("hi", "ho", system="s")],
            tokenizer_for(GEMMA),
            max_length=99,
            system_role="keep",
        )


def test_a_turn_marked_not_to_train_is_not_and_the_loss_options_widen_it() -> None:
    tokenizer = tokenizer_for(CHATML)
    turns = (Message("user", "a"), Message("assistant", "wrong", train=False),
             Message("user", "b"), Message("assistant", "right"))  # fmt: skip
    row = encode_one(Example("f", 1, turns), tokenizer)
    assert supervised_text(row, tokenizer) == "right<|im_end|>"
    wide = encode_one(chat("a", "b"), tokenizer, assistant_only_loss=False)
    assert wide.supervised == [False] + [True] * (len(wide.input_ids) - 1)
    pair = Example("f", 1, (Message("user", "a"), Message("assistant", "b")), single_turn=True)
    assert encode_one(pair, tokenizer, assistant_only_loss=False).supervised != wide.supervised
    assert encode_one(pair, tokenizer, completion_only_loss=False).supervised == wide.supervised


def test_ready_tokens_keep_their_labels() -> None:
    row = encode_one(
        Example("f", 1, input_ids=(5, 6, 7), labels=(-100, 6, -100)), tokenizer_for(CHATML)
    )
    assert row.supervised == [False, True, False]


def test_trap20_a_tokenizer_that_gives_a_plain_dict_is_masked_alike() -> None:
    class Plain:
        """The same tokenizer, whose calls give a dict in place of a BatchEncoding."""

        def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
            self._wrapped = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self._wrapped, name)

        def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
            return dict(self._wrapped(*args, **options))

    tokenizer = tokenizer_for(CHATML)
    example = chat("one", "two", "three", "four")
    assert encode_one(example, Plain(tokenizer)) == encode_one(example, tokenizer)


def test_encoding_is_deterministic_and_fingerprinted() -> None:
    tokenizer = tokenizer_for(CHATML)
    rows = [chat("a", "b"), chat("c", "d")]
    first = encode(rows, tokenizer, max_length=99)
    assert first.sha256 == encode(rows, tokenizer, max_length=99).sha256
    assert first.sha256 != encode(rows[:1], tokenizer, max_length=99).sha256


def test_the_choice_of_template_is_said() -> None:
    with_template = tiny_tokenizer()
    assert choose_template(with_template, None).name == "model"
    without_template = tiny_tokenizer(template=None)
    without_template.eos_token = "<|im_end|>"
    choice = choose_template(without_template, None)
    assert (choice.name, without_template.chat_template) == ("chatml", NAMED["chatml"])
    assert "no chat template" in choice.reason
    assert "in place of the model's own" in choose_template(with_template, "plain").reason
    with pytest.raises(UserError, match="neither one of chatml"):
        choose_template(with_template, "chatlm")


def test_the_real_model_learns_answers_only(smollm2: Base) -> None:
    row = encode_one(chat("Wie geht's?", "Gut. 좋아요!"), smollm2.tokenizer)
    assert supervised_text(row, smollm2.tokenizer) == "Gut. 좋아요!<|im_end|>"


def test_a_template_file_of_windows_begins_no_prompt_with_its_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = CHATML.replace("\n", "\r\n")
    (tmp_path / "틀.jinja").write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    tokenizer = tiny_tokenizer(template=None)
    choice = choose_template(tokenizer, str(tmp_path / "틀.jinja"))
    assert (choice.name, choice.text) == ("틀.jinja", CHATML)
    row = encode_one(chat("q", "a"), tokenizer)
    assert tokenizer.decode(row.input_ids) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )
    (tmp_path / "crlf.jinja").write_bytes(text.encode())
    assert choose_template(tokenizer, str(tmp_path / "crlf.jinja")).text == CHATML
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose_template(tokenizer, "~/틀.jinja").text == CHATML


def test_what_is_no_template_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cp949.jinja").write_bytes("{{ '질문' }}".encode("cp949"))
    with pytest.raises(UserError, match=r"chat_template: .*cp949\.jinja is not UTF-8 text"):
        choose_template(tiny_tokenizer(), str(tmp_path / "cp949.jinja"))
    # Longer than any name that a file system holds.
    with pytest.raises(UserError, match="neither one of chatml"):
        choose_template(tiny_tokenizer(), "chatml" * 1000)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_template_writes_only_answers_as_answers(name: str) -> None:
    tokenizer = tokenizer_for(NAMED[name])
    messages = [Message("developer", "be brief"), Message("user", "q"), Message("tool", "42"),
                Message("assistant", "a")]  # fmt: skip
    row = encode_one(Example("f", 1, tuple(messages)), tokenizer)
    text = tokenizer.decode(row.input_ids)
    for words in ("be brief", "q", "42", "a"):
        assert words in text
    end = "<|im_end|>" if name == "chatml" else tokenizer.eos_token
    assert supervised_text(row, tokenizer) == f"a{end}"
    if name != "chatml":  # which ends every message with the same token
        assert text.count(end) == 1
    assert text.count("### Response:") == (name == "alpaca")
