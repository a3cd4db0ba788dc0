"""A conversation as text, by the tokenizer's chat template.

`apply_chat_template` looks at every value of a conversation three times before the template sees
it, since values may be anything; that takes longer than the template itself. A conversation of
plain texts goes to the compiled template at once. That both write the same is compared on the first
conversations of each template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from lighten.data.examples import Message

# As many conversations are rendered both ways before the short way is taken alone.
COMPARED = 32


class _Compiled:
    """A tokenizer's chat template, compiled.

    Attributes:
        text: The template.
        template: None where it cannot be rendered the short way.
        compared: How many conversations came out alike.
    """

    def __init__(self, text: str) -> None:
        from transformers.utils import chat_template_utils

        self.text = text
        # transformers' own sandbox and filters; not among its public names.
        compiler = getattr(chat_template_utils, "_compile_jinja_template", None)
        self.template: Any = compiler(text) if compiler is not None else None
        if self.template is not None:
            # Jinja copies them for each conversation; a chain of dictionaries, as it keeps them,
            # takes it a third of the whole rendering.
            self.template.globals = dict(self.template.globals)
        self.compared = 0


_COMPILED: WeakKeyDictionary[Any, _Compiled] = WeakKeyDictionary()


def rendered(messages: Sequence[Message], tokenizer: Any, options: Mapping[str, Any]) -> str:
    """The conversation as text, as `apply_chat_template` writes it.

    Args:
        messages: The conversation.
        tokenizer: With its chat template chosen.
        options: As `apply_chat_template` takes them.

    Raises:
        Exception: Whatever the template or transformers raises.
    """
    compiled = None
    if isinstance(tokenizer.chat_template, str) and messages and not any(options.values()):
        compiled = _COMPILED.get(tokenizer)
        if compiled is None or compiled.text != tokenizer.chat_template:
            compiled = _COMPILED[tokenizer] = _Compiled(tokenizer.chat_template)
    if compiled is None or compiled.template is None or any(m.extra for m in messages):
        return _apply_template(messages, tokenizer, options)
    text: str = compiled.template.render(
        messages=[{"role": message.role, "content": message.content} for message in messages],
        tools=None,
        documents=None,
        add_generation_prompt=False,
        **tokenizer.special_tokens_map,
    )
    if compiled.compared < COMPARED:
        expected = _apply_template(messages, tokenizer, options)
        if text != expected:
            compiled.template = None
            return expected
        compiled.compared += 1
    return text


def _apply_template(messages: Sequence[Message], tokenizer: Any, options: Mapping[str, Any]) -> str:
    text: str = tokenizer.apply_chat_template(
        [message.for_template() for message in messages], tokenize=False, **options
    )
    return text
