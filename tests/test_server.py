# SPDX-License-Identifier: Apache-2.0
"""The command line of server.py: start-up, its failures, shut-down."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import (
    NEEDS_GPU,
    ROOT,
    SAMPLES,
    Answers,
    Server,
    ask_until_refused,
    decode,
    free_ports,
    iou,
    psnr,
    run_script,
    running_server,
)
from torchvision.models.segmentation import DeepLabV3_ResNet101_Weights
from tritonclient.utils import InferenceServerException

from model_inference import WeightsError, load_weights

PHOTO = SAMPLES["person"][0].read_bytes()
PRETRAINED = DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1
# No name server and no proxy answers there: the download fails as on a machine without a network.
OFFLINE = dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9") | {"no_proxy": "", "NO_PROXY": ""}


def start_up_failure(*arguments: object, cwd: Path, environment: dict | None = None) -> str:
    """Return the one line that server.py prints where it cannot start."""
    ports = zip(("--http-port", "--grpc-port", "--metrics-port"), free_ports(), strict=True)
    flags = [word for pair in ports if pair[0] not in arguments for word in pair]
    began = time.monotonic()
    done = run_script("server.py", *flags, *arguments, cwd=cwd, environment=environment)
    took = time.monotonic() - began
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "warm-up" not in done.stderr  # the network was not built
    *log, line = done.stderr.splitlines()
    assert all(" INFO server: " in entry for entry in log)
    print(f"{took:.1f} s: {line}")  # 5 s were asked for; see it with pytest -rP
    return line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "tpu"], "'tpu' is none of auto, all, cpu, cuda and cuda:N"),
        (["--device", "cpu,"], "'cpu,' is none of auto, all, cpu, cuda and cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--class-name", "unicorn"], "--class-name unicorn is none of __background__, aeroplane"),
        (["--threshold", "1.5"], "'1.5' is no float from 0 to 1"),
        (["--threshold", "nan"], "'nan' is no float from 0 to 1"),
        (["--input-size", "0"], "'0' is no int from 32 to 2048"),
        (["--max-pixels", "-3"], "'-3' is no int of at least 1"),
        (["--instances", "many"], "'many' is no int from 0 to 64"),
        (["--http-port", "99999"], "'99999' is no int from 1 to 65535"),
        (["--http-port", "8001", "--grpc-port", "8001"], "have to differ"),
        (["--address", "192.0.2.1"], "192.0.2.1:"),
        (["--address", "no.such.host.invalid"], "no.such.host.invalid:"),
        (["--weights", "missing.pth"], "there is no weights file missing.pth"),
        (["--precision", "fp64"], "invalid choice: 'fp64'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(arguments, expected, tmp_path):
    assert expected in start_up_failure(*arguments, cwd=tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "all"])
def test_cuda_without_a_gpu(device, tmp_path):
    said = start_up_failure("--device", device, cwd=tmp_path)
    assert re.search(r"--device (cuda|all): torch finds (0|no) CUDA device", said)


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port", "--metrics-port"])
def test_a_port_that_is_taken(flag, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = start_up_failure(flag, port, cwd=tmp_path)
    assert f"127.0.0.1:{port} cannot be listened on: Address already in use; see {flag}" in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is no state dict that torch can read"),
        ([1, 2, 3], "holds a list, not a state dict"),
        ({}, "is missing (and 667 more like it)"),
        (lambda state: state.pop("backbone.conv1.weight"), "backbone.conv1.weight is missing"),
        (lambda state: state.update(extra=torch.ones(1)), "extra does not belong there"),
        (lambda state: state.update({"classifier.4.bias": 5}), "classifier.4.bias is no tensor"),
        (
            lambda state: state.update({"classifier.4.bias": torch.ones(5)}),
            "classifier.4.bias has shape [5] instead of [21]",
        ),
    ],
)
def test_broken_weights(content, expected, tmp_path):
    file = tmp_path / "weights.pth"
    if callable(content):
        state_dict = load_weights("demo").state_dict
        content(state_dict)
        torch.save(state_dict, file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(WeightsError) as error:
        load_weights(str(file))
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_no_room_for_the_workspace(tmp_path):
    environment = {"PYTRITON_HOME": "/proc/nowhere"}
    done = run_script("server.py", "--weights", "demo", "--device", "cpu", cwd=tmp_path, environment=environment)
    assert done.returncode == 2
    assert "server.py: PyTriton cannot make its workspace: " in done.stderr.splitlines()[-1]


def test_broken_weights_on_the_command_line(tmp_path):
    state_dict = load_weights("demo").state_dict
    del state_dict["backbone.conv1.weight"]
    torch.save(state_dict, tmp_path / "weights.pth")
    assert "backbone.conv1.weight is missing" in start_up_failure("--weights", "weights.pth", cwd=tmp_path)


def test_weights_that_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save(Evil(), tmp_path / "evil.pth")
    assert "is no state dict that torch can read" in start_up_failure("--weights", tmp_path / "evil.pth", cwd=tmp_path)
    assert not (tmp_path / "it ran").exists()


def test_pretrained_weights_that_cannot_be_had(tmp_path):
    began = time.monotonic()
    said = start_up_failure(
        "--weights", "pretrained", cwd=tmp_path, environment=OFFLINE | {"TORCH_HOME": str(tmp_path)}
    )
    assert time.monotonic() - began < 15
    assert PRETRAINED.url in said
    assert str(tmp_path / "hub" / "checkpoints" / "deeplabv3_resnet101_coco-586e9e4e.pth") in said


def test_a_broken_file_in_torchs_cache(tmp_path):
    file = tmp_path / "hub" / "checkpoints" / PRETRAINED.url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a download")
    said = start_up_failure("--weights", "pretrained", cwd=tmp_path, environment={"TORCH_HOME": str(tmp_path)})
    assert str(file) in said


def test_auto_falls_back_loudly(tmp_path):
    environment = OFFLINE | {"TORCH_HOME": str(tmp_path)}
    with running_server(tmp_path / "server.log", environment=environment) as server:
        lines = server.log.read_text().splitlines()
        ready = next(index for index, line in enumerate(lines) if "ready: model" in line)
        assert "WARNING" in lines[ready - 1]
        assert "DEMONSTRATION WEIGHTS" in lines[ready - 1]
        assert PRETRAINED.url in lines[ready - 1]
        assert psnr(Answers(server, "http")(PHOTO)["original"][0], decode(PHOTO)) > 40


def test_ones_own_weights_with_the_auxiliary_head(tmp_path):
    # The network of the demonstration, under the names that torchvision's pretrained file has, and in double precision.
    state_dict = {
        name: value.double() if value.is_floating_point() else value
        for name, value in load_weights("demo").state_dict.items()
    }
    torch.save(state_dict | {"aux_classifier.4.bias": torch.zeros(21)}, tmp_path / "own.pth")
    options = "--weights own.pth --class-name cat --threshold 0.5 --device cpu --instances 2 --max-batch-size 1"
    options += " --input-size 225 --max-pixels 200000 --precision fp32 --address localhost"
    with running_server(tmp_path / "server.log", *options.split()) as server:
        segment = Answers(server, "grpc")
        cat = segment(SAMPLES["cat"][0].read_bytes())
        assert cat["segmented"].any(axis=3).mean() > 0.7
        with pytest.raises(InferenceServerException, match="more than the 200000"):
            segment(PHOTO)
        assert "DEMONSTRATION" not in server.log.read_text()
        assert server.stop() == 0


def test_start_up_says_what_it_does(server):
    log = server.log.read_text()
    for expected in (
        "device: ",
        "weights: demonstration weights",
        "warm-up",
        f"http://127.0.0.1:{server.http_port}",
    ):
        assert expected in log
    assert f"grpc://127.0.0.1:{server.grpc_port}" in log


# As a shell makes it that runs a command with &.
IGNORING_SIGINT = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "Ctrl-C in a terminal"])
def test_shut_down_under_load(how, tmp_path):
    # More photos than can be finished: the rest is told so, nothing hangs, and the clients' connections stay open.
    prefix = IGNORING_SIGINT if how == "SIGINT" else ()
    arguments = ("--weights", "demo")
    with (
        running_server(tmp_path / "server.log", *arguments, prefix=prefix) as server,
        ThreadPoolExecutor(40) as pool,
    ):
        clients = [pool.submit(ask_until_refused, server, protocol, PHOTO) for protocol in ("http", "grpc") * 20]
        while server.metric("pending_request_count") + server.metric("request_success") < 10:
            time.sleep(0.05)
        began = time.monotonic()
        if how == "Ctrl-C in a terminal":  # which Triton gets, too
            os.killpg(server.process.pid, signal.SIGINT)
        else:
            server.process.send_signal(getattr(signal, how))
        assert server.process.wait(timeout=30) == 0
        assert time.monotonic() - began < 10
        results = [client.result() for client in clients]
        assert sum(good for good, _ in results) > 0
        assert server.left_behind() == []
        assert "Traceback" not in server.log.read_text()


def test_photos_in_flight_are_finished(tmp_path):
    with running_server(tmp_path / "server.log", "--weights", "demo") as server, ThreadPoolExecutor(3) as pool:
        # Three: what one instance without a GPU finishes well within the time that it has.
        answers = [pool.submit(Answers(server, "grpc"), PHOTO) for _ in range(3)]
        while server.metric("pending_request_count") < 2 and server.metric("request_success") < 1:
            time.sleep(0.01)
        assert server.stop() == 0
        for answer in answers:
            assert answer.result()["original"].shape == (1, *decode(PHOTO).shape)
        assert server.left_behind() == []


def test_started_in_the_background_of_a_shell(tmp_path):
    # A shell that runs a command with & makes it ignore SIGINT: the server has to listen to it nevertheless.
    http_port, grpc_port, metrics_port = free_ports()
    command = (
        f"{sys.executable} {ROOT / 'server.py'} --weights demo --http-port {http_port} --grpc-port {grpc_port} "
        f"--metrics-port {metrics_port} > log 2>&1 & server=$!; "
        "until grep -q 'device: ' log; do sleep 0.1; kill -0 $server || exit 3; done; "
        "kill -INT $server; wait $server"
    )
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=90, check=False).returncode == 0


def test_a_signal_during_start_up(tmp_path):
    with Server(tmp_path / "server.log", "--weights", "demo") as server:
        while "device: " not in server.log.read_text():
            assert server.process.poll() is None
            time.sleep(0.01)
        assert server.stop() == 0
        assert server.left_behind() == []


def test_several_devices(tmp_path):
    gpus = torch.cuda.device_count()
    devices = "cuda:0,cuda:1" if gpus > 1 else "cuda:0,cuda:0" if gpus else "cpu,cpu"
    arguments = ["--weights", "demo", "--instances", "1", "--device", devices]
    with running_server(tmp_path / "server.log", *arguments) as server, ThreadPoolExecutor(4) as pool:
        assert len(server.workers()) == 2
        before = [process.cpu_times().user for process in server.workers()]
        for answer in pool.map(lambda _: Answers(server, "grpc")(PHOTO), range(4)):
            assert answer["original"].shape == (1, *decode(PHOTO).shape)
        after = [process.cpu_times().user for process in server.workers()]
        assert all(late > early for early, late in zip(before, after, strict=True))
        assert server.stop() == 0
        assert server.left_behind() == []


def test_another_python_is_told_so(tmp_path):
    script = f"import sys; sys.version_info = (3, 13, 0); exec(open({str(ROOT / 'server.py')!r}).read())"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs Python 3.11 or 3.12" in done.stderr


@NEEDS_GPU
def test_auto_takes_the_gpu(server):
    assert torch.cuda.get_device_name() in server.log.read_text()


@NEEDS_GPU
def test_the_same_answers_on_the_cpu(server, tmp_path):
    with running_server(tmp_path / "server.log", "--weights", "demo", "--device", "cpu") as on_cpu:
        for name, (photo, _) in SAMPLES.items():
            encoded = photo.read_bytes()
            gpu, cpu = (Answers(which, "grpc")(encoded, class_name=name) for which in (server, on_cpu))
            assert psnr(gpu["original"][0], cpu["original"][0]) > 40
            gpu, cpu = (answer["segmented"][0].any(axis=2) for answer in (gpu, cpu))
            assert iou(gpu, cpu) > 0.98
