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
import random
import resource
import struct
import sys
import time
import tracemalloc
import warnings
import zlib
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.compression import Layout, codec_names
from edge_runtime.compression.container import unpack, varint
from edge_runtime.compression.pipeline import CodecSpec, decode, encode
from edge_runtime.compression.registry import codec_class
from edge_runtime.errors import CodecError

MAX_NORM = 1e6
SLOW_S = 5.0
HANG_S = 60.0
MEMORY_SAMPLE = 16  # one case in so many runs under tracemalloc, which is slow
LAYOUTS = {
    "buffers": {
        "delta": Layout(("w", "b", "mean", "var"), ((4, 3), (3,), (3,), (3,)), frozenset({"mean", "var"})),
    },
    "channels": {
        "control": Layout(("w", "b"), ((6, 5), (6,))),
        "delta": Layout(("w", "b", "mean"), ((6, 5), (6,), (2,)), frozenset({"mean"})),
    },
    "matrices": {"delta": Layout(("a", "k", "b", "e"), ((40, 24), (8, 3, 3, 3), (40,), (0, 4)))},
    "scalars": {"delta": Layout(tuple(f"s{i}" for i in range(20)), ((),) * 20)},
    "one": {"delta": Layout(("s",), ((1,),))},
    "none": {"delta": Layout((), ())},
    "large": {"delta": Layout(("w", "v"), ((300, 200), (5000,)))},
}
_SPECIAL = (0, 1, 2, 0x7F, 0x80, 0x81, 0xFE, 0xFF)
_NUMBERS = (0, 1, 2, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**64 - 1)


class Blob(NamedTuple):
    """A valid container: its codec, its layout's key in ``LAYOUTS``, and where its first section begins."""

    codec: str
    layout: str
    data: bytes
    section: int


class Case(NamedTuple):
    """Bytes to decode, and what they were made from."""

    blob: Blob
    kind: str
    data: bytes


def corpus(codecs: list[str]) -> list[Blob]:
    """Valid blobs of the codecs for all layouts; large ones are few."""
    blobs = []
    for codec in codecs:
        for name, layouts in LAYOUTS.items():
            for variant in range(1 if name in ("large", "none") else 4):
                generator = np.random.default_rng([variant, len(name)])
                vectors = {}
                for channel, layout in layouts.items():
                    vector = generator.standard_t(3, layout.size).astype(np.float32)
                    vectors[channel] = vector * np.float32((1, 1e-3, 0, 1)[variant])
                options = {"density": 0.3} if variant == 3 and "density" in codec_class(codec).defaults else {}
                data = encode(CodecSpec(codec, options), vectors, layouts, seed=variant).data
                _, sections = unpack(data, layouts)
                blobs.append(Blob(codec, name, data, min(start for start, _ in sections.values())))
    return blobs


def make_case(blobs: list[Blob], seed: int, number: int) -> Case:
    """Case ``number``: made from the seed and the number alone."""
    dice = random.Random(f"{seed}:{number}")
    blob = dice.choice(blobs)
    while blob.layout == "large" and dice.random() < 0.8:
        blob = dice.choice(blobs)
    kind = dice.choice(sorted(_MUTATIONS))
    data = bytearray(blob.data[:-4])
    low = blob.section if dice.random() < 0.85 else 0  # the header is soon tested
    data = _MUTATIONS[kind](dice, data, low, blob, blobs)
    if kind != "splice" and dice.random() < 0.15:
        data = _flip(dice, data, low, blob, blobs)
    if dice.random() < 0.95:
        return Case(blob, kind, bytes(data) + struct.pack("<I", zlib.crc32(data)))
    return Case(blob, kind, bytes(data) + blob.data[-4:])


def _at(dice: random.Random, data: bytearray, low: int) -> int:
    if low >= len(data):
        return len(data)
    if dice.random() < 0.5:  # counts, scales and tables stand in front
        return min(len(data) - 1, low + int(dice.expovariate(0.15)))
    return dice.randrange(low, len(data))


def _flip(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    for _ in range(dice.randint(1, 4)):
        if (at := _at(dice, data, low)) < len(data):
            data[at] ^= 1 << dice.randrange(8)
    return data


def _set(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    for _ in range(dice.randint(1, 6)):
        if (at := _at(dice, data, low)) < len(data):
            data[at] = dice.choice(_SPECIAL) if dice.random() < 0.5 else dice.randrange(256)
    return data


def _cut(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    return data[: _at(dice, data, low)]


def _extend(dice: random.Random, data: bytearray, *_: Any) -> bytearray:
    length = dice.choice((1, 2, 3, 4, 8, 64))
    return data + (bytes(length) if dice.random() < 0.5 else dice.randbytes(length))


def _delete(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    at = _at(dice, data, low)
    del data[at : at + dice.randint(1, 8)]
    return data


def _repeat(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    at, length = _at(dice, data, low), dice.randint(1, 32)
    data[at:at] = data[at : at + length] * dice.randint(1, 4)
    return data


def _number(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    """A number in the place of another, as LEB128 or in fixed width."""
    at, number = _at(dice, data, low), dice.choice(_NUMBERS) + dice.choice((0, 0, 1, -1))
    number = max(0, number)
    width = dice.choice((1, 2, 4, 8))
    written = varint(number) if dice.random() < 0.6 else (number % (1 << 8 * width)).to_bytes(width, "little")
    data[at : at + (1 if dice.random() < 0.5 else len(written))] = written
    return data


def _floats(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    """A float that is infinite, NaN (quiet or signalling), huge or tiny somewhere in the data."""
    word = dice.choice((b"\0\0\x80\x7f", b"\1\0\x80\x7f", b"\0\0\xc0\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b"\0\x7c"))
    at = _at(dice, data, low)
    data[at : at + len(word)] = word
    return data


def _splice(dice: random.Random, data: bytearray, low: int, blob: Blob, blobs: list[Blob]) -> bytearray:
    """The beginning of one and the end of another, of the same codec and layout more often than not."""
    alike = [other for other in blobs if (other.codec, other.layout) == (blob.codec, blob.layout)]
    other = dice.choice(alike if dice.random() < 0.7 else blobs)
    return data[: _at(dice, data, low)] + other.data[_at(dice, bytearray(other.data), low) : -4]


def _rename(dice: random.Random, data: bytearray, _low: int, _blob: Blob, blobs: list[Blob]) -> bytearray:
    """The payload of one codec under the number of another."""
    data[3] = dice.choice(blobs).data[3] if dice.random() < 0.9 else dice.randrange(256)
    return data


def _random(dice: random.Random, data: bytearray, low: int, *_: Any) -> bytearray:
    return data[:low] + dice.randbytes(dice.choice((0, 1, 2, 3, 5, 8, 13, 40, 200, len(data))))


_MUTATIONS = {
    "bytes": _set,
    "cut": _cut,
    "delete": _delete,
    "extend": _extend,
    "flips": _flip,
    "floats": _floats,
    "number": _number,
    "random": _random,
    "rename": _rename,
    "repeat": _repeat,
    "splice": _splice,
}


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
        updates = decode(case.data, layouts, max_norm=MAX_NORM)
    except CodecError as error:
        refusal = error.__cause__
    finally:
        seconds = time.process_time() - began
        peak = tracemalloc.get_traced_memory()[1] if memory else 0
        if memory:
            tracemalloc.stop()
    assert not isinstance(refusal, MemoryError), "tried to take more memory than there is"
    # Tables of the entropy coders take a fixed amount; all else is in proportion to layout and data.
    limit = 4_000_000 + 200 * sum(layout.size for layout in layouts.values()) + 32 * len(case.data)
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
        assert math.sqrt(np.square(vector, dtype=np.float64).sum()) <= MAX_NORM * 1.001
    return True, seconds


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in numbers:
            if shared is not None:
                shared.value = number
            case = make_case(blobs, seed, number)
            try:
                decoded, seconds = try_case(case, memory=number % MEMORY_SAMPLE == 0)
            except Exception as error:
                what = f"{case.kind} of a blob of {case.blob.codec!r} for layout {case.blob.layout!r}"
                raise AssertionError(f"{what}: {error!r}\n{replay(seed, number)}") from error
            count = counts[case.blob.codec]
            count["tried"] += 1
            count["decoded" if decoded else "refused"] += 1
            count["slowest_ms"] = max(count["slowest_ms"], round(1000 * seconds, 2))
    return counts


def replay(seed: int, number: int) -> str:
    """The command that runs one case alone."""
    return f"replay: python -m tests.support.fuzz_codecs --seed {seed} --start {number} --count 1"


def _work(seed: int, numbers: range, shared: Any, pipe: Any) -> None:
    faulthandler.enable()
    blobs = corpus(codec_names())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = fuzz(blobs, seed, numbers, shared)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, f"the process grew by {grown} kB"
    pipe.send((counts, grown))


def main() -> int:
    """Runs the cases in a child process, so that a crash or a hang names its case too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="cases to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    arguments = parser.parse_args()
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    shared = context.Value("q", -1, lock=False)
    receiver, sender = context.Pipe(duplex=False)
    numbers = range(arguments.start, arguments.start + arguments.count)
    child = context.Process(target=_work, args=(arguments.seed, numbers, shared, sender))
    child.start()
    last, since = -1, time.monotonic()
    while child.is_alive() and not receiver.poll(1):
        if shared.value != last:
            last, since = shared.value, time.monotonic()
        elif time.monotonic() - since > HANG_S:
            print(f"case {last} hangs\n{replay(arguments.seed, last)}", file=sys.stderr)
            child.kill()
    result = receiver.recv() if receiver.poll() else None
    child.join()
    if result is None or child.exitcode != 0:
        print(f"the process ended with {child.exitcode} in case {shared.value}", file=sys.stderr)
        print(replay(arguments.seed, shared.value), file=sys.stderr)
        return 1
    counts, grown = result
    total = {key: sum(count[key] for count in counts.values()) for key in ("tried", "refused", "decoded")}
    report = {"seed": arguments.seed, "start": arguments.start, **total, "process_grew_kb": grown}
    print(json.dumps({**report, "seconds": round(time.monotonic() - began), "codecs": counts}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
