# SPDX-License-Identifier: Apache-2.0
"""All kinds of load at the same time, for a while: every good photo is processed correctly, and nothing grows.

SOAK in the environment sets the seconds. The default of 120 shows little of growth; SOAK=1800 shows more.
"""

import os
import random
import socket
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier

import numpy as np
import pytest
import torch
from conftest import (
    PROTOCOLS,
    SAMPLES,
    Server,
    decode_cut_out,
    encode,
    http_request,
    psnr,
    running_server,
    sample,
    wait_for,
)

from client import Connection, InferenceError

SECONDS = float(os.environ.get("SOAK", "120"))
ROUNDS = 6
SPAWN = get_context("spawn")
CLIENTS = 16 if torch.cuda.is_available() else 3
# On a CPU with a small input for the network: it takes nearly all of the time, and nothing in it grows.
OPTIONS = () if torch.cuda.is_available() else ("--input-size", 64)
SIZES = [(1281, 851), (640, 426), (1024, 683), (500, 375)]
GOOD = [
    # As cameras write them.
    *(encode(sample("person", size), "JPEG", quality=90, subsampling="4:2:0") for size in SIZES),
    *(path.read_bytes() for path, _ in SAMPLES.values()),
]
WANTED = [
    (("original", "segmented"), {}),
    (("segmented",), {}),
    (("mask",), {}),
    *((("encoded",), {"format": name}) for name in ("jpeg", "png", "webp")),
]
BAD = [
    (GOOD[0][:20_000], {}, "is truncated"),
    (b"no photo at all", {}, "of an unknown type"),
    (GOOD[1], {"class_name": "unicorn"}, "class_name must be one of"),
    (GOOD[2], {"threshold": 7}, "threshold must be a number between 0 and 1"),
]


def warm_up(url: str) -> None:
    """Get the largest responses, in its own process, so that heaps fill up."""
    connection = Connection(url)
    for outputs, parameters in WANTED:
        together.wait(60)  # memory peaks if all clients request the same at the same time
        for _ in range(20):
            connection.infer(GOOD[0], outputs, parameters)


def set_together(barrier: Barrier) -> None:
    global together  # multiprocessing can pass it to a new process, but not to one that runs already
    together = barrier


def send(http_port: int, url: str, expected: list[dict], seed: int, seconds: float) -> Counter:
    """Send photos for some seconds, in its own process, and count the outcomes."""
    dice, end, outcomes = random.Random(seed), time.monotonic() + seconds, Counter()
    connection = Connection(url)
    while time.monotonic() < end:
        kind = dice.choices(("good", "bad", "half a request", "impatient"), (80, 14, 3, 3))[0]
        if kind == "good":
            index = dice.randrange(len(GOOD))
            outputs, parameters = dice.choice(WANTED)
            try:
                response = connection.infer(GOOD[index], outputs, parameters | {"class_name": "person,cat"})
            except InferenceError as error:
                outcomes[f"good, FAILED: {error}"] += 1
                continue
            what = parameters.get("format", " and ".join(outputs))
            outcomes[f"good, processed: {what}" if is_right(response, expected[index]) else f"good, WRONG: {what}"] += 1
        elif kind == "bad":
            encoded, parameters, sentence = dice.choice(BAD)
            try:
                connection.infer(encoded, (), parameters)
                outcomes["bad, ACCEPTED"] += 1
            except InferenceError as error:
                outcomes["bad, rejected" if sentence in str(error) else f"bad, REJECTED OTHERWISE: {error}"] += 1
        elif kind == "half a request":
            with socket.create_connection(("127.0.0.1", http_port)) as half:
                half.sendall(http_request(GOOD[0])[:9999])
            outcomes["half a request"] += 1
        else:
            try:
                connection.infer(GOOD[0], timeout_us=1)
                outcomes["impatient, processed"] += 1  # the queue was empty
            except InferenceError as error:
                expired = "timeout expired" in str(error)
                outcomes["impatient, expired" if expired else f"impatient, FAILED: {error}"] += 1
    return outcomes


def is_right(response: dict, expected: dict) -> bool:
    """Return whether a response is that of a single request, but for a few pixels: in another batch, the network rounds
    differently. JPEG and WebP change colors a little.
    """
    if "encoded" not in response:
        return all(is_similar(array[0], expected[name][0]) for name, array in response.items())
    cut_out, alpha, kind = decode_cut_out(response["encoded"][0].tobytes())
    segmented = expected["segmented"][0]
    if cut_out.shape != segmented.shape or (kind != "JPEG" and not is_similar(alpha, expected["mask"][0])):
        return False
    return is_similar(cut_out, segmented) if kind == "PNG" else psnr(cut_out, segmented) > 28


def is_similar(response: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether all but a few pixels are the same."""
    return (
        response.shape == expected.shape
        and (response != expected).reshape(*response.shape[:2], -1).any(2).mean() < 0.003
    )


def state(server: Server) -> dict[str, object]:
    """Return the server's use of each resource, once its clients' connections are closed."""
    family = server.family()
    counts = [-1]

    def is_steady() -> bool:
        counts.append(sum(process.num_fds() for process in family))
        time.sleep(0.5)
        return counts[-1] == counts[-2]

    wait_for(is_steady)
    # Of the GPU that the server uses. nvidia-smi would also count those that CUDA_VISIBLE_DEVICES hides.
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    memory = server.memory()
    return {
        "memory, MB": round(memory.total() / 1e6),
        "of which": {name: round(size / 1e6) for name, size in memory.items()},
        "shared memory, MB": round(server.shared_memory() / 1e6),
        "GPU memory, MB": round((total - free) / 1e6),
        "file descriptors": counts[-1],
        "threads": sum(process.num_threads() for process in family),
        "processes": len(family),
    }


@pytest.mark.timeout(200 + 2 * SECONDS)
def test_under_load_every_good_photo_is_processed_correctly_and_nothing_grows(tmp_path):
    outcomes, states, failed = Counter(), [], []
    with (
        running_server(tmp_path / "log", "--weights", "demo", "--max-queue", 100, *OPTIONS) as server,
        ProcessPoolExecutor(CLIENTS, SPAWN, set_together, (SPAWN.Barrier(CLIENTS),)) as pool,
    ):
        connection = server.connect("grpc")
        outputs = ("original", "segmented", "mask")
        expected = [connection.infer(photo, outputs, {"class_name": "person,cat"}) for photo in GOOD]
        assert all(0.01 < (response["mask"] > 0).mean() < 0.99 for response in expected)
        urls = [server.connect(protocol).url for protocol in PROTOCOLS]
        list(pool.map(warm_up, [urls[client % 2] for client in range(CLIENTS)]))
        for number in range(ROUNDS):
            clients = [
                pool.submit(send, server.http_port, urls[seed % 2], expected, seed, SECONDS / ROUNDS)
                for seed in range(number * CLIENTS, (number + 1) * CLIENTS)
            ]
            for client in clients:
                outcomes += client.result()
            failed.append(server.metric("request_failure"))
            states.append(state(server))
            print(states[-1], flush=True)  # pytest -rP shows it
        print(dict(outcomes))
        assert not [outcome for outcome in outcomes if not outcome.islower()]
        assert len([outcome for outcome in outcomes if outcome.startswith("good, processed")]) == len(WANTED)
        assert outcomes["bad, rejected"] > 0
        # Heaps fill up for a while, so everything is compared from halfway on. tritonserver keeps 1.4 KB and
        # more of each failed request.
        half, end = states[ROUNDS // 2 - 1], states[-1]
        kept = 3e-3 * (failed[-1] - failed[ROUNDS // 2 - 1])
        assert end["memory, MB"] < half["memory, MB"] + kept + 2 * end["processes"]
        assert end["shared memory, MB"] <= half["shared memory, MB"] + 5 * end["processes"]
        assert end["GPU memory, MB"] <= half["GPU memory, MB"] + 100
        assert end["file descriptors"] <= half["file descriptors"] + end["processes"]
        assert end["threads"] <= half["threads"] + 5
        assert end["processes"] == half["processes"]
        assert "Traceback" not in server.log.read_text()
        assert server.stop() == 0
        assert server.left_behind() == []
