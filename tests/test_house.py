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


def test_the_idle_agent_has_no_tools_for_types_in_memory() -> None:
    """Whether they are installed or not."""
    code = "import sys, edge_runtime.cli, edge_runtime.agent.daemon; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert not {"typing_extensions", "inspect", "ast", "dis"} & set(found.split())


MEASURES = """
import sys
from pathlib import Path
from energy.metering.conditions import read_conditions
from energy.metering.meter import Meter
from energy.sensors.discovery import choose, discover
from energy.sensors.modelled import Modelled
root = Path(sys.argv[1])
meter = Meter([*choose(discover(root)), [Modelled(1.0, 2.0, lambda: 1.0)]], conditions=lambda: read_conditions(root))
with meter.open("work") as window:
    meter.sample()
assert window.close().joules is not None
print(*sys.modules)
"""


def test_sensors_and_meter_are_light(tmp_path: Path) -> None:
    """Finding sensors and measuring a window loads nothing that an idle daemon should not carry."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURES, tmp_path], check=True, capture_output=True, text=True, cwd=ROOT
    )
    heavy = {*HEAVY, "dataclasses", "inspect", "json", "msgspec", "multiprocessing", "paho", "pynvml", "scipy"}
    assert not (heavy | {"subprocess", "threading"}) & set(done.stdout.split())


WATCHES = """
import sys
from pathlib import Path
from edge_runtime.agent.config import load_agent_config
from edge_runtime.agent.daemon import Agent
agent = Agent(load_agent_config(Path(sys.argv[1])))
agent.joules.start(agent.config.energy, busy_s=None, root=Path(sys.argv[2]))
assert agent.joules.source is not None
agent.joules.tick()
print(*sys.modules)
"""


def test_idle_agent_with_energy_imports_nothing_heavy(tmp_path: Path) -> None:
    """A daemon that measures its idle baseline carries sensors and meter, and nothing of profiles or reports."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  1 2 3 4 5 6 7 8 9 10\n")
    config = tmp_path / "agent.toml"
    config.write_text(
        'device = "d"\nstate_dir = "state"\n[broker]\nurl = "mqtt://127.0.0.1:1883"\n'
        "[energy]\nidle_watts = 1.0\nbusy_watts = 2.0\n"
        '[[data]]\nname = "own"\nfactory = "own:make"\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", WATCHES, config, tmp_path], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert not {*HEAVY, "scipy", "pynvml"} & loaded
    measuring = {"energy", "energy.errors", "energy.sensors", "energy.temperature", "energy.metering"}
    extra = {name for name in loaded if name.split(".")[0] == "energy"} - measuring
    extra -= {f"energy.metering.{name}" for name in ("conditions", "marks", "measurement", "meter", "series")}
    extra -= {f"energy.metering.{name}" for name in ("span", "way", "window")}
    assert all(name.startswith("energy.sensors.") for name in extra), sorted(extra)


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
