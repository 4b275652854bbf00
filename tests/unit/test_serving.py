# SPDX-License-Identifier: Apache-2.0
"""The parts of serving/ by themselves: channels, batches, instances, shared memory, the end of the server."""

import hashlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import answer_memory, as_array, wait_for
from gpu import DEVICES
from pytriton.proxy.types import Request

from photo import max_photo_bytes
from serving.batcher import LARGE_WEIGHT, Batcher
from serving.channel import FORK, SLACK_BYTES, lay_out, layout_of, open_channels
from serving.errors import InferenceFailed, InvalidRequest, ServerError, UsageError
from serving.instance import Instance
from serving.lifecycle import FAILURE, Lifecycle
from serving.memory import fit_shared_memory
from serving.printed import Printed
from serving.stages import Deferred

PHOTO = {"image": as_array(b"photo")}


class Forked:
    """A batcher in its own process, as the server has it."""

    def __init__(
        self,
        runner,
        channel_count: int,
        max_batch_size: int,
        explain=lambda error: error,
        read=lambda *job: job,
        **options,
    ):
        self.channels = open_channels(channel_count, 1000, 1000)
        batcher = Batcher(self.channels, read, runner, explain, Printed(), max_batch_size, **options)
        self.process = FORK.Process(target=batcher.run, daemon=True)
        self.process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


def double(jobs):
    """Answer each job with twice its inputs."""
    answers = []
    for channel, arrays, _ in jobs:
        answer = lay_out(channel.answer_memory, layout_of(arrays))
        for name, array in arrays.items():
            answer[name][...] = 2 * array
        answers.append(answer)
    return answers


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
        answer = forked.channels[0].call(arrays, None)
        assert list(answer) == list(arrays)
        for name, array in arrays.items():
            assert answer[name].dtype == array.dtype
            np.testing.assert_array_equal(answer[name], 2 * array)
            assert answer[name].ctypes.data % answer[name].itemsize == 0


def test_a_request_that_does_not_fit_into_the_channel_is_refused():
    with Forked(double, 1, 1) as forked:
        with pytest.raises(ValueError, match="image does not fit"):
            forked.channels[0].call({"image": np.zeros(1001 + SLACK_BYTES, np.uint8)}, None)
        with pytest.raises(ValueError, match="memoryview"):
            forked.channels[0].call(PHOTO, "x" * (2 << 20))
        assert forked.channels[0].call({"image": np.ones(1000, np.uint8)}, None)["image"].sum() == 2000


def test_only_the_request_at_fault_in_a_batch_fails():
    release = FORK.Event()

    def runner(jobs):
        release.wait()  # until all are waiting: the first call takes one or two, the next one all others
        if any(message == "bad" for _, _, message in jobs):
            raise InvalidRequest("this one is bad")
        return [{} for _ in jobs]

    messages = ["good", "bad", "good", "bad", "good"]
    with Forked(runner, len(messages), 8) as forked, ThreadPoolExecutor(len(messages)) as pool:
        answers = [
            pool.submit(channel.call, PHOTO, message)
            for channel, message in zip(forked.channels, messages, strict=True)
        ]
        release.set()
        for message, answer in zip(messages, answers, strict=True):
            if message == "bad":
                with pytest.raises(InvalidRequest, match="this one is bad"):
                    answer.result()
            else:
                assert answer.result() == {}


def test_a_batch_is_what_is_waiting():
    entered, release, sizes = FORK.Event(), FORK.Event(), FORK.SimpleQueue()

    def runner(jobs):
        entered.set()
        release.wait()
        sizes.put(len(jobs))
        return double(jobs)

    with Forked(runner, 11, max_batch_size=4) as forked, ThreadPoolExecutor(11) as pool:
        requests = [{"number": np.array([number], np.uint8)} for number in range(11)]
        first = pool.submit(forked.channels[0].call, requests[0], None)
        entered.wait()
        others = [
            pool.submit(channel.call, request, None)
            for channel, request in zip(forked.channels[1:], requests[1:], strict=True)
        ]
        wait_for(lambda: all(channel.is_processing() for channel in forked.channels))
        release.set()
        assert [future.result()["number"].tolist() for future in [first, *others]] == [[2 * n] for n in range(11)]
        assert [sizes.get() for _ in range(4)] == [1, 4, 4, 2]


@pytest.mark.parametrize("runner", [lambda jobs: [], lambda jobs: os._exit(1)])  # noqa: ARG005
def test_callers_are_told_when_the_other_process_is_gone(runner):
    with Forked(runner, 1, max_batch_size=4) as forked, ThreadPoolExecutor(1) as pool:
        call = pool.submit(forked.channels[0].call, PHOTO, None)
        forked.process.join(10)
        assert forked.process.exitcode == 1
        forked.channels[0].break_off()
        with pytest.raises(ConnectionError):
            call.result()
        with pytest.raises(ConnectionError):
            forked.channels[0].call(PHOTO, None)


def test_the_timeout_counts_from_the_last_answer_to_anybody_and_is_waited_for_once():
    entered = FORK.Event()

    def runner(jobs):
        entered.set()
        (job,) = jobs
        time.sleep(job[2])
        return double(jobs)

    with Forked(runner, 3, max_batch_size=1) as forked, ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(forked.channels[0].call, PHOTO, 0.8, 1.5)]
        entered.wait()
        began = time.monotonic()
        for channel, seconds in zip(forked.channels[1:], (0.8, 100), strict=True):
            calls.append(pool.submit(channel.call, PHOTO, seconds, 1.5))
        for call in calls[:2]:  # the second one takes 1.6 s in all, but the worker has shown that it is alive
            assert call.result()["image"].size == 5
        with pytest.raises(TimeoutError):
            calls[2].result()
        assert 3.0 < time.monotonic() - began < 4.2  # 1.6 s and 1.5 s
        with pytest.raises(ConnectionError):  # a late answer is not the answer to the next call
            forked.channels[2].call(PHOTO, 0)


def make_instance(forked: Forked, lifecycle: Lifecycle | None = None) -> Instance:
    return Instance(forked.channels[0], 1000, timeout_s=10, lifecycle=lifecycle or Lifecycle(1))


def test_two_requests_in_one_call_do_not_share_memory():
    with Forked(double, 1, 1) as forked:
        requests = [Request({"image": np.full((1, 5), number, np.uint8)}, {}) for number in (1, 2)]
        first, second = make_instance(forked)(requests)
        assert first["image"].tolist() == [[2] * 5]
        assert second["image"].tolist() == [[4] * 5]


def test_an_instance_refuses_what_it_cannot_send(caplog):
    with Forked(double, 1, 1) as forked:
        instance = make_instance(forked)
        with pytest.raises(InvalidRequest, match="the batch dimension must be 1"):
            instance([Request({"image": np.zeros((2, 5), np.uint8)}, {})])
        with pytest.raises(InvalidRequest, match="the request has 1001 bytes, but this server accepts at most 1000"):
            instance([Request({"image": np.zeros((1, 1001), np.uint8)}, {})])
        assert caplog.text.count("a request failed: ") == 2


def test_an_instance_refuses_strings():
    with Forked(double, 1, 1) as forked, pytest.raises(InvalidRequest, match="image must have a type of fixed size"):
        make_instance(forked)([Request({"image": np.array([[b"photo"]], object)}, {})])


def test_a_server_that_has_drained_refuses_requests():
    with Forked(double, 1, 1) as forked:
        lifecycle = Lifecycle(drain_s=0)
        instance, request = make_instance(forked, lifecycle), Request({"image": np.zeros((1, 5), np.uint8)}, {})
        assert instance([request])
        lifecycle.drain()
        with pytest.raises(InferenceFailed, match="the server is stopping: send the photo to another server"):
            instance([request])


@pytest.fixture
def restore_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, FAILURE)}
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


@pytest.mark.usefixtures("restore_signals")
def test_a_failure_in_another_thread_ends_the_server_with_status_1(caplog):
    with pytest.raises(SystemExit) as end, Lifecycle(1) as lifecycle:  # noqa: PT012 - the block is under test
        threading.Thread(target=lifecycle.fail, args=("lost the GPU",)).start()
        time.sleep(10)
    assert end.value.code == 1
    assert "lost the GPU" in caplog.text


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
        lifecycle.finish()  # called by the thread that notices the end of Triton first
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


def message_bytes(pixels: int) -> int:
    return max_photo_bytes(pixels) + 6 * pixels


def test_enough_shared_memory_changes_nothing():
    assert fit_shared_memory(12, 25_000_000, 11 * 10**9, message_bytes) == (12, 25_000_000, "")


def test_with_little_shared_memory_there_are_fewer_instances_and_smaller_photos():
    instances, max_pixels, warning = fit_shared_memory(12, 25_000_000, 10**9, message_bytes)
    assert instances == 12
    assert 1_900_000 < max_pixels < 2_300_000
    assert warning.startswith("SHARED MEMORY: /dev/shm has 1,000 MB free instead of 10,434.")
    assert f"more than {max_pixels:,} pixels and runs 12 instances." in warning
    assert "docker run --shm-size 10gb" in warning
    instances, max_pixels, _ = fit_shared_memory(12, 25_000_000, 64 << 20, message_bytes)
    assert instances == 1
    assert max_pixels > 1_000_000
    with pytest.raises(UsageError, match="too little for any photo: use docker run --shm-size 10gb"):
        fit_shared_memory(12, 25_000_000, 1 << 20, message_bytes)


def test_an_answer_that_does_not_fit_into_its_memory_is_an_error():
    memory = answer_memory(100, "cpu")
    with pytest.raises(InvalidRequest, match="the answer exceeds this server's limit of 100 bytes"):
        memory.store({"a": np.zeros(60, np.uint8), "b": np.zeros(60, np.uint8)})


@pytest.mark.parametrize("device", DEVICES)
def test_an_answer_may_mix_arrays_of_the_host_with_tensors_of_the_device(device):
    memory = answer_memory(1000, device)
    read_only = np.frombuffer(b"file", np.uint8)
    answer = memory.store({"file": read_only, "tensor": torch.arange(6.0, device=device).reshape(2, 3)})
    if device == "cuda":
        torch.cuda.synchronize()
    assert answer["file"].tobytes() == b"file"
    assert answer["tensor"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert answer["tensor"].dtype == np.float32


def test_a_deferred_output_is_computed_from_a_copy_and_stored_behind_the_others():
    memory, source = answer_memory(1000, "cpu"), np.arange(5)
    stored = memory.store({"file": Deferred(lambda array: 2 * array, source), "raw": np.full(3, 7.0)})
    source[:] = 0  # a device reuses its memory for the next batch
    answer = memory.compute_deferred(stored)
    assert answer["file"].tolist() == [0, 2, 4, 6, 8]
    assert answer["raw"].tolist() == [7, 7, 7]


def test_an_answer_that_takes_long_to_compute_holds_up_no_other_batch():
    go_on = FORK.Event()

    def later():
        go_on.wait()
        raise InvalidRequest("too late")

    def runner(jobs):
        return [later if message == "later" else {} for _, _, message in jobs]

    with Forked(runner, 2, max_batch_size=4) as forked, ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(forked.channels[0].call, PHOTO, "later")
        for _ in range(3):
            assert forked.channels[1].call(PHOTO, "now", 10) == {}
        assert not waiting.done()
        go_on.set()
        with pytest.raises(InvalidRequest, match="too late"):
            waiting.result()


def weigh(job: tuple) -> float:
    return {"large": 1, "small": LARGE_WEIGHT}.get(job[-1], 0)


def test_large_jobs_leave_a_channel_for_others():
    go_on = FORK.Event()

    def later():
        go_on.wait()
        return {}

    def runner(jobs):
        return [later if message == "large" else {} for _, _, message in jobs]

    with Forked(runner, 5, max_batch_size=4, weigh=weigh) as forked, ThreadPoolExecutor(5) as pool:
        large = [pool.submit(channel.call, PHOTO, "large") for channel in forked.channels[:4]]
        wait_for(lambda: all(channel.is_processing() for channel in forked.channels[:4]))
        for _ in range(2):
            with pytest.raises(InferenceFailed, match="the server is busy with large requests: send this one again"):
                forked.channels[4].call(PHOTO, "large", 10)
            assert forked.channels[4].call(PHOTO, "small", 10) == {}
        go_on.set()
        assert [answer.result() for answer in large] == [{}] * 4
        assert forked.channels[4].call(PHOTO, "large", 10) == {}


def test_a_small_job_is_part_of_the_next_batch_and_large_ones_do_not_share_one():
    memory = FORK.Array("i", 100, lock=False)  # the size of each batch
    begun, go_on = FORK.Semaphore(0), FORK.Semaphore(0)

    def runner(jobs):
        memory[memory[0] + 1] = 10 * sum(message == "large" for _, _, message in jobs) + len(jobs)
        memory[0] += 1
        begun.release()
        go_on.acquire()
        return [{}] * len(jobs)

    options = {"weigh": weigh, "max_batch_weight": 1}
    with Forked(runner, 6, max_batch_size=4, **options) as forked, ThreadPoolExecutor(6) as pool:
        pending = [pool.submit(forked.channels[0].call, PHOTO, "large")]
        begun.acquire()
        for channel, message in zip(forked.channels[1:], ("large", "large", "small", "small"), strict=False):
            pending.append(pool.submit(channel.call, PHOTO, message))
            wait_for(channel.is_processing)
        for _ in range(3):
            go_on.release()
        assert [answer.result(10) for answer in pending] == [{}] * 5
    assert memory[1:4] == [11, 13, 11]


def test_requests_that_are_rejected_again_and_again_do_not_keep_others_from_being_read():
    over = threading.Event()

    def read(*job):
        if job[-1] == "bad":
            time.sleep(0.02)
            raise InvalidRequest("bad")
        return job

    def send(channel) -> None:
        while not over.is_set():
            with pytest.raises(InvalidRequest):
                channel.call(PHOTO, "bad")

    with Forked(lambda jobs: [{}] * len(jobs), 4, 4, read=read) as forked, ThreadPoolExecutor(4) as pool:
        try:
            senders = [pool.submit(send, channel) for channel in forked.channels[:3]]
            for _ in range(5):
                assert pool.submit(forked.channels[3].call, PHOTO, "good").result(timeout=2) == {}
        finally:
            over.set()
        assert [sender.result() for sender in senders] == [None] * 3
