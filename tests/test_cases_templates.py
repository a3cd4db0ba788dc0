"""Templates and special tokens as people have them: found by rendering, told with counts."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import lighten
from lighten import data
from lighten.data import Example, Handling, Message, encode, prompt_of
from lighten.errors import UserError
from lighten.evaluation.chat import Conversation, chat
from lighten.runs import Run
from tests.test_data_encode import GEMMA, LLAMA3, THINKING, supervised_text, tokenizer_for
from tests.test_data_encode import chat as talk
from tests.tiny import CHATML, save_tiny, tiny_tokenizer

THOUGHT = "<think>\nI reckon so\n</think>\n\n"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As Mistral's: a system message and tools stand in the last user turn.
MOVING = (
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    "[INST] {% if system is defined and m == users[-1] %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
# As DeepSeek's: no answer shows its thought, and a prompt opens one.
SPLITTING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% else %}" + TURN + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Another mark for thoughts, cut out of every answer.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</reasoning>')[-1] | trim }}<|im_end|>\n{% endfor %}" + ASK
)
# Only a key of the message holds the thought, and the template does not look at it.
SILENT = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
WITHOUT_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}" + TURN + "{% endif %}"
WITHOUT_SYSTEM += "{% endfor %}" + ASK
REFUSING = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}" + TURN + "{% endfor %}" + ASK
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}" + TURN + "{% endfor %}" + ASK
)


def learnt(example: Example, template: str, **options: Any) -> tuple[str, data.Encoded]:
    """The supervised text of one example, and all that encoding says."""
    tokenizer = tokenizer_for(template)
    encoded = encode([example], tokenizer, max_length=10_000, **options)
    return supervised_text(encoded.rows[0], tokenizer), encoded


def unnamed(content: str, *, special: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with one more added token that none of its attributes names."""
    tokenizer = tiny_tokenizer(template=None)
    tokenizer.add_tokens([AddedToken(content, special=special, normalized=False)])
    assert content not in tokenizer.all_special_tokens
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + content + "\n"
        "{% endfor %}" + ASK
    )
    return tokenizer


# Special tokens, wherever they are declared


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("end", ["<end_of_turn>", "<|end|>", "[|endofturn|]", "<|eot|>"])
def test_a_turns_end_that_only_added_tokens_declare_is_an_end(end: str, special: bool) -> None:
    tokenizer = unnamed(end, special=special)
    encoded = encode([talk("a", "b", "c", "d")], tokenizer, max_length=999)
    assert supervised_text(encoded.rows[0], tokenizer) == f"b{end}d{end}"
    assert (encoded.counts.endless, encoded.problems) == (0, [])
    number = tokenizer.convert_tokens_to_ids(end)
    assert encoded.findings.ends == {number: 2}
    assert number in data.stop_tokens(tokenizer, None)  # of a model that was not trained here too


@pytest.mark.parametrize("whole_text", [False, True])
@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (data.template.NAMED["alpaca"], "</s>"),
                          (CHATML.replace("im_end", "done"), "<|done|>")],
)  # fmt: skip
def test_what_ends_an_answer_comes_from_the_rows(template: str, end: str, whole_text: bool) -> None:
    tokenizer = tokenizer_for(template)
    tokenizer.eos_token = "</s>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    rows = [talk("q", "the answer", "r", "the question")] * 3
    encoded = encode(rows, tokenizer, max_length=99, assistant_only_loss=not whole_text)
    answers = data.learnt_answers(encoded.findings)
    number = tokenizer.convert_tokens_to_ids(end)
    assert answers.ends == (number,)
    assert data.stop_tokens(tokenizer, [2], answers)[0] == number
    assert data.end_token(tokenizer, answers) == (None if end == "</s>" else end)


def test_tokens_and_texts_have_ends_too() -> None:
    tokenizer = tokenizer_for(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ready = Example("f", 1, input_ids=(9, 8, 7, end, 9), labels=(-100, 8, 7, end, -100))
    findings = encode([ready], tokenizer, max_length=99).findings
    assert (findings.ends, findings.inside) == ({end: 1}, set())
    cut = Example("f", 1, input_ids=(9, 8, 7), labels=(-100, 8, 7))
    assert not encode([cut], tokenizer, max_length=99).findings.ends
    assert encode([Example("f", 1, text="some")], tokenizer, max_length=99).findings.ends == {
        tokenizer.eos_token_id: 1
    }


def test_turns_within_a_text_that_is_learnt_whole_still_end_answers() -> None:
    tokenizer = tokenizer_for(CHATML)
    tokenizer.eos_token = "</s>"
    turn_end, end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2,
        tokenize=False,
    )
    ids = (*tokenizer(text)["input_ids"], end)
    for example in (Example("f", 1, text=text), Example("f", 1, input_ids=ids, labels=ids)):
        answers = data.learnt_answers(encode([example], tokenizer, max_length=999).findings)
        assert data.stop_tokens(tokenizer, [turn_end], answers) == [end, turn_end]


def test_a_special_token_inside_answers_stops_nothing() -> None:
    tokenizer = tokenizer_for(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|call|>"]})
    inner = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    findings = encode([talk("q", "one<|eot_id|>two")], tokenizer, max_length=99).findings
    answers = data.learnt_answers(findings)
    assert answers.inside == (inner,)
    assert inner not in data.stop_tokens(tokenizer, [inner], answers)
    assert inner in data.stop_tokens(tokenizer, [inner])


# Thoughts


@pytest.mark.parametrize(
    ("template", "answer", "remaining"),
    [
        (SPLITTING, THOUGHT + "yes", "\n\nyes"),
        (REASONING, "<reasoning>I reckon so</reasoning> yes", "yes"),
        (THINKING.replace("loop.last", "false"), THOUGHT + "yes", "yes"),
        (SPLITTING, "I reckon so</think>yes", "yes"),
    ],
)
def test_thoughts_that_a_template_cuts_out_are_told_kept_or_dropped(
    template: str, answer: str, remaining: str
) -> None:
    text, encoded = learnt(talk("q", answer), template)
    assert text == f"{remaining}<|im_end|>"
    assert "removes 1 of 1 thoughts" in encoded.problems[0]
    assert "set thinking to keep" in encoded.problems[0]
    assert not data.learnt_answers(encoded.findings).thinks

    text, encoded = learnt(talk("q", answer), template, thinking="keep")
    assert text == f"{answer}<|im_end|>"
    assert data.learnt_answers(encoded.findings).thinks

    text, encoded = learnt(talk("q", answer), template, thinking="drop")
    assert text == "yes<|im_end|>"
    assert "1 of 1 thoughts are removed" in encoded.problems[0]


def test_only_thoughts_are_dropped() -> None:
    for answer, remaining in (
        (f"{THOUGHT}one<think>more</think>two", "one\n\ntwo"),
        ("close <think> with </think> it", "close <think> with </think> it"),
        ("<b>bold</b> words", "<b>bold</b> words"),
    ):
        assert learnt(talk("q", answer), CHATML, thinking="drop")[0] == f"{remaining}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}", "not valid Jinja"),
        ("{{ messages[7].content.x }}", r"f\.jsonl:1: the chat template refuses"),
        ("{{ 1 / 0 }}", r"f\.jsonl:1: the chat template refuses"),
        ("{{ messages[0].content + 1 }}", r"f\.jsonl:1: the chat template refuses"),
    ],
)
def test_a_broken_template_is_one_sentence(template: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        learnt(talk("q", "a"), template)


def test_a_thought_in_a_key_of_its_own_is_not_lost_in_silence() -> None:
    aside = Message("assistant", "yes", extra=(("reasoning_content", "I reckon so"),))
    example = Example("f", 1, (Message("user", "q"), aside))
    text, encoded = learnt(example, SILENT)
    assert text == "yes<|im_end|>"
    assert "removes 1 of 1 thoughts" in encoded.problems[0]
    assert learnt(example, SILENT, thinking="keep")[0] == f"{THOUGHT}yes<|im_end|>"
    assert learnt(example, SILENT, thinking="drop")[1].counts.supervised_tokens < 12


@pytest.mark.parametrize("template", [THINKING, SPLITTING])
def test_kept_thoughts_stand_in_the_prompts_of_later_answers_too(template: str) -> None:
    example = talk("q", f"{THOUGHT}no", "r", f"{THOUGHT.replace('so', 'not')}yes", system="s")
    tokenizer = tokenizer_for(template)
    row = encode([example], tokenizer, max_length=999, thinking="keep").rows[0]
    text = supervised_text(row, tokenizer)
    assert text == f"{THOUGHT}no<|im_end|>{THOUGHT.replace('so', 'not')}yes<|im_end|>"
    prompt, reference = prompt_of(example, tokenizer, Handling(thinking="keep"))
    assert row.input_ids[: len(prompt)] == prompt
    assert reference == f"{THOUGHT.replace('so', 'not')}yes"
    assert tokenizer.decode(row.input_ids).count("<think>") == 2


def test_thoughts_that_the_template_shows_are_no_news() -> None:
    for thinking in (None, "keep"):
        text, encoded = learnt(talk("q", f"{THOUGHT}yes"), CHATML, thinking=thinking)
        assert (text, encoded.problems) == (f"{THOUGHT}yes<|im_end|>", [])
        assert data.learnt_answers(encoded.findings).thinks


def test_a_reference_is_what_was_learnt() -> None:
    tokenizer = tokenizer_for(SPLITTING)
    assert prompt_of(talk("q", f"{THOUGHT}yes"), tokenizer)[1].strip() == "yes"


# System messages, roles, tools, dates


@pytest.mark.parametrize("template", [GEMMA, WITHOUT_SYSTEM, REFUSING, ALTERNATING])
def test_a_system_message_that_a_template_takes_not_is_folded_and_said_once(template: str) -> None:
    tokenizer = tokenizer_for(template)
    rows = [talk("q", "a", "r", "b", system="be kind")] * 5
    encoded = encode(rows, tokenizer, max_length=999)
    text = tokenizer.decode(encoded.rows[0].input_ids)
    assert "user\nbe kind\n\nq" in text
    assert text.count("be kind") == 1
    [problem] = encoded.problems
    assert "5 of 5 are put at the beginning of the next user turn" in problem
    dropped = encode(rows, tokenizer, max_length=999, system_role="drop")
    assert "be kind" not in tokenizer.decode(dropped.rows[0].input_ids)
    assert dropped.problems == ["5 system messages are left out (system_role: drop)"]


def test_a_system_message_that_a_template_takes_stays() -> None:
    example = talk("q", "a", system="be kind")
    for template in (CHATML, LLAMA3):
        for role in (None, "keep"):
            text, encoded = learnt(example, template, system_role=role)
            assert encoded.problems == []
        folded = encode([example], tokenizer_for(template), max_length=999, system_role="fold")
        assert "into user turns" in folded.problems[0]
        assert text == "a<|im_end|>"


def test_rows_that_a_template_refuses_are_told_together_or_left_out_and_counted() -> None:
    good, bad = talk("q", "a"), talk("q", "a").messages
    rows = [
        Example("f.jsonl", 3, good.messages),
        Example("f.jsonl", 5, bad[1:] + bad),
        Example("f.jsonl", 8, (*bad, *bad[1:])),
        Example("f.jsonl", 9, (Message("tool", "x"), *bad)),
    ]
    tokenizer = tokenizer_for(ALTERNATING)
    with pytest.raises(UserError) as error:
        encode(rows, tokenizer, max_length=99)
    assert str(error.value).splitlines() == [
        "f.jsonl:5: the chat template refuses this conversation: turns must alternate; "
        "and 2 more rows: 8, 9",
        "fix these rows, or go on without them: --skip-bad-rows",
    ]
    encoded = encode(rows, tokenizer, max_length=99, skip_bad_rows=True)
    assert (encoded.counts.rows, encoded.counts.refused) == (1, 3)
    assert "f.jsonl:5" in encoded.problems[0]


def test_keep_leaves_a_system_message_to_the_template() -> None:
    with pytest.raises(UserError, match=r"System role not supported.*system_role: fold"):
        learnt(talk("q", "a", system="s"), GEMMA, system_role="keep")
    _, encoded = learnt(talk("q", "a", system="s"), WITHOUT_SYSTEM, system_role="keep")
    assert encoded.problems == ["the chat template leaves out 1 system message, first in f.jsonl:1"]


@pytest.mark.parametrize("moved", ["system", "tools"])
def test_answers_whose_prompt_the_template_moves_are_counted_and_the_others_learnt(
    moved: str,
) -> None:
    example = talk("q", "first", "r", "second", "s", "third",
                   system="be kind" if moved == "system" else None)  # fmt: skip
    if moved == "tools":
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        example = Example("f.jsonl", 1, example.messages, tools=tools)
    tokenizer = tokenizer_for(MOVING)
    encoded = encode([example], tokenizer, max_length=999)
    assert supervised_text(encoded.rows[0], tokenizer).strip() == "third<|im_end|>"
    lost = sum(len(tokenizer(f"{word}<|im_end|>")["input_ids"]) for word in ("first", "second"))
    assert any(
        "2 of 3 answers" in problem and f"{lost} tokens" in problem for problem in encoded.problems
    )
    assert not any("cannot be found" in problem for problem in encoded.problems)
    assert encoded.counts.unaligned == 0


def test_messages_and_tools_that_a_template_leaves_out_are_told() -> None:
    only_turns = (
        "{% for m in messages if m.role in ('user', 'assistant') %}" + TURN + "{% endfor %}"
    )
    messages = (Message("user", "q"), Message("assistant", "a"), Message("tool", "result"),
                Message("assistant", "b"))  # fmt: skip
    example = Example("f.jsonl", 4, messages, tools=[{"name": "f"}])
    _, encoded = learnt(example, only_turns)
    assert "leaves out the tool descriptions of 1 of 1" in encoded.problems[0]
    assert "leaves out 1 tool message, first in f.jsonl:4" in encoded.problems[1]
    escaped = "{% for m in messages %}<|im_start|>{{ m.content | tojson }}<|im_end|>{% endfor %}"
    tokenizer = tokenizer_for(escaped)
    escaped_encoding = encode(
        [Example("f", 1, (Message("user", 'say "하"\n'), Message("assistant", "a")))],
        tokenizer, max_length=99,
    )  # fmt: skip
    assert not any("leaves out" in problem for problem in escaped_encoding.problems)


def test_calls_that_a_template_leaves_out_do_not_teach_silence() -> None:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    messages = (
        Message("user", "q"), Message("assistant", "", extra=(("tool_calls", calls),)),
        Message("tool", "sunny"), Message("assistant", "It is."),
    )  # fmt: skip
    example = Example("f.jsonl", 3, messages)
    text, encoded = learnt(example, SILENT)
    assert text == "It is.<|im_end|>"
    assert any("leaves out 1 calls of tools, first in f.jsonl:3" in p for p in encoded.problems)
    written = "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    shown = SILENT.replace("{{ m.content }}", written)
    assert "weather" in learnt(example, shown)[0]


@pytest.mark.parametrize("date_format", ["%d %b %Y", "%Y-%m-%d", "%B %d, %Y"])
def test_todays_date_in_training_text_is_told(date_format: str) -> None:
    dated = "Today is {{ strftime_now('" + date_format + "') }}\n" + CHATML
    _, encoded = learnt(talk("q", "a"), dated)
    today = datetime.now(UTC).astimezone().strftime(date_format)
    assert f"today's date ({today}) into 1 of 1" in encoded.problems[0]
    assert learnt(talk("q", "a"), CHATML)[1].problems == []


@pytest.mark.parametrize("name", ["alpaca", "plain", "llama"])
def test_a_tokenizer_without_an_end_is_named(name: str) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = tiny_tokenizer(template=data.template.NAMED.get(name, template))
    tokenizer.eos_token = None
    tokenizer.name_or_path = "somebody/endless"
    with pytest.raises(UserError, match="the tokenizer somebody/endless has no eos_token"):
        encode([talk("q", "a")], tokenizer, max_length=99)
    texts = encode([Example("f", 1, text="some text")], tokenizer, max_length=99)
    assert "has no eos_token" in texts.problems[0]


# `data check` token by token


@pytest.mark.parametrize(
    "text", ["하늘은 왜 파란가요", "🎉👩‍👩‍👧 party", "naïve café", "漢字かな交じり"]
)
def test_tokens_are_joined_until_they_are_characters(text: str) -> None:
    tokenizer = tokenizer_for(CHATML)
    file = Path("f.jsonl")
    dataset = data.Dataset([talk(text, text)], [], "messages", file, "")
    report = data.check(dataset, tokenizer, max_length=999, template="")
    assert "".join(piece for piece, _ in report.sample) == tokenizer.decode(
        encode(dataset.examples, tokenizer, max_length=999).rows[0].input_ids
    )
    assert not any("\ufffd" in piece for piece, _ in report.sample)
    inside = "".join(piece for piece, supervised in report.sample if supervised)
    assert inside == f"{text}<|im_end|>"
    broken = data.Dataset([talk("\ufffd a \ufffd", "\ufffd")], [], "messages", file, "")
    sample = data.check(broken, tokenizer, max_length=999, template="").sample
    assert "".join(piece for piece, _ in sample).count("\ufffd") == 3


# Whole runs


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model that answers with special tokens, and ends with one that its files do not name."""
    folder = tmp_path_factory.mktemp("labels")
    template = CHATML.replace("<|im_end|>", "<|done|>")
    (folder / "done.jinja").write_text(template)
    rows = [
        {"instruction": f"{word} {number}", "output": f"{label} so"}
        for number in range(24)
        for word, label in (("nice", "<good>"), ("ugly", "<bad>"))
    ]
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return lighten.train(
        model=str(save_tiny(folder / "model")), dataset=str(file), dtype="float32", method="full",
        learning_rate=1e-2, max_steps=60, val_size=16, added_tokens=["<good>", "<bad>", "<|done|>"],
        chat_template=str(folder / "done.jinja"), output_dir=str(folder / "run"), progress=False,
    )  # fmt: skip


def test_special_tokens_in_answers_are_compared_and_shown_as_text(labels: Run) -> None:
    evaluation = lighten.evaluate(labels)
    assert evaluation.metric("default", "exact_match")["value"] == 100
    assert {example["answers"]["default"] for example in evaluation.examples} == {
        "<good> so",
        "<bad> so",
    }
    out = io.StringIO()
    chat(str(labels.folder), lines=io.StringIO("nice 3\nugly 4\n"), out=out, max_new_tokens=9)
    assert out.getvalue() == "<good> so\n<bad> so\n"


def test_saved_files_say_what_ends_an_answer(labels: Run) -> None:
    folder = labels.folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    done_id = tokenizer.convert_tokens_to_ids("<|done|>")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|done|>", done_id)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert (ends if isinstance(ends, list) else [ends])[0] == done_id
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == done_id
    assert labels.info()["data"]["answers"]["ends"] == [done_id]


def test_an_adapter_is_saved_with_its_end_where_the_template_allows_it(
    tmp_path: Path, chat_file: Path
) -> None:
    def trained(name: str, template: str) -> Path:
        (tmp_path / f"{name}.jinja").write_text(template)
        run = lighten.train(
            model=str(save_tiny(tmp_path / "model", template=None)), dataset=str(chat_file),
            dtype="float32", max_steps=1, chat_template=str(tmp_path / f"{name}.jinja"),
            added_tokens=["<|done|>"], output_dir=str(tmp_path / name), progress=False,
        )  # fmt: skip
        return run.folder / "adapters" / "default"

    done_template = CHATML.replace("<|im_end|>", "<|done|>")
    for name, template, end in (
        ("done", done_template, "<|done|>"),
        (
            "both",
            done_template.replace("{{ '<|im_start|>' +", "{{ eos_token + '<|im_start|>' +", 1),
            "</s>",
        ),
        ("same", data.template.NAMED["alpaca"], "</s>"),
    ):
        folder = trained(name, template)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token == end
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        assert tokenizer.convert_tokens_to_ids(end) in (ends if isinstance(ends, list) else [ends])


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model that was trained to think, with a template that cuts thoughts out."""
    folder = tmp_path_factory.mktemp("thinker")
    (folder / "cut.jinja").write_text(SPLITTING)
    rows = [
        {"instruction": f"q {i}", "output": f"<think>\nso\n</think>\n\nthe {i}"} for i in range(8)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return lighten.train(
        model=str(save_tiny(folder / "model")), dataset=str(folder / "rows.jsonl"), thinking="keep",
        dtype="float32", max_steps=1, val_size=0, chat_template=str(folder / "cut.jinja"),
        output_dir=str(folder / "run"), progress=False,
    )  # fmt: skip


def test_chat_thinks_as_trained_and_as_told(thinker: Run) -> None:
    assert thinker.info()["data"]["answers"]["thoughts"] == 8
    prompts = {}
    for thinking in (None, True, False):
        talking = Conversation(str(thinker.folder), thinking=thinking)
        prompts[thinking] = talking.base.tokenizer.decode(talking.prompt("q 1")[0])
    assert prompts[None] == prompts[True]
    assert all(text.endswith("q 1<|im_end|>\n<|im_start|>assistant\n") for text in prompts.values())
    base = Conversation(thinker.recipe().model_name_or_path)
    assert base.thinking is False


@pytest.mark.parametrize("template", [SPLITTING, THINKING, CHATML])
def test_an_untrained_model_thinks_when_told(tmp_path: Path, template: str) -> None:
    folder = save_tiny(tmp_path / "model", template=template)
    ends = {}
    for thinking in (True, False):
        talking = Conversation(str(folder), thinking=thinking)
        ends[thinking] = talking.base.tokenizer.decode(talking.prompt("q")[0])
    assert ends[False].endswith("<|im_start|>assistant\n")
    assert ends[True].endswith("<think>\n" if template == SPLITTING else "assistant\n")


@pytest.mark.parametrize("template", [GEMMA, REFUSING, ALTERNATING, CHATML])
def test_a_system_message_never_ends_a_chat(tmp_path: Path, template: str) -> None:
    folder = save_tiny(tmp_path / "model", template=template)
    out = io.StringIO()
    lines = io.StringIO("/system be kind\nhello\n/system\nhello again\n")
    chat(str(folder), lines=lines, out=out, max_new_tokens=2)
    assert len(out.getvalue().split("\n")) >= 3
    assert "refuses" not in out.getvalue()
