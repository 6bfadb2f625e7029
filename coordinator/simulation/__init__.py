"""Discrete-event simulation of fleets: the coordinator's own code on a virtual clock.

    from coordinator.simulation import Settings, load_data, share_out, simulate
    from coordinator.simulation.traces import read_traces

    traces = read_traces(Path("traces")).resized(120)
    shares = share_out(load_data(Path("train.npz")), "dirichlet:0.3", 120, seed=1)
    report = simulate(plan, traces, Settings(seed=1, step_s=0.05), shares=shares)

:class:`~coordinator.simulation.report.SimulationReport` has a row per model version (virtual time, accuracy, modelled
joules, losses to battery), per device, and per job. Without ``shares`` nothing is trained, and updates are echoes.
"""

from coordinator.simulation.data import Data, Shares, load_data, share_out
from coordinator.simulation.faults import DEFAULT_FAULTS, FaultPlan, parse_faults
from coordinator.simulation.report import SimulationReport, as_json, as_text
from coordinator.simulation.running import simulate
from coordinator.simulation.settings import Settings
from coordinator.simulation.store import BrokenRuleError

__all__ = [
    "DEFAULT_FAULTS",
    "BrokenRuleError",
    "Data",
    "FaultPlan",
    "Settings",
    "Shares",
    "SimulationReport",
    "as_json",
    "as_text",
    "load_data",
    "parse_faults",
    "share_out",
    "simulate",
]
