"""Who may import whom, as DESIGN lays it down; and that looking costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from lighten.machine.hardware import EXTRAS

SOURCE = Path(__file__).parents[1] / "src" / "lighten"
MODULES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}
# Rooms that a room may import; `errors` and `wording` are everybody's, and so is the room itself.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "wording": set(),
    "paths": set(),
    "containers": set(),
    "forks": {"containers"},
    "verbs": {"api"},
    "peft_config": set(),
    "gguf_names": set(),
    "recipe": {"paths", "peft_config"},
    "hardware": {"containers"},
    "native": {"hardware"},
    "parallel": {"adapters", "forks", "hardware", "models", "recipe", "whole_files"},
    "allocator": {"hardware", "native"},
    # Drawing in notebooks goes the other way round, when a notebook asks for it.
    "notebook": {"evaluate", "report", "runs", "sweep"},
    "locks": set(),
    "streams": set(),
    "dialogue": {"streams"},
    "whole_files": set(),
    "folders": {"locks", "whole_files"},
    "runs": {"folders", "locks", "notebook", "recipe", "whole_files"},
    "models": {"allocator", "gguf_names", "hardware", "native", "streams"},
    "data": {"forks", "paths"},
    "adapters": {"peft_config"},
    "train": {"adapters", "allocator", "data", "devices", "folders", "forks", "locks", "models",
              "parallel", "paths", "peft_config", "recipe", "hardware", "runs", "verbs", "streams"},
    "evaluate": {"adapters", "data", "dialogue", "models", "recipe", "hardware", "notebook", "runs",
                 "train", "verbs", "streams"},
    "datasheets": {"hardware"},
    "devices": {"containers", "datasheets", "hardware"},
    "report": {"data", "evaluate", "folders", "runs", "verbs"},
    "sweep": {"adapters", "data", "folders", "locks", "models", "notebook", "paths", "recipe",
              "hardware", "runs", "train", "evaluate", "verbs"},
    # It traces the step of `train`, and draws its picture with `report`'s figures.
    "plan": {"adapters", "allocator", "containers", "data", "devices", "forks", "models",
             "recipe", "hardware", "parallel", "paths", "report", "runs", "timing", "train",
             "verbs"},
    "artifacts": {"models", "peft_config", "runs"},
    # A receipt asks the prompts that an evaluation asks.
    "quantize": {"adapters", "artifacts", "containers", "data", "evaluate", "gguf_names",
                 "hardware", "jobs", "looked", "models", "peft_config", "recipe", "runs", "streams",
                 "train", "verbs", "whole_files"},
    "serve": {"adapters", "containers", "data", "dialogue", "hardware", "models", "native",
              "peft_config", "quantize", "report", "runs", "whole_files"},
    "timing": set(),
    # Its children's errors are read as the training's are.
    "jobs": {"train"},
    # It measures the steps of `train` against what `plan` says, and the answers of `evaluate`.
    "bench": {"adapters", "allocator", "artifacts", "devices", "evaluate", "hardware", "jobs",
              "models", "plan", "quantize", "recipe", "runs", "timing", "train", "whole_files"},
    "api_serve": {"serve"},
    "api_plan": {"api", "devices", "looked", "plan", "quantize", "runs"},
    "api_bench": {"api", "bench", "looked", "recipe", "report"},
    "api": {"adapters", "api_bench", "api_plan", "api_serve", "artifacts", "devices", "evaluate",
            "folders",
            "looked", "parallel", "paths", "plan", "quantize", "recipe", "report", "runs", "sweep",
            "train"},
    "looked": {"models", "paths", "recipe", "runs", "train"},
    "console": {"recipe", "streams"},
    "cli_runs": {"console", "looked", "report", "runs"},
    "cli_adapter": {"api", "console"},
    "cli_audit": {"api", "console", "report"},
    "cli_bench": {"api", "bench", "cli_serve", "console"},
    "cli_evaluate": {"console"},
    "cli_export": {"api", "console", "quantize"},
    "cli_quantize": {"api", "console"},
    "cli_plan": {"api", "console", "datasheets", "plan", "runs"},
    "cli_serve": {"api", "cli_plan", "console", "plan", "serve"},
    "cli_settings": {"console", "recipe"},
    "cli": {"api", "cli_adapter", "cli_audit", "cli_bench", "cli_evaluate", "cli_export",
            "cli_plan", "cli_quantize", "cli_runs", "cli_serve", "cli_settings", "console", "data",
            "evaluate", "hardware", "looked", "models", "parallel",
            "paths", "recipe", "report", "runs", "streams", "sweep", "train"},
    "__main__": {"cli"},
}  # fmt: skip
LIGHT = (
    "lighten",
    "lighten.api",
    "lighten.api_bench",
    "lighten.api_plan",
    "lighten.api_serve",
    "lighten.benchmarking",
    "lighten.benchmarking.text",
    "lighten.cli.console",
    "lighten.cli.main",
    "lighten.data.read",
    "lighten.dialogue",
    "lighten.errors",
    "lighten.evaluation",
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
    "lighten.quantization.gguf_model",
    "lighten.quantization.llamacpp",
    "lighten.recipe",
    "lighten.reporting",
    "lighten.reporting.charts",
    "lighten.reporting.planned",
    "lighten.runs",
    "lighten.streams",
    "lighten.sweeps",
    "lighten.sweeps.arms",
    "lighten.sweeps.recommend",
    "lighten.training",
)
HEAVY = {"torch", "transformers", "peft", "accelerate"}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Rooms of the project that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {room(alias.name) for alias in node.names if alias.name.startswith("lighten.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lighten":
            module = str(node.module)
            if module == "lighten":
                found |= {alias.name for alias in node.names}
            else:
                found.add(room(module))
    return found


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"lighten"}))
def test_a_room_imports_only_what_it_may(module: str) -> None:
    own = room(module)
    allowed = ALLOWED[own] | {own, "errors", "wording"}
    assert imports(MODULES[module]) <= allowed


def test_nobody_imports_the_command_line() -> None:
    assert [m for m, path in MODULES.items() if "cli" in imports(path)] == ["lighten.__main__"]


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


def test_no_file_is_two_things() -> None:
    sizes = {m: len(path.read_text(encoding="utf-8").splitlines()) for m, path in MODULES.items()}
    assert max(sizes.values()) <= 480, max(sizes, key=lambda m: sizes[m])
