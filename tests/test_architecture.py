"""Who may import whom, as DESIGN lays it down; and that looking costs nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from lighten.machine.hardware import EXTRAS

SOURCE = Path(__file__).parents[1] / "src" / "lighten"
MODULES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}
# Rooms that a room may import, from the lowest to the highest: each imports only rooms above it in
# this table, so no two need each other. `errors` and `wording` are everybody's.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "gguf_names": set(),
    "hub_errors": set(),
    "job_server": set(),
    "locks": set(),
    "machine": set(),
    "forked_jobs": {"job_server", "machine"},
    "data_card": set(),
    "paths": {"data_card"},
    "safetensors_header": set(),
    "safetensors_stream": {"safetensors_header"},
    "streams": set(),
    "whole_files": set(),
    "wording": set(),
    "cpu": {"machine"},
    "peft_config": {"hub_errors", "paths", "safetensors_header"},
    "adapters": {"cpu", "peft_config", "safetensors_stream"},
    "data": {"data_card", "hub_errors", "machine", "paths", "streams"},
    "dialogue": {"streams"},
    "folders": {"locks", "whole_files"},
    "recipe": {"paths", "peft_config"},
    "models": {"cpu", "gguf_names", "machine", "paths", "safetensors_header", "streams"},
    "runs": {"folders", "locks", "paths", "recipe", "whole_files"},
    "artifacts": {"models", "paths", "peft_config", "runs"},
    "parallel": {
        "adapters",
        "machine",
        "models",
        "recipe",
        "safetensors_header",
        "whole_files",
    },
    "engine": {"adapters", "cpu", "data", "machine", "models", "parallel"},
    "generation": {"adapters", "cpu", "machine", "models", "peft_config"},
    "jobs": {"engine", "forked_jobs"},
    "training": {
        "adapters",
        "cpu",
        "data",
        "engine",
        "folders",
        "locks",
        "machine",
        "models",
        "parallel",
        "paths",
        "peft_config",
        "recipe",
        "runs",
        "safetensors_header",
        "safetensors_stream",
        "streams",
    },
    "evaluation": {
        "adapters",
        "artifacts",
        "cpu",
        "data",
        "dialogue",
        "engine",
        "generation",
        "machine",
        "models",
        "paths",
        "peft_config",
        "recipe",
        "runs",
        "training",
    },
    "path_checks": {"models", "paths", "peft_config", "recipe", "runs", "training"},
    "quantization": {
        "adapters",
        "artifacts",
        "data",
        "engine",
        "evaluation",
        "gguf_names",
        "jobs",
        "machine",
        "models",
        "path_checks",
        "paths",
        "peft_config",
        "recipe",
        "runs",
        "safetensors_header",
        "safetensors_stream",
        "streams",
        "training",
        "whole_files",
    },
    "sweeps": {
        "cpu",
        "data",
        "engine",
        "evaluation",
        "folders",
        "locks",
        "machine",
        "models",
        "paths",
        "recipe",
        "runs",
        "training",
    },
    "reporting": {"data", "evaluation", "folders", "runs", "sweeps"},
    "planning": {
        "adapters",
        "cpu",
        "data",
        "engine",
        "generation",
        "machine",
        "models",
        "parallel",
        "paths",
        "recipe",
        "reporting",
        "runs",
        "training",
    },
    "serving": {
        "adapters",
        "cpu",
        "data",
        "dialogue",
        "generation",
        "machine",
        "models",
        "paths",
        "peft_config",
        "quantization",
        "reporting",
        "runs",
        "streams",
        "whole_files",
    },
    "benchmarking": {
        "adapters",
        "artifacts",
        "cpu",
        "engine",
        "evaluation",
        "generation",
        "jobs",
        "locks",
        "machine",
        "models",
        "planning",
        "quantization",
        "recipe",
        "runs",
        "training",
        "whole_files",
    },
    "api": {
        "adapters",
        "benchmarking",
        "evaluation",
        "folders",
        "machine",
        "parallel",
        "path_checks",
        "paths",
        "planning",
        "quantization",
        "recipe",
        "reporting",
        "runs",
        "serving",
        "sweeps",
        "training",
    },
    "cli": {
        "api",
        "benchmarking",
        "cpu",
        "data",
        "evaluation",
        "machine",
        "models",
        "parallel",
        "path_checks",
        "paths",
        "planning",
        "quantization",
        "recipe",
        "reporting",
        "runs",
        "serving",
        "streams",
        "training",
    },
    "__main__": {"cli"},
}
LIGHT = (
    "lighten",
    "lighten.api",
    "lighten.benchmarking",
    "lighten.benchmarking.text",
    "lighten.cli.console",
    "lighten.cli.main",
    "lighten.data.read",
    "lighten.dialogue",
    "lighten.errors",
    "lighten.evaluation",
    "lighten.generation.settings",
    "lighten.machine.datasheets",
    "lighten.machine.devices",
    "lighten.machine.hardware",
    "lighten.machine.timing",
    "lighten.models",
    "lighten.models.catalogue",
    "lighten.models.names",
    "lighten.parallel.launch",
    "lighten.parallel.spawn",
    "lighten.peft_config",
    "lighten.planning",
    "lighten.planning.text",
    "lighten.quantization.child",
    "lighten.quantization.gguf_model",
    "lighten.quantization.llamacpp",
    "lighten.quantization.scores",
    "lighten.recipe",
    "lighten.reporting",
    "lighten.reporting.charts",
    "lighten.reporting.planned",
    "lighten.runs",
    "lighten.safetensors_header",
    "lighten.streams",
    "lighten.sweeps",
    "lighten.sweeps.arms",
    "lighten.sweeps.recommend",
    "lighten.training",
)
HEAVY = {"torch", "transformers", "peft", "accelerate"}


# What runs PEFT's own modules. Importing PEFT takes a second and more: the rest does without until
# a file of PEFT's is written.
OF_PEFT = {"lighten.adapters." + name for name in ("peft_backed", "peft_starts", "virtual_tokens")}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Rooms of the project that a file imports, inside functions too."""
    imported_rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported_rooms |= {
                room(alias.name) for alias in node.names if alias.name.startswith("lighten.")
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lighten":
            module = str(node.module)
            if module == "lighten":
                imported_rooms |= {alias.name for alias in node.names}
            else:
                imported_rooms.add(room(module))
    return imported_rooms


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"lighten"}))
def test_a_room_imports_only_what_it_may(module: str) -> None:
    own_room = room(module)
    allowed = ALLOWED[own_room] | {own_room, "errors", "wording"}
    assert imports(MODULES[module]) <= allowed


def test_no_room_needs_one_that_needs_it() -> None:
    rooms = list(ALLOWED)
    assert [
        (name, needed)
        for name, allowed in ALLOWED.items()
        for needed in allowed
        if rooms.index(needed) >= rooms.index(name)
    ] == []


def test_training_begins_without_peft() -> None:
    """No file but those that run PEFT's modules loads PEFT, or one of them, as it is imported."""
    for name, path in MODULES.items():
        loaded = {module for module in _loaded(path) if module.split(".")[0] == "peft"}
        loaded |= OF_PEFT & _loaded(path)
        assert name in OF_PEFT or not loaded, f"{name} imports {loaded}"


def _loaded(path: Path) -> set[str]:
    """Modules that a file's statements outside of functions import, and names taken from them."""
    modules: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {str(node.module), *(f"{node.module}.{a.name}" for a in node.names)}
    return modules


def test_no_circle_between_files() -> None:
    """Imports within functions count; those for annotations alone are never run."""
    unseen = {module: _needs(module) for module in MODULES}
    while ready := [module for module, needed in unseen.items() if not needed & set(unseen)]:
        for module in ready:
            del unseen[module]
    assert unseen == {}


def _needs(module: str) -> set[str]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    needed: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            needed |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            needed |= names & set(MODULES) or {node.module}
    return needed & set(MODULES) - {module}


def test_nobody_imports_the_command_line() -> None:
    users = {room(module) for module, path in MODULES.items() if "cli" in imports(path)}
    assert users == {"__main__", "cli"}


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_loads_without_torch(module: str) -> None:
    code = f"import sys, {module}; assert not {HEAVY!r} & set(sys.modules), set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_extras_are_imported_only_where_they_are_used(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    at_the_top = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not {name.split(".")[0] for name in at_the_top} & set(EXTRAS)


def test_from_the_command_to_the_backward_pass_it_is_not_far(
    tiny_folder: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run with one worker: functions of ours that are under way, and the files they are in."""
    import torch

    from lighten.cli.main import app
    from lighten.engine.scaling import LossScaler

    chain: list[tuple[str, str]] = []
    backward = torch.Tensor.backward

    def watched(loss: torch.Tensor, *args: object, **options: object) -> None:
        if not chain:
            for frame, _ in traceback.walk_stack(sys._getframe(1)):
                path = Path(frame.f_code.co_filename)
                if path.is_relative_to(SOURCE):
                    chain.insert(0, (path.relative_to(SOURCE).as_posix(), frame.f_code.co_name))
        backward(loss, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    monkeypatch.setattr(LossScaler, "backward", staticmethod(watched))
    app(
        ["train", str(tiny_folder), str(chat_file), "--max_steps", "1", "--workers", "1",
         "--dtype", "float32", "--output_dir", str(tmp_path / "run")],
        standalone_mode=False,
    )  # fmt: skip
    assert chain[0] == ("cli/main.py", "train")
    assert len(chain) <= 8, chain
    assert len({file for file, _ in chain}) <= 6, chain


def test_the_page_about_the_house_names_files_that_are_there() -> None:
    page = (SOURCE.parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    house, _, _ = page.partition("## Kernels and environment variables")
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+(?:\.(?:py|cpp)|/))`", house))
    assert len(named) > 30
    assert {name for name in named if not (SOURCE / name).exists()} == {
        "tests/test_architecture.py"
    }
    rooms = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    assert {room for room in rooms if f"**`{room}/`**" not in house} - {"cli"} == set()


def test_no_file_is_two_things() -> None:
    sizes = {m: len(path.read_text(encoding="utf-8").splitlines()) for m, path in MODULES.items()}
    assert max(sizes.values()) <= 480, max(sizes, key=lambda m: sizes[m])
