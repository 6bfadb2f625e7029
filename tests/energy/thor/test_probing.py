"""Running probes: what is fed, and that a step runs."""

from __future__ import annotations

import numpy as np
import pytest

from energy.errors import ProfileError
from tests.energy.probe_packs import graph

pytest.importorskip("onnxruntime")
from energy.thor.probing import Stepper, cpu_cost


def ticking(step):
    now = [0.0]

    def clock():
        now[0] += step
        return now[0]

    return clock


def test_a_step_is_timed():
    """CPU time and wall time per step, both above zero, with bursts that fill the window."""
    stepper = Stepper(graph("linear", {"in_channels": 64, "out_channels": 32}), batch=4)
    stepper.warm_up(0.01)
    assert stepper.steps_per_burst > 2
    reading = cpu_cost(stepper)
    assert reading.steps == stepper.steps_per_burst
    assert 0 < reading.costs["seconds"] < 1
    assert 0 <= reading.costs["cpu_seconds"] < 1


def test_small_probes_get_several_sets_of_inputs():
    """As many as fill the footprint, at most eight; whole networks one."""
    data = graph("relu", {"in_positions": 1000})
    each = 2 * 4 * 1000 * 4
    assert len(Stepper(data, batch=4, footprint=0)._bindings) == 1
    assert len(Stepper(data, batch=4, footprint=3 * each)._bindings) == 3
    assert len(Stepper(data, batch=4)._bindings) == 8


def test_the_same_seed_feeds_the_same_values():
    """Values are seeded, finite and small."""
    data = graph("linear", {"in_channels": 5, "out_channels": 3})
    one, two = (Stepper(data, batch=2, seed=3, footprint=0)._kept[0] for _ in range(2))
    assert np.array_equal(one, two)
    assert np.abs(one).max() < 1


def test_integers_stay_below_their_limit():
    """Targets and tokens: a number outside of the classes would fail."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    x = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, ["batch"])
    out = helper.make_tensor_value_info("out", onnx.TensorProto.INT64, ["batch"])
    body = helper.make_graph([helper.make_node("Identity", ["y"], ["out"])], "g", [x], [out])
    data = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
    values = Stepper(data, batch=100, limits={"y": 3}, footprint=0)._kept[0]
    assert set(values.tolist()) == {0, 1, 2}


def test_a_graph_that_is_none_is_refused():
    """One line, with the cure."""
    with pytest.raises(ProfileError, match="no valid ONNX model"):
        Stepper(b"nonsense", batch=1)


def test_sessions_are_those_of_the_trainer():
    """The options of a probe's session are the same as those that train on the device."""
    import onnxruntime

    from edge_runtime.training.onnx_graph import _options
    from energy.thor.probing import session_options

    ours, theirs = session_options(onnxruntime, 2), _options(2)
    names = ("intra_op_num_threads", "inter_op_num_threads", "enable_mem_pattern", "enable_cpu_mem_arena")
    for name in (*names, "graph_optimization_level", "execution_mode"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning"):
        assert ours.get_session_config_entry(name) == theirs.get_session_config_entry(name)
