"""Chat templates that know tools, each writing calls as a family of models does."""

from __future__ import annotations

_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_HERMES_CALLS = (
    "{% for c in m.tool_calls %}{% if not loop.first or m.content %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
)
_HERMES_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}"
    "{% for t in tools %}{{ t | tojson }}{{ '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
)
# Qwen2.5 and Hermes.
HERMES = (
    _HERMES_TOOLS + "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.tool_calls %}{{ '<|im_start|>assistant\n' + m.content }}" + _HERMES_CALLS
    + "{{ '<|im_end|>\n' }}{% else %}" + _TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
# Qwen3: an empty thought before the last answer, and before one that is asked for without.
QWEN3 = (
    _HERMES_TOOLS + "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last and '<think>' not in m.content %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}{% if m.tool_calls %}" + _HERMES_CALLS + "{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}" + _TURN + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)  # fmt: skip
_LLAMA_TURN = "{{ '<|im_start|>' + m.role + '\n\n' + m.content + '<|im_end|>' }}"
# Llama 3.1 and 3.2: no mark, and one call alone.
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' and loop.first and tools %}"
    "{{ '<|im_start|>user\n\nAnswer with JSON for a function call.\n' }}"
    "{% for t in tools %}{{ t | tojson(indent=4) }}{{ '\n' }}{% endfor %}"
    "{{ m.content + '<|im_end|>' }}{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>ipython\n\n' }}{{ m.content | tojson }}{{ '<|im_end|>' }}"
    "{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}{{ '<|im_start|>assistant\n\n' }}"
    '{{ \'{"name": "\' + f.name + \'", "parameters": \' }}{{ f.arguments | tojson }}'
    "{{ '}<|im_end|>' }}{% else %}" + _LLAMA_TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
_MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.last or tools and"
    " loop.index == 1 %}{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}"
    "{{ '[/AVAILABLE_TOOLS]' }}{% endif %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' }}{{ m.content | tojson }}"
    "{{ '}[/TOOL_RESULTS]' }}{% elif m.tool_calls %}CALLS{{ '<|im_end|>' }}"
    "{% else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
# Mistral's older models: all calls in one list, with their ids.
MISTRAL = _MISTRAL.replace(
    "CALLS",
    "{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    '{% endif %}{{ \'{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ ', \"id\": \"' + c.id + '\"}' }}"
    "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' }}",
)
# Its newer ones: each call after a mark of its own.
MISTRAL_NEW = _MISTRAL.replace(
    "CALLS",
    "{% for c in m.tool_calls %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' }}"
    "{{ c.function.arguments | tojson }}{% endfor %}",
)
# DeepSeek's marks, around calls in blocks of JSON.
BLOCKS = HERMES.replace(
    _HERMES_CALLS,
    "{{ '<|calls|>' }}{% for c in m.tool_calls %}{{ '<|call|>function<|sep|>' + c.function.name }}"
    "{{ '\n```json\n' }}{{ c.function.arguments | tojson }}{{ '\n```<|end_call|>' }}{% endfor %}"
    "{{ '<|end_calls|>' }}",
)
# Qwen3.5's and Nemotron's, arguments one by one; and GLM's.
XML = HERMES.replace(
    _HERMES_CALLS,
    "{% for c in m.tool_calls %}{% if not loop.first or m.content %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n<function=' + c.function.name + '>\n' }}"
    "{% for k, v in c.function.arguments.items() %}{{ '<parameter=' + k + '>\n' }}"
    "{{ v if v is string else (v | tojson if v is mapping or v is iterable else v | string) }}"
    "{{ '\n</parameter>\n' }}{% endfor %}{{ '</function>\n</tool_call>' }}{% endfor %}",
)
KEYS = HERMES.replace(
    _HERMES_CALLS,
    "{% for c in m.tool_calls %}{{ '\n<tool_call>' + c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}{{ '\n<arg_key>' + k + '</arg_key>' }}"
    "{{ '\n<arg_value>' }}{{ v if v is string else v | tojson }}{{ '</arg_value>' }}"
    "{% endfor %}{{ '\n</tool_call>' }}{% endfor %}",
)
# Calls as Python, which is not read here; and a template that leaves tools out.
PYTHONIC = HERMES.replace(
    _HERMES_CALLS,
    "[{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in c.function.arguments.items()"
    " %}{{ k }}={{ v | tojson }}{% endfor %}){% endfor %}]",
)
FORMATS = {
    "hermes": HERMES, "qwen3": QWEN3, "llama": LLAMA, "mistral": MISTRAL,
    "mistral new": MISTRAL_NEW, "blocks": BLOCKS, "xml": XML, "keys": KEYS,
}  # fmt: skip
