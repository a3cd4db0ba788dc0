"""Ollama's Modelfile: its Go template renders what the model's own template renders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lighten.quantization.gguf_tokenizer import stop_texts
from lighten.quantization.modelfile import chat_pieces, modelfile
from tests.tiny import CHATML, save_tiny, tiny_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are {{ '{{' }}kind}}."
    "<|im_end|>\n{% endif %}" + CHATML
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('roles') }}{% endif %}{% endfor %}"
)
BRACES = (
    "{% for m in messages %}{{ '{' + m['role'] + ': {' + m['content'] + '}}\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{assistant: {' }}{% endif %}"
)
SHOUTS = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
COUNTS = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}"
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
     {"role": "user", "content": "c"}],
]  # fmt: skip
WITH_SYSTEM = [{"role": "system", "content": "be brief"}, *CHATS[1]]


def go(template: str, messages: list[dict[str, str]]) -> str:
    """The part of Go's text/template that these templates use, apart from the code under test."""
    tokens = re.split(r"(\{\{.*?\}\})", template)

    def block(place: int, message: dict[str, str] | None, live: bool) -> tuple[str, int]:
        text = ""
        while place < len(tokens):
            token = tokens[place]
            action = token[2:-2].strip() if token.startswith("{{") else None
            if action is None:
                text += token if live else ""
                place += 1
            elif action == ".Content":
                text += message["content"] if live and message else ""
                place += 1
            elif action.startswith('"'):
                text += action.strip('"') if live else ""
                place += 1
            elif action == "range .Messages":
                start, end = place + 1, place
                for chat_message in messages:
                    piece, end = block(start, chat_message, live)
                    text += piece
                place = end + 1
            elif action.startswith("if "):
                matched = False
                while True:
                    active = live and not matched and holds(tokens[place][2:-2].strip(), message)
                    piece, place = block(place + 1, message, active)
                    text += piece
                    matched = matched or active
                    if tokens[place] == "{{ end }}":
                        break
                place += 1
            else:  # the end of this block, or its next branch
                return text, place
        return text, place

    def holds(action: str, message: dict[str, str] | None) -> bool:
        role = re.search(r'"(\w+)"', action)
        assert role is not None
        if "ne (index .Messages 0).Role" in action:
            return messages[0]["role"] != role[1]
        return message is not None and message["role"] == role[1]

    return block(0, None, True)[0]


@pytest.mark.parametrize(
    ("template", "system"),
    [
        (CHATML, True),
        (LLAMA3, True),
        (GEMMA, False),
        (DEFAULT_SYSTEM, True),
        (MISTRAL, False),
        (BRACES, True),
    ],
)
def test_the_go_template_renders_the_same(template: str, system: bool) -> None:
    tokenizer = tiny_tokenizer(template=template)
    text = modelfile(tokenizer, source="model.gguf", stops=["<|im_end|>"])
    match = re.search(r'TEMPLATE """(.*?)"""', text, re.S)
    assert match is not None
    for chat in [*CHATS, *([WITH_SYSTEM] if system else [])]:
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert go(match[1], chat) == expected


@pytest.mark.parametrize("template", [SHOUTS, COUNTS])
def test_a_template_that_does_more_is_left_to_ollama(template: str) -> None:
    tokenizer = tiny_tokenizer(template=template)
    assert chat_pieces(tokenizer) is None
    text = modelfile(tokenizer, source="model.gguf", stops=[])
    assert "TEMPLATE" not in text
    assert "does more" in text


def test_the_start_token_is_not_put_twice() -> None:
    tokenizer = tiny_tokenizer(template=LLAMA3)
    with_bos, without = (chat_pieces(tokenizer, adds_bos=adds) for adds in (False, True))
    assert with_bos is not None and without is not None  # noqa: PT018
    assert with_bos.render(CHATS[0]) == "<s>" + without.render(CHATS[0])


def test_a_modelfile_names_model_and_stops(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    stops, adds_bos = stop_texts(folder, 320)
    assert (stops, adds_bos) == (["<|im_end|>"], False)
    text = modelfile(tiny_tokenizer(), source="model.gguf", stops=[*stops, 'say "x"\n'])
    lines: list[Any] = text.splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert text.endswith('PARAMETER stop """say "x"\n"""\n')  # Ollama takes escapes as they are
    assert modelfile(tiny_tokenizer(template=None), source="smollm2:135m", stops=[]) == (
        "FROM smollm2:135m\n"
    )
