"""lm-eval's `local-completions` at our server, against its `hf` model with the same adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from peft import PeftModel

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")
pytest.importorskip("lm_eval")
pytest.importorskip("aiohttp")
pytest.importorskip("tenacity")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

from lighten import models
from lighten.serving.options import Options
from tests.caches import new_cache
from tests.serving import client_of, client_of_two, save_adapters
from tests.tiny import save_tiny, tiny_tokenizer

CONTEXTS = ("the answer is", "the user asks the system a question", "서울은", "")
ENDS = (" the question", " a user", " 어디", "</s>")
PART = "\N{REPLACEMENT CHARACTER}"
PAIRS = [(context, end) for context in CONTEXTS for end in ENDS]


@pytest.fixture(scope="module")
def adapters(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(tiny_folder, tmp_path_factory.mktemp("adapters")) / "inside"


@pytest.fixture(scope="module")
def client(
    tiny_folder: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    cache = new_cache(tmp_path_factory.mktemp("cache"))
    with client_of_two(tiny_folder, adapters, cache) as http:
        yield http


def in_thread(ask: Callable[[list[Instance]], list[Any]], asked: list[Instance]) -> list[Any]:
    """What lm-eval is told; it begins an event loop, and Playwright's may be in this thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(ask, asked).result()


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]


@pytest.mark.parametrize("settings", [{}, {"batch_size": 3}, {"num_concurrent": 3}], ids=str)
@pytest.mark.parametrize("name", ["base", "one", "two"])
def test_lm_eval_scores_an_adapter_through_the_server_as_in_peft(
    name: str, settings: dict[str, Any], client: httpx.Client, tiny_folder: Path, adapters: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Likelihoods of continuations and of whole texts, and answers."""
    monkeypatch.setattr(logging.getLogger("lm_eval"), "disabled", True)
    base = models.load(str(tiny_folder), dtype="float32")
    reference: Any = base.model
    if name != "base":
        reference = PeftModel.from_pretrained(reference, str(adapters / name)).eval()
    hf = HFLM(pretrained=reference, tokenizer=base.tokenizer, device="cpu", max_length=128)
    beside = adapters / "two"  # as a run's adapters have it
    served = LocalCompletionsAPI(
        model=name, base_url=f"{client.base_url}/v1/completions",
        tokenizer=str(beside if name == "two" else tiny_folder), max_length=128, **settings,
    )  # fmt: skip
    pairs = requests("loglikelihood", PAIRS)
    for ours, theirs in zip(
        in_thread(served.loglikelihood, pairs), hf.loglikelihood(pairs), strict=True
    ):
        assert ours[0] == pytest.approx(theirs[0], abs=2e-2)
        assert ours[1] == theirs[1]
    texts = requests("loglikelihood_rolling", [(" ".join(CONTEXTS * 4),), ("the user",)])
    rolled = zip(
        in_thread(served.loglikelihood_rolling, texts), hf.loglikelihood_rolling(texts), strict=True
    )
    for ours, theirs in rolled:
        assert ours == pytest.approx(theirs, rel=2e-4)  # of a hundred tokens
    how = {"until": ["question"], "max_gen_toks": 8, "do_sample": False}
    asked = requests("generate_until", [(context, how) for context in CONTEXTS[:3]])
    for ours, theirs in zip(
        in_thread(served.generate_until, asked), hf.generate_until(asked), strict=True
    ):
        # A part of a character at the end is not shown here.
        assert ours.rstrip(PART) == theirs.rstrip(PART)


def test_a_token_that_begins_texts_is_asked_for(tmp_path: Path) -> None:
    """What `hf` models do by themselves."""
    folder = save_tiny(tmp_path / "base")
    tiny_tokenizer(add_bos=True).save_pretrained(folder)
    base = models.load(str(folder), dtype="float32")
    hf = HFLM(pretrained=base.model, tokenizer=base.tokenizer, device="cpu", max_length=128)
    options = Options(engine="lighten", served_name="base", storage="f32", slots=2, context=128)
    pairs = requests("loglikelihood", PAIRS)
    expected = hf.loglikelihood(pairs)
    with client_of(folder, new_cache(tmp_path / "cache"), options) as http:
        served = LocalCompletionsAPI(
            model="base", base_url=f"{http.base_url}/v1/completions", tokenizer=str(folder),
            max_length=128, add_bos_token=True,
        )  # fmt: skip
        scores = in_thread(served.loglikelihood, pairs)
    for ours, theirs in zip(scores, expected, strict=True):
        assert ours == (pytest.approx(theirs[0], abs=1e-3), theirs[1])
