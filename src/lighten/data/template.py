"""Which chat template a run uses: the model's own, or a named one for a base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.errors import UserError
from lighten.paths import exists, expanded

NAMED = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
        " + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token if bos_token else '' }}{% for message in messages %}"
        "{% if message['role'] == 'system' or message['role'] == 'developer' %}"
        "{{ message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'tool' %}"
        "{{ '### Input:\n' + message['content'] + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "plain": (
        "{{ bos_token if bos_token else '' }}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    ),
}


@dataclass(frozen=True)
class TemplateChoice:
    """The template of a run.

    Attributes:
        name: `model`, one of the named ones, a file's name, or `recipe` for a recipe's text.
        text: The Jinja text, now set on the tokenizer.
        reason: Why this one.
    """

    name: str
    text: str
    reason: str


def choose_template(tokenizer: Any, requested: str | None) -> TemplateChoice:
    """Choose the chat template and set it on the tokenizer.

    Args:
        tokenizer: Its own template is taken unless another is asked for.
        requested: A named template, a `.jinja` file, a template's text, or None.

    Raises:
        UserError: The file does not exist, or the name is unknown.
    """
    model_template = tokenizer.chat_template
    model_template = (
        model_template.get("default") if isinstance(model_template, dict) else model_template
    )
    if requested is None and model_template:
        choice = TemplateChoice("model", model_template, "the model's own chat template")
    elif requested is None:
        # chatml ends a turn with a token of its own; without it the model could not learn to stop.
        name = "chatml" if "<|im_end|>" in tokenizer.all_special_tokens else "alpaca"
        why = "the model has no chat template; "
        why += "it has chatml's tokens" if name == "chatml" else "alpaca needs no special tokens"
        choice = TemplateChoice(name, NAMED[name], why)
    elif requested in NAMED:
        instead = " in place of the model's own" if model_template else ""
        choice = TemplateChoice(requested, NAMED[requested], f"the recipe asks for it{instead}")
    elif "{{" in requested or "{%" in requested:
        choice = TemplateChoice("recipe", requested, "the recipe holds it")
    elif exists(file := expanded(requested)) and file.is_file():
        choice = TemplateChoice(file.name, _read(file), "the recipe names this file")
    else:
        raise UserError(
            f"chat_template: {requested!r} is neither one of {', '.join(NAMED)} nor a file"
        )
    tokenizer.chat_template = choice.text
    return choice


def _read(file: Path) -> str:
    try:
        # Editors on Windows put a byte order mark in front, which would begin every prompt.
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"chat_template: cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"chat_template: {file} is not UTF-8 text; save it as UTF-8") from error
