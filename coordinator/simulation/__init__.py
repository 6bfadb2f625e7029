"""Discrete-event simulation of fleets: the coordinator's own code on a virtual clock."""
