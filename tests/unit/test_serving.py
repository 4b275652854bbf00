# SPDX-License-Identifier: Apache-2.0
"""The parts of serving/ by themselves: channels, batches, instances, shared memory, shutdown."""

import argparse
import hashlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from conftest import as_array, complete, wait_for
from gpu import DEVICES
from pytriton.model_config import Tensor
from pytriton.proxy.types import Request

from photo import max_photo_bytes
from serving.batcher import LARGE_WEIGHT, Batcher
from serving.channel import SLACK_BYTES, Channel, open_channels
from serving.errors import InferenceFailed, InvalidRequest, ServerError, UsageError
from serving.executor import Executor, open_memories
from serving.fleet import Fleet
from serving.instance import Instance
from serving.lifecycle import FAILURE, Lifecycle
from serving.memory import ResponseMemory, fit_shared_memory
from serving.options import count_frontends
from serving.printed import Printed
from serving.processes import FORK, Child, kill_all
from serving.shared import share_bytes
from serving.stages import Checked, Deferred, Stages
from serving.traffic import Traffic

PHOTO = {"image": as_array(b"photo")}


class Functions(Stages):
    """Stages that consist of the functions in the options."""

    @classmethod
    def limits(cls, options):  # noqa: ARG003
        return 1000, 1000

    @classmethod
    def example(cls, options):  # noqa: ARG003
        return Request(PHOTO, {"example": True})

    def __init__(self, options: argparse.Namespace, device: str):  # noqa: ARG002
        self._compute, self._read, self._weigh = options.compute, options.read, options.weigh

    def read(self, request):
        return request if "example" in request.parameters else self._read(request)

    def weigh(self, job):
        return self._weigh(job)

    def __call__(self, jobs):
        return [{}] * len(jobs) if "example" in jobs[0].parameters else self._compute(jobs)


class Forked:
    """A batcher in its own process, as in the server."""

    def __init__(
        self,
        compute: Callable,
        channel_count: int,
        max_batch_size: int,
        read: Callable = lambda request: request,
        weigh: Callable = lambda job: 0,  # noqa: ARG005
        executors: int = 1,
        **options: object,
    ):
        self.channels = open_channels(channel_count, *Functions.limits(None))
        memories = open_memories(self.channels, 1000, "cpu")
        functions = argparse.Namespace(compute=compute, read=read, weigh=weigh, max_batch_size=max_batch_size)
        executors = [Executor(Functions, functions, "cpu", memories) for _ in range(executors)]
        batcher = Batcher(self.channels, executors, Printed(), max_batch_size, **options)
        self.process = FORK.Process(target=batcher.run, daemon=True)
        self.process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


def call(channel: Channel, note: object, arrays=PHOTO, timeout_s: float | None = None) -> dict[str, np.ndarray]:
    """Send a request, as an instance does, with a note as its parameter."""
    return channel.call(arrays, ({"note": note}, None), timeout_s)


def notes(jobs: list[Request]) -> list:
    return [job.parameters["note"] for job in jobs]


def double(jobs: list[Request]) -> list[dict[str, np.ndarray]]:
    """Respond to each job with twice its inputs."""
    return [{name: 2 * array for name, array in job.items()} for job in jobs]


def test_a_channel_carries_arrays_of_any_type_and_shape():
    arrays = {
        "bytes": np.arange(3, dtype=np.uint8),
        "floats": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
        "integers": np.array([[-1], [1 << 40]]),
        "doubles": np.arange(8, dtype=np.float64).reshape(2, 4).T,  # not contiguous
        "scalar": np.array(1.5),
        "empty": np.empty((0, 3), np.float16),
    }
    with Forked(double, 1, 1) as forked:
        response = call(forked.channels[0], None, arrays)
        assert list(response) == list(arrays)
        for name, array in arrays.items():
            assert response[name].dtype == array.dtype
            np.testing.assert_array_equal(response[name], 2 * array)
            assert response[name].ctypes.data % response[name].itemsize == 0


def test_a_channel_carries_strings_there_and_back():
    arrays = {
        "bytes": np.array([[b"\xff\0", b"", b"long" * 25]], object),  # as PyTriton has them
        "text": np.array([["a", "\u00e9\0"], ["", "\U0001f600"]], object),
        "numpy": np.array(["as", "a", "Python list"]),
        "scalar": np.array(b"one", object),
        "none": np.empty((0, 2), object),
        "no text": np.empty(0, str),
        "transposed": np.array([[b"a", b"bb", b"ccc"]] * 2, object).T,
        "numbers": np.arange(3.0),  # after strings of any length
        "fixed size": np.array([b"abc", b"", b"x"]),
    }
    with Forked(lambda jobs: [job.data for job in jobs], 1, 1) as forked:
        response = call(forked.channels[0], None, arrays)
    assert list(response) == list(arrays)
    for name, array in arrays.items():
        if name not in ("numbers", "fixed size"):  # strings become objects of type bytes
            assert response[name].dtype == object
            array = np.vectorize(lambda text: text.encode() if isinstance(text, str) else text, [object])(array)
        np.testing.assert_array_equal(response[name], array, strict=name in ("numbers", "fixed size"))
        assert response[name].shape == array.shape


def test_strings_that_do_not_fit_are_rejected():
    long = {"text": np.array([b"x" * 1001], object)}
    with Forked(lambda jobs: [long] * len(jobs), 1, 1) as forked:
        with pytest.raises(ValueError, match="text does not fit"):
            call(forked.channels[0], None, {"text": np.array([b"x" * (1000 + SLACK_BYTES)], object)})
        assert call(forked.channels[0], None)["text"].tolist() == long["text"].tolist()
    long["text"][0] *= SLACK_BYTES
    with (
        Forked(lambda jobs: [long] * len(jobs), 1, 1) as forked,
        pytest.raises(InvalidRequest, match=r"the response exceeds the limit of \d+ bytes: request fewer outputs"),
    ):
        call(forked.channels[0], None)


def test_a_request_that_does_not_fit_into_the_channel_is_rejected():
    with Forked(double, 1, 1) as forked:
        with pytest.raises(ValueError, match="image does not fit"):
            call(forked.channels[0], None, {"image": np.zeros(1001 + SLACK_BYTES, np.uint8)})
        with pytest.raises(ValueError, match="memoryview"):
            call(forked.channels[0], "x" * (2 << 20))
        assert call(forked.channels[0], None, {"image": np.ones(1000, np.uint8)})["image"].sum() == 2000


def test_only_the_request_at_fault_in_a_batch_fails():
    release = FORK.Event()

    def compute(jobs):
        release.wait()  # until all are queued: the first call gets one or two, the next one all others
        if "bad" in notes(jobs):
            raise InvalidRequest("this one is bad")
        return [{} for _ in jobs]

    messages = ["good", "bad", "good", "bad", "good"]
    with Forked(compute, len(messages), 8) as forked, ThreadPoolExecutor(len(messages)) as pool:
        responses = [
            pool.submit(call, channel, message) for channel, message in zip(forked.channels, messages, strict=True)
        ]
        release.set()
        for message, response in zip(messages, responses, strict=True):
            if message == "bad":
                with pytest.raises(InvalidRequest, match="this one is bad"):
                    response.result()
            else:
                assert response.result() == {}


def test_a_batch_contains_the_queued_requests():
    entered, release, sizes = FORK.Event(), FORK.Event(), FORK.SimpleQueue()

    def compute(jobs):
        entered.set()
        release.wait()
        sizes.put(len(jobs))
        return double(jobs)

    with Forked(compute, 11, max_batch_size=4) as forked, ThreadPoolExecutor(11) as pool:
        requests = [{"number": np.array([number], np.uint8)} for number in range(11)]
        first = pool.submit(call, forked.channels[0], None, requests[0])
        entered.wait()
        others = [
            pool.submit(call, channel, None, request)
            for channel, request in zip(forked.channels[1:], requests[1:], strict=True)
        ]
        wait_for(lambda: all(channel.is_processing() for channel in forked.channels))
        release.set()
        assert [future.result()["number"].tolist() for future in [first, *others]] == [[2 * n] for n in range(11)]
        assert [sizes.get() for _ in range(4)] == [1, 4, 4, 2]


def test_two_executors_compute_two_batches_at_the_same_time():
    both = FORK.Barrier(2)

    def compute(jobs):
        both.wait(10)  # or fail
        return double(jobs)

    with Forked(compute, 2, max_batch_size=1, executors=2) as forked, ThreadPoolExecutor(2) as pool:
        for number in range(10):
            requests = [{"number": np.array([number + 100 * index], np.int16)} for index in range(2)]
            responses = list(pool.map(call, forked.channels, [None] * 2, requests))
            assert [response["number"].tolist() for response in responses] == [[2 * number], [2 * number + 200]]


def test_a_job_whose_result_is_not_valid_fails_alone():
    release = FORK.Event()

    def compute(jobs):
        release.wait()
        error = InferenceFailed("the result is not finite")
        outputs = double(jobs)
        return [
            # A condition may be any scalar of torch or numpy, and a job need not have one.
            output if note is None else Checked(output, note, error)
            for output, note in zip(outputs, notes(jobs), strict=True)
        ]

    conditions = [torch.tensor(True), torch.tensor(False), None, np.False_, np.True_, False]
    with Forked(compute, len(conditions), 8) as forked, ThreadPoolExecutor(len(conditions)) as pool:
        responses = [pool.submit(call, *request) for request in zip(forked.channels, conditions, strict=True)]
        wait_for(lambda: all(channel.is_processing() for channel in forked.channels))
        release.set()
        for condition, response in zip(conditions, responses, strict=True):
            if condition is None or condition:
                assert response.result()["image"].tolist() == (2 * PHOTO["image"]).tolist()
            else:
                with pytest.raises(InferenceFailed, match="the result is not finite"):
                    response.result()


@pytest.fixture
def log_file(tmp_path):
    """The log of this process and its children."""
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("server").addHandler(handler)
    yield tmp_path / "log"
    logging.getLogger("server").removeHandler(handler)
    handler.close()


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda jobs: {}[notes(jobs)[0]], "KeyError: 'a secret'"),
        (lambda jobs: jobs[:0], "ValueError: Functions returned 0 results for a batch of 1"),
        (lambda jobs: [{"file": Deferred(lambda _: 1 / 0, np.zeros(1))} for _ in jobs], "ZeroDivisionError: "),
        (
            lambda jobs: [Checked(output, False, InferenceFailed) for output in double(jobs)],
            "TypeError: the error of Checked must be an exception, not <class ",
        ),
    ],
)
def test_an_exception_of_the_stages_is_logged_and_the_client_gets_a_sentence(compute, reason, log_file: Path):
    with Forked(compute, 1, 1) as forked:
        with pytest.raises(InferenceFailed) as error:
            call(forked.channels[0], "a secret")
        assert str(error.value) == "the server could not process this request and logged the reason: try again later"
        assert log_file.read_text().count(f"\n{reason}") == 1


class LongError(InvalidRequest):
    """An exception of a user's class."""

    def __str__(self) -> str:
        return super().__str__() + 2_000_000 * "x"


@pytest.mark.parametrize(
    ("note", "start"), [("x", "x{500}"), ("\U0001f4f7", "\U0001f4f7{500}"), ("a\n\udc80", r"a\\n\\udc80a")]
)
@pytest.mark.parametrize("kind", [InvalidRequest, LongError])
def test_a_message_that_quotes_a_large_input_is_a_short_line_and_costs_no_worker(kind, note, start):
    def compute(jobs):
        raise kind(f"what is {''.join(notes(jobs)) * 100}?")

    with Forked(compute, 1, 1) as forked:
        for _ in range(2):
            with pytest.raises(InvalidRequest, match=f"^what is {start}") as error:
                call(forked.channels[0], note * 20_000)
            assert str(error.value).isprintable()
            assert len(quote(str(error.value))) < 8_000  # as gRPC encodes it; it may drop a longer one


@pytest.mark.parametrize("how", ["exit", "bug"])
def test_callers_get_an_error_when_the_other_process_exits(how, monkeypatch):
    if how == "bug":
        monkeypatch.setattr(Batcher, "_compute", lambda *_: 1 / 0)
    with Forked(lambda jobs: os._exit(1), 1, max_batch_size=4) as forked, ThreadPoolExecutor(1) as pool:  # noqa: ARG005
        pending = pool.submit(call, forked.channels[0], None)
        forked.process.join(10)
        assert forked.process.exitcode == 1
        forked.channels[0].close()
        with pytest.raises(ConnectionError):
            pending.result()
        with pytest.raises(ConnectionError):
            call(forked.channels[0], None)


def test_the_timeout_counts_from_the_last_response_to_anybody_and_is_waited_for_once():
    entered = FORK.Event()

    def compute(jobs):
        entered.set()
        (job,) = jobs
        time.sleep(job.parameters["note"])
        return double(jobs)

    with Forked(compute, 3, max_batch_size=1) as forked, ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(call, forked.channels[0], 0.8, timeout_s=1.5)]
        entered.wait()
        began = time.monotonic()
        for channel, seconds in zip(forked.channels[1:], (0.8, 100), strict=True):
            calls.append(pool.submit(call, channel, seconds, timeout_s=1.5))
        for response in calls[:2]:  # the second one takes 1.6 s in all, but the worker has shown that it is alive
            assert response.result()["image"].size == 5
        with pytest.raises(TimeoutError):
            calls[2].result()
        assert 3.0 < time.monotonic() - began < 4.2  # 1.6 s and 1.5 s
        with pytest.raises(ConnectionError):  # a late response is not the response to the next call
            call(forked.channels[2], 0)


def make_instance(forked: Forked, *outputs: Tensor, traffic: Traffic | None = None) -> Instance:
    instance = Instance(0, forked.channels[0], timeout_s=10, traffic=traffic or Traffic(1), lifecycle=Lifecycle(1))
    instance.outputs = outputs or [Tensor(name="image", dtype=np.uint8, shape=(-1,))]
    return instance


def test_two_requests_in_one_call_do_not_share_memory():
    with Forked(double, 1, 1) as forked:
        requests = [Request({"image": np.full((1, 5), number, np.uint8)}, {}) for number in (1, 2)]
        first, second = make_instance(forked)(requests)
        assert first["image"].tolist() == [[2] * 5]
        assert second["image"].tolist() == [[4] * 5]


def test_an_instance_rejects_what_it_cannot_send(caplog):
    with Forked(double, 1, 1) as forked:
        instance = make_instance(forked)
        with pytest.raises(InvalidRequest, match="the batch dimension must be 1"):
            instance([Request({"image": np.zeros((2, 5), np.uint8)}, {})])
        with pytest.raises(InvalidRequest, match="the request has 1001 bytes, but the limit is 1000"):
            instance([Request({"image": np.zeros((1, 1001), np.uint8)}, {})])
        with pytest.raises(InvalidRequest, match="the inputs or parameters of the request are too large"):
            instance([Request({"text": np.array([[b"x" * (1000 + SLACK_BYTES)]], object)}, {})])
        assert caplog.text.count("a request failed: ") == 3


def test_an_instance_sends_and_returns_strings():
    with Forked(double, 1, 1) as forked:
        instance = make_instance(forked, Tensor(name="label", dtype=np.bytes_, shape=(-1,)))
        (response,) = instance([Request({"label": np.array([[b"cat", b""]], object)}, {})])
        assert response["label"].tolist() == [[b"catcat", b""]]


def test_a_server_that_has_drained_rejects_requests():
    with Forked(double, 1, 1) as forked:
        traffic = Traffic(1)
        instance, request = make_instance(forked, traffic=traffic), Request({"image": np.zeros((1, 5), np.uint8)}, {})
        assert instance([request])
        Lifecycle(drain_s=0).drain(traffic, abandon=lambda: pytest.fail("nothing is in flight"))
        with pytest.raises(InferenceFailed, match="the server is stopping: send the request to another server"):
            instance([request])


DECLARED = [
    Tensor(name="mean", dtype=np.float32, shape=(3,)),
    Tensor(name="names", dtype=np.bytes_, shape=(-1,)),
    Tensor(name="picture", dtype=np.uint8, shape=(-1, -1, 3)),
]
RIGHT = {
    "mean": np.ones(3, np.float32),
    "names": np.array(["cat", "a dog"]),
    "picture": np.ones((2, 1, 3), np.uint8),
}
EMPTY = "is empty, which PyTriton cannot return"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mean": np.ones(3)}, "mean is declared as float32 [3], but is float64 [3]"),
        ({"mean": np.array(["a", "b", "c"])}, "mean is declared as float32 [3], but is strings [3]"),
        ({"mean": np.ones(3, complex)}, "mean is declared as float32 [3], but is complex128 [3]"),
        ({"mean": np.ones(4, np.float32)}, "mean is declared as float32 [3], but is float32 [4]"),
        ({"mean": np.ones((1, 3), np.float32)}, "mean is declared as float32 [3], but is float32 [1, 3]"),
        ({"mean": np.float32(1)}, "mean is declared as float32 [3], but is float32 []"),
        ({"mean": None}, "mean is declared as float32 [3], but is strings []"),
        ({"names": np.arange(2)}, "names is declared as strings [-1], but is int64 [2]"),
        ({"names": np.empty(0, str)}, f"names {EMPTY}"),
        ({"picture": np.ones((2, 2, 4), np.uint8)}, "picture is declared as uint8 [-1, -1, 3], but is uint8 [2, 2, 4]"),
        ({"picture": np.ones((0, 2, 3), np.uint8)}, f"picture {EMPTY}"),
        ({"picture": Deferred(np.ravel, np.ones(3))}, "picture is declared as uint8 [-1, -1, 3], but is float64 [3]"),
        ({"other": np.ones(3)}, "other is not declared"),
    ],
)
def test_an_output_that_is_not_as_declared_fails_its_request_alone(changes, said, caplog):
    def compute(jobs):
        return [RIGHT | (changes if note == "wrong" else {}) for note in notes(jobs)]

    with Forked(compute, 1, 1) as forked:
        instance, inputs = make_instance(forked, *DECLARED), {"image": np.zeros((1, 5), np.uint8)}
        with pytest.raises(InferenceFailed) as error:
            instance([Request(inputs, {"note": "wrong"}, requested_output_names=list(RIGHT))])
        assert str(error.value).startswith(f"the output {said}")
        assert caplog.messages == [f"a request failed: {error.value}"]
        (response,) = instance([Request(inputs, {"note": "right"}, requested_output_names=list(RIGHT))])
        assert {name: array.shape for name, array in response.items()} == {
            name: (1, *array.shape) for name, array in RIGHT.items()
        }


def test_a_requested_output_that_is_missing_fails_its_request():
    def compute(jobs):
        return [{name: RIGHT[name] for name in note} for note in notes(jobs)]

    with Forked(compute, 1, 1) as forked:
        instance, inputs = make_instance(forked, *DECLARED), {"image": np.zeros((1, 5), np.uint8)}
        # A request that names no outputs arrives with all of them. Then, the stages may choose.
        for wanted, returned, missing in (
            (["mean", "names"], ["mean"], "names"),
            (list(RIGHT), ["mean"], None),
            (list(RIGHT), [], "mean"),
            (["mean"], ["mean", "names"], None),
        ):
            request = Request(inputs, {"note": returned}, requested_output_names=wanted)
            if missing:
                with pytest.raises(InferenceFailed, match=f"the output {missing} is missing"):
                    instance([request])
            else:
                assert [*instance([request])[0]] == returned


class WrongLimits(Functions):
    """Stages whose limits are those of the options, or the error in them."""

    @classmethod
    def limits(cls, options):
        if isinstance(options.wrong, Exception):
            raise options.wrong
        return options.wrong


@pytest.mark.parametrize("wrong", [None, 1e6, "10", (1e6, 1e6), ("10", "10"), (10,), (10, 10, 10), ValueError("no")])
def test_limits_that_are_wrong_are_one_line(wrong):
    options = argparse.Namespace(device="cpu", start_timeout_s=9, worker_timeout_s=9, instances=1, wrong=wrong)
    with (
        pytest.raises(ServerError, match=r"^the limits of WrongLimits failed: .+; --verbose shows where$") as error,
        Fleet(WrongLimits, options, Lifecycle(1)),
    ):
        pytest.fail("it starts")
    assert error.value.exit_status == 1


@pytest.mark.parametrize("weight", [None, "heavy", [0.5]])
def test_a_weight_that_is_no_number_is_noticed_at_startup(weight):
    with pytest.raises((TypeError, ValueError), match="float"):
        Forked(double, 1, 1, weigh=lambda job: weight)  # noqa: ARG005


class Client:
    """A process that has a request in flight until it is told to end."""

    def __init__(self, traffic: Traffic, number: int):
        self._over, began = FORK.Event(), FORK.Event()
        self.process = FORK.Process(target=self._run, args=(traffic, number, began), daemon=True)
        self.process.start()
        assert began.wait(10)

    def _run(self, traffic: Traffic, number: int, began) -> None:
        with traffic.request(number):
            began.set()
            self._over.wait()

    def end(self) -> None:
        self._over.set()
        self.process.join()


def test_requests_in_flight_are_counted_over_all_processes():
    traffic = Traffic(5)
    assert (traffic.in_flight, traffic.last_done) == (0, 0)
    clients = [Client(traffic, number) for number in (0, 1, 4)]
    assert traffic.in_flight == 3
    with traffic.request(2):
        assert traffic.in_flight == 4
    before = time.monotonic()
    clients[0].end()
    assert traffic.in_flight == 2
    assert before < traffic.last_done < time.monotonic()
    clients[1].process.kill()  # it cannot report that its request has ended
    clients[1].process.join()
    assert traffic.in_flight == 2
    traffic.forget([1, 0])
    assert traffic.in_flight == 1
    clients[2].end()
    assert traffic.in_flight == 0


def test_a_process_learns_that_the_server_is_stopping():
    traffic, rejected = Traffic(1), FORK.Event()

    def ask() -> None:
        while True:
            try:
                with traffic.request(0):
                    time.sleep(0.01)
            except InferenceFailed:
                rejected.set()
                return

    process = FORK.Process(target=ask, daemon=True)
    process.start()
    traffic.close_at(time.monotonic() + 0.5)
    assert not rejected.wait(0.3)
    assert rejected.wait(10)
    process.join()


def drain(lifecycle: Lifecycle, traffic: Traffic) -> tuple[float, bool]:
    """Drain, and return the seconds that it took, and whether requests were abandoned."""
    abandoned, began = [], time.monotonic()
    lifecycle.drain(traffic, lambda: abandoned.append(True))
    return time.monotonic() - began, bool(abandoned)


def test_draining_waits_for_the_requests_of_all_processes():
    traffic = Traffic(2)
    clients = [Client(traffic, number) for number in range(2)]
    for client, seconds in zip(clients, (0.3, 0.6), strict=True):
        threading.Timer(seconds, client.end).start()
    seconds, abandoned = drain(Lifecycle(drain_s=20), traffic)
    assert 1.5 < seconds < 4  # and 1 s for the last response
    assert not abandoned


def test_requests_that_take_too_long_are_abandoned_and_those_of_a_lost_process_are_not_waited_for():
    traffic = Traffic(2)
    clients = [Client(traffic, number) for number in range(2)]
    seconds, abandoned = drain(Lifecycle(drain_s=0.5), traffic)
    assert 1.4 < seconds < 4
    assert abandoned
    for client in clients:
        client.process.kill()
        client.process.join()
    traffic.forget(range(2))
    assert drain(Lifecycle(drain_s=20), traffic)[0] < 4


def test_ctrl_z_suspends_neither_workers_nor_frontends():
    def echo(pipe) -> None:
        while True:
            pipe.send(pipe.recv())

    child = Child("worker", echo)
    try:
        os.setpgid(child.process.pid, child.process.pid)  # as a shell does: the kernel suspends no orphaned group
        for number in range(2):
            child.send(number)
            assert child.pipe.poll(10)
            assert child.receive() == number
            os.killpg(child.process.pid, signal.SIGTSTP)
    finally:
        kill_all([child])


@pytest.fixture
def restore_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, FAILURE)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("restore_signals")
@pytest.mark.parametrize(("error", "status"), [(ServerError, 1), (UsageError, 2)])
def test_an_error_of_the_server_is_one_line_and_a_status(error, status, capsys):
    with pytest.raises(SystemExit) as end, Lifecycle(1):
        raise error("what is wrong")
    assert end.value.code == status
    assert capsys.readouterr().err.endswith(": what is wrong\n")


class Interrupted:
    """A signal arrives while Python runs its destructor."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("restore_signals")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_in_a_destructor_ends_the_server():
    with pytest.raises(SystemExit) as end, Lifecycle(1):  # noqa: PT012 - the block is under test
        Interrupted()
        time.sleep(10)
    assert end.value.code == 0
    assert signal.alarm(0) == 0  # it is not raised again


@pytest.mark.usefixtures("restore_signals")
def test_a_failure_in_another_thread_ends_the_server_with_status_1(caplog):
    with pytest.raises(SystemExit) as end, Lifecycle(1) as lifecycle:  # noqa: PT012 - the block is under test
        threading.Thread(target=lifecycle.fail, args=("lost the GPU",)).start()
        time.sleep(10)
    assert end.value.code == 1
    assert "lost the GPU" in caplog.text


@pytest.mark.usefixtures("restore_signals")
def test_a_failure_in_another_process_ends_the_server_with_its_reason_and_status_1(caplog):
    with pytest.raises(SystemExit) as end, Lifecycle(1) as lifecycle:  # noqa: PT012 - the block is under test
        FORK.Process(target=lifecycle.fail, args=(f"a worker hung {'x' * 2000}",), daemon=True).start()
        time.sleep(10)
    assert end.value.code == 1
    (record,) = caplog.records
    assert record.levelname == "CRITICAL"
    assert record.getMessage().startswith("a worker hung xxx")


@pytest.mark.usefixtures("restore_signals")
def test_the_first_of_several_failures_is_the_reason(caplog):
    def fail_twice(lifecycle: Lifecycle) -> None:
        lifecycle.fail("the cause")
        lifecycle.fail("what it caused in the same process, at greater length")

    with pytest.raises(SystemExit) as end, Lifecycle(1) as lifecycle:  # noqa: PT012 - the block is under test
        with lifecycle.signals_deferred():
            for target, arguments in ((fail_twice, (lifecycle,)), (lifecycle.fail, ("what it caused in another",))):
                process = FORK.Process(target=target, args=arguments)
                process.start()
                process.join()
        pytest.fail("the deferred signal has been lost")
    assert end.value.code == 1
    assert [record.getMessage() for record in caplog.records] == ["the cause"]


@pytest.mark.usefixtures("restore_signals")
def test_a_failure_that_a_signal_to_all_processes_causes_does_not_count(caplog):
    began = threading.Event()

    def end_everything(lifecycle: Lifecycle) -> None:
        began.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        lifecycle.fail("lost a helper")

    with pytest.raises(SystemExit) as end, Lifecycle(1) as lifecycle:  # noqa: PT012 - the block is under test
        threading.Thread(target=end_everything, args=(lifecycle,)).start()
        began.set()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)  # runs no handler, and lets the other thread run
        time.sleep(10)
    assert end.value.code == 0
    assert "lost a helper" not in caplog.text


@pytest.mark.usefixtures("restore_signals")
def test_a_server_that_was_told_to_stop_does_not_complain_that_triton_ended(capsys):
    with pytest.raises(SystemExit) as end, Lifecycle(1) as lifecycle:  # noqa: PT012 - the block is under test
        lifecycle.ignore_signals()  # called by the thread that notices the end of Triton first
        os.kill(os.getpid(), signal.SIGTERM)
        raise ServerError("Triton exited unexpectedly")
    assert end.value.code == 0
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("restore_signals")
def test_a_deferred_signal_arrives_at_the_end_of_the_block():
    done = []
    with pytest.raises(SystemExit) as end, Lifecycle(1) as lifecycle:  # noqa: PT012 - the block is under test
        with lifecycle.signals_deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("clean-up")
        done.append("more")
    assert (end.value.code, done) == (0, ["clean-up"])


@pytest.mark.usefixtures("restore_signals")
def test_only_the_first_signal_counts():
    done = []
    with pytest.raises(SystemExit), Lifecycle(1) as lifecycle:  # noqa: PT012 - the block is under test
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            lifecycle.fail("not the first failure")
            done.append("clean-up")
    assert done == ["clean-up"]


class Sized(Functions):
    """Stages whose limits grow with an option."""

    size_option = "max_pixels"

    @classmethod
    def limits(cls, options):
        return max_photo_bytes(options.max_pixels), 6 * options.max_pixels


class Fixed(Functions):
    """Stages whose limits are always the same."""

    @classmethod
    def limits(cls, options):  # noqa: ARG003
        return 100_000_000, 100_000_000


OPTIONS = argparse.Namespace(max_pixels=25_000_000, another="option")


@pytest.mark.parametrize("stages", [Sized, Fixed])
def test_enough_shared_memory_changes_nothing(stages):
    assert fit_shared_memory(stages, OPTIONS, 12, 11 * 10**9) == (12, OPTIONS, "")


def test_with_little_shared_memory_there_are_fewer_instances_and_smaller_photos():
    instances, options, warning = fit_shared_memory(Sized, OPTIONS, 12, 10**9)
    assert instances == 12
    assert 1_900_000 < options.max_pixels < 2_300_000
    assert vars(options) == vars(OPTIONS) | {"max_pixels": options.max_pixels}
    assert OPTIONS.max_pixels == 25_000_000
    assert warning.startswith("SHARED MEMORY: /dev/shm has 1,000 MB free instead of 10,434.")
    assert f"The server runs 12 instances, with --max-pixels {options.max_pixels}." in warning
    assert "docker run --shm-size 10gb" in warning
    # No more would fit.
    more = argparse.Namespace(max_pixels=options.max_pixels + 1)
    assert fit_shared_memory(Sized, options, 12, 10**9) == (12, options, "")
    assert fit_shared_memory(Sized, more, 12, 10**9)[2]
    instances, options, _ = fit_shared_memory(Sized, OPTIONS, 12, 64 << 20)
    assert instances == 1
    assert options.max_pixels > 1_000_000
    with pytest.raises(UsageError, match="not enough for any request: use docker run --shm-size 10gb"):
        fit_shared_memory(Sized, OPTIONS, 12, 1 << 20)


def test_without_a_size_option_there_are_only_fewer_instances():
    instances, options, warning = fit_shared_memory(Fixed, OPTIONS, 12, 3 * 10**9)
    assert (instances, options) == (3, OPTIONS)  # each needs 865 MB
    assert warning.startswith(
        "SHARED MEMORY: /dev/shm has 3,000 MB free instead of 10,380. The server runs 3 instances."
    )
    assert "--" not in warning.replace("--shm-size", "")
    assert fit_shared_memory(Fixed, OPTIONS, 12, 866 * 10**6)[0] == 1
    with pytest.raises(UsageError, match="not enough for any request: use docker run --shm-size 10gb"):
        fit_shared_memory(Fixed, OPTIONS, 12, 864 * 10**6)


@pytest.mark.parametrize(
    ("device_type", "cores", "workers", "expected"),
    [
        ("cpu", 64, 1, 1),
        ("cuda", 2, 1, 1),
        ("cuda", 14, 1, 2),
        ("cuda", 16, 1, 3),
        ("cuda", 16, 2, 1),
        ("cuda", 64, 2, 3),
    ],
)
def test_the_number_of_frontends_follows_from_the_device_and_its_share_of_the_cores(
    device_type, cores, workers, expected, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    assert count_frontends(argparse.Namespace(frontends=0), device_type, workers) == expected
    assert count_frontends(argparse.Namespace(frontends=5), device_type, workers) == 5


def test_a_response_that_does_not_fit_into_its_memory_is_an_error():
    memory = ResponseMemory(share_bytes(100), "cpu")
    with pytest.raises(InvalidRequest, match="the response exceeds the limit of 100 bytes: request fewer outputs"):
        memory.store({"a": np.zeros(60, np.uint8), "b": np.zeros(60, np.uint8)})
    stored = memory.store({"a": np.zeros(60, np.uint8), "b": Deferred(lambda source: source, np.zeros(60, np.uint8))})
    with pytest.raises(InvalidRequest, match="the response exceeds the limit of 100 bytes: request fewer outputs"):
        stored.complete()


_pinned: list[np.ndarray] = []  # stays until the end of the process


@pytest.mark.parametrize("device", DEVICES)
def test_a_response_may_mix_arrays_of_the_host_with_tensors_of_the_device(device):
    _pinned.append(memory := share_bytes(1000))
    outputs = {
        "file": np.frombuffer(b"file", np.uint8),  # read-only
        "tensor": torch.arange(6.0, device=device).reshape(2, 3),
        "labels": np.array(["cat", "dog"]),
        "flags": torch.tensor([True, False], device=device),
    }
    stored = ResponseMemory(memory, device).store(outputs)
    if device == "cuda":
        torch.cuda.synchronize()
    response = complete(memory, stored)
    assert response["file"].tobytes() == b"file"
    assert response["tensor"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert response["tensor"].dtype == np.float32
    assert response["labels"].tolist() == [b"cat", b"dog"]
    assert response["flags"].tolist() == [True, False]
    assert response["flags"].dtype == bool


def test_a_deferred_output_is_computed_from_a_copy_and_stored_after_the_others():
    memory, source = share_bytes(1000), np.arange(5)
    outputs = {
        "file": Deferred(lambda array: 2 * array, source),
        "raw": np.full(3, 7.0),
        "text": Deferred(lambda array: np.array([str(array.sum())]), source),
    }
    stored = ResponseMemory(memory, "cpu").store(outputs)
    source[:] = 0  # a device reuses its memory for the next batch
    response = complete(memory, stored)
    assert response["file"].tolist() == [0, 2, 4, 6, 8]
    assert response["raw"].tolist() == [7, 7, 7]
    assert response["text"].tolist() == [b"10"]


def test_a_response_that_takes_long_to_compute_holds_up_no_other_batch():
    go_on = FORK.Event()

    def encode(_source):
        go_on.wait()
        raise InvalidRequest("too late")

    def compute(jobs):
        return [{"file": Deferred(encode, np.zeros(1))} if note == "later" else {} for note in notes(jobs)]

    with Forked(compute, 2, max_batch_size=4) as forked, ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(call, forked.channels[0], "later")
        for _ in range(3):
            assert call(forked.channels[1], "now", timeout_s=10) == {}
        assert not waiting.done()
        go_on.set()
        with pytest.raises(InvalidRequest, match="too late"):
            waiting.result()


def weigh(job: Request) -> float:
    return {"large": 1, "small": LARGE_WEIGHT}.get(job.parameters.get("note"), 0)


def test_large_jobs_leave_a_channel_for_others():
    go_on = FORK.Event()

    def encode(source):
        go_on.wait()
        return source

    def compute(jobs):
        return [{"file": Deferred(encode, np.zeros(1))} if note == "large" else {} for note in notes(jobs)]

    with Forked(compute, 5, max_batch_size=4, weigh=weigh) as forked, ThreadPoolExecutor(5) as pool:
        large = [pool.submit(call, channel, "large") for channel in forked.channels[:4]]
        wait_for(lambda: all(channel.is_processing() for channel in forked.channels[:4]))
        for _ in range(2):
            with pytest.raises(
                InferenceFailed, match="the server is busy with large requests: send this request again"
            ):
                call(forked.channels[4], "large", timeout_s=10)
            assert call(forked.channels[4], "small", timeout_s=10) == {}
        go_on.set()
        assert [response.result()["file"].tolist() for response in large] == [[0]] * 4
        assert call(forked.channels[4], "large", timeout_s=10)["file"].tolist() == [0]


def test_large_jobs_that_fail_make_room_for_others():
    def fail(_source):
        raise InvalidRequest("this one is bad")

    def compute(jobs):
        if "raise" in jobs[0].parameters["how"]:
            raise InvalidRequest("this one is bad")
        error = InferenceFailed("this one is bad")
        return [Checked({"file": Deferred(fail, np.zeros(1))}, job.parameters["how"] == "later", error) for job in jobs]

    with Forked(compute, 1, max_batch_size=1, weigh=lambda job: len(job.parameters)) as forked:
        for how in 2 * ("raise", "later", "not valid"):  # there is room for one
            with pytest.raises((InvalidRequest, InferenceFailed), match="this one is bad"):
                forked.channels[0].call(PHOTO, ({"how": how}, None), 10)


def test_a_small_job_is_part_of_the_next_batch_and_large_ones_do_not_share_one():
    memory = FORK.Array("i", 100, lock=False)  # the size of each batch
    begun, go_on = FORK.Semaphore(0), FORK.Semaphore(0)

    def compute(jobs):
        memory[memory[0] + 1] = 10 * notes(jobs).count("large") + len(jobs)
        memory[0] += 1
        begun.release()
        go_on.acquire()
        return [{}] * len(jobs)

    options = {"weigh": weigh, "max_batch_weight": 1}
    with Forked(compute, 6, max_batch_size=4, **options) as forked, ThreadPoolExecutor(6) as pool:
        pending = [pool.submit(call, forked.channels[0], "large")]
        begun.acquire()
        for channel, message in zip(forked.channels[1:], ("large", "large", "small", "small"), strict=False):
            pending.append(pool.submit(call, channel, message))
            wait_for(channel.is_processing)
        for _ in range(3):
            go_on.release()
        assert [response.result(10) for response in pending] == [{}] * 5
    assert memory[1:4] == [11, 13, 11]


def test_requests_that_are_rejected_again_and_again_do_not_keep_others_from_being_read():
    over = threading.Event()

    def read(request):
        if request.parameters["note"] == "bad":
            time.sleep(0.02)
            raise InvalidRequest("bad")
        return request

    def send(channel) -> None:
        while not over.is_set():
            with pytest.raises(InvalidRequest):
                call(channel, "bad")

    with Forked(lambda jobs: [{}] * len(jobs), 4, 4, read=read) as forked, ThreadPoolExecutor(4) as pool:
        try:
            senders = [pool.submit(send, channel) for channel in forked.channels[:3]]
            for _ in range(5):
                assert pool.submit(call, forked.channels[3], "good").result(timeout=2) == {}
        finally:
            over.set()
        assert [sender.result() for sender in senders] == [None] * 3
