"""The shape of the house: what may import what, what the idle agent holds, and the public face."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "energy": set(),
    "edge_runtime": {"energy"},
    "exporters": {"edge_runtime", "energy"},
    "coordinator": {"edge_runtime", "energy"},
}
NEVER = {"energy": {"torch"}, "edge_runtime": {"torch", "onnx"}, "coordinator": {"torch"}, "exporters": set()}
HEAVY = (
    "numpy",
    "onnxruntime",
    "torch",
    "onnx",
    "sqlalchemy",
    "asyncio",
    "cryptography",
    "safetensors",
    "backports.zstd",
)


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_down_only(room: str) -> None:
    """No module imports from a room above its own, nor a library that its room must do without."""
    others = set(ALLOWED) - {room} - ALLOWED[room]
    for path in (ROOT / room).rglob("*.py"):
        wrong = _imports(path) & (others | NEVER[room])
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_idle_agent_imports_nothing_heavy() -> None:
    """The daemon runs without numpy, onnxruntime and their like in memory."""
    code = "import sys, edge_runtime.cli, edge_runtime.agent.daemon; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert not set(HEAVY) & set(loaded.split())


def test_worker_trains_without_torch() -> None:
    """What the worker imports to train holds neither torch nor onnx."""
    code = "import sys, edge_runtime.agent.worker, edge_runtime.training.job; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert not {"torch", "onnx", "sqlalchemy"} & set(loaded.split())


def test_public_face_of_the_device() -> None:
    """``edge_runtime`` offers exactly these names."""
    import edge_runtime

    assert sorted(edge_runtime.__all__) == [
        "Agent",
        "AgentConfig",
        "Bundle",
        "ClientMethod",
        "Codec",
        "Dataset",
        "EdgeError",
        "Trainer",
        "__version__",
        "load_agent_config",
    ]
    for name in edge_runtime.__all__:
        assert getattr(edge_runtime, name)


def test_public_face_of_the_coordinator() -> None:
    """``coordinator`` offers exactly these names."""
    pytest.importorskip("sqlalchemy")
    import coordinator

    assert sorted(coordinator.__all__) == [
        "Coordinator",
        "Plan",
        "Selector",
        "ServerMethod",
        "ServerSettings",
        "load_plan",
    ]
    for name in coordinator.__all__:
        assert getattr(coordinator, name)


def test_public_face_of_the_exporter() -> None:
    """``exporters`` offers exactly these names."""
    pytest.importorskip("torch")
    import exporters

    assert sorted(exporters.__all__) == ["ExportError", "ExportReport", "export_bundle"]
    for name in exporters.__all__:
        assert getattr(exporters, name)


def test_unknown_public_names_are_refused() -> None:
    """A misspelt name of the public face is an AttributeError, not a silent None."""
    import edge_runtime

    with pytest.raises(AttributeError, match="Agnet"):
        _ = edge_runtime.Agnet
