# SPDX-License-Identifier: Apache-2.0
"""Damaged photos: each gets the right answer or a clean error, and the server goes on.

A few hundred of them; FUZZ=20000 in the environment for as many as one likes.
"""

import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES, Answers, Server, decode, encode, running_server, sentence
from PIL import Image
from tritonclient.utils import InferenceServerException

COUNT = int(os.environ.get("FUZZ", "400"))
PHOTO = Image.open(SAMPLES["cat"][0]).resize((120, 80))
KINDS = {
    "JPEG": encode(PHOTO, "JPEG", quality=80),
    "progressive JPEG": encode(PHOTO, "JPEG", progressive=True, subsampling="4:4:4"),
    "PNG": encode(PHOTO, "PNG"),
    "palette PNG": encode(PHOTO.convert("P"), "PNG"),
    "WebP": encode(PHOTO, "WEBP"),
    "lossless WebP": encode(PHOTO, "WEBP", lossless=True),
    "BMP": encode(PHOTO, "BMP"),
}


def damage(encoded: bytes, dice: random.Random) -> bytes:
    """Return the photo with one to three kinds of damage."""
    data = bytearray(encoded)
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(min(dice.choice((100, len(data), len(data))), len(data)))  # headers are hit more often
        how = dice.choice(("flip", "noise", "cut", "remove", "repeat", "splice"))
        if how == "flip":
            data[at] ^= 1 << dice.randrange(8)
        elif how == "noise":
            data[at : at + 8] = dice.randbytes(8)
        elif how == "cut":
            del data[max(1, len(data) - dice.randrange(len(data))) :]
        elif how == "remove":
            del data[at : at + dice.randrange(1, 32)]
        elif how == "repeat":
            data[at:at] = data[at : at + dice.randrange(1, 256)]
        else:
            other = KINDS[dice.choice(list(KINDS))]
            data[: at + 1] = other[: at + 1]
        if len(data) < 2:
            break
    return bytes(data) or b"x"


@pytest.fixture
def fuzzed(tmp_path: Path):
    """A server of its own, whose memory nothing else moves."""
    with running_server(tmp_path / "server.log", "--weights", "demo") as server:
        yield server


@pytest.mark.timeout(120 + COUNT // 20)
def test_damaged_photos(fuzzed: Server):
    def send(chunk: range) -> list[str]:
        clients, said = {protocol: Answers(fuzzed, protocol) for protocol in ("http", "grpc")}, []
        for number in chunk:
            dice = random.Random(number)
            data = damage(KINDS[dice.choice(list(KINDS))], dice)
            try:
                # Without the network, which damage does not reach.
                answer = clients[dice.choice(("http", "grpc"))](data, outputs=("original",))["original"]
            except InferenceServerException as error:
                clean = "InvalidRequest: " in str(error) and str(ROOT) not in str(error)
                said.append(re.sub(r"\d+", "N", sentence(error)) if clean else f"NOT CLEAN, {number}: {error}")
            else:
                try:
                    expected = decode(data).shape
                except Exception:
                    expected = None  # Pillow gave up on what DALI made something of
                right = expected is None or answer.shape == (1, *expected)
                said.append("answered" if right else f"NOT RIGHT, {number}: {answer.shape}, not {expected}")
        return said

    outcomes, halves = [], []
    with ThreadPoolExecutor(4) as pool:
        # Heaps fill up first, once: memory is compared from the half on.
        for numbers in (range(COUNT // 2), range(COUNT // 2, COUNT)):
            halves.append(fuzzed.memory())
            outcomes += chain.from_iterable(pool.map(send, (numbers[thread::4] for thread in range(4))))
    for outcome in sorted(set(outcomes)):
        print(f"{outcomes.count(outcome):6d} {outcome}")  # see it with pytest -rP
    at_start, at_half, at_end = *halves, fuzzed.memory()
    print(f"the server's memory: {at_start / 1e6:.0f} MB, {at_half / 1e6:.0f} at half, {at_end / 1e6:.0f} at the end")
    # tritonserver keeps 1.4 KB of each failed request.
    assert at_end - at_half < 2e6 * len(fuzzed.family()) + 3000 * COUNT / 2
    assert len(outcomes) == COUNT
    assert not [outcome for outcome in outcomes if outcome.startswith("NOT")]
    assert fuzzed.process.poll() is None
    log = fuzzed.log.read_text()
    assert "Traceback" not in log
    whole = KINDS["PNG"]
    assert (Answers(fuzzed, "http")(whole)["original"][0] == decode(whole)).all()
