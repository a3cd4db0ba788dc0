"""What trackers get of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lighten.errors import UserError
from tests.processes import python
from tests.tiny_runs import eight_steps, train


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return eight_steps(tiny_folder, chat_file, tmp_path / "run")


def test_trackers_get_every_adapter_and_wandb_stays_offline(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    run = train(settings, report_to=["wandb", "tensorboard"], max_steps=2, eval_steps=1)
    assert list(run.folder.glob("wandb/offline-run-*/*.wandb"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: dict[str, list[float]] = {}
    for events in {path.parent for path in run.folder.rglob("events.out*")}:
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        scalars |= {
            tag: [event.value for event in accumulator.Scalars(tag)]
            for tag in accumulator.Tags()["scalars"]
        }
    expected = [m["loss"] for m in run.metrics() if m["adapter"] == "r4" and m["kind"] == "train"]
    assert scalars["train/r4/loss"] == pytest.approx(expected)
    assert "eval/r2/loss" in scalars


@pytest.mark.parametrize("logged_in", [False, True])
def test_wandb_sends_figures_after_wandb_login_and_without_says_where_they_stay(
    logged_in: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key is in a file then. In a process of its own: W&B keeps what it has read."""
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text(f"default login user password {'a' * 40}\n" * logged_in)
    result = python(
        "import os\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from lighten.training import trackers\n"
        "accelerator = SimpleNamespace(log_with=['wandb'], is_main_process=True,\n"
        "    init_trackers=lambda *_, **options: print(options['init_kwargs'], dict(os.environ)))\n"
        "print(trackers.start(accelerator, Path('r'), {'report_to': ['wandb']}))\n"
    )
    assert result.returncode == 0, result.stderr
    *_, options, note = result.stdout.splitlines()
    assert ("'offline'" in options, "wandb sync" in note) == (not logged_in, not logged_in)


def test_a_missing_tracker_is_named_with_its_install_command(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "trackio" else real(name, *a)
    )
    with pytest.raises(UserError, match=r"pip install 'lighten\[track\]'"):
        train(settings, report_to="trackio")
