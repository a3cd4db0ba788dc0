"""Lower ranks and singular values, against the whole product decomposed by torch, and PEFT."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from lighten import api
from lighten.adapters import AdapterSpec, attach, files, resize, spectrum
from lighten.adapters import load as load_adapters
from lighten.errors import UserError
from lighten.recipe import Recipe
from lighten.runs import Run
from tests.processes import call
from tests.tiny import VOCAB, tiny_model

IDS = torch.randint(3, VOCAB, (4, 11), generator=torch.Generator().manual_seed(0))


def save(folder: Path, arch: str = "llama", **options: Any) -> Path:
    """A saved adapter whose update is not zero, its singular values far apart."""
    settings = {"r": 8, "alpha": 12.0, "init_lora_weights": False, **options}
    cohort = attach(tiny_model(arch), [AdapterSpec("default", **settings)])
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for key, value in cohort.parameters("default").items():
            if ".lora_A." in key:
                value *= 0.6 ** torch.arange(len(value))[:, None]
            elif ".lora_" not in key:
                value += 0.1
    for name, data in files.contents(cohort, "default", base_model="tiny").items():
        (folder / name).write_bytes(data)
    return folder


def write(adapter: spectrum.SavedAdapter, rank: int, folder: Path) -> Path:
    folder.mkdir()
    for name, data in resize.contents(adapter, resize.at_rank(adapter, rank)).items():
        (folder / name).write_bytes(data)
    return folder


def deltas(folder: Path, arch: str = "llama") -> dict[str, Tensor]:
    """Each layer's update as PEFT itself forms it from a folder."""
    model = PeftModel.from_pretrained(tiny_model(arch), str(folder))
    return {
        path.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(40, 24, 6), (24, 40, 6), (10, 12, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_decomposition_is_that_of_the_whole_product(
    outputs: int, inputs: int, rank: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    B = torch.randn(outputs, rank, generator=generator, dtype=dtype)
    A = torch.randn(rank, inputs, generator=generator, dtype=dtype)
    product = B.double() @ A.double()
    svd = spectrum.svd_of_product(B, A)
    singular_values = torch.linalg.svdvals(product)[: len(svd.values)]
    torch.testing.assert_close(svd.values, singular_values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(svd.U * svd.values @ svd.Vh, product, rtol=1e-12, atol=1e-11)
    eye = torch.eye(len(svd.values), dtype=torch.float64)
    torch.testing.assert_close(svd.U.T @ svd.U, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(svd.Vh @ svd.Vh.T, eye, rtol=0, atol=1e-12)


def test_no_large_matrix_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 20 000 x 20 000 would take 3.2 GB; the factors take 0.6 MB."""
    sizes = []
    real_svd = torch.linalg.svd
    monkeypatch.setattr(
        torch.linalg,
        "svd",
        lambda core, **options: sizes.append(core.shape) or real_svd(core, **options),
    )
    svd = spectrum.svd_of_product(torch.randn(20_000, 4), torch.randn(4, 20_000))
    assert svd.U.shape == (20_000, 4)
    assert sizes == [(4, 4)]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_lower_rank_is_the_best_one_in_peft(arch: str, rslora: bool, tmp_path: Path) -> None:
    source = save(tmp_path / "full", arch, use_rslora=rslora)
    adapter = spectrum.read(source)
    cut = resize.at_rank(adapter, 3)
    before, after = deltas(source, arch), deltas(write(adapter, 3, tmp_path / "cut"), arch)
    assert before.keys() == after.keys() == {layer.path for layer in cut.cuts}
    lost = energy = 0.0
    for path, delta in before.items():
        U, values, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
        best = U[:, :3] * values[:3] @ Vh[:3]
        torch.testing.assert_close(after[path].double(), best, rtol=1e-4, atol=1e-6)
        lost += float(values[3:].square().sum())
        energy += float(values.square().sum())
    assert cut.error == pytest.approx(math.sqrt(lost / energy), rel=1e-5)
    assert cut.energy_kept == pytest.approx(1 - lost / energy, rel=1e-6)
    assert 0.01 < cut.error < 0.5  # the test would tell a wrong choice of triplets


def test_a_rank_that_cuts_nothing_changes_nothing(tmp_path: Path) -> None:
    source = save(tmp_path / "full", modules_to_save=("lm_head",))
    adapter = spectrum.read(source)
    cut = resize.at_rank(adapter, 8)
    assert (cut.error, cut.energy_kept, cut.facts()["layers_cut"]) == (0.0, 1.0, 0)
    again = write(adapter, 64, tmp_path / "again")
    weights = files.read_weights(again)
    assert all(
        torch.equal(weights[key], value) for key, value in files.read_weights(source).items()
    )
    models = [PeftModel.from_pretrained(tiny_model("llama"), str(f)) for f in (source, again)]
    with torch.no_grad():
        assert torch.equal(*(model.eval()(input_ids=IDS).logits for model in models))


def test_all_the_energy_costs_only_rounding(tmp_path: Path) -> None:
    """An update of rank 2 in factors of rank 8 loses nothing at rank 2."""
    source = save(tmp_path / "full")
    weights = files.read_weights(source)
    for key, value in weights.items():
        if ".lora_A." in key:
            value[2:] = value[:2].repeat(3, 1)
    (source / files.WEIGHTS).write_bytes(files.to_bytes(weights, metadata={"format": "pt"}))
    adapter = spectrum.read(source)
    for layer in adapter.layers:
        assert layer.facts()["effective_rank"] <= 2 + 1e-4
        assert layer.facts()["rank_99"] <= 2
    cut = resize.at_rank(adapter, 2)
    assert 0.0 < cut.error < 1e-6
    folder = write(adapter, 2, tmp_path / "cut")
    expected, logits = (
        PeftModel.from_pretrained(tiny_model("llama"), str(f)).eval()(input_ids=IDS).logits
        for f in (source, folder)
    )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_and_whole_modules_are_kept(rslora: bool, tmp_path: Path) -> None:
    source = save(
        tmp_path / "full", use_rslora=rslora, modules_to_save=("lm_head",),
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 12},
        alpha_pattern={"q_proj": 3.0, "up_proj": 5.0},
    )  # fmt: skip
    adapter = spectrum.read(source)
    folder = write(adapter, 4, tmp_path / "cut")
    cut = spectrum.read(folder)
    for old, new in zip(adapter.layers, cut.layers, strict=True):
        assert old.path == new.path
        assert new.rank == min(old.rank, 4)
        assert new.scale == pytest.approx(old.scale, rel=1e-12)
    assert {layer.rank for layer in cut.layers} == {2, 4}
    for key, value in adapter.other_tensors.items():
        assert torch.equal(cut.other_tensors[key], value)
    assert adapter.other_tensors
    before, after = deltas(source), deltas(folder)
    for path, delta in before.items():
        values = torch.linalg.svdvals(delta.double())
        lost = float((delta - after[path]).double().norm())
        assert lost == pytest.approx(float(values[4:].norm()), rel=1e-3, abs=1e-5), path
    # lighten's own layers read the patterns as PEFT does.
    ours = load_adapters(tiny_model("llama"), {"default": folder})
    theirs = PeftModel.from_pretrained(tiny_model("llama"), str(folder)).eval()
    with torch.no_grad(), ours.using("default"):
        logits = ours.model(input_ids=IDS).logits
    torch.testing.assert_close(logits, theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_peft_saved_with_an_embedding_is_cut_too(tmp_path: Path) -> None:
    config = LoraConfig(r=8, lora_alpha=4, target_modules=["embed_tokens", "v_proj"],
                        init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "full")
    adapter = spectrum.read(tmp_path / "full")
    assert any("embed_tokens" in layer.path for layer in adapter.layers)
    before, after = deltas(tmp_path / "full"), deltas(write(adapter, 2, tmp_path / "cut"))
    for path, delta in before.items():
        values = torch.linalg.svdvals(delta.double())
        lost = float((delta - after[path]).double().norm())
        assert lost == pytest.approx(float(values[2:].norm()), rel=1e-4), path


def test_rank_used_is_the_literature_s(tmp_path: Path) -> None:
    assert spectrum.effective_rank(torch.full((5,), 3.0)) == pytest.approx(5.0)
    assert spectrum.effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert spectrum.effective_rank(torch.zeros(4)) == 0.0
    # exp(-(3/4 ln 3/4 + 1/4 ln 1/4))
    assert spectrum.effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(1.7547654)
    values = torch.tensor([3.0, 1.0, 0.1])  # energies 9, 1, 0.01
    assert [spectrum.rank_for_energy(values, s) for s in (0.5, 0.9, 0.99, 1.0)] == [1, 2, 2, 3]
    assert spectrum.rank_for_energy(torch.zeros(3), 0.9) == 0
    assert spectrum.rank_for_energy(torch.ones(10), 0.9) == 9
    fresh = save(tmp_path / "fresh", init_lora_weights=True)  # B is zero
    assert {layer.facts()["effective_rank"] for layer in spectrum.read(fresh).layers} == {0.0}
    assert resize.at_rank(spectrum.read(fresh), 2).error == 0.0


def test_other_kinds_and_broken_folders_are_refused(tmp_path: Path) -> None:
    dora = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama"), dora).save_pretrained(tmp_path / "dora")
    with pytest.raises(UserError, match="with use_dora is more than"):
        spectrum.read(tmp_path / "dora")
    with pytest.raises(UserError, match="is not an adapter"):
        spectrum.read(tmp_path)
    source = save(tmp_path / "full")
    with pytest.raises(UserError, match="rank of 1 at least"):
        resize.at_rank(spectrum.read(source), 0)
    config = json.loads((source / files.CONFIG).read_text())
    (source / files.CONFIG).write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(UserError, match="says rank 4; the two do not belong together"):
        spectrum.read(source)


def a_run(folder: Path, tiny: Path, data: Path, names: tuple[str, ...]) -> Run:
    """A run folder with saved adapters, as training leaves it."""
    recipe = Recipe.from_values(
        {"model_name_or_path": str(tiny), "dataset": str(data), "output_dir": str(folder),
         "adapters": [{"name": name, "lora_r": 8} for name in names]}
    )  # fmt: skip
    run = Run.create(recipe)
    for name in names:
        save(run.folder / "adapters" / name)
        (run.folder / "adapters" / name / "README.md").write_text("# The card\n")
    return run


def test_the_verbs_on_a_run_and_on_a_folder(
    tmp_path: Path, tiny_folder: Path, chat_file: Path
) -> None:
    run = a_run(tmp_path / "one", tiny_folder, chat_file, ("default",))
    folder, resized = api.resize_adapter(run, 2)
    assert len(repr(resized)) < 80, "no weights in a notebook's cell"
    assert folder == run.folder / "exports" / "default-r2"
    assert "# The card\n\nResized by lighten from rank 8 to 2" in (folder / "README.md").read_text()
    assert resized.facts()["r"] == 2
    assert list(Run(run.folder).adapters()) == ["default"]
    by_folder, _ = api.resize_adapter(run.folder / "adapters" / "default", 2)
    assert by_folder == run.folder / "adapters" / "default-r2"
    assert (by_folder / files.CONFIG).read_bytes() == (folder / files.CONFIG).read_bytes()

    result = call("adapter", "resize", "one", "--rank", "2", "--output_dir", "mine", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "of the update's squared norm" in result.stdout
    # Headers differ in the mark that says whose the folder is, and in the order of its entries.
    mine, theirs = (load_file(path / files.WEIGHTS) for path in (tmp_path / "mine", folder))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    info = json.loads(call("adapter", "info", "mine", "--json", cwd=tmp_path).stdout)
    assert (info["r"], info["largest_rank"], len(info["layers"])) == (2, 2, 14)
    assert info["parameters"] == resized.parameters
    table = call("adapter", "info", "one", "--layers", cwd=tmp_path).stdout
    assert "for 90 %" in table
    assert "layers.1.mlp.down_proj" in table


def test_mistakes_with_runs_are_said(tmp_path: Path, tiny_folder: Path, chat_file: Path) -> None:
    run = a_run(tmp_path / "two", tiny_folder, chat_file, ("a", "b"))
    with pytest.raises(UserError, match="has several adapters; name one: --adapter a"):
        api.adapter_info(run)
    with pytest.raises(UserError, match="has no adapter 'c'; it has a, b"):
        api.adapter_info(run, adapter="c")
    assert api.adapter_info(run, adapter="b")["r"] == 8
    adapter_folder = run.folder / "adapters" / "a"
    with pytest.raises(UserError, match="is the adapter itself"):
        api.resize_adapter(adapter_folder, 2, output_dir=adapter_folder)
    with pytest.raises(UserError, match="did not write"):
        api.resize_adapter(adapter_folder, 2, output_dir=tmp_path)
    assert (adapter_folder / files.WEIGHTS).is_file()


def test_a_folder_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "full")
    folder, _ = api.resize_adapter(source, 4)
    before = (folder / files.WEIGHTS).read_bytes()

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full"):
        api.resize_adapter(source, 2, output_dir=folder)
    assert (folder / files.WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "full-r4"]


def _trained_there_since(folder: Path) -> None:
    (folder / files.WEIGHTS).write_bytes((folder.parent / "full" / files.WEIGHTS).read_bytes())


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "notes.txt").write_text("mine"),
        lambda folder: (folder / "checkpoints").mkdir(),
        lambda folder: (folder / files.WEIGHTS).write_bytes(b"cut"),
        lambda folder: (folder / files.WEIGHTS).unlink(),
        _trained_there_since,
    ],
    ids=["a file", "a folder", "damaged", "no weights", "another adapter"],
)
def test_a_folder_with_anything_else_in_it_is_left_alone(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    source = save(tmp_path / "full")
    folder, _ = api.resize_adapter(source, 2)
    again, _ = api.resize_adapter(source, 2)  # its own result is written anew
    assert again == folder
    change(folder)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="did not write"):
        api.resize_adapter(source, 2)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_an_adapter_of_one_s_own_an_empty_folder_and_a_link(tmp_path: Path) -> None:
    source, other = save(tmp_path / "full"), save(tmp_path / "other")
    before = (other / files.WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="did not write"):
        api.resize_adapter(source, 2, output_dir=other)
    assert (other / files.WEIGHTS).read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert api.resize_adapter(source, 2, output_dir=tmp_path / "empty")[0] == tmp_path / "empty"
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(UserError, match="is a link"):
        api.resize_adapter(source, 2, output_dir=tmp_path / "link")


def test_the_folder_that_one_stands_in_is_resized_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.` has no name, and its parent is itself."""
    source = save(tmp_path / "full")
    before = sorted(source.iterdir())
    monkeypatch.chdir(source)
    assert api.resize_adapter(".", 2)[0] == tmp_path / "full-r2"
    assert sorted(source.iterdir()) == before
