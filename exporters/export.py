"""`export_bundle`: from a torch module to a bundle that devices train without torch."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from edge_runtime.bundle import manifest as bundle
from exporters import _archive, _layers, _optimizers, _parity
from exporters._graph import OPSET, GraphBuilder
from exporters._model import Model, inspect_model
from exporters._parity import Exported, Gate, Parity
from exporters._trace import Traced, trace
from exporters.errors import ExportError, UsageError

__all__ = ["ExportReport", "export_bundle"]

OptimizerName = Literal["sgd", "adam", "adamw"]
Progress = Callable[[str], None]

_DTYPES: dict[torch.dtype, Literal["float32", "int64", "bool"]] = {
    torch.float32: "float32",
    torch.int64: "int64",
    torch.bool: "bool",
}
_DISTRIBUTION = "edge-training-runtime"


@dataclass
class ExportReport:
    """What was exported, and how close it is to torch.

    ``fallback`` says why a batch that was to be dynamic became fixed. ``notes`` are things the user should know.
    ``parity`` holds the largest differences found; None if the gate was switched off and the batch was given.
    """

    path: Path
    name: str
    size_bytes: int
    batch: bundle.Batch
    optimizer: str
    hyper: dict[str, float]
    parameters: int
    trainable_parameters: int
    nodes: dict[str, int]
    seconds: float
    parity: Parity | None
    fallback: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Graphs:
    builders: dict[str, GraphBuilder]
    data: dict[str, bytes]
    batch: bundle.Batch
    dropout: bool
    model: Model


def export_bundle(
    module: nn.Module,
    example_input: Any,
    path: str | Path,
    *,
    name: str,
    loss: bundle.Loss = "cross_entropy",
    optimizer: OptimizerName = "sgd",
    hyper: Mapping[str, float] | None = None,
    labels: Sequence[str] = (),
    batch: Literal["auto", "dynamic"] | int = "auto",
    trainable: Callable[[str], bool] | Iterable[str] | None = None,
    preprocessing: Sequence[bundle.Preprocessing | Mapping[str, Any]] = (),
    parity: bool = True,
    progress: Progress | None = None,
) -> ExportReport:
    """Exports a module with its loss and optimiser as a bundle.

    Args:
        module: returns logits or values, ``[batch, ...]`` float32, from one input. It is copied, not changed.
        example_input: ``[batch, ...]``; floats become float32, integers int64. Its values matter for integers: the
            parity check draws from them, so they should cover the vocabulary.
        path: the bundle to write.
        name: the model's name in the manifest.
        loss: mean over the batch of torch's loss of this name. Targets: int64 ``[batch]`` classes for cross entropy,
            else float32 of the output's shape.
        optimizer: ``sgd`` (with momentum), ``adam`` or ``adamw``, as in ``torch.optim``.
        hyper: defaults of the optimiser's inputs that differ from the usual ones; ``clip_norm`` 0 means no clipping.
        labels: names of the classes, for people.
        batch: ``"dynamic"``: any size; a number: exactly that size, partial batches masked; ``"auto"``: dynamic if
            it can be traced and gives torch's results at 1, 2, 7 and the example's size, else the example's size.
        trainable: names to train, by predicate or prefixes; None: where ``requires_grad`` is set.
        preprocessing: what the device applies to ``x`` before the model, in order.
        parity: compare 20 steps with torch and refuse the export if they differ.
        progress: called with one line at the start of each long part.

    Returns:
        What was written, with the measured differences from torch.

    Raises:
        UsageError: the arguments do not fit together.
        ExportError: the module cannot be exported, or its graphs do not compute what torch computes.
    """
    started = time.monotonic()
    say = progress or (lambda _line: None)
    model = inspect_model(module, example_input, loss, trainable)
    if labels and model.target.classes is not None and len(labels) != model.target.classes:
        raise UsageError(f"{len(labels)} labels for {model.target.classes} classes; give one per class")
    for key, value in model.tensors().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ExportError(f"{key} holds a NaN or infinite value; use a large finite number such as -1e9 instead")
    defaults = _optimizers.hyper_parameters(optimizer, hyper or {})
    say(f"tracing {name}")
    graphs, found, fallback, notes = _build(model, optimizer, defaults, batch, steps=_steps(parity), say=say)
    say("writing the bundle")
    files = {bundle.PARAMETERS_NAME: _archive.parameters_file(model.tensors())}
    files.update({f"{key}.onnx": data for key, data in graphs.data.items()})
    written = _manifest(
        graphs,
        name=name,
        optimizer=optimizer,
        hyper=defaults,
        labels=list(labels),
        preprocessing=preprocessing,
        files=files,
    )
    path = Path(path)
    size = _archive.write_bundle(path, written, files)
    tensors = model.tensors()
    return ExportReport(
        path=path,
        name=name,
        size_bytes=size,
        batch=graphs.batch,
        optimizer=optimizer,
        hyper=defaults,
        parameters=sum(tensors[key].numel() for key in (*model.trainable, *model.frozen)),
        trainable_parameters=sum(tensors[key].numel() for key in graphs.model.trainable),
        nodes={key: len(builder.to_model(key).graph.node) for key, builder in graphs.builders.items()},
        seconds=time.monotonic() - started,
        parity=found,
        fallback=fallback,
        notes=notes,
    )


def _steps(parity: bool) -> int:
    return _parity.STEPS if parity else 0


def _build(
    model: Model,
    optimizer: OptimizerName,
    hyper: Mapping[str, float],
    batch: str | int,
    *,
    steps: int,
    say: Progress,
) -> tuple[_Graphs, Parity | None, str | None, list[str]]:
    """Traces and checks, falling back from a dynamic to a fixed batch where that is allowed."""
    if isinstance(batch, bool) or not (batch in {"auto", "dynamic"} or (isinstance(batch, int) and batch >= 1)):
        raise UsageError(f"batch is {batch!r}; it must be 'auto', 'dynamic' or a number of samples")
    minimum = _smallest_batch(model)
    fallback = None
    if not isinstance(batch, int):
        try:
            graphs, notes = _graphs(model, optimizer, None, minimum)
            gate = _checked_sizes(graphs, optimizer, hyper, say)
        except ExportError as error:
            if batch == "dynamic":
                raise
            fallback = str(error)
            batch = len(model.example)
            say(f"the batch cannot be dynamic ({fallback}); tracing again for batches of {batch}")
    if isinstance(batch, int):
        graphs, notes = _graphs(model, optimizer, batch, minimum)
        if not steps and fallback is None:
            return graphs, None, None, notes
        gate = _checked_sizes(graphs, optimizer, hyper, say)
    if steps:
        say(f"comparing {steps} training steps with torch")
        gate.check_steps(steps)
    return graphs, gate.found, fallback, notes


def _checked_sizes(graphs: _Graphs, optimizer: OptimizerName, hyper: Mapping[str, float], say: Progress) -> Gate:
    say("comparing batch sizes with torch")
    batch = graphs.batch
    gate = Gate(Exported(graphs.model, optimizer, hyper, graphs.data, batch.size, batch.mask, batch.minimum))
    gate.check_sizes()
    return gate


def _graphs(model: Model, optimizer: OptimizerName, batch: int | None, minimum: int) -> tuple[_Graphs, list[str]]:
    fixed = batch is not None
    if batch is not None and batch < minimum:
        raise UsageError(f"batch {batch} is too small: BatchNorm on single values needs at least {minimum} samples")
    mask = fixed and not model.batch_statistics
    step = trace(model, "gradients", batch=batch, mask=mask)
    notes = [f"{name} does not influence the loss; it is kept but not trained" for name in step.unused]
    if step.unused:
        model = model.without(step.unused)
    if fixed and not mask:
        notes.append("BatchNorm with a fixed batch: devices drop the last partial batch of an epoch")
    tensors = model.tensors()
    shapes = {name: tuple(tensors[name].shape) for name in model.trainable}
    forward = trace(model, "evaluate", batch=batch, mask=fixed).builder
    builders = {
        "train": _optimizers.train_graph(optimizer, shapes, step.builder),
        "gradients": step.builder,
        "update": _optimizers.update_graph(optimizer, shapes),
        "evaluate": forward.with_outputs(name for name in forward.outputs if name != "output"),
        "predict": forward.with_outputs(["output"]),
    }
    entry = bundle.Batch(mode="fixed" if fixed else "dynamic", size=batch, mask=mask, minimum=minimum)
    data = {name: builder.to_bytes(name) for name, builder in builders.items()}
    return _Graphs(builders, data, entry, _draws(step), model), notes


def _draws(step: Traced) -> bool:
    return step.dropout_streams > 0


def _smallest_batch(model: Model) -> int:
    """2 if torch refuses to train on one sample (BatchNorm of single values), else 1."""
    if not model.batch_statistics:
        return 1
    copied = {name: value.clone() for name, value in model.tensors().items()}
    try:
        with torch.no_grad():
            torch.func.functional_call(model.module.train(), copied, (model.example_batch(1),))
    except ValueError:
        return 2
    return 1


def _manifest(
    graphs: _Graphs,
    *,
    name: str,
    optimizer: OptimizerName,
    hyper: dict[str, float],
    labels: list[str],
    preprocessing: Sequence[bundle.Preprocessing | Mapping[str, Any]],
    files: Mapping[str, bytes],
) -> bundle.Manifest:
    model = graphs.model
    tensors = model.tensors()
    target = model.target
    shapes = {key: tuple(tensors[key].shape) for key in model.trainable}
    return bundle.Manifest(
        name=name,
        created_by=f"edge-export {importlib.metadata.version(_DISTRIBUTION)}, torch {torch.__version__}",
        task=bundle.Task(loss=model.loss, classes=target.classes, labels=labels),
        inputs=[
            bundle.Input(
                name="x",
                dtype="float32" if model.example.is_floating_point() else "int64",
                shape=tuple(model.example.shape[1:]),
                preprocessing=[_preprocessing(item) for item in preprocessing],
            )
        ],
        target=bundle.Input(
            name="y", dtype="float32" if target.dtype.is_floating_point else "int64", shape=target.shape
        ),
        batch=graphs.batch,
        batch_statistics=model.batch_statistics,
        opset=OPSET,
        parameters=[
            bundle.Parameter(
                name=key,
                shape=tuple(value.shape),
                dtype=_DTYPES[value.dtype],
                trainable=key in model.trainable,
                buffer=key in model.buffers,
                layer=_layers.layer_of(key),
            )
            for key, value in tensors.items()
        ],
        optimizer=bundle.Optimizer(name=optimizer, hyper=hyper, slots=_optimizers.slots_of(optimizer, shapes)),
        layers=_layers.layer_table(model),
        graphs={key: _graph_entry(key, builder) for key, builder in graphs.builders.items()},
        files=_archive.file_entries(files),
    )


def _graph_entry(name: str, builder: GraphBuilder) -> bundle.Graph:
    graph = builder.to_model(name).graph
    return bundle.Graph(
        file=f"{name}.onnx",
        inputs=[item.name for item in graph.input],
        outputs=[item.name for item in graph.output],
    )


def _preprocessing(item: bundle.Preprocessing | Mapping[str, Any]) -> bundle.Preprocessing:
    if isinstance(item, bundle.Preprocessing):
        return item
    try:
        return bundle.Preprocessing(**item)
    except TypeError as error:
        raise UsageError(f"preprocessing {dict(item)}: {error}; it has scale, mean and std") from error
