"""Numbers of a recipe as people write them: decimal commas, and seeds that generators take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lighten.cli.console import overrides
from lighten.errors import UserError
from lighten.recipe import Recipe


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n')
    return path


def recipe(rows: Path, **settings: Any) -> Recipe:
    return Recipe.from_values({"model_name_or_path": "m", "dataset": str(rows), **settings})


@pytest.mark.parametrize(
    ("key", "text", "number"),
    [("learning_rate", "2,5e-4", "2.5e-4"), ("lr", "0,001", "0.001"),
     ("learning_rate", "1e-4,2,5e-4", "2.5e-4"), ("lora_dropout", "0,05", "0.05"),
     ("lora_dropout", "0,1", "0.1"), ("lora_alpha", "16,5e0", "16.5e0"),
     ("warmup_ratio", "0,03", "0.03"), ("weight_decay", "0,01", "0.01"),
     ("val_size", "0,1", "0.1"), ("num_train_epochs", "1,5", "1.5"),
     ("max_grad_norm", "0,5", "0.5"), ("adam_beta2", "0,95", "0.95"),
     ("warmup_steps", "0,05", "0.05"), ("num_train_epochs", "1,3", "[1,3] to sweep"),
     ("sweep.learning_rate", "2,5e-4", "2.5e-4")],
)  # fmt: skip
def test_a_decimal_comma_is_asked_about(key: str, text: str, number: str) -> None:
    for words in ([f"--{key}", text], [f"{key}={text}"]):
        with pytest.raises(UserError, match=r"with a point") as error:
            overrides(words)
        assert f"{number}" in str(error.value)


@pytest.mark.parametrize(
    ("key", "text", "values"),
    [("learning_rate", "1e-4,2e-4", [1e-4, 2e-4]), ("learning_rate", "[2,5e-4]", [2, 5e-4]),
     ("learning_rate", "0.1,0.2", [0.1, 0.2]), ("lora_alpha", "16,32", [16, 32]),
     ("lora_r", "8,16", [8, 16]), ("seed", "0,1,2", [0, 1, 2]), ("warmup_steps", "5,20", [5, 20]),
     ("lora_dropout", "0,0.1", [0, 0.1]), ("lora_target_modules", "q_proj,v_proj",
                                           ["q_proj", "v_proj"])],
)  # fmt: skip
def test_lists_stay_lists(key: str, text: str, values: list[Any]) -> None:
    assert overrides([f"--{key}", text]) == {key: values}


@pytest.mark.parametrize("key", ["learning_rate", "lora_dropout", "warmup_ratio", "val_size"])
def test_a_decimal_comma_in_a_recipe_file_is_refused(key: str, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model_name_or_path: m\ndataset: {rows}\n{key}: 0,05\n")
    with pytest.raises(UserError, match=rf":3: {key}: '0,05' .*write 0.05, with a point"):
        Recipe.from_file(path)


@pytest.mark.parametrize("seed", [-1, 2**64, 2**63, [1, -1], [0, 2**70], "x", 1.5])
@pytest.mark.parametrize("key", ["seed", "evaluate.seed", "adapters", "sweep"])
def test_seeds_that_no_generator_takes_are_refused(key: str, seed: Any, rows: Path) -> None:
    settings: dict[str, Any] = {"seed": seed}
    if key == "evaluate.seed":
        settings = {"evaluate": {"seed": seed}}
    elif key == "adapters":
        settings = {"adapters": [{"name": "a", "seed": seed}]}
    elif key == "sweep":
        settings = {"sweep": {"seed": seed if isinstance(seed, list) else [seed]}}
    with pytest.raises(UserError, match="seed"):
        recipe(rows, **settings)


@pytest.mark.parametrize("seed", [0, 42, 2**32, 2**63 - 1])
def test_seeds_that_generators_take_are_kept(seed: int, rows: Path) -> None:
    assert recipe(rows, seed=seed).seed == seed
    assert recipe(rows, seed=[seed, 1]).seed == [seed, 1]


@pytest.mark.parametrize(
    ("columns", "why"),
    [({"question": "instruction"}, "write instruction: question"),
     ({"instrction": "q"}, "instrction is not one of instruction"),
     ({"instruction": "q", "output": "q"}, "two of them name the same column")],
)  # fmt: skip
def test_a_mapping_of_columns_that_means_nothing_is_refused(
    columns: dict[str, str], why: str, rows: Path
) -> None:
    with pytest.raises(UserError, match=why):
        recipe(rows, dataset_columns=columns)
    mapping = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
    assert overrides(["--dataset_columns", f"{{{mapping}}}"]) == {"dataset_columns": columns}
