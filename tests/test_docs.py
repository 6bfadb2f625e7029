"""What the documentation shows works as shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.slow
def test_python_page_runs(tmp_path: Path) -> None:
    """The blocks of docs/python.md run in order, in an empty folder."""
    pytest.importorskip("torch")
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    script = tmp_path / "page.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """Every relative link, its heading too, and every path in backquotes that looks like one of ours exists."""
    text = page.read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        if "://" not in target:
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name} links to {target}"
            if heading:
                assert heading in _headings(there), f"{page.name} links to {target}#{heading}"
    for target in re.findall(
        r"`((?:coordinator|edge_runtime|exporters|energy|benchmarks|examples|docs|scripts)/[\w./-]+)`", text
    ):
        if "NAME" not in target:
            assert (ROOT / target).exists(), f"{page.name} names {target}"


def _headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them of its headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


COMMANDS = [
    *(("edge_runtime.cli", command) for command in ("run", "check", "quarantine")),
    *(
        ("coordinator.cli", command)
        for command in (
            *("serve", "submit", "status", "runs", "devices", "model", "stop", "verify"),
            *("explain", "simulate"),
        )
    ),
    *(
        ("energy.cli", command)
        for command in ("sensors", "watch", "measure", "calibrate", "profile", "fit", "predict", "report")
    ),
    *(("exporters.cli", command) for command in ("bundle", "inspect", "probes")),
]


@pytest.mark.parametrize(("program", "command"), COMMANDS)
def test_every_command_explains_itself(program: str, command: str) -> None:
    """Every command is listed by its program and has --help with an example."""
    pytest.importorskip("sqlalchemy" if program.startswith("coordinator") else "msgspec")
    assert command in _help(program)
    assert "example" in _help(program, command).lower()


def _help(program: str, *arguments: str) -> str:
    command = [sys.executable, "-m", program, *arguments, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
