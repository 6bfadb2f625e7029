"""Low-rank updates in a given number of bytes, with a reconstruction that is bit-identical on every machine.

One local epoch changes a weight matrix by little more than a few outer products (Wang et al., "ATOMO", arXiv
1806.04090; Vogels et al., "PowerSGD", arXiv 1905.13727). An update is the sum of

* a prediction for two dense layers in a row, from weights that both ends hold
  (:mod:`edge_runtime.compression.lowrank_pair`),
* truncated singular value decompositions of what is left of each matrix, convolutions as ``[out, rest]``; the columns
  ``U s`` and ``V s`` are rounded with one step for the whole model, which spends the bytes where they save most error
  ("reverse water-filling", Cover and Thomas, Elements of Information Theory, 10.3.3), components that do not pay for
  their bits are left out, and the step is searched until the bytes are used,
* all other tensors rounded with the same step.

Errors in kernels of convolutions weigh twice as much as others (:mod:`edge_runtime.compression.lowrank_parts`).

Entropy coding: :mod:`edge_runtime.compression.lowrank_coefficients`; exact product of the factors:
:mod:`edge_runtime.compression.lowrank_product`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.compression.lowrank_format import read, rounded_step, write
from edge_runtime.compression.lowrank_product import pair_weights, rebuild
from edge_runtime.compression.lowrank_search import search
from edge_runtime.errors import CodecError

if TYPE_CHECKING:
    from edge_runtime.compression.base import Layout, Vector
    from edge_runtime.compression.lowrank_search import Weights

_ATTEMPTS = 6


def encode_low_rank(
    values: Vector, layout: Layout, budget_bytes: int, reference: Vector | None = None
) -> tuple[bytes, Vector]:
    """The payload, at most ``budget_bytes``, and exactly what it decodes to.

    Args:
        values: update to encode, finite float32 ``[layout.size]``.
        layout: names and shapes; without buffers.
        budget_bytes: most bytes of payload; too few for any content gives an empty payload, an update of zeros.
        reference: float32 ``[layout.size]`` that both ends hold, as the model that was trained: lets updates of dense
            layers be predicted. Decoding then needs the same one.

    Raises:
        CodecError: wrong sizes, values that are not finite, or a negative budget (at least 0 bytes are needed).
    """
    values = np.ascontiguousarray(values, np.float32)
    if values.shape != (layout.size,):
        raise CodecError(f"vector has shape {values.shape}, the layout needs ({layout.size},)")
    if budget_bytes < 0:
        raise CodecError(f"a low-rank update does not fit into {budget_bytes} bytes; it needs at least 0")
    weights = pair_weights(layout, reference)
    peak = float(np.abs(values).max()) if values.size else 0.0
    if not math.isfinite(peak):
        raise CodecError("an update with values that are not finite cannot be encoded")
    exponent = math.frexp(peak)[1]
    scaled = np.ldexp(values, -exponent) if peak else values
    return _encode(scaled, exponent, layout, budget_bytes, weights)


def _encode(scaled: Vector, exponent: int, layout: Layout, budget_bytes: int, weights: Weights) -> tuple[bytes, Vector]:
    bits = 8.0 * budget_bytes - 4
    for _ in range(_ATTEMPTS if scaled.any() and bits > 0 else 0):
        content = search(scaled, layout, bits, weights)
        if content is None:
            break
        content = content._replace(step=rounded_step(content.step, exponent))
        payload = write(content)
        if len(payload) <= budget_bytes:
            return payload, rebuild(layout, content, weights)
        bits -= 8 * (len(payload) - budget_bytes) + 8
    return b"", np.zeros(layout.size, np.float32)


def decode_low_rank(payload: bytes | memoryview, layout: Layout, reference: Vector | None = None) -> Vector:
    """The update, float32 ``[layout.size]``; memory and work are bounded by the layout.

    Raises:
        CodecError: the payload is damaged, belongs to another layout, or was made against a model and ``reference``
            is None.
    """
    content = read(payload, layout)
    weights = pair_weights(layout, reference)
    return np.zeros(layout.size, np.float32) if content is None else rebuild(layout, content, weights)


def predicts(payload: bytes | memoryview, layout: Layout) -> bool:
    """Whether decoding needs the reference; raises CodecError if the payload is damaged."""
    content = read(payload, layout)
    return content is not None and any(pair is not None for pair in content.pairs)
