# SPDX-License-Identifier: Apache-2.0
"""Faults around the server: it continues, or exits with status 1 so that a supervisor restarts it."""

import contextlib
import hashlib
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.http
from conftest import (
    PHOTO,
    PROTOCOLS,
    Server,
    decode,
    infer_until_rejected,
    patched_toy,
    running_together,
    running_toy,
    start_toy,
    wait_for,
)
from tritonclient.utils import InferenceServerException

from client import InferenceError
from serving.traffic import STOPPING
from serving.watchdog import TritonProbe, Watchdog


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server in which Triton groups requests, although the example never does that."""
    with running_toy(tmp_path_factory.mktemp("toy") / "log", "--triton-batch-size", 4) as server:
        yield server


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_error_of_the_server_costs_one_request(toy, protocol):
    connection = toy.connect(protocol)
    with pytest.raises(InferenceError, match="the server could not process this request") as error:
        connection.infer(PHOTO, parameters={"raise": f"an error over {protocol}"})
    assert "ValueError" not in str(error.value.__cause__)
    assert "Traceback (most recent call last)" in toy.log.read_text()
    assert f"ValueError: an error over {protocol}" in toy.log.read_text()
    assert (connection.infer(PHOTO)["inverted"][0] == 255 - decode(PHOTO)).all()


DESCRIPTION = f"image of {len(PHOTO)} bytes with SHA-256 {hashlib.sha256(PHOTO).hexdigest()}"
FORGED = "\n2026-11-26 20:00:00,000 CRITICAL server: forged\x1b[2J\rforged"


@pytest.mark.parametrize("parameters", [{"print": f"text{FORGED}"}, {"raise": f"text{FORGED}"}])
def test_nothing_that_a_client_sends_can_start_a_line_of_the_log_or_move_the_cursor(toy, parameters):
    before = len(toy.log.read_text())
    with contextlib.suppress(InferenceError):
        toy.connect("http").infer(PHOTO, parameters=parameters)
    text = toy.log.read_text()[before:]
    assert "forged" in text
    assert all(line.isprintable() for line in text.splitlines())
    assert "\r" not in text
    assert not [line for line in text.split("\n") if line.startswith(("forged", "2026-11-26 20:00:00,000"))]


def test_the_output_of_a_library_is_one_line_with_the_request(toy):
    before = len(toy.log.read_text())
    toy.connect("http").infer(PHOTO, parameters={"print": 5_000 * "many lines\n"})
    (line,) = toy.log.read_text()[before:].splitlines()
    assert 'WARNING server: a library printed "many lines\\nmany lines' in line
    assert len(line) < 1000
    assert line.endswith(f'..." while it processed {DESCRIPTION}')


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_parameters_that_are_too_large_are_rejected(toy, protocol):
    with pytest.raises(InferenceError, match="the parameters of the request are too large"):
        toy.connect(protocol).infer(PHOTO, parameters={"note": "x" * (1 << 16)})


def test_requests_that_triton_puts_into_one_call_get_their_own_responses(toy, tmp_path):
    other = PHOTO[:2] + b"\xff\xfe\x00\x04no" + PHOTO[2:]  # the same picture with a comment, so another length
    photos = [other, PHOTO, PHOTO, PHOTO]  # in any order, two of the same length are neighbors
    before, go_on = toy.metric("exec_count"), tmp_path / "go on"
    connections = [toy.connect(protocol) for protocol in PROTOCOLS]
    with ThreadPoolExecutor(9) as pool:
        pool.submit(connections[0].infer, PHOTO, (), {"hold": str(go_on)})
        wait_for(lambda: "holding until" in toy.log.read_text())
        responses = [
            pool.submit(connections[index % 2].infer, photos[index % 4], (), {"add": index}) for index in range(8)
        ]
        wait_for(lambda: toy.metric("pending_request_count") >= 4)
        go_on.touch()
        for index, response in enumerate(responses):
            assert (response.result()["inverted"][0] == 255 - decode(PHOTO) - np.uint8(index)).all()
            np.testing.assert_allclose(response.result()["mean"][0], decode(PHOTO).mean(axis=(0, 1)))
    assert toy.metric("exec_count") - before < 9  # some of them shared a call


def test_a_request_with_two_photos_is_rejected(toy):
    image = tritonclient.http.InferInput("image", (2, len(PHOTO)), "UINT8")
    image.set_data_from_numpy(np.frombuffer(2 * PHOTO, np.uint8).reshape(2, -1))
    with pytest.raises(InferenceServerException, match="InvalidRequest: the batch dimension must be 1"):
        toy.connect("http").client.infer("Toy", [image])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_watchdog_is_quiet_as_long_as_the_model_is_ready(toy, protocol, monkeypatch):
    for name in ("http_proxy", "grpc_proxy"):  # no proxy listens there
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    port = toy.http_port if protocol == "http" else toy.grpc_port
    ready, ended, unknown = (threading.Event() for _ in range(3))
    with contextlib.ExitStack() as stack:
        for _ in range(400):  # idle clients
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        with Watchdog(TritonProbe(protocol, "127.0.0.1", port, "Another").is_ready, 1, ended.set):
            pass
        stack.enter_context(Watchdog(TritonProbe(protocol, "127.0.0.1", port, "Another").is_ready, 1, unknown.set))
        stack.enter_context(Watchdog(TritonProbe(protocol, "0.0.0.0", port, "Toy").is_ready, 2, ready.set))
        assert not ready.wait(3)
    assert unknown.is_set()
    assert not ended.is_set()


class Broken:
    """A server to which something fatal happens while clients use it."""

    def __init__(self, server: Server, pool: ThreadPoolExecutor):
        self.server = server
        self.broken_at = datetime.now()
        self.clients: list[Future] = []
        self._pool = pool

    def use(self) -> None:
        """Send it photos until one is rejected."""
        self.clients = [
            self._pool.submit(infer_until_rejected, self.server.connect(protocol), sleep_s=0.1)
            for protocol in PROTOCOLS * 2
        ]
        wait_for(lambda: self.server.metric("pending_request_count") + self.server.metric("request_success") >= 3)

    def suspend(self, kind: str) -> None:
        """Make a process hang, as a worker does if the driver of its GPU hangs."""
        self.server.processes(kind)[0].suspend()
        self.broken_at = datetime.now()

    def kill(self, kind: str, index: int = 0) -> None:
        """Kill a process, as the system does if memory runs out."""
        self.server.processes(kind)[index].kill()

    def seconds_until(self, said: str) -> float:
        """Return when the log has a line, the only critical one, in seconds after it broke."""
        (line,) = [line for line in self.server.log.read_text().splitlines() if " CRITICAL server: " in line]
        assert said in line
        logged = datetime.strptime(" ".join(line.split()[:2]), "%Y-%m-%d %H:%M:%S,%f")
        return (logged - self.broken_at).total_seconds()

    def assert_it_ends(self, said: str) -> str:
        """Wait for the end of the server, with status 1 and one line that says why, and return its log.

        There are no leftovers, and each client got an error.
        """
        assert self.server.process.wait(timeout=30) == 1
        for client in self.clients:
            client.result()
        assert self.server.left_behind() == []
        log = self.server.log.read_text()
        reasons = [line for line in log.splitlines() if " CRITICAL server: " in line or ".py: " in line]
        assert len(reasons) == 1, log
        assert said in reasons[0]
        assert "Traceback" not in log
        return log


FRONTENDS = ("--frontends", 2, "--instances", 4)

# A signal that arrives while Python runs a destructor or a callback raises SystemExit there, and Python ignores it.
LOSE_SIGNALS = """
from serving.lifecycle import Lifecycle
Lifecycle._on_signal = lambda self, *_: self.ignore_signals()
"""


# Usually a thread of PyTriton's notices the end of Triton before the main thread does, but not always.
NOTICE_LATE = """
import time
from pytriton.server.triton_server import TritonServer
on_time = TritonServer._handle_exit

def late(self, *arguments):
    time.sleep(2)
    on_time(self, *arguments)

TritonServer._handle_exit = late
"""


def patched(folder: Path, code: str) -> Path:
    folder.mkdir()
    return patched_toy(folder, code)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Broken]]:
    """Servers by the fault that ends them, in parallel, because each takes some seconds to start and to end."""
    folder = tmp_path_factory.mktemp("broken")
    servers = {
        "killed worker": start_toy(folder / "worker"),
        "exiting worker": start_toy(folder / "exit"),
        "killed helper": start_toy(folder / "helper"),
        "deleted socket": start_toy(folder / "socket"),
        "killed store": start_toy(folder / "store"),
        "killed first frontend": start_toy(folder / "first", *FRONTENDS),
        "killed last frontend": start_toy(folder / "last", *FRONTENDS),
        "hanging frontend": start_toy(folder / "frontend", *FRONTENDS, "--triton-timeout-s", 3),
        "killed Triton": start_toy(folder / "triton"),
        "killed Triton, lost signal": start_toy(folder / "signal", script=patched(folder / "lose", LOSE_SIGNALS)),
        "killed Triton, noticed late": start_toy(folder / "late", script=patched(folder / "notice", NOTICE_LATE)),
        "killed server": start_toy(folder / "server", *FRONTENDS),
        "killed process group": start_toy(folder / "group", *FRONTENDS),
        "hanging worker": start_toy(folder / "hanging", "--instances", 2, "--worker-timeout-s", 3),
        "hanging Triton": start_toy(folder / "silent", "--triton-timeout-s", 3),
    }
    with running_together(servers), ThreadPoolExecutor(100) as pool:
        broken = {what: Broken(server, pool) for what, server in servers.items()}
        broken["hanging worker"].server.connect("http").infer(PHOTO)
        for what in ("hanging worker", "killed Triton", "killed Triton, noticed late"):
            broken[what].suspend("worker")
            broken[what].use()
        for what, one in broken.items():
            if not one.clients and what != "exiting worker":
                one.use()
        for server in servers.values():
            server.segments()
        broken["hanging Triton"].suspend("tritonserver")
        broken["hanging frontend"].suspend("frontend")
        broken["killed worker"].kill("worker")
        broken["killed first frontend"].kill("frontend")
        broken["killed last frontend"].kill("frontend", -1)
        exiting = broken["exiting worker"]
        exiting.clients = [
            pool.submit(infer_until_rejected, exiting.server.connect("grpc"), exit=1, print="last words\n")
        ]
        broken["killed helper"].kill("stubs")
        # The process that owns the shared memory of requests and responses.
        broken["killed store"].kill("helpers", -1)
        next(broken["deleted socket"].server.home.glob("workspace_*/triton/*-data.sock")).unlink()
        broken["killed server"].server.process.kill()
        os.killpg(broken["killed process group"].server.process.pid, signal.SIGKILL)
        for what in ("killed Triton", "killed Triton, noticed late"):
            broken[what].kill("tritonserver")
        broken["killed Triton, lost signal"].server.process.terminate()
        broken["killed Triton, lost signal"].kill("tritonserver")
        yield broken
        # Leftovers of a test that failed or did not run would keep the clients busy.
        for server in servers.values():
            with contextlib.suppress(ProcessLookupError):
                server.process.kill()


TOLD = "is stopping|refused|closed|UNAVAILABLE|not ready|unknown|reset"


def test_a_killed_worker_ends_the_server(broken):
    broken["killed worker"].assert_it_ends("stopping: a worker exited")
    for client in broken["killed worker"].clients:
        assert re.search(TOLD, client.result()[1])


def test_a_worker_that_exits_in_the_middle_of_a_request_ends_the_server(broken):
    log = broken["exiting worker"].assert_it_ends("stopping: a worker exited")
    # So that an operator can find or block photos that end a worker.
    assert f"ERROR server: a worker exited while it processed {DESCRIPTION}\n" in log
    assert 'ERROR server: before a worker exited, a library printed "last words"' in log
    assert broken["exiting worker"].clients[0].result() == (0, STOPPING)


@pytest.mark.parametrize("what", ["killed helper", "killed store"])
def test_a_killed_helper_of_triton_ends_the_server(broken, what):
    broken[what].assert_it_ends("stopping: one of Triton's helper processes exited")


def test_a_deleted_socket_ends_the_server(broken):
    log = broken["deleted socket"].assert_it_ends("Toy-data.sock was deleted")
    assert f"CRITICAL server: stopping: {broken['deleted socket'].server.home}/workspace_" in log


@pytest.mark.parametrize("what", ["killed first frontend", "killed last frontend"])
def test_a_killed_frontend_ends_the_server(broken, what):
    broken[what].assert_it_ends("stopping: a frontend exited")
    log = broken[what].server.log.read_text()
    assert "took too long" not in log  # it does not wait for the requests that the frontend had
    assert " ERROR " not in log


def test_a_frontend_that_hangs_ends_the_server_after_its_timeout(broken):
    broken["hanging frontend"].assert_it_ends("stopping: a frontend hung for 3 s")
    # Three checks in a row, of which the first may come right after it hangs, or a second later.
    assert 2.4 < broken["hanging frontend"].seconds_until("a frontend hung") < 6


@pytest.mark.parametrize("what", ["killed Triton", "killed Triton, lost signal"])
def test_the_end_of_triton_ends_the_server(broken, what):
    log = broken[what].assert_it_ends(".py: Triton exited unexpectedly")
    assert log.count("ready: model") == 1  # it does not start Triton again


@pytest.mark.parametrize("what", ["killed Triton", "killed Triton, noticed late"])
def test_a_worker_that_hangs_does_not_hold_up_the_end_of_the_server(broken, what):
    broken[what].assert_it_ends("Triton exited unexpectedly")
    assert [client.result()[0] for client in broken[what].clients] == [0, 0, 0, 0]


def test_a_worker_that_hangs_ends_the_server_after_its_timeout(broken):
    said = "stopping: a worker has responded to no request for 3 s"
    log = broken["hanging worker"].assert_it_ends(said)
    assert f"ERROR server: a worker hung while it processed {DESCRIPTION}\n" in log
    for client in broken["hanging worker"].clients:
        succeeded, told = client.result()
        assert succeeded == 0
        assert re.search("the server took too long and is stopping|the server is stopping: ", told)
    # Not after twice its timeout.
    assert 2.9 < broken["hanging worker"].seconds_until(said) < 5


def test_a_triton_that_hangs_ends_the_server_after_its_timeout(broken):
    said = "stopping: Triton has not responded for 3 s"
    broken["hanging Triton"].assert_it_ends(said)
    # The first of the checks that fail may begin a second after Triton hangs.
    assert 2.9 < broken["hanging Triton"].seconds_until(said) < 6


@pytest.mark.parametrize("what", ["killed server", "killed process group"])
def test_a_killed_server_leaves_nothing_behind(broken, what):
    server = broken[what].server
    assert psutil.wait_procs(server.family(), timeout=20)[1] == []
    assert server.left_behind() == []
    for client in broken[what].clients:
        assert re.search(TOLD, client.result()[1])
