"""Parts of a server without one: an adapter as it was trained, what is refused, stop texts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, ByteLevel, Fuse, Replace, Sequence, Strip
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import lighten.api
from lighten import data, models
from lighten.errors import UserError
from lighten.models.same import names_another
from lighten.peft_config import CONFIG
from lighten.quantization.gguf_adapter import write_gguf_adapter
from lighten.serving import adapters
from lighten.serving.engine import Adapter, Generation
from lighten.serving.options import Options
from lighten.serving.running import prepare
from lighten.serving.stopping import StopTexts
from lighten.serving.texts import Texts
from tests.conftest import HUB_COMMIT
from tests.serving import save_adapter, save_adapters
from tests.tiny import CHATML, save_tiny, tiny_tokenizer


def test_trap_18_a_served_run_is_asked_as_it_was_trained(chat_file: Path, tmp_path: Path) -> None:
    """Prompt ids of the server are those before the answers that training saw."""
    base_folder = save_tiny(tmp_path / "base")
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, *json.loads(line)["messages"]]}
        for line in chat_file.read_text().splitlines()
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    template = CHATML.replace("<|im_start|>", "<|im_start|>> ")
    (tmp_path / "other.jinja").write_text(template)
    run = lighten.train(
        model=str(base_folder), dataset=str(file), output_dir=str(tmp_path / "run"), max_steps=1,
        chat_template=str(tmp_path / "other.jinja"), system_role="fold", progress=False,
    )  # fmt: skip
    base = adapters.open_base(str(base_folder))
    ((_, path),) = adapters.resolve([str(tmp_path / "run")]).items()
    served = adapters.open_adapter("it", path, base).asking
    tokenizer = models.load_tokenizer(str(base_folder))
    tokenizer.chat_template = template
    examples = data.read(str(file)).examples
    trained = data.encode(examples, tokenizer, max_length=1000, system_role="fold").rows
    assert run.recipe().system_role == "fold"
    for example, row in zip(examples, trained, strict=True):
        prompt_length = list(row.supervised).index(True)
        assert served.conversation(example.messages[:-1]) == list(row.input_ids)[:prompt_length]


def test_what_cannot_be_served_is_said_before_anything_starts(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path))
    folder = save_adapters(tiny_folder, tmp_path / "adapters")

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            lighten.api.serve(str(tiny_folder), port=0, log=lambda _: None, **options)

    refused("dora.*merge", adapters=[str(folder / "inside" / "dora")])
    refused("does not exist", adapters=["nowhere"])
    refused("nowhere does not exist", adapters={"a": Path("nowhere")})
    refused("nowhere does not exist", adapters="nowhere")
    spaced = shutil.copytree(folder / "inside" / "one", tmp_path / "민지 말투")
    refused(f"cannot be the name of a model; .*: NAME='{spaced}'", adapters=[str(spaced)])
    planned, _ = lighten.api.plan_server(tiny_folder, adapters=[folder / "inside" / "one"])
    assert planned.adapters == 1
    refused("runs/nowhere does not exist; give an adapter's folder", adapters=["a=runs/nowhere"])
    with pytest.raises(UserError, match=f"lighten serve {tiny_folder} --adapters .*one"):
        lighten.api.serve(folder / "inside" / "one", log=lambda _: None)
    spaced = shutil.copytree(folder / "inside" / "one", tmp_path / "내 adapter")
    with pytest.raises(UserError, match=f"lighten serve {tiny_folder} --adapters '{spaced}'"):
        lighten.api.serve(str(spaced), log=lambda _: None)
    refused("two adapters are called", adapters=[f"a={folder / 'inside' / 'one'}"] * 2)
    refused("api-key", host="0.0.0.0")
    refused("adapter-dir", admin_keys=["key"])
    refused("needs --admin-key.*--adapters", adapter_dir=folder / "inside")
    refused("positions", context=10_000)
    refused("storage", storage="q3")
    refused("engine", engine="nothing")
    refused("gpu-layers is for --engine llamacpp", engine="lighten", gpu_layers=4)
    other_base = save_tiny(tmp_path / "other", "phi3")
    alien = save_adapter(other_base, tmp_path / "alien", seed=1)
    refused("alien.*(base|model)", adapters=[str(alien)])


HUB = "meta-llama/Llama-3.1-8B-Instruct"
CACHED = "hub/models--meta-llama--Llama-3.1-8B-Instruct/snapshots/abc"


@pytest.mark.parametrize(
    ("recorded", "name", "folder", "configured", "another"),
    [
        (HUB, "meta-llama/Llama-3.1-8B", "m", None, True),  # not the one that was tuned on chats
        ("Qwen/Qwen2.5-7B", HUB, "m", None, True),
        ("/data/hub/models--Qwen--Qwen2.5-7B/snapshots/1", HUB, "m", None, True),
        ("Qwen/Qwen2.5-7B", None, "m", HUB, True),
        ("Qwen/Qwen2.5-7B", None, CACHED, None, True),
        (HUB, HUB.lower(), "m", None, False),
        ("unsloth/Llama-3.1-8B-Instruct-bnb-4bit", HUB, "m", None, False),
        (HUB, None, "Llama-3.1-8B-Instruct", None, False),
        (HUB, None, "Llama-3.1-8B-Instruct", "else/something", False),
        (HUB, None, CACHED, None, False),
        (HUB, None, "m", None, False),  # what lies in a folder, nothing tells
        ("/somewhere/else", HUB, "m", None, False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m", "m", None, False),
        ("Qwen/Qwen2.5-0.5B", "smollm2-135m", "m", None, True),
        (None, HUB, "m", None, False),
        ("", HUB, "m", None, False),
    ],
)
def test_a_base_of_another_name_is_told_from_another_place(
    recorded: str | None, name: str | None, folder: str, configured: str | None, another: bool,
    tmp_path: Path,
) -> None:  # fmt: skip
    place = tmp_path / folder
    place.mkdir(parents=True)
    if configured is not None:
        (place / "config.json").write_text(json.dumps({"_name_or_path": configured}))
    assert names_another(recorded, name or str(place), place) == another


def test_an_adapter_that_names_another_base_is_served_with_a_warning(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base_folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    config = json.loads((base_folder / "config.json").read_text())
    (base_folder / "config.json").write_text(json.dumps({**config, "_name_or_path": HUB}))
    base = adapters.open_base(str(base_folder))
    adapter = save_adapter(base_folder, tmp_path / "adapter", seed=1)
    settings = json.loads((adapter / CONFIG).read_text())
    for recorded, warned in ((HUB, False), ("Qwen/Qwen2.5-7B", True), (str(tiny_folder), False)):
        caplog.clear()
        named = {**settings, "base_model_name_or_path": recorded}
        (adapter / CONFIG).write_text(json.dumps(named))
        assert adapters.open_adapter("it", adapter, base).name == "it"
        assert (f"names {recorded} as its base" in caplog.text) == warned


def test_adapters_with_the_same_tokenizer_share_it(tiny_folder: Path, tmp_path: Path) -> None:
    """Hundreds of them take the memory of one; a template of its own is an adapter's alone."""
    base = adapters.open_base(str(tiny_folder))
    plain = save_adapter(tiny_folder, tmp_path / "plain", seed=1)
    folders = {name: Path(shutil.copytree(plain, tmp_path / name)) for name in ("a", "b", "c", "d")}
    for name in ("a", "b", "c"):
        models.load_tokenizer(str(tiny_folder)).save_pretrained(folders[name])
    for name in ("c", "d"):
        (folders[name] / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    opened = {
        name: adapters.open_adapter(name, folder, base)
        for name, folder in {**folders, "plain": plain}.items()
    }
    tokenizers = {name: model.asking.tokenizer for name, model in opened.items()}
    assert tokenizers["a"] is tokenizers["b"]
    core = base.asking.tokenizer.backend_tokenizer
    assert tokenizers["d"].backend_tokenizer is tokenizers["plain"].backend_tokenizer is core
    templates = {name: tokenizer.chat_template for name, tokenizer in tokenizers.items()}
    assert templates["c"] == templates["d"] != templates["plain"]
    assert templates["a"] == templates["plain"] == base.asking.tokenizer.chat_template
    del opened, tokenizers
    assert not base.tokenizers


def test_a_chat_template_is_the_bases_and_of_adapters_that_bring_none(
    tiny_folder: Path, tmp_path: Path
) -> None:
    base = adapters.open_base(str(tiny_folder), chat_template="plain")
    folder = save_adapter(tiny_folder, tmp_path / "adapter", seed=1)
    messages = [data.Message("user", "the answer")]
    plain = base.asking.conversation(messages)
    assert plain != adapters.open_base(str(tiny_folder)).asking.conversation(messages)
    assert adapters.open_adapter("it", folder, base).asking.conversation(messages) == plain
    models.load_tokenizer(str(tiny_folder)).save_pretrained(folder)
    assert adapters.open_adapter("it", folder, base).asking.conversation(messages) != plain
    with pytest.raises(UserError, match="chat_template"):
        adapters.open_base(str(tiny_folder), chat_template="nowhere.jinja")


def test_a_template_that_was_chosen_for_a_base_without_one_is_said(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", template=None)
    lines: list[str] = []
    prepare(str(base), Options(engine="lighten"), lines.append)
    prepare(str(base), Options(engine="lighten", chat_template="plain"), lines.append)
    told = [line for line in lines if line.startswith("chat template")]
    choice = data.choose_template(models.load_tokenizer(str(base)), None)
    assert told == [f"chat template: {choice.name}, {choice.reason}"]


def test_an_adapter_takes_the_tokenizer_of_the_revision_that_is_served(
    hub_model: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """Here the only one that is on this machine."""
    (tmp_path / "hub" / "models--someone--tiny" / "refs" / "main").unlink()
    base = adapters.open_base(hub_model, revision=HUB_COMMIT)
    folder = save_adapter(tiny_folder, tmp_path / "adapter", seed=1)
    asked = adapters.open_adapter("it", folder, base).asking
    assert asked.text("the user") == base.asking.text("the user")


def test_an_adapter_of_the_hub_is_given_by_its_id(
    hub_model: str, tiny_folder: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "hub" / "models--someone--helper"
    snapshot = repository / "snapshots" / HUB_COMMIT
    save_adapter(tiny_folder, snapshot, seed=1)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(HUB_COMMIT)
    assert adapters.resolve(["someone/helper"]) == {"helper": snapshot}
    assert adapters.resolve(["sql=someone/helper"]) == {"sql": snapshot}
    for name in ("someone/nothing", hub_model):
        with pytest.raises(UserError, match=name):
            adapters.resolve([name])


def test_stop_texts_across_pieces() -> None:
    stops = StopTexts(["END", "ab"])
    assert [stops.take(piece) for piece in ("xE", "N", "x", "a")] == ["x", "", "ENx", ""]
    assert not stops.stopped
    assert stops.take("b tail") == ""
    assert stops.stopped
    open_end = StopTexts(["END"])
    assert open_end.take("the EN") + open_end.rest() == "the EN"


def test_a_row_of_the_model_beyond_the_last_token_writes_nothing() -> None:
    tokenizer = tiny_tokenizer()
    texts = Texts(tokenizer)
    beyond = texts.token_logprob(len(tokenizer), -1.0, [(len(tokenizer) + 7, -2.0)])
    assert [(token.text, token.bytes) for token in (beyond, *beyond.top)] == [("", ())] * 2
    assert texts.stream(()).text(len(tokenizer)) == ""


def test_characters_of_several_tokens_are_shown_whole_and_end_an_answer_as_one() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("가나🙂다", add_special_tokens=False)["input_ids"]
    assert len(ids) == len("가나🙂다".encode())  # a token each byte
    stream, stops = Texts(tokenizer).stream(()), StopTexts(["🙂다"])
    pieces = [stream.text(token) for token in ids]
    assert [piece for piece in pieces if piece] == ["가", "나", "🙂", "다"]
    assert "".join(map(stops.take, pieces)) == "가나"
    assert stops.stopped


def test_a_token_that_ends_a_character_and_begins_another_shows_the_first_at_the_end() -> None:
    """Large vocabularies have such, of Cyrillic letters for one."""
    letters = bytes_to_unicode()
    *begin, end = (letters[byte] for byte in "жб".encode())
    core = Tokenizer(WordLevel({"a": 0, "".join(begin): 1, end: 2}, "a"))
    core.decoder = ByteLevel()
    texts = Texts(PreTrainedTokenizerFast(tokenizer_object=core))
    for tokens, shown, rest in (
        ((0, 1, 2, 0), "aжбa", ""), ((0, 1), "a", "ж"), ((1, 2), "жб", ""), ((1, 2, 1), "жб", "ж"),
        ((1, 0), "ж\N{REPLACEMENT CHARACTER}a", ""), ((0, 2), "a", "\N{REPLACEMENT CHARACTER}"),
    ):  # fmt: skip
        stream = texts.stream(())
        assert "".join(stream.text(token) for token in tokens) == shown
        assert stream.rest() == rest


def test_a_byte_that_is_invalid_after_a_whole_character_is_a_sign_for_what_is_none() -> None:
    """Decoders of bytes take a run of them as one: the invalid one changes what was shown."""
    pieces = ["a", *(f"<0x{byte:02X}>" for byte in "가나\n".encode()), "\u2581b"]
    core = Tokenizer(WordLevel({piece: number for number, piece in enumerate(pieces)}, "a"))
    core.decoder = Sequence([Replace("\u2581", " "), ByteFallback(), Fuse()])
    texts = Texts(PreTrainedTokenizerFast(tokenizer_object=core))
    a, ga, na, line, b = [0], [1, 2, 3], [4, 5, 6], [7], [8]
    for tokens, expected in (
        (a + ga + ga[:1] + b + a, "a가\N{REPLACEMENT CHARACTER} ba"),
        (ga + ga[:1] + b + na + b, "가\N{REPLACEMENT CHARACTER} b나 b"),
        (line + ga[:1] + a + na, "\n\N{REPLACEMENT CHARACTER}a나"),
        (ga + ga[1:2] + na + b, "가\N{REPLACEMENT CHARACTER}나 b"),
        (ga + na[:2], "가"),  # an answer that its limit ends within a character
        (ga + na + b, "가나 b"),
    ):  # fmt: skip
        stream = texts.stream(())
        assert "".join(map(stream.text, tokens)) + stream.rest() == expected
        assert "".join(texts.whole(tokens)[0]) == expected


def test_a_completion_goes_on_with_the_space_that_a_text_would_not_begin_with() -> None:
    """Decoders as Llama 2's, Mistral's and Phi-3's leave out the first of what they are given."""
    core = Tokenizer(WordLevel({"\u2581is": 0, "\u2581a": 1, "<0xEA>": 2, "b": 3}, "b"))
    core.decoder = Sequence(
        [Replace("\u2581", " "), ByteFallback(), Fuse(), Strip(content=" ", left=1)]
    )
    texts = Texts(PreTrainedTokenizerFast(tokenizer_object=core))
    for prompt, shown in (((), "a is"), ((0,), " a is"), ((0, 2), "a is"), ((2, 0), " a is")):
        stream = texts.stream((), prompt)
        assert "".join(map(stream.text, (1, 0))) == shown
    asked = Generation((0,), None, 1, continues=True)
    assert texts.stream_of(asked).text(1) == texts.token_logprob(1, -1.0, ()).text == " a"
    assert texts.stream_of(dataclasses.replace(asked, continues=False)).text(1) == "a"


def test_an_adapters_file_for_llama_cpp_is_that_of_the_base_that_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers fit a base with other heads as well, whose rows are in another order there."""
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
    heads = {"four": (4, 2), "two": (2, 1)}
    bases = {
        name: adapters.open_base(
            str(save_tiny(tmp_path / name, num_attention_heads=query, num_key_value_heads=key))
        )
        for name, (query, key) in heads.items()
    }
    folder = save_adapter(bases["four"].folder, tmp_path / "it", seed=1)
    adapter = Adapter(adapters.fingerprint(folder), folder)
    for name in ("four", "two", "four"):
        written = adapters.adapter_as_gguf(adapter, bases[name])
        write_gguf_adapter(folder, bases[name].config, tmp_path / "expected.gguf")
        assert written.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    of_head = save_adapter(
        bases["four"].folder, tmp_path / "head", seed=1, target_modules=("lm_head",)
    )
    head = Adapter(adapters.fingerprint(of_head), of_head)
    adapters.adapter_as_gguf(head, bases["four"])
    with pytest.raises(UserError, match="shares with its word embeddings"):
        adapters.adapter_as_gguf(head, adapters.open_base(str(tied)))
