# SPDX-License-Identifier: Apache-2.0
"""Damaged photos: each gets the right answer or one sentence about what is wrong, and the server goes on.

FUZZ in the environment sets how many; the default is 2,000.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pytest
from conftest import PROTOCOLS, ROOT, Server, decode, decode_cut_out, encode, running_server, sample

from client import InferenceError

COUNT = int(os.environ.get("FUZZ", "2000"))
CLIENTS = 4
PICTURE = sample("cat", (120, 80))
KINDS = {
    "JPEG": encode(PICTURE, "JPEG", quality=80),
    "progressive JPEG": encode(PICTURE, "JPEG", progressive=True, subsampling="4:4:4"),
    "PNG": encode(PICTURE, "PNG"),
    "palette PNG": encode(PICTURE.convert("P"), "PNG"),
    "WebP": encode(PICTURE, "WEBP"),
    "lossless WebP": encode(PICTURE, "WEBP", lossless=True),
    "BMP": encode(PICTURE, "BMP"),
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


def send(server: Server, numbers: Iterable[int]) -> list[str]:
    """Send the damaged photos with these numbers, and return what came of each."""
    connections = {protocol: server.connect(protocol) for protocol in PROTOCOLS}
    outcomes = []
    for number in numbers:
        dice = random.Random(number)
        data = damage(KINDS[dice.choice(list(KINDS))], dice)
        try:
            # Mostly without the network, which damage does not reach, and which takes long on a CPU.
            outputs = ("original", "segmented", "encoded") if dice.random() < 1 / 8 else ("original",)
            parameters = {"format": dice.choice(("jpeg", "png", "webp"))} if "encoded" in outputs else {}
            answer = connections[dice.choice(PROTOCOLS)].infer(data, outputs, parameters)
        except InferenceError as error:
            everything = str(error.__cause__)
            clean = "InvalidRequest: " in everything and str(ROOT) not in everything
            outcomes.append(re.sub(r"\d+", "N", str(error)) if clean else f"NOT CLEAN, {number}: {everything}")
        else:
            try:
                expected = decode(data).shape
            except Exception:
                expected = None  # Pillow gave up on a photo of which DALI made something
            shape = answer["original"].shape[1:]
            right = expected in (None, shape)
            if "encoded" in answer:
                cut_out, _, _ = decode_cut_out(answer["encoded"][0].tobytes())
                right = right and cut_out.shape == shape
                if parameters["format"] == "png":
                    right = right and np.array_equal(cut_out, answer["segmented"][0])
            what = parameters.get("format", "original")
            outcomes.append(f"answered: {what}" if right else f"NOT RIGHT, {number}: {shape}, not {expected}")
    return outcomes


@pytest.mark.timeout(120 + COUNT // 10)
def test_each_damaged_photo_is_answered_rightly_or_refused_with_a_sentence(tmp_path):
    outcomes, memory = Counter(), []
    # A server of its own, so that nothing else changes its memory.
    with running_server(tmp_path / "log", "--weights", "demo") as server, ThreadPoolExecutor(CLIENTS) as pool:
        # At first heaps fill up, so memory is compared from the half on.
        for numbers in (range(COUNT // 2), range(COUNT // 2, COUNT)):
            memory.append(server.memory().total())
            shares = [numbers[client::CLIENTS] for client in range(CLIENTS)]
            outcomes += Counter(chain.from_iterable(pool.map(send, [server] * CLIENTS, shares)))
        memory.append(server.memory().total())
        for outcome, count in sorted(outcomes.items()):
            print(f"{count:6d} {outcome}")  # pytest -rP shows it
        print("the server's memory at the start, halfway and at the end, MB:", *(round(size / 1e6) for size in memory))
        assert outcomes.total() == COUNT
        assert not [outcome for outcome in outcomes if outcome.startswith("NOT")]
        assert {f"answered: {what}" for what in ("original", "jpeg", "png", "webp")} < set(outcomes)
        # tritonserver keeps 1.4 KB of each failed request.
        assert memory[2] - memory[1] < 2e6 * len(server.family()) + 3000 * COUNT / 2
        assert server.process.poll() is None
        assert "Traceback" not in server.log.read_text()
        whole = KINDS["PNG"]
        assert (server.connect("http").infer(whole)["original"][0] == decode(whole)).all()
