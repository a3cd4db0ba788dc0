"""A model as an ExecuTorch program, run through ExecuTorch's own Python runtime."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lighten
from lighten.errors import DiskFull, UserError
from lighten.quantization import executorch, verify
from lighten.quantization.executorch_rounding import ProgramRounding
from lighten.quantization.merged_model import Exported
from tests.test_merge import trained
from tests.tiny import save_tiny, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("forked_jobs"),
    pytest.mark.skipif(
        importlib.util.find_spec("executorch") is None, reason="the extra phone is not installed"
    ),
]
CALIBRATED = ProgramRounding(
    32, [[5 + (7 * row + 11 * place * place) % 200 for place in range(64)] for row in range(6)]
)
PROMPT = [5, 9, 40, 7, 8, 11, 300, 3, 17, 55, 23, 91]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes every linear layer of a tiny Llama."""
    root = tmp_path_factory.mktemp("phone")
    base = save_tiny(root / "base")
    trained(tiny_model("llama"), root / "adapter")
    config = root / "adapter" / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"base_model_name_or_path": str(base)}))
    return root / "adapter"


@pytest.fixture(scope="module")
def made(adapter: Path) -> Iterator[Exported]:
    """The adapter's program, rounded by data, where the last bit of an activation decides."""
    chosen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executorch, "program_rounding", lambda _: (CALIBRATED, {"rows": 6}, []))
        with pytest.MonkeyPatch.context() as noting:
            noting.setattr(executorch, "write_rounding", lambda *words: chosen.append(words))
            exported = lighten.export(
                adapter, "executorch", context_tokens=160, output_dir=adapter.parent / "out"
            )
        assert chosen == []  # the receipt takes the weights that the export rounded
        assert not list(adapter.parent.glob(".*.partial"))
        yield exported


def test_the_program_has_all_that_a_chat_needs_and_a_receipt(made: Exported) -> None:
    """Judged by what rounding costs, and by what the runtime adds to that."""
    receipt = made.receipt
    assert receipt is not None
    assert receipt.passed, receipt.sentence()
    assert (receipt.kind, receipt.other_tokens, receipt.answers) == ("executorch", 0, 6)
    added = receipt.runtime
    assert added is not None
    assert added.within
    assert added.texts >= 20
    assert 0 < added.between_kl < 0.05 * added.rounding_kl
    assert "where the same rounding in PyTorch loses" in receipt.sentence()
    assert {path.name for path in made.folder.iterdir()} == {
        "adapter.pte", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json", "README.md", "export.json", "receipt.json",
    }  # fmt: skip
    assert json.loads((made.folder / "receipt.json").read_text())["passed"] is True


def adapter_base(made: Exported) -> Path:
    return made.folder.parent / "base"


def test_weights_computed_again_are_those_that_the_export_kept(
    made: Exported, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receipt is to the last bit one."""
    chosen = []
    write = executorch.write_rounding
    monkeypatch.setattr(
        executorch, "write_rounding", lambda *words: (chosen.append(words), write(*words))
    )
    again = lighten.verify(made.folder, adapter)
    assert len(chosen) == 1
    assert again == made.receipt


def test_it_answers_greedily_as_the_same_rounding_in_pytorch(made: Exported, adapter: Path) -> None:
    """An independent runtime; the prompt read at once and token by token; twice from one cache."""
    merged = lighten.export(
        adapter, "merged", output_dir=adapter.parent / "merged", dtype="float32", verify=False
    ).folder
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        plain = model(ids).logits[0].log_softmax(-1)
        CALIBRATED.apply(model)
        rounded = model(ids).logits[0].log_softmax(-1)
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                                  do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    with executorch.running(made.files[0], tokenizer) as program:
        assert program.positions == 160
        assert program.greedy(PROMPT, 12) == expected[0, len(PROMPT) :].tolist()
        told = torch.from_numpy(program.log_probabilities(PROMPT))
        assert program.greedy(PROMPT, 12) == expected[0, len(PROMPT) :].tolist()
        # Longer than a call takes: the prompt is read in two pieces, to the cache's last place.
        long = [5 + place % 200 for place in range(150)]
        answer = program.greedy(long, 10)
        with torch.no_grad():
            last = model(torch.tensor([[*long, *answer[:9]]])).logits[0, 149:]
        near = last.max(-1).values - last[torch.arange(10), torch.tensor(answer)]
        assert float(near.max()) < 0.1  # the likeliest, or as good as
        with pytest.raises(UserError, match="takes 160 tokens, not 161"):
            program.greedy(long, 11)
    assert (told - rounded).abs().mean() < 0.1 * (plain - rounded).abs().mean()


def test_a_torn_program_and_a_missing_package_are_told(
    made: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(made.folder, torn)
    file = torn / "adapter.pte"
    data = file.read_bytes()
    for part in (b"", b"PK\x03\x04", data[: len(data) // 2]):
        file.write_bytes(part)
        with pytest.raises(UserError, match="not a whole ExecuTorch program"):
            lighten.verify(torn, adapter_base(made))
    with pytest.raises(UserError, match="--context_tokens is of executorch"):
        lighten.export(adapter_base(made), "merged", context_tokens=64)
    with pytest.raises(UserError, match="too short for a question"):
        lighten.export(adapter_base(made), "executorch", context_tokens=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(UserError, match=r"pip install 'lighten\[phone\]'"):
        lighten.export(adapter_base(made), "executorch", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_later_receipt_looks_for_room_before_anything_is_compared(
    made: Exported, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It merges the adapter in float32 and rounds again: the export's weights are gone by then."""
    free = shutil.disk_usage(adapter)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=1000))
    monkeypatch.setattr(verify, "compare", lambda *_, **__: pytest.fail("it was compared"))
    with pytest.raises(DiskFull, match=r"comparing adapter as executorch needs .*; free some"):
        lighten.verify(made.folder, adapter)
