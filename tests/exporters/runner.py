"""Runs the graphs of a bundle as a device would: onnxruntime and NumPy, from the file alone."""

from __future__ import annotations

import numpy as np
import onnxruntime

from edge_runtime.bundle import Bundle


class Device:
    """A bundle with its state; `train` moves the state on."""

    def __init__(self, path):
        self.bundle = Bundle.open(path)
        self.manifest = self.bundle.manifest
        self.state = {f"p.{name}": value for name, value in self.bundle.initial_tensors().items()}
        for slot in self.manifest.optimizer.slots:
            self.state[f"s.{slot.name}"] = np.zeros(slot.shape, np.float32)
        self._sessions = {}

    def session(self, graph):
        if graph not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            data = self.bundle.graph(graph)
            providers = ["CPUExecutionProvider"]
            self._sessions[graph] = onnxruntime.InferenceSession(data, options, providers=providers)
        return self._sessions[graph]

    def run(self, graph, **given):
        """Named outputs; parameters, slots and default hyper-parameters are filled in."""
        feed = {**self.manifest.optimizer.hyper, **self.state, **given}
        session = self.session(graph)
        types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        inputs = {item.name: np.asarray(feed[item.name], types[item.type]) for item in session.get_inputs()}
        names = [item.name for item in session.get_outputs()]
        return dict(zip(names, session.run(None, inputs), strict=True))

    def train(self, **given):
        """One fused step; returns the loss."""
        outputs = self.run("train", **given)
        self.state.update({k.removeprefix("new."): v for k, v in outputs.items() if k.startswith("new.")})
        return float(outputs["loss"])
