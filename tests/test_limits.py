# SPDX-License-Identifier: Apache-2.0
"""What the server does where there is too much of something or too little."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import SAMPLES, Answers, Server, encode, run_client, running_server, with_tmpfs
from PIL import Image
from tritonclient.utils import InferenceServerException

PHOTO = SAMPLES["person"][0].read_bytes()


def test_little_shared_memory(tmp_path):
    prefix = with_tmpfs("/dev/shm", "64m")
    with running_server(tmp_path / "server.log", "--weights", "demo", "--instances", "16", prefix=prefix) as server:
        log = server.log.read_text()
        most, instances = re.search(r"photos of more than ([\d,]+) pixels are refused, instances (\d+);", log).groups()
        assert "--shm-size 15gb" in log
        side = int(int(most.replace(",", "")) ** 0.5)
        assert side >= 1000
        assert int(instances) == 1
        # Photos that grow up to the limit, and files as large as photos can be, many at once: the server must live.
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8))
        for width in (side // 4, side // 2, 3 * side // 4, side, side, side):
            encoded = encode(noise.crop((0, 0, width, side)), "JPEG", quality=100)
            with ThreadPoolExecutor(6) as pool:
                for answer in pool.map(lambda _, encoded=encoded: Answers(server, "grpc")(encoded), range(6)):
                    assert answer["segmented"].shape == (1, side, width, 3)
        with pytest.raises(InferenceServerException, match=r"bytes, more than the \d+ that this server takes"):
            Answers(server, "grpc")(encode(noise, "BMP"))
        with pytest.raises(InferenceServerException, match=r"pixels, more than the \d+ that this server takes"):
            Answers(server, "http")(encode(Image.new("RGB", (side + 1, side + 1)), "PNG"))
        assert server.stop() == 0


def test_no_shared_memory(tmp_path):
    with Server(tmp_path / "server.log", "--weights", "demo", prefix=with_tmpfs("/dev/shm", "1m")) as server:
        assert server.process.wait(timeout=30) == 2
    line = server.log.read_text().splitlines()[-1]
    assert line.startswith("server.py: /dev/shm has no room for any photo: docker run --shm-size ")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that works on one photo at a time and lets eight wait."""
    options = "--weights demo --device cpu --instances 1 --max-queue 8"
    with running_server(tmp_path_factory.mktemp("slow") / "server.log", *options.split()) as server:
        yield server


def test_more_clients_than_may_wait(slow: Server):
    def ask(protocol: str) -> str:
        try:
            return str(Answers(slow, protocol)(PHOTO)["original"].shape)
        except InferenceServerException as error:
            return str(error)

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, ("http", "grpc") * 100))
    refused = sum("Exceeds maximum queue size" in answer for answer in answers)
    answered = answers.count("(1, 512, 512, 3)")
    assert refused + answered == 200
    assert answered >= 9
    assert refused > 100
    began = time.monotonic()
    assert ask("http") == "(1, 512, 512, 3)"
    assert time.monotonic() - began < 5


def test_client_py_says_that_the_server_is_busy(slow: Server, tmp_path):
    photos = [SAMPLES["person"][0]] * 40
    done = run_client("--url", slow.grpc_url, "--concurrency", 40, "--image-paths", *photos, cwd=tmp_path)
    assert done.returncode == 1
    assert "the server is busy" in done.stderr
    assert "Traceback" not in done.stderr
    assert "512 x 512 pixels" in done.stdout


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_request_that_waited_too_long_is_not_worked_on(slow: Server, protocol):
    worked_on = slow.metric("exec_count")
    with ThreadPoolExecutor(4) as pool:
        patient = [pool.submit(Answers(slow, "http"), PHOTO) for _ in range(4)]
        while slow.metric("pending_request_count") < 3:
            time.sleep(0.01)
        with pytest.raises(InferenceServerException, match="timeout expired"):
            Answers(slow, protocol)(PHOTO, timeout_us=1000)
        assert all(answer.result()["segmented"].any() for answer in patient)
    assert slow.metric("exec_count") == worked_on + 4
