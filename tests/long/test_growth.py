# SPDX-License-Identifier: Apache-2.0
"""Photos that are refused leave nothing behind: no memory, no process."""

import zlib

import pytest
from conftest import PHOTO, PROTOCOLS, encode, running_server, sample, with_chunk

from client import Connection, InferenceError

PICTURE = sample("person")
PNG = encode(PICTURE, "PNG")
PROGRESSIVE = encode(PICTURE.resize((40, 40)), "JPEG", progressive=True)


# Each reaches another place: PyTriton, the check of the header, or the decoder.
BAD_PHOTOS = [
    b"",
    bytes(5000),
    PHOTO[:50_000],
    PHOTO[:-1],
    PHOTO[:20] + b"damaged" + PHOTO[27:],
    PNG[:50_000],
    encode(PICTURE, "WEBP")[:10_000],
    encode(PICTURE, "BMP")[:50_000],
    encode(PICTURE.quantize(64), "GIF"),
    with_chunk(PNG, b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 1)),
    PROGRESSIVE[:-2] + 1000 * PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2] + b"\xff\xd9",
]


def refuse(connection: Connection, encoded: bytes) -> None:
    with pytest.raises(InferenceError):
        connection.infer(encoded)


def test_nothing_grows_and_nothing_restarts_while_photos_are_refused(tmp_path):
    with running_server(tmp_path / "log", "--weights", "demo") as server:
        connections = [server.connect(protocol) for protocol in PROTOCOLS]

        def memory_while_photos_are_refused() -> int:
            """Return the most that was in use between the photos."""
            # What a photo needed for a moment is not always given back at once.
            most = 0
            for _ in range(10):
                for connection in connections * 3:
                    for encoded in BAD_PHOTOS:
                        refuse(connection, encoded)
                # With segments of shared memory that no process has any more.
                segments = sum(segment.stat().st_blocks * 512 for segment in server.segments())
                most = max(most, server.memory() + segments)
            return most

        # In the first half, heaps fill up.
        before, processes = memory_while_photos_are_refused(), {process.pid for process in server.family()}
        after = memory_while_photos_are_refused()
        print(f"memory: {before / 1e6:.0f} MB, then {after / 1e6:.0f} MB")  # pytest -rP shows it
        # Triton's processes keep the memory that they once used. The requests alone have 110 MB.
        assert after < before + 2e6 * len(processes)
        assert {process.pid for process in server.family()} == processes
        for connection in connections:
            assert connection.infer(PHOTO)["segmented"].any(axis=3).mean() > 0.3
