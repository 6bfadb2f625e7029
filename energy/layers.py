"""A model as a list of layers: kinds that behave alike, and the sizes that their cost depends on.

The layers of a bundle come from the layer table of its manifest. All kinds use the same names of sizes:

====================  ==================================================================================
size                  meaning
====================  ==================================================================================
``batch``             samples per step
``in_channels``       input channels, or features of a dense layer
``out_channels``      output channels, or features
``in_positions``      values per channel of the input: height x width, steps of a sequence, 1 for a vector
``out_positions``     the same of the output
``kernel_positions``  taps of the kernel: height x width
``stride``            along one axis
``dilation``          along one axis
``groups``            of a convolution
``elements``          numbers that an optimiser updates (kinds ``optimizer-...`` only)
====================  ==================================================================================

A size that a kind lacks is 1.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

Sizes: TypeAlias = dict[str, int]


class LayerSpec(NamedTuple):
    """One layer of a model. ``kind`` names its family, for example ``conv2d``, ``conv2d-depthwise``, ``linear``.

    A kind that ends with ``-input`` needs no gradient of its input, being the first layer that trains. ``calls``: how
    often a step runs it.
    """

    name: str
    kind: str
    sizes: Sizes
    calls: int = 1
