"""A base in few bits whose layers are spread over two ranks trains as it does in one process.

One pair of ranks makes all the runs, and each rank notes what it held in them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lighten
from lighten.errors import UserError
from lighten.parallel.streamed import over_ranks
from lighten.parallel.streamed.build import Setting, build
from lighten.parallel.streamed.feed import LayerPieces
from lighten.parallel.streamed.over_ranks import RankFeed, part_of
from lighten.runs import Run
from lighten.training import loop
from tests.cut_runs import assert_equal, cut_short
from tests.processes import notes_of, runs_of_rank, start_ranks, wait_for
from tests.tiny import save_tiny, tiny_tokenizer

LAYERS = 5
COHORT = {
    "adapters": [
        {"name": "quick", "lora_r": 2, "learning_rate": 3e-3},
        {"name": "slow", "lora_r": 3, "learning_rate": 1e-3},
    ],
    "lora_dropout": 0.1,
}
# Of the second one nothing learns below the last layer, and each micro-batch has one adapter's row.
UNEVEN = {
    "adapters": [
        {"name": "all", "lora_r": 2},
        {"name": "top", "lora_r": 2, "lora_target_modules": rf".*layers\.{LAYERS - 1}\..*q_proj"},
    ],
    "learning_rate": 1e-3, "tokens_per_microbatch": 32, "max_length": 32, "packing": False,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "strategy": "fsdp", **COHORT},
    "checkpointed": {
        "load_in_4bit": True, "bnb_4bit_use_double_quant": True, "strategy": "zero3", **COHORT,
        "gradient_checkpointing": True, "gradient_accumulation_steps": 2,
    },
    "int8": {"load_in_8bit": True, "strategy": "zero3", **COHORT},
    # A rank's rows of all adapters are one micro-batch.
    "four": {
        "load_in_4bit": True, "strategy": "fsdp", "lora_r": [1, 2, 3, 4], "learning_rate": 1e-3,
        "max_train_samples": 4,
    },
    "stored": {"strategy": "fsdp", "lora_r": 2, "learning_rate": 1e-3},
    # A micro-batch has room for one long row or several short ones.
    "idle": {
        "load_in_4bit": True, "strategy": "zero3", "lora_r": [2, 3], "learning_rate": 1e-3,
        "packing": False, "tokens_per_microbatch": 80, "per_device_train_batch_size": 4,
    },
    "uneven": {"load_in_4bit": True, "strategy": "fsdp", **UNEVEN},
}  # fmt: skip


def settings(root: Path, data: Path, name: str, ranks: int) -> dict[str, Any]:
    """Thirteen rows: in the last step of an epoch one rank has no row."""
    changes = dict(RUNS[name])
    # A step has as many examples with fewer ranks.
    accumulation = changes.pop("gradient_accumulation_steps", 1) * 2 // ranks
    values: dict[str, Any] = {
        "model_name_or_path": str(root / ("stored" if name == "stored" else "base")),
        "dataset": str(data), "dtype": "float32", "output_dir": str(root / f"{name} {ranks}"),
        "per_device_train_batch_size": 2, "max_train_samples": 13, "max_steps": 4,
        "gradient_accumulation_steps": accumulation, "save_steps": 2, "eval_dataset": str(data),
        "max_eval_samples": 5, "eval_steps": 3, "save_total_limit": 10, **changes,
    }  # fmt: skip
    if ranks == 1:
        values["strategy"] = "single"
    return values


def train_all(ports: str, file: str) -> None:
    """In a rank: one run after another, and what was gathered and held in their steps."""
    notes: list[dict[str, Any]] = []
    step = loop.train_step

    def noted_step(*args: Any, **options: Any) -> Any:
        batches, _, objective, *_, idle = args
        model = objective.model
        feed = next(m._absent.feed for m in model.modules() if hasattr(m, "_absent"))
        before = feed.fetches
        report = step(*args, **options)
        notes[-1].setdefault("steps", []).append({
            "adapters": [len({item.adapter for item in batch.items}) for batch in batches],
            "idle": len(idle), "passes": len(batches) + len(idle),
            "gathers": feed.fetches - before, "collectives": len(gathered),
        })  # fmt: skip
        gathered.clear()
        notes[-1] |= {
            "held": sum(part.untyped_storage().nbytes() for part in feed.parts),
            "packed": feed.base_bytes, "slots": feed.slot_bytes,
            "in_layers": sum(p.untyped_storage().nbytes() for key, p in model.named_parameters()
                             if ".layers." in key and key.endswith("proj.weight")),
        }  # fmt: skip
        return report

    def noted_gather(slot: Tensor, part: Tensor, *, async_op: bool) -> Any:
        gathered.append(part.nbytes)
        return gather(slot, part, async_op=async_op)

    loop.train_step = noted_step
    gathered: list[int] = []
    gather, over_ranks._gather = over_ranks._gather, noted_gather
    for run_settings, noted in runs_of_rank(ports, file):
        notes.append(noted)
        lighten.train(progress=False, **run_settings)


def save_stored(root: Path) -> None:
    """The base as transformers saves it in 4 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        root / "base", quantization_config=config, dtype=torch.float32
    ).save_pretrained(root / "stored")
    tiny_tokenizer().save_pretrained(root / "stored")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> Path:
    """The runs of two ranks and of one process, and what the ranks noted."""
    root = tmp_path_factory.mktemp("packed")
    save_tiny(root / "base", "qwen2", num_hidden_layers=LAYERS)
    save_stored(root)
    runs = [settings(root, chat_file, name, 2) for name in RUNS]
    started = start_ranks(train_all, runs, root / "runs.json")
    for name in RUNS:
        lighten.train(progress=False, **settings(root, chat_file, name, 1))
    wait_for(started)
    return root


def notes(root: Path, name: str) -> list[dict[str, Any]]:
    """Of each rank."""
    return notes_of(root / "runs.json", list(RUNS).index(name))


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_with_a_part_of_each_layer_are_one_process(root: Path, name: str) -> None:
    run, reference = Run(root / f"{name} 2"), Run(root / f"{name} 1")
    assert_equal(run, reference)
    assert any(record["kind"] == "eval" for record in run.metrics())
    choices = {choice["what"]: choice for choice in run.info()["choices"]}
    assert choices["strategy"]["value"] == RUNS[name]["strategy"]
    assert f"{LAYERS} packed layers spread over 2 ranks" in choices["strategy"]["reason"]
    after, before = run.info()["base"], reference.info()["base"]
    assert after | {"weights_bytes": 0} == before | {"weights_bytes": 0}


def test_a_rank_holds_half_of_the_packed_base(root: Path) -> None:
    for name in RUNS:
        for rank in notes(root, name):
            assert rank["packed"] / 2 <= rank["held"] <= rank["packed"] / 2 + LAYERS
            assert rank["slots"] <= 2 * rank["packed"] / LAYERS + 4
            assert rank["in_layers"] <= 4 * 7 * LAYERS  # a number in the place of each weight


@pytest.mark.parametrize(("name", "adapters"), [("stored", 1), ("four", 4)])
def test_a_layer_is_gathered_once_per_pass_for_a_whole_cohort(
    root: Path, name: str, adapters: int
) -> None:
    for rank in notes(root, name):
        step = rank["steps"][1]
        assert step["adapters"] == [adapters]
        # Up and down, and at each turn two layers are there already.
        assert step["gathers"] == step["collectives"] == 2 * (LAYERS - 2)


def test_ranks_that_need_other_layers_gather_the_same(root: Path) -> None:
    one, other = notes(root, "uneven")
    assert one["steps"]
    for mine, others in zip(one["steps"], other["steps"], strict=True):
        for key in ("passes", "gathers", "collectives"):
            assert mine[key] == others[key]


def test_a_rank_without_a_micro_batch_gathers_for_the_others(root: Path) -> None:
    """Both have some in that step, and one has more; the result is that of one process, above."""
    steps = list(zip(*(rank["steps"] for rank in notes(root, "idle")), strict=True))
    uneven = [pair for pair in steps if any(step["idle"] for step in pair)]
    assert any(all(step["adapters"] for step in pair) for pair in uneven)
    for pair in uneven:
        assert min(step["idle"] for step in pair) == 0
        for step in pair:
            assert step["gathers"] >= step["passes"] * 2 * (LAYERS - 2) > 0
            assert step["gathers"] == pair[0]["gathers"]


def test_a_checkpoint_of_two_ranks_goes_on_as_one_process(
    root: Path, tmp_path: Path, chat_file: Path
) -> None:
    run, folder = Run(root / "nf4 2"), tmp_path / "alone"
    cut_short(run, folder)
    run_settings = {**settings(root, chat_file, "nf4", 2), "output_dir": str(folder)}
    lighten.train(progress=False, resume=True, **run_settings)
    assert_equal(Run(folder), run)


class Gatherings:
    """Collectives that are written down, and done when they are waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []
        monkeypatch.setattr(over_ranks, "_gather", self._gather)

    def _gather(self, slot: Tensor, part: Tensor, *, async_op: bool) -> Any:
        assert async_op
        self.begun.append(int(part[0]))
        gatherings = self

        class Work:
            def wait(self) -> None:
                assert gatherings.begun
                slot.copy_(part.repeat(2))

        return Work()


def feed_of(count: int) -> tuple[RankFeed, Any]:
    layers = [LayerPieces() for _ in range(count)]
    pieces = [layer_pieces.add("w", torch.uint8, (8,)) for layer_pieces in layers]
    parts = [torch.full((32,), place, dtype=torch.uint8) for place in range(count)]
    feed = RankFeed(layers, parts, 2)
    return feed, lambda layer: feed.get(layer, pieces[layer])


def test_the_next_layer_is_gathered_while_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    gatherings = Gatherings(monkeypatch)
    feed, get = feed_of(6)
    feed.begin(learns=True)
    assert gatherings.begun == [0]
    for layer in (*range(6), *reversed(range(6))):
        assert get(layer).tolist() == [layer] * 8
        assert get(layer).tolist() == [layer] * 8
        if layer == 2:
            assert gatherings.begun[-1] in (3, 1)
    feed.end()
    feed.begin(learns=False)
    for layer in range(6):
        assert get(layer).tolist() == [layer] * 8
    assert gatherings.begun == [*range(6), 3, 2, 1, 0, 2, 3, 4, 5]
    assert feed.fetches == len(gatherings.begun)


def test_a_pass_that_stops_early_gathers_what_the_others_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gatherings = Gatherings(monkeypatch)
    feed, get = feed_of(4)
    feed.begin(learns=True)
    get(3)
    feed.end()
    assert gatherings.begun == [0, 1, 2, 3, 1, 0]
    with pytest.raises(AssertionError, match="layer 2 is asked for where no pass comes to it"):
        get(2)


def test_parts_of_ranks_are_the_whole_layer() -> None:
    layer = LayerPieces()
    tensors = {"a": torch.arange(70, dtype=torch.uint8), "b": torch.arange(3.0)}
    pieces = [layer.add(name, value.dtype, value.shape) for name, value in tensors.items()]
    for count in (1, 2, 3, 7):
        parts = [part_of(layer, lambda name, into: into.copy_(tensors[name]), rank, count)
                 for rank in range(count)]  # fmt: skip
        assert len({len(part) for part in parts}) == 1
        whole = torch.cat(parts)
        for piece in pieces:
            assert torch.equal(piece.of(whole), tensors[piece.name])


def test_a_base_that_cannot_be_spread_is_told_with_what_to_do(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "experts", "mixtral")
    setting = Setting("strategy: fsdp", "use strategy: ddp")
    with pytest.raises(UserError, match=r"strategy: fsdp: the experts .* use strategy: ddp"):
        build("experts", folder, torch.float32, device="cpu", keeps="ranks", setting=setting)
