"""The tokenizer of a GGUF file gives the ids of the model's own tokenizer, kind by kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lighten.errors import UserError
from lighten.gguf_names import PATTERNS, SPLITTINGS, WHOLE_WORDS
from lighten.models.gguf import converted, read_tokenizer
from lighten.quantization import gguf_tokenizer
from lighten.quantization.gguf_model import write_gguf
from lighten.quantization.llamacpp import Runtime
from tests.tiny import tiny_model

ROWS = 700
CORPUS = [
    "The question is whether it's the answer, isn't it? We'll see: 3.14159 and 1234567 apples.",
    "def add(left, right):\n    return left + right\n\n\nclass Point:\n\tpass\r\n",
    "Größe, naïve café; Ελληνικά, русский язык, 한국어 문장, 日本語のテキスト, عربى",
    "CamelCaseWords and SHOUTING WORDS, don't you think? they'Re HERE. it's, it'S",
]  # fmt: skip
TEXTS = [
    *CORPUS,
    "the question", " the question", "  two spaces  before\n\n and after   ", "\n\n\n", "a\tb\r\n",
    "12345 67 8", "x=1;y=22;z=333", "spaces before   1  23", "I'd've SAID'd it's THE'LL",
    "🦙 llamas \U0001f469\u200d\U0001f469\u200d\U0001f467", "e\u0301 vs \u00e9",
    "<s>the answer</s> after", "word<|im_end|>word", "x.append(1).sort() ->\r\n#include <a.h>",
    "混合12345文字ひらがなカタカナ、漢字。 한글abc +=<>€ ½ ٣", ".Name _id #tag\n\n\t;;  \n end",
    "Ωμέγα ὝΔΩΡ \u0561\u0562 \u10d0\u10d1 \U00010400\U00010428 ７，８！ “quoted”\u30001　22。 x  ",
]  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_end|>"]


def trained(core: Tokenizer, **trainer_options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with merges learnt from the corpus."""
    trainer = trainers.BpeTrainer(vocab_size=ROWS - 20, special_tokens=SPECIAL, show_progress=False,
                                  **trainer_options)  # fmt: skip
    core.train_from_iterator(CORPUS * 3, trainer)
    core.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def byte_level(*splitters: Any, whole_words: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(ignore_merges=whole_words))
    core.pre_tokenizer = (
        pre_tokenizers.Sequence(list(splitters)) if len(splitters) > 1 else splitters[0]
    )
    core.decoder = decoders.ByteLevel()
    return trained(core, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def by_patterns(patterns: tuple[str, ...], whole_words: bool) -> PreTrainedTokenizerFast:
    return byte_level(
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        whole_words=whole_words,
    )


def sentencepiece(prefix: bool, bos: bool) -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma have it: spaces as marks, words unsplit, bytes for the rest."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<pad>", fuse_unk=True))
    marks = [normalizers.Prepend("\u2581")] if prefix else []
    core.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581?[^\u2581]+|\u2581+"), "isolated")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = trained(core, initial_alphabet=[])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"] = None
    vocabulary = state["model"]["vocab"]
    free = ROWS - 10
    # Learnt words make room for the bytes, and the merges into them go.
    kept_words = {word: token for word, token in vocabulary.items() if token < free - 256}
    state["model"]["merges"] = [
        merge for merge in state["model"]["merges"] if "".join(merge) in kept_words
    ]
    next_id = max(kept_words.values()) + 1
    state["model"]["vocab"] = {
        **kept_words,
        **{byte: next_id + index for index, byte in enumerate(byte_tokens)},
    }
    state["added_tokens"] = [
        token for token in state["added_tokens"] if token["content"] in kept_words
    ]
    core = Tokenizer.from_str(json.dumps(state))
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


KINDS: dict[str, Any] = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: byte_level(
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    **{
        name: lambda patterns=patterns, name=name: by_patterns(
            patterns, name in ("llama-bpe", "tekken")
        )
        for name, patterns in PATTERNS.items()
    },
    "dbrx": lambda: by_patterns(PATTERNS["llama-bpe"], False),
    "llama 2": lambda: sentencepiece(prefix=True, bos=True),
    "gemma": lambda: sentencepiece(prefix=False, bos=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_same(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    KINDS[kind]().save_pretrained(folder)
    tiny_model("llama", vocab_size=ROWS, num_hidden_layers=1).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write_gguf(folder, tmp_path / "model.gguf", "f16")
    with Runtime(tmp_path / "model.gguf", context_tokens=16, threads=1) as runtime:
        assert runtime.adds_bos == (kind in ("llama 2", "gemma"))
        for text in TEXTS:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if kind == "llama 2" and "<s>" in text:
                continue  # transformers puts no second space in front after a special token
            assert runtime.tokenise(text) == ids, text
            assert runtime.tokenise(text, bos=True) == tokenizer(text)["input_ids"], text


def phi3(*, extra: str | None = None) -> PreTrainedTokenizerFast:
    """As Phi-3 has it: its special tokens swallow the white space behind them, but for three."""
    tokenizer = sentencepiece(prefix=True, bos=False)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    spare = max(vocabulary.values()) + 1
    vocabulary["<unk>"] = spare
    for token in state["added_tokens"]:
        token["rstrip"] = token["content"] != "<s>"
    state["added_tokens"].append({**state["added_tokens"][0], "id": spare, "content": "<unk>",
                                  "rstrip": False})  # fmt: skip
    core = Tokenizer.from_str(json.dumps(state))
    core.add_special_tokens([AddedToken("<|endoftext|>")])
    core.add_special_tokens([AddedToken(text, rstrip=True) for text in ("<|user|>", "<|end|>")])
    if extra is not None:
        core.add_special_tokens([AddedToken(extra)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<pad>"
    )


@pytest.mark.parametrize("name", ["demo", "Phi3 mini", "my-phi-3"])
def test_a_models_name_decides_nothing_about_its_tokens(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """llama.cpp goes by it: of `phi-3` special tokens swallow the white space behind them."""
    prompt = "<|user|>\nthe question<|end|>\n the answer</s>  word <s> word"
    for kind in ("phi-3", "llama 2", "gpt-2", "phi-3 and a token"):
        folder = tmp_path / kind
        tokenizer = (
            KINDS[kind]() if kind in KINDS else phi3(extra="<|x|>" if "and" in kind else None)
        )
        tokenizer.save_pretrained(folder)
        tiny_model("llama", vocab_size=ROWS, num_hidden_layers=1).save_pretrained(folder)
        caplog.clear()
        write_gguf(folder, tmp_path / "model.gguf", "f16", name=name)
        expected = AutoTokenizer.from_pretrained(folder)(prompt, add_special_tokens=False)
        with Runtime(tmp_path / "model.gguf", context_tokens=16, threads=1) as runtime:
            assert runtime.tokenise(prompt) == expected["input_ids"], kind
        assert ("<|x|>" in caplog.text) == ("and" in kind)


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "tekken"])
def test_a_file_that_was_read_is_written_again_with_the_same_tokens(
    kind: str, tmp_path: Path
) -> None:
    """transformers gave Llama 3's files an `<|endoftext|>` more than the model has rows."""
    folder = tmp_path / "model"
    KINDS[kind]().save_pretrained(folder)
    tiny_model("llama", vocab_size=ROWS, num_hidden_layers=1).save_pretrained(folder)
    write_gguf(folder, tmp_path / "model.gguf", "f16")
    tokenizer = read_tokenizer(tmp_path / "model.gguf")
    assert len(tokenizer) == ROWS
    text = "the question<|endoftext|> and the <|im_end|>"
    expected = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    write_gguf(converted(tmp_path / "model.gguf"), tmp_path / "again.gguf", "f16")
    with Runtime(tmp_path / "again.gguf", context_tokens=16, threads=1) as runtime:
        assert runtime.tokenise(text) == expected


@pytest.mark.parametrize("kind", ["llama-bpe", "tekken", "dbrx"])
def test_words_that_no_merges_lead_to_are_read_as_llamacpp_reads_them(
    kind: str, tmp_path: Path
) -> None:
    """Llama 3 and Mistral's Tekken look for a word in the vocabulary first."""
    folder = tmp_path / "model"
    tokenizer = KINDS[kind]()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = [
        merge for merge in state["model"]["merges"] if "".join(merge) != "\u0120question"
    ]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    tiny_model("llama", vocab_size=ROWS, num_hidden_layers=1).save_pretrained(folder)
    write_gguf(folder, tmp_path / "model.gguf", "f16")
    ids = read_tokenizer(tmp_path / "model.gguf")("the question", add_special_tokens=False)
    assert (state["model"]["vocab"]["\u0120question"] in ids["input_ids"]) == (kind != "dbrx")
    with Runtime(tmp_path / "model.gguf", context_tokens=16, threads=1) as runtime:
        assert runtime.tokenise("the question") == ids["input_ids"]


@pytest.mark.parametrize(
    ("first", "architecture"),
    [*((first, "llama") for first in sorted(set(SPLITTINGS.values()))), ("gpt-2", "qwen2")],
)
def test_a_way_to_split_is_read_under_all_its_names(
    first: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers knew some, and split by the others as GPT-2 does, or as the architecture."""
    model = tiny_model(architecture, vocab_size=ROWS, num_hidden_layers=1)
    for name in (name for name, other in SPLITTINGS.items() if other == first):
        kind = "dbrx" if first == "llama-bpe" and name not in WHOLE_WORDS else first
        if not (folder := tmp_path / kind).exists():
            KINDS[kind]().save_pretrained(folder)
            model.save_pretrained(folder)
            own = PreTrainedTokenizerFast.from_pretrained(folder)
        monkeypatch.setattr(gguf_tokenizer, "_splitting", lambda *_, name=name: name)
        path = tmp_path / f"{name}.gguf"
        write_gguf(folder, path, "f16")
        built, kept = read_tokenizer(path), read_tokenizer(path)
        with Runtime(path, context_tokens=16, threads=1) as runtime:
            for text in TEXTS:
                ids = own(text, add_special_tokens=False)["input_ids"]
                assert runtime.tokenise(text) == ids, (name, text)
                assert built(text, add_special_tokens=False)["input_ids"] == ids, (name, text)
                assert kept(text, add_special_tokens=False)["input_ids"] == ids, (name, text)


COMPOSED, DECOMPOSED = "\ud55c\uad6d\uc5b4", "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165"


def test_what_a_tokenizer_changes_of_a_text_is_refused_or_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """llama.cpp splits a text as it comes: Qwen's tokenizers compose letters before."""
    folder = tmp_path / "model"
    KINDS["qwen2"]().save_pretrained(folder)
    tiny_model("llama", vocab_size=ROWS, num_hidden_layers=1).save_pretrained(folder)
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text())

    def write(normalizer: dict[str, Any] | None) -> None:
        file.write_text(json.dumps({**state, "normalizer": normalizer}))
        write_gguf(folder, tmp_path / "model.gguf", "f16")

    for wrong in (
        {"type": "Lowercase"}, {"type": "Prepend", "prepend": "x"},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]},
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"changes text before it is split \(.*other tokens"):
            write(wrong)
    write(None)
    assert "NFC" not in caplog.text
    write({"type": "NFC"})
    assert "decomposed ones" in caplog.text
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with Runtime(tmp_path / "model.gguf", context_tokens=16, threads=1) as runtime:
        ids = tokenizer(DECOMPOSED, add_special_tokens=False)["input_ids"]
        assert runtime.tokenise(COMPOSED) == ids
        assert runtime.tokenise(DECOMPOSED) != ids


def test_a_space_before_every_text_has_no_name_there(tmp_path: Path) -> None:
    (pattern,) = PATTERNS["qwen2"]
    byte_level(
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no known name"):
        gguf_tokenizer.read_vocabulary(tmp_path, ROWS)
