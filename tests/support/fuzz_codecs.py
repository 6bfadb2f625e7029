"""Hostile bytes for every codec: whatever arrives is refused with a CodecError or is a valid update.

    python -m tests.support.fuzz_codecs --count 1000000 --seed 0

Each case is made from the seed and its number alone: random bytes, or a valid blob with flipped bits, bytes set, cut
off, made longer, spliced with another, given another codec's number, or with lengths changed; most get a right CRC
again, so that the codecs themselves are what is tested. A case fails if decoding raises anything but CodecError, warns,
takes more memory than in proportion to the layout, takes longer than ``SLOW_S`` of processor time, hangs, kills the
process, or gives an update of the wrong size or norm or with a value that is not finite. The command that replays a
failure is printed; at the end, a JSON object with counts and the slowest case per codec.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import multiprocessing
import resource
import sys
import time
import tracemalloc
import warnings
from typing import Any

import numpy as np

from edge_runtime.compression import codec_names
from edge_runtime.compression.base import Update
from edge_runtime.compression.grid import SharedModel
from edge_runtime.compression.pipeline import decode
from edge_runtime.errors import CodecError
from tests.support.hostile_bytes import LAYOUTS, SNAPSHOT, Blob, Case, corpus, make_case, reference

MAX_NORM = 1e6
SLOW_S = 5.0
HANG_S = 60.0
MEMORY_SAMPLE = 32  # one case in so many runs under tracemalloc, which is slow and loses some bytes each time


def try_case(case: Case, *, memory: bool) -> tuple[bool, float]:
    """Decodes a case.

    Returns:
        Whether it was decoded (and not refused), and the seconds of processor time.

    Raises:
        AssertionError: the result is no valid update, or took too long or too much memory.
        Exception: whatever decoding raised that it may not.
    """
    layouts = LAYOUTS[case.blob.layout]
    if memory:
        tracemalloc.start()
    began = time.process_time()
    updates, refusal = None, None
    try:
        updates = _decoded(case.blob, case.data)
    except CodecError as error:
        refusal = error.__cause__
    finally:
        seconds = time.process_time() - began
        peak = tracemalloc.get_traced_memory()[1] if memory else 0
        if memory:
            tracemalloc.stop()
    assert not isinstance(refusal, MemoryError), "tried to take more memory than there is"
    # Tables of the entropy coders take a fixed amount; all else is in proportion to layout and data.
    limit = 4_000_000 + 48 * sum(layout.size for layout in layouts.values()) + 32 * len(case.data)
    assert peak <= limit, f"{peak} bytes of memory, {limit} are allowed"
    assert seconds <= SLOW_S, f"{seconds:.1f} s"
    if updates is None:
        return False, seconds
    assert updates.keys() == layouts.keys()
    for name, update in updates.items():
        size = layouts[name].size
        if update.indices is not None:
            assert update.indices.dtype == np.int64
            assert update.indices.shape == update.values.shape
            assert ((update.indices >= 0) & (update.indices < size)).all()
            assert len(np.unique(update.indices)) == len(update.indices), "positions come twice"
        vector = update.vector()
        assert vector.shape == (size,)
        assert vector.dtype == np.float32
        assert np.isfinite(vector).all()
        assert math.sqrt(np.square(vector, dtype=np.float64).sum()) <= MAX_NORM * 1.415  # buffers and the rest each
    return True, seconds


def _decoded(blob: Blob, data: bytes) -> dict[str, Update]:
    layouts = LAYOUTS[blob.layout]
    if blob.codec == SNAPSHOT:
        update = Update(SharedModel.decode(data, layouts["delta"]).vector)
        if not update.norm() <= MAX_NORM:  # a snapshot is the coordinator's and not one of many: no limit on its norm
            assert np.isfinite(update.values).all()
            raise CodecError("too large")
        return {"delta": update}
    return decode(data, layouts, max_norm=MAX_NORM, reference=reference(blob.layout, predicted=blob.predicted))


def fuzz(blobs: list[Blob], seed: int, numbers: range, shared: Any = None) -> dict[str, dict[str, float]]:
    """Tries the cases; gives counts per codec.

    Args:
        blobs: of :func:`corpus`.
        seed: with the number, what a case is made from.
        numbers: of the cases.
        shared: an object whose ``value`` is the number of the case at work; None: nobody watches.

    Raises:
        AssertionError: a case failed; the text says how to replay it.
    """
    counts: dict[str, dict[str, float]] = {
        name: {"tried": 0, "refused": 0, "decoded": 0, "slowest_ms": 0.0} for name in sorted({b.codec for b in blobs})
    }
    parent = multiprocessing.parent_process()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in numbers:
            if shared is not None:
                shared.value = number
                if number % 1024 == 0 and parent is not None and not parent.is_alive():
                    break  # nobody waits for the result any more
            case = make_case(blobs, seed, number)
            try:
                traced = number % MEMORY_SAMPLE == 0
                decoded, seconds = try_case(case, memory=traced)
            except Exception as error:
                what = f"{case.kind} of a blob of {case.blob.codec!r} for layout {case.blob.layout!r}"
                raise AssertionError(f"{what}: {error!r}\n{replay(seed, number, list(counts))}") from error
            count = counts[case.blob.codec]
            count["tried"] += 1
            count["decoded" if decoded else "refused"] += 1
            if not traced:
                count["slowest_ms"] = max(count["slowest_ms"], round(1000 * seconds, 2))
    return counts


def all_codecs() -> list[str]:
    """Names of all codecs, with that of snapshots."""
    return sorted([*codec_names(), SNAPSHOT])


def replay(seed: int, number: int, codecs: list[str]) -> str:
    """The command that runs one case alone; what a case is depends on the codecs that take part."""
    chosen = "" if codecs == all_codecs() else f" --codecs {','.join(codecs)}"
    return f"replay: python -m tests.support.fuzz_codecs --seed {seed} --start {number} --count 1{chosen}"


def _work(codecs: list[str], seed: int, numbers: range, shared: Any, pipe: Any) -> None:
    faulthandler.enable()
    blobs = corpus(codecs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = fuzz(blobs, seed, numbers, shared)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000 + len(numbers) // 10, f"the process grew by {grown} kB"
    pipe.send((counts, grown))


def main() -> int:
    """Runs the cases in a child process, so that a crash or a hang names its case too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="cases to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--codecs", default=",".join(all_codecs()), help="names, with commas")
    arguments = parser.parse_args()
    codecs = sorted(arguments.codecs.split(","))
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    shared = context.Value("q", -1, lock=False)
    receiver, sender = context.Pipe(duplex=False)
    numbers = range(arguments.start, arguments.start + arguments.count)
    child = context.Process(target=_work, args=(codecs, arguments.seed, numbers, shared, sender))
    child.start()
    last, since = -1, time.monotonic()
    while child.is_alive() and not receiver.poll(1):
        if shared.value != last:
            last, since = shared.value, time.monotonic()
        elif time.monotonic() - since > HANG_S:
            print(f"case {last} hangs\n{replay(arguments.seed, last, codecs)}", file=sys.stderr)
            child.kill()
    result = receiver.recv() if receiver.poll() else None
    child.join()
    if result is None or child.exitcode != 0:
        print(f"the process ended with {child.exitcode} in case {shared.value}", file=sys.stderr)
        print(replay(arguments.seed, shared.value, codecs), file=sys.stderr)
        return 1
    counts, grown = result
    total = {key: sum(count[key] for count in counts.values()) for key in ("tried", "refused", "decoded")}
    report = {"seed": arguments.seed, "start": arguments.start, **total, "process_grew_kb": grown}
    print(json.dumps({**report, "seconds": round(time.monotonic() - began), "codecs": counts}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
