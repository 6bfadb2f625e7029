"""Bundles and export reports as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.bundle.manifest import Batch, Manifest
    from exporters.export import ExportReport
    from exporters.probes import PackReport


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "-"


def batch_text(batch: Batch) -> str:
    """How a bundle takes batches, in words."""
    if batch.mode == "dynamic":
        return f"any size from {batch.minimum}"
    return f"exactly {batch.size}, partial batches {'masked' if batch.mask else 'dropped'}"


def report_text(report: ExportReport) -> str:
    """The result of an export."""
    trained = f"{report.parameters} parameters ({report.trainable_parameters} trained)"
    lines = [
        f"{report.path}: {report.size_bytes} bytes, {trained}, {report.optimizer}, written in {report.seconds:.1f} s",
        f"batch: {batch_text(report.batch)}",
    ]
    if report.fallback:
        lines.append(f"batch not dynamic because: {report.fallback}")
    lines += [f"note: {note}" for note in report.notes]
    found = report.parity
    if found is None:
        lines.append("not compared with torch (--no-parity)")
        return "\n".join(lines)
    sizes = ", ".join(map(str, found.checked_batches))
    lines.append(f"compared with torch: {found.steps} steps, and batches of {sizes}; largest differences:")
    names: tuple[str, ...] = ("parameters", "buffers", "gradients", "update", "fused", "loss", "evaluate", "predict")
    if report.optimizer != "sgd":  # see docs/exporting.md: gradients and the rule are compared instead
        names = names[1:]
    lines.append("  " + ", ".join(f"{name} {getattr(found, name):.1e}" for name in names))
    if found.redrawn:
        lines.append(f"  {found.redrawn} batches drawn again: a ReLU or max-pool switched by rounding alone")
    return "\n".join(lines)


def manifest_text(manifest: Manifest, sha256: str) -> str:
    """Summary, layers and parameters of a bundle."""
    inputs = ", ".join(f"{item.name} {item.dtype} {_shape(item.shape)}" for item in manifest.inputs)
    hyper = ", ".join(f"{name} {value:g}" for name, value in manifest.optimizer.hyper.items())
    lines = [
        f"{manifest.name}  (format {manifest.format_version}, sha256 {sha256[:12]}, by {manifest.created_by})",
        f"loss        {manifest.task.loss}" + (f", {manifest.task.classes} classes" if manifest.task.classes else ""),
        f"input       {inputs}; target {manifest.target.dtype} {_shape(manifest.target.shape)}",
        f"batch       {batch_text(manifest.batch)}",
        f"optimizer   {manifest.optimizer.name}: {hyper}",
        f"graphs      {', '.join(manifest.graphs)}",
        "",
    ]
    if manifest.layers:
        head = ("layer", "kind", "input", "output", "FLOPs", "parameter bytes", "activation bytes")
        rows = [
            (
                layer.name,
                layer.kind,
                _shape(layer.input_shape),
                _shape(layer.output_shape),
                str(layer.flops),
                str(layer.parameter_bytes),
                str(layer.activation_bytes),
            )
            for layer in manifest.layers
        ]
        lines += [*_table([head, *rows]), ""]
    roles = [
        (
            entry.name,
            entry.dtype,
            _shape(entry.shape),
            "trained" if entry.trainable else "buffer" if entry.buffer else "frozen",
        )
        for entry in manifest.parameters
    ]
    lines += _table([("parameter", "dtype", "shape", "role"), *roles])
    return "\n".join(lines)


def probes_text(report: PackReport) -> str:
    """What a probe pack holds."""
    layers, candidates = sum(report.layers.values()), sum(report.candidates.values())
    lines = [f"{report.path}: {report.size_bytes} bytes, {layers} layers and {candidates} other sizes to measure", ""]
    rows = [(kind, str(count), str(report.candidates.get(kind, 0))) for kind, count in sorted(report.layers.items())]
    lines += _table([("kind", "layers", "other sizes"), *rows])
    for kind, names in sorted(report.missing.items()):
        lines.append(f"no probe for {kind} ({', '.join(names[:3])}): what it costs will be missing from estimates")
    return "\n".join(lines)
