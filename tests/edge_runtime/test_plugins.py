"""Codecs and methods of other packages are found, and cost nothing where there are none."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from edge_runtime.compression import registry
from edge_runtime.plugins import any_installed

ROOT = Path(__file__).parents[2]
GROUP = "[edge_runtime.codecs]\nfancy = fancy_codecs:Fancy\n"


def test_a_codec_of_an_installed_package_is_found(tmp_path, monkeypatch):
    """Its entry point in a folder on the path is enough; a package with other entry points changes nothing."""
    assert "fancy" not in registry.codec_names()
    for name, text in (("other", "[console_scripts]\nother = other:main\n"), ("fancy", GROUP)):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "fancy" in registry.codec_names()


def test_an_archive_on_the_path_is_looked_into(tmp_path, monkeypatch):
    """Whether it names the group is left to importlib."""
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("fancy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fancy\nVersion: 1.0\n")
        content.writestr("fancy-1.0.dist-info/entry_points.txt", GROUP)
    monkeypatch.syspath_prepend(str(archive))
    assert any_installed("edge_runtime.codecs")
    assert "fancy" in registry.codec_names()


def test_names_alone_do_not_cost_importlib_metadata():
    """The idle agent knows its codecs and methods without it: that is 2 MB of memory."""
    code = (
        "import sys\nfrom edge_runtime import compression, methods\n"
        "print(compression.codec_names(), methods.method_names(), 'importlib.metadata' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert "'topk'" in said
    assert said.endswith("False\n")
