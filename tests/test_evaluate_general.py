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


def test_mistakes_are_told(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        lighten.evaluate(run, forgetting=str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        lighten.evaluate(run, forgetting=str(tmp_path / "empty.txt"))
