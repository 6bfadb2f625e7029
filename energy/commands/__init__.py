"""The commands of ``edge-energy``, one module each; :mod:`energy.cli` has their table."""
