"""What a training makes a model forget: the loss on general text beside the task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lighten
from lighten.errors import UserError
from lighten.evaluation import against, forgetting, metrics
from lighten.evaluation.bootstrap import Resamples
from lighten.runs import Run
from tests.tiny import tiny_tokenizer

FEW = {"max_examples": 4, "max_new_tokens": 2}


@pytest.fixture(scope="module")
def run(tiny_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return lighten.train(
        model=str(tiny_folder), dataset=str(chat_file), dtype="float32", max_length=96,
        output_dir=str(tmp_path_factory.mktemp("runs") / "run"), max_steps=12, val_size=0.5,
        learning_rate=5e-2, progress=False,
    )  # fmt: skip


def test_the_builtin_text_is_of_both_languages() -> None:
    texts = [example.text or "" for example in forgetting.read("builtin")]
    korean = [text for text in texts if any("가" <= sign <= "힣" for sign in text)]
    assert len(texts) >= 20  # fewer tell nothing apart
    assert 8 <= len(korean) <= len(texts) - 8


def test_forgetting_is_the_loss_on_general_text(run: Run, tiny_folder: Path) -> None:
    """The base's against transformers' own loss on the same ids; the change is paired."""
    from transformers import AutoModelForCausalLM

    evaluation = lighten.evaluate(run, forgetting="builtin", **FEW)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    tokenizer = tiny_tokenizer()
    nll, tokens = 0.0, 0
    for example in forgetting.read("builtin"):
        ids = tokenizer(example.text, add_special_tokens=False)["input_ids"][:96]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
        nll, tokens = nll + float(loss) * (len(ids) - 1), tokens + len(ids) - 1
    assert evaluation.metric("base", "general_loss")["value"] == pytest.approx(
        nll / tokens, rel=1e-2
    )
    (change,) = [
        difference
        for difference in evaluation.differences
        if difference["metric"] == "general_loss"
    ]
    expected = evaluation.metric("default", "general_loss")["value"]
    assert change["difference"] == pytest.approx(
        float(expected or 0) - float(evaluation.metric("base", "general_loss")["value"] or 0)
    )
    ours, base = (np.asarray(entry["general_losses"]) for entry in reversed(evaluation.models))
    assert ours[:, 1].tolist() == base[:, 1].tolist()  # paired over the same tokens
    spread = Resamples(len(ours), 1000, 0).difference(ours, base, metrics.mean_loss)
    assert (change["low"], change["high"]) == pytest.approx((spread.low, spread.high))
    assert evaluation.settings["general_text"]["path"] == "builtin"


def test_a_users_text_file_and_what_is_compared(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "general.txt"
    file.write_text("A first paragraph\nof two lines.\n\n  \nAnother one.\n", encoding="utf-8")
    assert [example.text for example in forgetting.read(str(file))] == [
        "A first paragraph\nof two lines.", "Another one.",
    ]  # fmt: skip
    ours = lighten.evaluate(run, forgetting=str(file), **FEW).to_dict()
    assert ours["settings"]["general_text"]["rows"] == 2
    rows = against.compare(ours, ours, "other")
    assert {"loss", "general_loss"} <= {row["metric"] for row in rows}
    copied = tmp_path / "copied.txt"
    copied.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    elsewhere = lighten.evaluate(run, forgetting=str(copied), **FEW).to_dict()
    assert against.compare(ours, elsewhere, "other")
    file.write_text("Something else.\n\nAnd more.\n", encoding="utf-8")
    theirs = lighten.evaluate(run, forgetting=str(file), **FEW).to_dict()
    with pytest.raises(UserError, match="general_text is"):
        against.compare(ours, theirs, "other")


def test_general_text_that_was_cut_elsewhere_is_not_compared(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    """The same file, of which one run reads more: a loss per token of other tokens."""
    file = tmp_path / "general.txt"
    file.write_text("A long paragraph goes on. " * 9, encoding="utf-8")
    ours, theirs = (
        lighten.evaluate(
            str(tiny_folder), eval_dataset=str(chat_file), forgetting=str(file), max_length=length,
            dtype="float32", output_dir=str(tmp_path / str(length)), **FEW,
        ).to_dict()
        for length in (240, 160)
    )  # fmt: skip
    assert [entry["settings"]["general_text"]["rows"] for entry in (ours, theirs)] == [1, 1]
    with pytest.raises(UserError, match="general text has other tokens"):
        against.compare(ours, theirs, "other")


def test_what_is_no_comparison_is_told_before_it_is_measured(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(chat_file.read_text(encoding="utf-8").replace("What is", "Tell me"))
    options = {"max_length": 96, "dtype": "float32", "forgetting": "builtin", **FEW}
    first = tmp_path / "first"
    lighten.evaluate(
        str(tiny_folder), eval_dataset=str(chat_file), output_dir=str(first), **options
    )
    for change, message in (
        ({"eval_dataset": str(other)}, "held-out examples are not the same"),
        ({"max_length": 90}, "general text has other tokens"),
        ({"forgetting": str(chat_file)}, "general_text is"),
        ({"chat_template": "alpaca"}, "chat_template is"),
    ):
        seen: list[str] = []
        with pytest.raises(UserError, match=message):
            lighten.evaluate(
                str(tiny_folder), against=first, output_dir=str(tmp_path / "second"),
                progress=lambda what, *_, seen=seen: seen.append(what),
                **{"eval_dataset": str(chat_file), **options, **change},
            )  # fmt: skip
        assert not [what for what in seen if what.startswith("base")]


def test_mistakes_are_told(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        lighten.evaluate(run, forgetting=str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        lighten.evaluate(run, forgetting=str(tmp_path / "empty.txt"))
