"""Sensors of power and energy, one file each; :mod:`energy.sensors.base` is their contract."""
