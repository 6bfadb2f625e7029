"""msgspec, imported without what it never uses here.

Where ``typing_extensions`` is installed msgspec takes it (with it ``inspect``, ``ast`` and ``dis``, 1.1 MB of memory),
for kinds of types that no message has; the idle agent's memory is the product. To be imported before msgspec.
"""

from __future__ import annotations

import sys

_UNUSED = "typing_extensions"

if _UNUSED not in sys.modules and "msgspec" not in sys.modules:
    sys.modules[_UNUSED] = None  # type: ignore[assignment] # so Python says that it is not there
    try:
        import msgspec  # noqa: F401 - see above
    finally:
        del sys.modules[_UNUSED]  # whoever needs it imports it as usual
