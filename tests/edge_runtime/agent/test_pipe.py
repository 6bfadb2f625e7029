"""The pipe between daemon and worker: frames in any pieces, damage is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent import pipe
from edge_runtime.data import DatasetConfig
from edge_runtime.errors import MessageError
from edge_runtime.messages import BlobRef, Job, ModelRef, UpdateId, UpdateMeta

BLOB = BlobRef(sha256="0" * 64, size_bytes=1)
MODEL = ModelRef(base=0, blobs=[BLOB], vector_sha256="1" * 64)
JOB = Job(run="r", assignment="a", round=0, model_version=1, bundle=BLOB, model=MODEL, dataset="d", deadline_s=1)
UPDATE = UpdateId("r", "d", "a", 0)
REQUEST = pipe.TrainRequest(
    job=JOB,
    device="d",
    bundle_path="b",
    model_paths=["m"],
    output_folder="o",
    dataset=DatasetConfig(name="d", path="p"),
    state_path="s",
    refused=[pipe.RefusedUpdate(update=UPDATE, path="u", key="k")],
)
META = UpdateMeta(round=0, model_version=0, samples=3, steps=2, loss=0.5)
REPLIES = [
    pipe.Ready(backends=["onnx"]),
    pipe.Progress(step=1, steps_total=2, loss=0.5),
    pipe.Trained(
        path="p",
        sha256="0" * 64,
        size_bytes=1,
        meta=META,
        dataset_samples=3,
        state_path="s",
        key="k",
        returned=[UPDATE],
    ),
    pipe.Failed(kind="data", reason="empty"),
]


@given(st.lists(st.integers(1, 40)))
def test_frames_come_whole_from_any_pieces(cuts):
    """However the kernel cuts the stream, the same messages come out."""
    stream = b"".join(pipe.encode(message) for message in REPLIES)
    reader, frames = pipe.FrameReader(), []
    for cut in [*cuts, len(stream)]:
        frames += reader.feed(stream[:cut])
        stream = stream[cut:]
    assert [pipe.decode_from_worker(frame) for frame in frames] == REPLIES


def test_requests_survive():
    """The worker reads what the daemon wrote."""
    (frame,) = pipe.FrameReader().feed(pipe.encode(REQUEST))
    assert pipe.decode_to_worker(frame) == REQUEST


def test_an_oversize_frame_is_refused_at_its_length():
    """Nothing is buffered for a length that cannot be right."""
    with pytest.raises(MessageError, match="frame of 4294967295 bytes"):
        pipe.FrameReader().feed(b"\xff\xff\xff\xff")
    with pytest.raises(MessageError, match="over the pipe's limit"):
        pipe.encode(pipe.Failed(kind="data", reason="x" * (1 << 20)))


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x81\xa1t\xa4none", b"\x81\xa1t\xa6failed"])
def test_malformed_messages_are_refused(frame):
    """A damaged pipe is one clear error on either side."""
    with pytest.raises(MessageError, match="refused"):
        pipe.decode_from_worker(frame)
    with pytest.raises(MessageError, match="refused"):
        pipe.decode_to_worker(frame)
