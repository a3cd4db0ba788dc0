"""The curve of truncated ranks against PEFT's own loss of the truncated adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import lighten
from lighten import api
from lighten.errors import UserError
from lighten.evaluation.truncated import truncated_curve
from lighten.models import load_tokenizer
from lighten.reporting import sweep_table
from lighten.runs import Run
from lighten.training.rows import load_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, chat_file: Path) -> Run:
    return lighten.train(
        model_name_or_path=str(tiny_folder), dataset=str(chat_file), val_size=0.5, max_steps=12,
        learning_rate=2e-2, dtype="float32", progress=False,
        output_dir=str(tmp_path_factory.mktemp("runs") / "truncated"),
        adapters=[{"name": "small", "lora_r": 2}, {"name": "large", "lora_r": 8}],
    )  # fmt: skip


def test_each_point_is_the_loss_that_peft_has_at_that_rank(run: Run, tmp_path: Path) -> None:
    curve = truncated_curve(run, [1, 3, 8, 64])
    assert (curve.adapter, curve.trained_rank) == ("large", 8)
    assert [point.rank for point in curve.points] == [8, 3, 1]
    recipe = run.recipe()
    held_out = load_rows(recipe, load_tokenizer(recipe.model_name_or_path)).held_out
    assert held_out is not None
    for point in curve.points:
        folder, resized = api.resize_adapter(
            run, point.rank, adapter="large", output_dir=tmp_path / str(point.rank)
        )
        assert point.parameters == resized.parameters
        assert point.energy_kept == resized.energy_kept
        base = AutoModelForCausalLM.from_pretrained(recipe.model_name_or_path)
        model = PeftModel.from_pretrained(base, str(folder)).eval()
        nll = tokens = 0.0
        for row in held_out.rows:
            ids = torch.tensor([row.input_ids])
            mask = torch.tensor(row.supervised[1:])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            token_losses = F.cross_entropy(logits.float(), ids[0, 1:], reduction="none")
            nll, tokens = nll + float(token_losses[mask].sum()), tokens + int(mask.sum())
        assert point.losses.loss == pytest.approx(nll / tokens, rel=1e-5)
        expected_difference = point.losses.loss - curve.points[0].losses.loss
        assert point.difference.value == pytest.approx(expected_difference, abs=1e-9)
    # The first point is the trained adapter itself, whose loss the run kept.
    (eval_loss,) = [
        adapter["eval_loss"] for adapter in run.info()["adapters"] if adapter["name"] == "large"
    ]
    assert curve.points[0].losses.loss == pytest.approx(eval_loss, rel=1e-5)
    energies = [point.energy_kept for point in curve.points]
    assert energies == sorted(energies, reverse=True)
    assert curve.points[-1].losses.loss != curve.points[0].losses.loss


def test_the_answer_names_a_rank_that_is_not_worse(run: Run) -> None:
    curve = truncated_curve(run, [4, 2, 1], adapter="large")
    verdicts = {point.rank: point.verdict for point in curve.points}
    assert verdicts[8] == "no difference found"
    assert verdicts[curve.enough] != "worse"
    plain = curve.to_dict()
    assert plain["enough"] == curve.enough
    assert plain["points"][0]["difference"]["value"] == 0.0


def test_what_cannot_be_cut_is_said(run: Run) -> None:
    with pytest.raises(UserError, match="has rank 8, and none of the ranks 8, 16 is below it"):
        truncated_curve(run, [8, 16])
    with pytest.raises(UserError, match="has no adapter 'other'; it has small, large"):
        truncated_curve(run, [1], adapter="other")


def test_too_few_examples_name_no_rank(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    few = lighten.train(
        model_name_or_path=str(tiny_folder), dataset=str(chat_file), val_size=4, max_steps=2,
        lora_r=4, dtype="float32", progress=False, output_dir=str(tmp_path / "few"),
    )  # fmt: skip
    curve = truncated_curve(few, [1]).to_dict()
    assert curve["enough"] is None
    (sentence,) = sweep_table.truncated({"truncated": {"r4": curve}})
    assert "too few examples to tell" in sentence
