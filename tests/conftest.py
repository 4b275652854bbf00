# SPDX-License-Identifier: Apache-2.0
"""A real server, started as a user starts it, and the ways to talk to it."""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark import free_ports  # noqa: E402 - the project is no package
from server import kill  # noqa: E402

MODEL_NAME = "ResNet101"
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=NEEDS_GPU)]
# Every sample: its photo, its reference mask and its class.
SAMPLES = {
    "person": (ROOT / "images" / "orig.jpg", ROOT / "weights" / "orig_mask.png"),
    "cat": (ROOT / "images" / "cat_orig.jpg", ROOT / "weights" / "cat_mask.png"),
}


class Server:
    """``python server.py`` on free ports, its log in a file."""

    def __init__(
        self,
        log: Path,
        *arguments: str,
        environment: dict[str, str] | None = None,
        script: Path = ROOT / "server.py",
        prefix: Sequence[str] = (),
    ):
        self.http_port, self.grpc_port, self.metrics_port = free_ports()
        self.http_url, self.grpc_url = f"http://127.0.0.1:{self.http_port}", f"grpc://127.0.0.1:{self.grpc_port}"
        self.log = log
        # A home of its own for PyTriton's workspaces, to see whether anything is left behind there. Its path is short,
        # because it holds Unix sockets, whose paths end at 107 characters.
        self.home = Path(tempfile.mkdtemp(prefix="pytriton-"))
        ports = ["--http-port", self.http_port, "--grpc-port", self.grpc_port, "--metrics-port", self.metrics_port]
        self.segments_before = set(Path("/dev/shm").glob("psm_*"))
        self.began = time.monotonic()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, str(script), *map(str, ports), *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                start_new_session=True,  # to send a signal to all of its processes, as a terminal does
                env=os.environ | {"PYTRITON_HOME": str(self.home)} | (environment or {}),
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        """End what is still there, however the test went, and what a killed server left."""
        # Not as a user would, which takes 5 s. Python's resource trackers get the time to remove what they track.
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "multiprocessing" not in " ".join(process.cmdline()):
                    process.kill()
        kill(psutil.wait_procs(self.family(), timeout=1)[1])
        self.process.wait()
        for segment in self.segments():
            segment.unlink(missing_ok=True)
        shutil.rmtree(self.home, ignore_errors=True)

    def segments(self) -> list[Path]:
        """Return Triton's shared memory segments, which bear the server's process id."""
        return list(Path("/dev/shm").glob(f"pytrtion{self.process.pid}-*"))

    def wait_until_ready(self, timeout_s: float = 90) -> float:
        """Return the seconds from start to ready."""
        while "ready: model" not in self.log.read_text():
            assert self.process.poll() is None, f"the server ended: {self.log.read_text()}"
            assert time.monotonic() < self.began + timeout_s, f"not ready: {self.log.read_text()}"
            time.sleep(0.05)
        return time.monotonic() - self.began

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=30)

    def metric(self, name: str) -> int:
        """Return the sum of one of Triton's metrics, ``nv_inference_`` and the name."""
        lines = get(self.metrics_port, "/metrics").splitlines()
        return int(sum(float(line.split()[-1]) for line in lines if line.startswith(f"nv_inference_{name}{{")))

    def memory(self) -> int:
        """Return the bytes that its processes have, those that they share counted once."""
        return sum(process.memory_full_info().pss for process in self.family())

    def process_named(self, name: str) -> psutil.Process:
        """Return one of its processes whose name begins like this."""
        return next(process for process in self.family() if process.name().startswith(name))

    def family(self) -> list[psutil.Process]:
        """Return the processes of the server: they all inherit its home."""
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PYTRITON_HOME") == str(self.home):
                    processes.append(process)
        return processes

    def workers(self) -> list[psutil.Process]:
        """Return the processes that have the network: forked, they bear the server's command line."""
        process = psutil.Process(self.process.pid)
        return [child for child in process.children() if child.cmdline() == process.cmdline()]

    def left_behind(self) -> list[str]:
        """Return what a stopped server left: processes, shared memory, files in its workspace."""
        psutil.wait_procs(self.family(), timeout=2)  # Python's resource trackers end after what they track
        return [
            *map(str, self.family()),
            *map(str, self.segments()),
            # PyTriton's: those that no process has in use any more.
            *sorted(set(Path("/dev/shm").glob("psm_*")) - self.segments_before - set(segments_in_use())),
            *map(str, self.home.glob("workspace_*")),
        ]


def get(port: int, path: str) -> str:
    """Return what ``http://127.0.0.1:port/path`` says, or raise."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as response:
        return response.read().decode()


def segments_in_use() -> Iterator[Path]:
    """Yield PyTriton's shared memory segments that a process has mapped."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            yield from (Path(area.path) for area in process.memory_maps() if area.path.startswith("/dev/shm/psm_"))


@contextlib.contextmanager
def running_server(log: Path, *arguments: str, **options: object) -> Iterator[Server]:
    with Server(log, *arguments, **options) as server:
        server.wait_until_ready()
        yield server


def patched_server(folder: Path, code: str) -> Path:
    """Return a script that is server.py with something done to it before it runs."""
    script = folder / "patched.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport server\n{code}\nserver.run(server.parse_options())\n"
    )
    return script


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of the session: the demonstration weights, and a GPU where there is one."""
    with running_server(tmp_path_factory.mktemp("server") / "server.log", "--weights", "demo") as server:
        yield server


class Answers:
    """Sends requests with Triton's own client, over one of the two protocols."""

    def __init__(self, server: Server, protocol: str):
        self.triton = tritonclient.http if protocol == "http" else tritonclient.grpc
        port = server.http_port if protocol == "http" else server.grpc_port
        self.client = self.triton.InferenceServerClient(f"127.0.0.1:{port}")

    def __call__(
        self,
        encoded: bytes,
        outputs: tuple[str, ...] = ("original", "segmented"),
        timeout_us: int | None = None,
        client_timeout: float | None = None,
        **parameters: object,
    ) -> dict:
        photo = np.frombuffer(encoded, np.uint8)[None]
        image = self.triton.InferInput("image", photo.shape, "UINT8")
        image.set_data_from_numpy(photo)
        wanted = [self.triton.InferRequestedOutput(name) for name in outputs] or None
        patience = {} if client_timeout is None else {"client_timeout": client_timeout}  # of gRPC alone, in seconds
        result = self.client.infer(
            MODEL_NAME, [image], outputs=wanted, parameters=parameters, timeout=timeout_us, **patience
        )
        arrays = {name: result.as_numpy(name) for name in ("original", "segmented")}
        return {name: array for name, array in arrays.items() if array is not None}


@pytest.fixture(params=["http", "grpc"])
def segment(server: Server, request: pytest.FixtureRequest) -> Answers:
    """Send a photo to the server of the session, over HTTP and over gRPC."""
    return Answers(server, request.param)


@pytest.fixture(scope="session")
def segment_http(server: Server) -> Answers:
    """Send a photo over HTTP alone, where the protocol makes no difference."""
    return Answers(server, "http")


def http_request(photo: bytes) -> bytes:
    """Return what goes over the wire for a photo, in the simplest form that Triton takes."""
    head = (
        f"POST /v2/models/{MODEL_NAME}/infer HTTP/1.1\r\nHost: test\r\nContent-Length: {len(photo)}\r\n"
        "Inference-Header-Content-Length: 0\r\n\r\n"
    )
    return head.encode() + photo


def ask_until_refused(server: Server, protocol: str, photo: bytes) -> tuple[int, str]:
    """Send photos until one is not answered; return how many were and what was said of the last."""
    segment, good = Answers(server, protocol), 0
    while True:
        try:
            answer = segment(photo)
        except Exception as error:
            return good, str(error)
        assert answer["original"].shape == (1, *decode(photo).shape)
        good += 1


def with_tmpfs(path: str, size: str) -> list[str]:
    """Return what to put before a command to run it with a small file system of its own at a path."""
    mount = f'mount -t tmpfs -o size={size} tmpfs "{path}" && exec "$@"'
    prefix = ["unshare", "-rm", "sh", "-c", mount, "sh"]
    environment = os.environ | {"PYTRITON_HOME": "/mnt"}
    if subprocess.run([*prefix, "true"], env=environment, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    return prefix


def run_client(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return run_script("client.py", *arguments, cwd=cwd)


def run_script(script: str, *arguments: object, cwd: Path, environment: dict | None = None, timeout: float = 100):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decode(encoded: bytes) -> np.ndarray:
    """Pillow's decoding, upright, uint8 ``[H, W, 3]``: the reference for ``original``."""
    image = Image.open(io.BytesIO(encoded))
    if image.mode == "I;16":  # Pillow's own conversion clips instead of scaling.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boolean masks."""
    return (a & b).sum() / (a | b).sum()


def sentence(error: Exception) -> str:
    """Return the last line of what PyTriton says of an exception; where Triton saw it, which follows, left away."""
    lines = [line.strip() for line in str(error).split("\nAt:\n")[0].splitlines() if line.strip()]
    return re.sub(r"^.*?(?=InvalidRequest: )", "", lines[-1])
