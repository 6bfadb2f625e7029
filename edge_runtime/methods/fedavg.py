"""FedAvg: local steps from the received model, then send the difference.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

from edge_runtime.methods.base import ClientMethod


class FedAvg(ClientMethod):
    """The defaults of :class:`~edge_runtime.methods.base.ClientMethod`."""

    name: ClassVar[str] = "fedavg"
