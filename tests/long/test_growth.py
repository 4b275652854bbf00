# SPDX-License-Identifier: Apache-2.0
"""Photos that are refused leave nothing behind: no memory, no process."""

import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

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

        def refuse_all(client: int) -> None:
            connection = server.connect(PROTOCOLS[client % 2])
            for encoded in BAD_PHOTOS * 10:
                refuse(connection, encoded)

        def memory_while_photos_are_refused() -> Counter[str]:
            """Return the most that was in use between the photos."""
            # What a photo needed for a moment is not always given back at once.
            most = Counter()
            for round_ in range(10):
                refuse_all(round_)
                most = max(most, server.memory(), key=Counter.total)
            return most

        # Triton's processes keep the memory that they once used. So that this happens now, each instance is kept busy.
        instances = len(server.processes("stubs"))
        with ThreadPoolExecutor(instances) as pool:
            list(pool.map(refuse_all, range(instances)))
        processes = {process.pid for process in server.family()}
        before, shared = memory_while_photos_are_refused(), server.shared_memory()
        after = memory_while_photos_are_refused()
        for name in after:  # pytest -rP shows it
            print(f"memory of {name}: {before[name] / 1e6:.0f} MB, then {after[name] / 1e6:.0f} MB")
        # The requests alone have 190 MB.
        assert after.total() < before.total() + 2e6 * len(processes)
        assert server.shared_memory() < shared + 2e6 * len(processes)
        assert {process.pid for process in server.family()} == processes
        for protocol in PROTOCOLS:
            assert server.connect(protocol).infer(PHOTO)["segmented"].any(axis=3).mean() > 0.3
        assert "Traceback" not in server.log.read_text()
