"""A base of which two layers are in memory trains as one that is there whole."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lighten
from lighten.errors import UserError
from lighten.parallel.streamed import build as building
from lighten.parallel.streamed import shards as reading
from lighten.parallel.streamed.cuda import CudaSlots
from lighten.parallel.streamed.feed import LayerFeed, LayerPieces, MemorySlots, Piece
from lighten.parallel.streamed.shards import RateLimit, Shards
from lighten.recipe import RecipeError
from lighten.runs import Run
from tests.caches import new_cache
from tests.cut_runs import cut_short, weights
from tests.mapped_files import resident_bytes
from tests.processes import python
from tests.tiny import tiny_model, tiny_tokenizer

LAYERS = 5


def save_deep(folder: Path, arch: str = "llama", *, shard: str = "20KB", **changes: Any) -> Path:
    """A tiny model of several layers in several bfloat16 files."""
    sizes = {"n_layer": LAYERS} if arch == "gpt2" else {"num_hidden_layers": LAYERS}
    model = tiny_model(arch, dtype=torch.bfloat16, **{**sizes, **changes})
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_deep(tmp_path_factory.mktemp("deep") / "llama")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def settings(deep: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(deep), "dataset": str(chat_file), "dtype": "float32",
        "output_dir": str(tmp_path / "run"), "lora_r": 4, "learning_rate": 1e-2,
        "per_device_train_batch_size": 6, "max_steps": 4, "val_size": 0.2, "eval_steps": 2,
        "tokens_per_microbatch": 4096, "workers": 1, "max_eval_samples": 4,
    }  # fmt: skip


def train(settings: dict[str, Any], where: Path | str | None = None, **changes: Any) -> Run:
    run_settings = {**settings, **changes}
    if where is not None:
        run_settings["output_dir"] = str(where)
    return lighten.train(**run_settings, progress=False)


def losses(run: Run) -> dict[tuple[Any, ...], float]:
    return {(m["kind"], m["step"], m["adapter"]): m["loss"] for m in run.metrics()}


def assert_same(run: Run, reference: Run, *, within: float) -> None:
    assert losses(run) == pytest.approx(losses(reference), rel=within)
    trained, expected = weights(run), weights(reference)
    assert trained.keys() == expected.keys()
    for key in trained:
        torch.testing.assert_close(trained[key], expected[key], rtol=within, atol=within)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_adapter_learns_the_same(
    checkpointing: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**settings, "gradient_checkpointing": checkpointing, "lora_dropout": 0.1}
    resident = train(settings, tmp_path / "resident")
    streamed = train(settings, offload_base="disk")
    # The same products of the same numbers: nothing is rounded otherwise.
    assert_same(streamed, resident, within=1e-6)
    (choice,) = (entry for entry in streamed.info()["choices"] if entry["what"] == "offload_base")
    assert "5 layers wait in the model's files" in choice["reason"]
    before, after = resident.info()["base"], streamed.info()["base"]
    assert before == after, "the base is described as it is, wherever it waits"


@pytest.mark.parametrize("arch", ["gpt2", "falcon_h1", "gemma2", "opt", "phi3", "qwen2"])
def test_every_kind_of_layer_learns_the_same(
    arch: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Transposed weights, biases, tied heads, convolutions, projections beside the layers."""
    targets = {"gpt2": ["c_attn"], "phi3": ["o_proj"]}.get(arch, ["q_proj", "v_proj"])
    run_settings = {**settings, "model_name_or_path": str(save_deep(tmp_path / "base", arch)),
                    "lora_target_modules": targets, "max_steps": 2}  # fmt: skip
    resident = train(run_settings, tmp_path / "resident")
    assert_same(train(run_settings, offload_base="disk"), resident, within=1e-6)


def test_a_cohort_reads_each_layer_once_per_pass(settings: dict[str, Any], tmp_path: Path) -> None:
    run_settings = {**settings, "lora_r": [2, 4, 8], "val_size": 0, "eval_steps": None,
                    "max_eval_samples": None, "offload_base": "disk"}  # fmt: skip

    def reads(steps: int) -> int:
        run = train(run_settings, tmp_path / str(steps), max_steps=steps)
        return run.info()["training"]["offload_base"]["reads"]

    # Up and down, and at each turn two layers are there already.
    assert reads(4) - reads(2) == 2 * 2 * (LAYERS - 2)


def test_a_cohort_learns_as_each_adapter_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    ranks = [2, 4]
    together = train(settings, lora_r=ranks, offload_base="disk", gradient_checkpointing=True)
    for rank in ranks:
        alone = train(settings, tmp_path / str(rank), lora_r=rank)
        alone_losses = {key[:2]: value for key, value in losses(alone).items()}
        cohort_losses = {k[:2]: v for k, v in losses(together).items() if k[2] == f"r{rank}"}
        assert cohort_losses == pytest.approx(alone_losses, rel=1e-5)


def packed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "load_in_4bit": True, "bnb_4bit_use_double_quant": True}


def test_four_bits_are_quantised_once_and_learn_the_same(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = new_cache(tmp_path / "cache")
    monkeypatch.setenv("LIGHTEN_CACHE", str(cache))
    run_settings = packed_settings(settings)
    resident = train(run_settings, tmp_path / "resident")
    streamed = train(run_settings, offload_base="disk")
    assert_same(streamed, resident, within=1e-6)
    before, after = resident.info()["base"], streamed.info()["base"]
    assert after | {"weights_bytes": 0} == before | {"weights_bytes": 0}
    assert after["weights_bytes"] < before["weights_bytes"], "tables of constants are not streamed"
    (cached_file,) = (cache / "streamed").glob("*/*/layer-00000.safetensors")
    written = cached_file.stat().st_mtime_ns
    repeated = train(run_settings, tmp_path / "again", offload_base="disk")
    assert cached_file.stat().st_mtime_ns == written, "quantised once"
    assert losses(repeated) == losses(streamed)


def test_a_checkpoint_in_four_bits_is_streamed_as_it_is(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path / "packed"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        settings["model_name_or_path"], quantization_config=config, dtype=torch.float32
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    run_settings = {**settings, "model_name_or_path": str(folder)}
    resident = train(run_settings, tmp_path / "resident")
    streamed = train(run_settings, offload_base="disk")
    assert_same(streamed, resident, within=1e-6)
    assert streamed.info()["base"]["quantization"] == "nf4"


def test_a_run_goes_on_bitwise_and_is_evaluated(settings: dict[str, Any], tmp_path: Path) -> None:
    run_settings = {**settings, "save_steps": 2, "save_total_limit": 5, "offload_base": "disk"}
    run = train(run_settings)
    cut = cut_short(run, tmp_path / "cut")
    resumed = lighten.train(
        **{**run_settings, "output_dir": str(cut.folder)}, resume=True, progress=False
    )
    assert losses(resumed) == losses(run)
    assert all(torch.equal(weights(resumed)[key], value) for key, value in weights(run).items())
    evaluation = lighten.evaluate(run, max_new_tokens=1, max_examples=4)
    last_loss = losses(run)["eval", 4, "default"]
    assert evaluation.metric("default", "loss")["value"] == pytest.approx(last_loss, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full", "lora_r": 8}, "method: full trains them"),
        ({"use_dora": True}, "goes with plain LoRA"),
        ({"peft": {"peft_type": "IA3"}, "lora_r": 8}, "goes with plain LoRA"),
        ({"load_in_8bit": True}, "dense layers or 4 bits"),
        ({"torch_compile": True}, "remove torch_compile"),
        ({"workers": 2}, "set workers to 1"),
    ],
)
def test_what_does_not_go_together_is_told_by_the_recipe(
    changes: dict[str, Any], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(settings, offload_base="disk", **changes)


def test_what_cannot_be_streamed_is_told_before_weights_are_read(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shards, "read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(UserError, match="modules_to_save of adapter 'default' names"):
        train(settings, offload_base="disk", modules_to_save=["layers.1.mlp"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="use offload_base: disk"):
            train(settings, offload_base="cpu")
    folder = save_deep(tmp_path / "experts", "mixtral")
    with pytest.raises(UserError, match="stacked"):
        train({**settings, "model_name_or_path": str(folder)}, offload_base="disk")


def test_a_torn_or_renamed_file_is_one_sentence(settings: dict[str, Any], tmp_path: Path) -> None:
    torn = Path(shutil.copytree(settings["model_name_or_path"], tmp_path / "torn"))
    file = sorted(torn.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file: it ends before"):
        train({**settings, "model_name_or_path": str(torn)}, offload_base="disk")
    renamed = Path(shutil.copytree(settings["model_name_or_path"], tmp_path / "renamed"))
    for index in renamed.glob("*.index.json"):
        index.unlink()
    tensors: dict[str, Tensor] = {}
    for file in renamed.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    tensors["elsewhere"] = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, renamed / "model.safetensors")
    with pytest.raises(UserError, match=r"have no model\.layers\.2\.mlp"):
        train({**settings, "model_name_or_path": str(renamed)}, offload_base="disk")


CHILD = """
import json, sys
import lighten
settings, *changes = json.loads(sys.argv[1])
for change in changes:
    run = lighten.train(**settings, **change, progress=False)
print(run.info()["training"]["peak_bytes"])
"""


def test_most_of_the_base_is_not_in_memory(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = save_deep(tmp_path / "wide", num_hidden_layers=16, hidden_size=512,
                       intermediate_size=2048, shard="100MB")  # fmt: skip
    base_bytes = 4 * 16 * (3 * 512 * 2048 + 2 * 512 * 512 + 2 * 512 * 256)
    common_settings = {**settings, "max_steps": 1, "val_size": 0, "eval_steps": None,
                       "max_eval_samples": None, "gradient_checkpointing": True}  # fmt: skip
    del common_settings["output_dir"], common_settings["model_name_or_path"]
    tiny = settings["model_name_or_path"]

    def peak_bytes(how: str) -> int:
        """Of a run in a process of its own: what an earlier one leaves free, a later one takes."""
        # A first run, of another model, loads what every run needs.
        runs = [{"model_name_or_path": tiny, "offload_base": "disk",
                 "output_dir": str(tmp_path / f"tiny-{how}")},
                {"model_name_or_path": str(folder), "offload_base": how,
                 "output_dir": str(tmp_path / how)}]  # fmt: skip
        child = python(CHILD, json.dumps([common_settings, *runs]))
        assert child.returncode == 0, child.stderr
        return int(child.stdout)

    streamed, resident = peak_bytes("disk"), peak_bytes("none")
    # All but two of 16 layers.
    assert resident - streamed > 0.75 * base_bytes


class NotingSlots:
    """Slots that write down what is read, in a thread that can be held up."""

    def __init__(self, layers: Sequence[LayerPieces]) -> None:
        self.read: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self._slots = [torch.zeros(layers[0].bytes, dtype=torch.uint8) for _ in range(2)]

    def get(self, place: int, piece: Piece) -> Tensor:
        return piece.of(self._slots[place])

    def fill(self, place: int, layer: int) -> None:
        self.gate.wait()
        self.read.append(layer)
        self._slots[place].fill_(layer)

    def begin(self, place: int) -> None:
        pass

    def end(self, place: int) -> None:
        pass


def feed_of(count: int) -> tuple[LayerFeed, NotingSlots, Any]:
    layers = [LayerPieces() for _ in range(count)]
    pieces = [layer_pieces.add("w", torch.uint8, (8,)) for layer_pieces in layers]
    slots = NotingSlots(layers)
    feed = LayerFeed(layers, slots)
    return feed, slots, lambda layer: feed.get(layer, pieces[layer])


def test_the_next_layer_is_read_while_one_computes() -> None:
    feed, slots, get = feed_of(6)
    feed.begin(learns=True)
    for layer in (*range(6), *reversed(range(6))):
        assert get(layer).tolist() == [layer] * 8
        assert get(layer).tolist() == [layer] * 8
    feed.begin(learns=False)
    for _ in range(2):
        for layer in range(6):
            assert get(layer).tolist() == [layer] * 8
    feed._settle()
    assert slots.read == [*range(6), 3, 2, 1, 0, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0]


def test_layers_may_be_asked_for_in_any_order() -> None:
    feed, _, get = feed_of(5)
    generator = torch.Generator().manual_seed(0)
    for layer in torch.randint(5, (200,), generator=generator).tolist():
        if layer == 4:
            feed.begin(learns=bool(feed.fetches % 2))
        assert get(layer).tolist() == [layer] * 8


def test_what_went_wrong_while_reading_is_told_to_whoever_asks() -> None:
    slots, get = feed_of(3)[1:]

    def broken(place: int, layer: int) -> None:
        raise OSError("the disk is gone")

    slots.gate.clear()  # layer 1 is not read yet when the disk goes
    slots.fill = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the disk is gone"):
        get(0)


def test_tensors_are_read_in_any_format_in_stretches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "STRETCH_BYTES", 4096)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype): torch.randn(300, 77, generator=generator).to(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    shards = Shards.of(tmp_path)
    for name, value in tensors.items():
        for dtype in (torch.float32, torch.bfloat16):
            into = torch.empty(300, 77, dtype=dtype)
            shards.read(name, into)
            assert torch.equal(into, value.to(dtype)), (name, dtype)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_what_lies_as_products_take_it_is_computed_with_where_it_lies(
    stored: torch.dtype, tmp_path: Path
) -> None:
    size = 3 * 2**20
    tensors = {str(layer): torch.randn(size).to(stored) for layer in range(3)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    layers = [LayerPieces() for _ in tensors]
    pieces = [
        layer.add(name, torch.float32, (size,)) for layer, name in zip(layers, tensors, strict=True)
    ]
    slots = MemorySlots(layers, Shards.of(tmp_path))
    in_file = 0
    for layer, place in ((0, 0), (1, 1), (2, 0), (1, 1), (0, 0)):
        slots.fill(place, layer)
        weight = slots.get(place, pieces[layer])
        assert torch.equal(weight, tensors[str(layer)].float())
        in_file = max(in_file, resident_bytes(file))
    bytes_of_two = 2 * size * 4
    if stored == torch.float32:
        assert bytes_of_two <= in_file <= bytes_of_two + 2**20
    else:
        assert in_file <= 2**20


def test_numbers_that_begin_between_two_places_are_copied(tmp_path: Path) -> None:
    numbers = torch.randn(64)
    header = {"w": {"dtype": "F32", "shape": [64], "data_offsets": [1, 257]},
              "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = bytes([7]) + numbers.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
    shards = Shards.of(tmp_path)
    assert shards.in_place("w", torch.float32) is None
    layer = LayerPieces()
    piece = layer.add("w", torch.float32, (64,))
    slots = MemorySlots([layer], shards)
    slots.fill(0, 0)
    assert torch.equal(slots.get(0, piece), numbers)


def test_a_rate_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(reading.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(reading.time, "sleep", sleep)
    limit = RateLimit(1000.0)
    for _ in range(4):
        limit.after(500)
    assert sum(slept) == pytest.approx(2.0)
    now[0] += 10.0  # what was not read meanwhile is not made up for
    limit.after(500)
    assert slept[-1] == pytest.approx(0.5)


def test_a_plan_counts_two_layers_and_the_time_of_reading(
    deep: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_settings = {**settings, "gradient_accumulation_steps": 2}

    def planned(**changes: Any) -> Any:
        return lighten.plan(**{**run_settings, **changes})

    def base_bytes(plan: Any) -> int:
        return sum(part.bytes for part in plan.memory.parts if part.name == "base weights")

    monkeypatch.setenv("LIGHTEN_READ_RATE", "1e5")
    resident, streamed = planned(), planned(offload_base="disk")
    layer = 4 * (3 * 32 * 48 + 2 * 32 * 32 + 2 * 32 * 16)
    saved = base_bytes(resident) - base_bytes(streamed)
    assert saved == pytest.approx((LAYERS - 2) * layer, abs=4 * 7 * LAYERS)
    # Two micro-batches go up and down; two of the layers are there at each turn; half as many bytes
    # in the files as in memory.
    read = 2 * 2 * (LAYERS - 2) * layer / 2
    assert streamed.time.seconds == pytest.approx(read / 1e5)
    assert any(note.endswith("which is what it waits for") for note in streamed.notes)
    packed = planned(offload_base="disk", load_in_4bit=True)
    assert base_bytes(packed) < base_bytes(streamed)
    monkeypatch.setenv("LIGHTEN_READ_RATE", "fast")
    with pytest.raises(UserError, match="LIGHTEN_READ_RATE is 'fast'"):
        planned(offload_base="disk")
    monkeypatch.delenv("LIGHTEN_READ_RATE")
    for dtype in ("float32", "bfloat16"):  # converted on the way, and looked at where it lies
        plan = planned(offload_base="disk", dtype=dtype)
        assert any("measured on" in note for note in plan.notes)


def test_what_does_not_fit_is_told_that_its_base_can_wait(settings: dict[str, Any]) -> None:
    from lighten.planning.changes import ideas
    from lighten.recipe import Recipe

    recipe = Recipe.from_values(settings)
    plan = lighten.plan(**settings)
    assert {"offload_base": "disk"} in [idea.settings for idea in ideas(recipe, plan)]
    streamed_recipe = recipe.changed({"offload_base": "disk"})
    assert not any("offload_base" in idea.settings for idea in ideas(streamed_recipe, plan))


def test_an_embedding_in_its_files_format_stays_there(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "LEFT_IN_FILE_BYTES", 1024)
    run_settings = {**settings, "dtype": "bfloat16", "max_steps": 2}
    mapped = []
    original_mapped = Shards.mapped

    def note_mapped(self: Shards, name: str) -> Tensor:
        mapped.append(name)
        return original_mapped(self, name)

    monkeypatch.setattr(Shards, "mapped", note_mapped)
    streamed = train(run_settings, offload_base="disk")
    outside = {name for name in mapped if ".layers." not in name}
    assert outside == {"lm_head.weight", "model.embed_tokens.weight"}
    assert_same(streamed, train(run_settings, tmp_path / "resident"), within=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_gpu_learns_the_same_from_layers_in_main_memory_or_on_disk(
    where: str, four: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    run_settings = {**settings, "lora_r": [2, 4], "load_in_4bit": four}
    resident = train(run_settings, tmp_path / "resident")
    streamed = train(run_settings, offload_base=where)
    assert losses(streamed) == pytest.approx(losses(resident), rel=1e-5)
    assert streamed.info()["training"]["offload_base"]["reads"] > 2 * 4 * (LAYERS - 2)


@pytest.mark.gpu
def test_a_slot_is_not_overwritten_while_a_gpu_computes_from_it() -> None:
    device = torch.device("cuda")
    layers = [LayerPieces() for _ in range(6)]
    pieces = [
        layer_pieces.add(str(n), torch.float32, (2**20,)) for n, layer_pieces in enumerate(layers)
    ]
    slots = CudaSlots(layers, lambda name, into: into.fill_(int(name)), device, all_pinned=True)
    feed = LayerFeed(layers, slots)
    sums = []
    for _ in range(20):
        feed.begin(learns=False)
        for layer, piece in enumerate(pieces):
            torch.cuda._sleep(1_000_000)  # the copy of the next layer but one is waiting meanwhile
            sums.append((feed.get(layer, piece).mean(), layer))
    torch.cuda.synchronize()
    assert [float(mean) for mean, _ in sums] == [float(layer) for _, layer in sums]
