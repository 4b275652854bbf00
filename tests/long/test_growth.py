# SPDX-License-Identifier: Apache-2.0
"""Rejected photos leave no memory and no process behind."""

import math
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import PHOTO, PROTOCOLS, encode, running_server, running_toy, sample, with_tmpfs, with_wrong_checksum
from PIL import Image

from client import Connection, InferenceError
from photo import max_photo_bytes
from serving.memory import SHM_BYTES_PER_BYTE, SHM_BYTES_PER_INSTANCE

PICTURE = sample("person")
PNG = encode(PICTURE, "PNG")
PROGRESSIVE = encode(PICTURE.resize((40, 40)), "JPEG", progressive=True)


# Different parts reject them: PyTriton, photo/, or the decoder.
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
    with_wrong_checksum(PNG),
    PROGRESSIVE[:-2] + 1000 * PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2] + b"\xff\xd9",
]


def expect_rejection(connection: Connection, encoded: bytes) -> None:
    with pytest.raises(InferenceError):
        connection.infer(encoded)


def test_nothing_grows_and_nothing_restarts_while_photos_are_rejected(tmp_path):
    with running_server(tmp_path / "log", "--weights", "demo") as server:

        def reject_all(client: int) -> None:
            connection = server.connect(PROTOCOLS[client % 2])
            for encoded in BAD_PHOTOS * 10:
                expect_rejection(connection, encoded)

        def memory_while_photos_are_rejected() -> Counter[str]:
            """Return the highest memory use, measured after each round of photos."""
            # Temporary memory is not always freed immediately.
            most = Counter()
            for round_ in range(10):
                reject_all(round_)
                most = max(most, server.memory(), key=Counter.total)
            return most

        # Triton's processes keep memory that they have used. Keep each instance busy, so that this happens now.
        instances = len(server.processes("stubs"))
        with ThreadPoolExecutor(instances) as pool:
            list(pool.map(reject_all, range(instances)))
        processes = {process.pid for process in server.family()}
        before, shared = memory_while_photos_are_rejected(), server.shared_memory()
        after = memory_while_photos_are_rejected()
        for name in after:  # pytest -rP shows it
            print(f"memory of {name}: {before[name] / 1e6:.0f} MB, then {after[name] / 1e6:.0f} MB")
        # The requests alone have 190 MB.
        assert after.total() < before.total() + 2e6 * len(processes)
        assert server.shared_memory() < shared + 2e6 * len(processes)
        assert {process.pid for process in server.family()} == processes
        for protocol in PROTOCOLS:
            assert server.connect(protocol).infer(PHOTO)["segmented"].any(axis=3).mean() > 0.3
        assert "Traceback" not in server.log.read_text()


def test_the_largest_photos_that_fail_fit_into_the_shared_memory_that_the_server_counts_on(tmp_path):
    """A full /dev/shm would end the server with a bus error. This one has not a byte more than the server wants."""
    instances, side = 14, 2000
    size, response = max_photo_bytes(side**2), 3 * side**2 + 64
    wanted = instances * (SHM_BYTES_PER_INSTANCE + math.ceil(SHM_BYTES_PER_BYTE * (size + response)))
    noise = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    good = encode(Image.frombytes("RGB", (side, side), 2 * noise, "raw"), "JPEG", quality=100)
    # Each is rejected in another place, and has the largest size that is not rejected immediately.
    bad = [noise, bytes(size), b"BM" + noise[2:], PHOTO[:5000] + noise[5000:], PNG[:33] + noise[33:], b"x" + noise]

    options = ("--instances", instances, "--max-queue", 64, "--max-pixels", side**2)
    prefix = with_tmpfs("/dev/shm", f"{math.ceil(wanted / 4096) * 4}k")
    with running_toy(tmp_path / "log", *options, prefix=prefix) as server:
        assert "SHARED MEMORY" not in server.log.read_text()
        used = []

        def send(client: int) -> None:
            connection = server.connect(PROTOCOLS[client % 2])
            for encoded in [good, *bad] * 4:
                expect_rejection(connection, encoded) if encoded in bad else connection.infer(encoded)
                used.append(shutil.disk_usage(f"/proc/{server.process.pid}/root/dev/shm").used)

        with ThreadPoolExecutor(2 * instances) as pool:
            list(pool.map(send, range(2 * instances)))
        print(f"{max(used) / 1e6:.0f} of {wanted / 1e6:.0f} MB of /dev/shm were used")  # pytest -rP shows it
        assert server.process.poll() is None
        assert (server.connect("http").infer(PHOTO)["mean"] > 0).all()
