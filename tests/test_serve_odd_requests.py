"""Requests at the edge of what fields allow, and adapters that no training should leave behind."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

from lighten.data import Message
from lighten.errors import UserError
from lighten.generation.adapter import read_factors
from lighten.models import configuration
from lighten.peft_config import CONFIG, FACTOR, WEIGHTS
from lighten.quantization.gguf_adapter import write_gguf_adapter
from lighten.serving import adapters
from lighten.serving.options import Options
from tests.serving import ADMIN, by_schema, client_of, save_adapter

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters `good`, and `huge`, whose numbers are finite until they are multiplied."""
    root = tmp_path_factory.mktemp("adapters")
    save_adapter(tiny_folder, root / "good", seed=1)
    changed(root / "good", root / "huge", lambda weights: {k: v * 1e30 for k, v in weights.items()})
    return root


def changed(
    source: Path, target: Path, change: Callable[[Weights], Weights] | None = None, **config: Any
) -> Path:
    """A copy with other weights or settings."""
    shutil.copytree(source, target)
    if change is not None:
        save_file(change(load_file(source / WEIGHTS)), target / WEIGHTS)
    settings = json.loads((source / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps({**settings, **config}))
    return target


@pytest.fixture(scope="module", params=["lighten", "llamacpp"])
def client(
    folder: Path,
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[httpx.Client]:
    # llama.cpp's flash attention, which a float32 cache does without, hides what is left in it.
    options = Options(
        engine=request.param, served_name="base", storage="f32", slots=2, threads=1,
        adapter_dir=folder, context=128,
    )  # fmt: skip
    with client_of(tiny_folder, tmp_path_factory.mktemp("cache"), options) as http:
        yield http


def complete(client: httpx.Client, **changes: Any) -> httpx.Response:
    body = {"model": "base", "prompt": "the answer", "max_tokens": 8, "temperature": 0, **changes}
    return client.post("/v1/completions", json=body)


def text(client: httpx.Client, **changes: Any) -> str:
    answer = complete(client, **changes)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_an_adapter_whose_numbers_overflow_is_told_and_spoils_no_other_answer(
    client: httpx.Client,
) -> None:
    prompts = ["the answer", "a question " * 6, "user " * 12]
    before = [text(client, prompt=prompt) for prompt in prompts]
    assert all(before)
    loaded = client.post(
        "/v1/load_lora_adapter", json={"lora_name": "huge", "lora_path": "huge"},
        headers={"Authorization": f"Bearer {ADMIN}"},
    )  # fmt: skip
    if loaded.status_code == 200:
        refused = [complete(client, model="huge", prompt="user " * 12, logprobs=2) for _ in "ab"]
    else:
        refused = [loaded]
    for answer in refused:
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] in ("model", "lora_path")
        assert "not finite" in answer.json()["error"]["message"]
    assert [text(client, prompt=prompt) for prompt in prompts] == before


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300])
def test_a_temperature_of_almost_nothing_takes_the_likeliest(
    client: httpx.Client, temperature: float
) -> None:
    assert text(client, temperature=temperature) == text(client)


def test_a_schema_without_end_is_refused(client: httpx.Client) -> None:
    pytest.importorskip("llguidance")
    schema = by_schema({"$ref": "#"})
    answer = complete(client, response_format=schema)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "response_format"
    assert len(answer.json()["error"]["message"]) < 200


def test_what_is_wrong_with_a_regular_expression_is_said(client: httpx.Client) -> None:
    pytest.importorskip("llguidance")
    schema = {"schema": {"type": "string", "pattern": "("}}
    answer = complete(client, response_format={"type": "json_schema", "json_schema": schema})
    assert answer.status_code == 400, answer.text
    assert "unclosed group" in answer.json()["error"]["message"]


def test_tokens_of_clients_that_hang_up_are_counted(client: httpx.Client) -> None:
    def generated() -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith("lighten_generated_tokens_total")
        )

    before = generated()
    ends = {str(token): -100 for token in range(5)}
    body = {"model": "base", "prompt": "a", "max_tokens": 120, "stream": True, "logit_bias": ends}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 20
    while generated() == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert before < generated() <= before + 120


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda weights: {k: v * math.nan for k, v in weights.items()}, {}, "not finite"),
        (lambda _: {}, {}, "holds no weights"),
        (None, {"r": 8}, "have rank 4 and adapter_config.json says 8"),
        (None, {"rank_pattern": {"q_proj": 2}}, "have rank 4 and adapter_config.json says 2"),
    ],
    ids=["nan", "empty", "rank", "pattern"],
)
def test_a_broken_adapter_is_refused_by_both_readers(
    folder: Path, tiny_folder: Path, tmp_path: Path, change: Any, config: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    layers = {m["path"] for key in load_file(folder / "good" / WEIGHTS) if (m := FACTOR.match(key))}
    assert read_factors(folder / "good", layers)[0]
    broken = changed(folder / "good", tmp_path / "broken", change, **config)
    with pytest.raises(UserError, match=message):
        read_factors(broken, layers)
    base = configuration.read_config(tiny_folder)
    with pytest.raises(UserError, match=message):
        write_gguf_adapter(broken, base, tmp_path / "adapter.gguf")


def test_a_template_beside_an_adapter_is_taken_without_a_tokenizer(
    folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    base = adapters.open_base(str(tiny_folder))
    own = changed(folder / "good", tmp_path / "own")
    (own / "chat_template.jinja").write_text("Q: {{ messages[0].content }} A:")
    asking = adapters.open_adapter("it", own, base).asking
    ids = asking.conversation([Message("user", "the answer")])
    assert asking.tokenizer.decode(ids) == "Q: the answer A:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "the chat template writes nothing of these messages"),
        ("{{ raise_exception('no') }}", "the chat template refuses this conversation: no"),
    ],
    ids=["empty", "refuses"],
)
def test_what_a_template_does_not_write_is_told(
    client: httpx.Client, folder: Path, template: str, message: str
) -> None:
    empty = changed(folder / "good", folder / "empty")
    (empty / "chat_template.jinja").write_text(template)
    loaded = client.post(
        "/v1/load_lora_adapter", json={"lora_name": "empty", "lora_path": "empty"},
        headers={"Authorization": f"Bearer {ADMIN}"},
    )  # fmt: skip
    assert loaded.status_code == 200, loaded.text
    shutil.rmtree(empty)
    body = {"model": "empty", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    answer = client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert answer.json()["error"]["message"] == message


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"load_inplace": True, "lora_int_id": None}, 200), ({"load_inplace": False}, 400),
        ({"lora_name": "unknown", "load_inplace": False}, 200), ({"load_inplace": "no"}, 400),
    ],
)  # fmt: skip
def test_vllms_word_for_loading_anew_is_known(
    client: httpx.Client, more: dict[str, Any], status: int
) -> None:
    answer = client.post(
        "/v1/load_lora_adapter", json={"lora_name": "known", "lora_path": "good", **more},
        headers={"Authorization": f"Bearer {ADMIN}"},
    )  # fmt: skip
    assert answer.status_code == status, answer.text


def test_metrics_of_an_adapter_end_with_it(client: httpx.Client) -> None:
    """Where adapters come and go under new names the page would grow for ever."""
    headers = {"Authorization": f"Bearer {ADMIN}"}
    for name in ("going", "staying"):
        body = {"lora_name": name, "lora_path": "good"}
        client.post("/v1/load_lora_adapter", json=body, headers=headers)
        text(client, model=name)
    assert '{model="going"}' in client.get("/metrics").text
    client.post("/v1/unload_lora_adapter", json={"lora_name": "going"}, headers=headers)
    page = client.get("/metrics").text
    assert '"going"' not in page
    assert '{model="staying"}' in page


def chat(client: httpx.Client, **changes: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "the answer"}]
    body = {"model": "base", "messages": messages, "max_tokens": 2, **changes}
    return client.post("/v1/chat/completions", json=body)


def test_a_client_chooses_whether_an_answer_begins_with_a_thought(
    client: httpx.Client, folder: Path
) -> None:
    """By vLLM's name for it; what else a template may know is not applied."""
    own = changed(folder / "good", folder / "thinking")
    (own / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{% if enable_thinking %} the user{% endif %}"
    )
    client.post(
        "/v1/load_lora_adapter", json={"lora_name": "thinking", "lora_path": "thinking"},
        headers={"Authorization": f"Bearer {ADMIN}"},
    )  # fmt: skip
    shutil.rmtree(own)

    def tokens(**options: Any) -> int:
        answer = chat(client, model="thinking", **options)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    plain = tokens()
    assert tokens(chat_template_kwargs={"enable_thinking": False}) == plain
    assert tokens(chat_template_kwargs={"enable_thinking": True}) > plain
    assert tokens(chat_template_kwargs=None) == tokens(chat_template_kwargs={}) == plain
    refused = chat(client, chat_template_kwargs={"reasoning": 1})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "chat_template_kwargs.reasoning"


def test_a_system_message_may_be_all_that_is_said(client: httpx.Client) -> None:
    assert chat(client, messages=[{"role": "system", "content": "the answer"}]).status_code == 200


def test_ends_of_answers_that_are_no_tokens_are_refused(
    folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    base = adapters.open_base(str(tiny_folder))
    broken = changed(folder / "good", tmp_path / "broken")
    for ends, refused in ((5, False), ([5, 6], False), ("x", True), ([5, None], True)):
        (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        if refused:
            with pytest.raises(UserError, match="eos_token_id"):
                adapters.open_adapter("it", broken, base)
        else:
            stops = adapters.open_adapter("it", broken, base).asking.stop_ids
            assert {ends} <= stops if isinstance(ends, int) else set(ends) <= stops
