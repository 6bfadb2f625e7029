"""Whether any installed package adds to an entry point group, without ``importlib.metadata``.

That module brings mail, CSV and archives along, 2 MB in the idle agent, to say "none" on nearly every device.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def any_installed(group: str) -> bool:
    """Whether ``importlib.metadata`` is worth asking: a package on the path names this group, or an archive might."""
    heading = f"[{group}]"
    for place in dict.fromkeys(sys.path):
        folder = place or "."
        if os.path.isfile(folder):  # noqa: PTH113 - a zip on the path: let importlib look into it
            return True
        try:
            with os.scandir(folder) as entries:
                found = [entry.path for entry in entries if entry.name.endswith((".dist-info", ".egg-info"))]
        except OSError:  # sys.path may name what does not exist
            continue
        if any(heading in _text(Path(path, "entry_points.txt")) for path in found):
            return True
    return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
