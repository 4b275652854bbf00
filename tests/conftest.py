# SPDX-License-Identifier: Apache-2.0
"""Servers, started as a user starts them, and shared helpers to talk to them."""

import argparse
import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import hostile_photos
import numpy as np
import psutil
import pytest
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import client  # noqa: E402
from benchmark.cpu import kind  # noqa: E402 - the project is not a package
from client import Connection, InferenceError  # noqa: E402
from photo import Photo, read_photo  # noqa: E402
from serving.arrays import unpack  # noqa: E402
from serving.channel import Channel, open_channels  # noqa: E402
from serving.executor import Executor, Job, open_memories  # noqa: E402
from serving.memory import ResponseMemory, StoredResponse  # noqa: E402
from serving.stages import Stages  # noqa: E402
from tools.launch import DIRECT, LaunchedServer  # noqa: E402

encode = hostile_photos.encode

# A shell makes background ("&") processes ignore SIGINT. If pytest is one, its children would also ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

MODEL_NAME = "ResNet101"
TOY_SERVER = ROOT / "tests" / "toy_server.py"
PROTOCOLS = ("http", "grpc")
# The photo and the reference mask of each sample, by its class.
SAMPLES = {
    "person": (ROOT / "images" / "orig.jpg", ROOT / "weights" / "orig_mask.png"),
    "cat": (ROOT / "images" / "cat_orig.jpg", ROOT / "weights" / "cat_mask.png"),
}
PHOTO = SAMPLES["person"][0].read_bytes()


class Server(LaunchedServer):
    """A server with a log file, and with methods that list its processes and its leftovers."""

    def __init__(
        self, log: Path, *arguments: object, script: Path = ROOT / "server.py", model_name: str = MODEL_NAME, **options
    ):
        """``options`` are those of LaunchedServer."""
        self.log = log
        self.model_name = model_name
        # A separate home for PyTriton's workspaces shows leftovers there. The path is short, because it contains Unix
        # sockets, whose paths are limited to 107 characters.
        self.home = Path(tempfile.mkdtemp(prefix="pytriton-"))
        self._segments: set[Path] = set()
        environment = {"PYTRITON_HOME": str(self.home)} | options.pop("environment", {})
        with log.open("w") as file:
            super().__init__(
                [script, *arguments],
                environment=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                start_new_session=True,  # so that a signal can go to all of its processes, as in a terminal
                **options,
            )

    def __exit__(self, *_: object) -> None:
        """Kill the remaining processes, and remove the leftovers of a killed server."""
        # Kill the server, because stopping it takes 5 s. Python's resource trackers survive, and clean up.
        family = self.family()
        self.segments()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "multiprocessing" not in " ".join(process.cmdline()):
                    process.kill()
        self.process.kill()  # in case a test has set another home
        self.process.wait()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self.family(), timeout_s=1)
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for segment in self.segments():
            segment.unlink(missing_ok=True)
        shutil.rmtree(self.home, ignore_errors=True)

    def wait_until_ready(self, timeout_s: float = 90) -> "Server":
        try:
            super().wait_until_ready(self.model_name, timeout_s)
        except (RuntimeError, TimeoutError) as error:
            raise AssertionError(f"{error}: {self.log.read_text()}") from error
        self.segments()
        return self

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Send a signal, wait and return the exit status."""
        self.segments()
        return super().stop(signal_number)

    def segments(self) -> set[Path]:
        """Return the shared-memory segments that its processes have used and that still exist."""
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                self._segments |= {
                    Path(area.path) for area in process.memory_maps() if area.path.startswith("/dev/shm/psm_")
                }
        self._segments |= set(Path("/dev/shm").glob(f"pytrtion{self.process.pid}-*"))
        return {segment for segment in self._segments if segment.exists()}

    def connect(self, protocol: str) -> Connection:
        """Return a connection over ``http`` or ``grpc``."""
        return Connection(self.http_url if protocol == "http" else self.grpc_url, self.model_name)

    def metric(self, name: str) -> int:
        """Return the sum over all series of Triton's metric ``nv_inference_NAME``."""
        lines = get(self.metrics_port, "/metrics").splitlines()
        return int(sum(float(line.split()[-1]) for line in lines if line.startswith(f"nv_inference_{name}{{")))

    def memory(self) -> Counter[str]:
        """Return the memory of each kind of process in bytes, with shared pages counted once."""
        main, memory = psutil.Process(self.process.pid), Counter()
        for process in self.family():
            memory[kind(process, main)] += process.memory_full_info().pss
        return memory

    def shared_memory(self) -> int:
        """Return the size of its shared-memory segments in bytes, including those that no process uses."""
        return sum(segment.stat().st_blocks * 512 for segment in self.segments())

    def family(self) -> list[psutil.Process]:
        """Return the processes of the server, which all inherit its home."""
        return processes_of(self.home)

    def processes(self, wanted: str) -> list[psutil.Process]:
        """Return its processes of one kind, as benchmark.cpu.kind names them."""
        main = psutil.Process(self.process.pid)
        return [process for process in self.family() if kind(process, main) == wanted]

    def left_behind(self) -> list[str]:
        """Return the leftovers of a stopped server: processes, shared memory, files in its workspace."""
        psutil.wait_procs(self.family(), timeout=2)  # Python's resource trackers end last
        return [*map(str, self.family()), *map(str, self.segments()), *map(str, self.home.glob("workspace_*"))]


def processes_of(home: str | Path) -> list[psutil.Process]:
    """Return the processes that have this folder as PyTriton's home."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PYTRITON_HOME") == str(home):
                processes.append(process)
    return processes


def get(port: int, path: str) -> str:
    """Return the text at ``http://127.0.0.1:port/path``, or raise."""
    with DIRECT.open(f"http://127.0.0.1:{port}{path}") as response:
        return response.read().decode()


@contextlib.contextmanager
def running_server(log: Path, *arguments: object, **options: object) -> Iterator[Server]:
    """Start server.py, and yield it when it is ready."""
    with Server(log, *arguments, **options) as server:
        yield server.wait_until_ready()


def running_toy(log: Path, *arguments: object, **options: object) -> contextlib.AbstractContextManager[Server]:
    """Start the toy server, and yield it when it is ready."""
    return running_server(log, *arguments, script=TOY_SERVER, model_name="Toy", **options)


def start_toy(log: Path, *arguments: object, **options: object) -> Server:
    """Start the toy server, or a script that runs it, and return immediately."""
    return Server(log, *arguments, **{"script": TOY_SERVER, "model_name": "Toy"} | options)


@contextlib.contextmanager
def running_together(servers: Mapping[str, Server]) -> Iterator[Mapping[str, Server]]:
    """Yield servers that are starting once all are ready. Starting them one after another would take longer."""
    with contextlib.ExitStack() as stack:
        for server in servers.values():
            stack.enter_context(server)
        for server in servers.values():
            server.wait_until_ready()
        yield servers


# No proxy listens there: downloads fail as on a machine without a network.
OFFLINE = dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9") | {"no_proxy": "", "NO_PROXY": ""}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of the session, without options or a network: it serves the demonstration weights."""
    folder = tmp_path_factory.mktemp("server")
    with running_server(folder / "log", environment=OFFLINE | {"TORCH_HOME": str(folder)}) as server:
        yield server


@pytest.fixture(scope="session")
def mask_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for the client, without a network. It takes up to five photos at the same time."""
    log = tmp_path_factory.mktemp("mask_server") / "log"
    with running_server(log, "--max-queue", 4, "--drain-s", 0, script=ROOT / "tests" / "mask_server.py") as server:
        yield server


@pytest.fixture(params=PROTOCOLS)
def connection(server: Server, request: pytest.FixtureRequest) -> Connection:
    """Connections to the server of the session, over HTTP and over gRPC."""
    return server.connect(request.param)


class Done(NamedTuple):
    """The exit status and the output of a run of the client."""

    status: int
    out: str
    err: str


@pytest.fixture
def run_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable[..., Done]:
    """Runs client.py in this process, which saves a second each time, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["client.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            client.main()
        return Done(end.value.code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def http_connection(server: Server) -> Connection:
    """A connection over HTTP alone, for tests to which the protocol makes no difference."""
    return server.connect("http")


def skip_if_in_tmp() -> None:
    """Skip a test that mounts something over /tmp if the code or the interpreter is there."""
    if any(path.is_relative_to("/tmp") for path in (ROOT, Path(sys.prefix))):
        pytest.skip("needs a repository and an interpreter outside of /tmp")


def with_tmpfs(path: str, size: str) -> list[str]:
    """Return a prefix for a command that mounts a small private file system at a path."""
    mount = f'mount -t tmpfs -o size={size} tmpfs "{path}" && exec "$@"'
    prefix = ["unshare", "-rm", "sh", "-c", mount, "sh"]
    environment = os.environ | {"PYTRITON_HOME": "/mnt"}
    if subprocess.run([*prefix, "true"], env=environment, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    return prefix


def run_python(
    *arguments: object, cwd: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run Python with these arguments to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def as_rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB. Pillow's own conversion clips 16 bits instead of scaling them."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def decode(encoded: bytes) -> np.ndarray:
    """Decode with Pillow, upright, uint8 ``[H, W, 3]``: the reference for ``original``."""
    return np.asarray(as_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))))


def decode_cut_out(encoded: bytes) -> tuple[np.ndarray, np.ndarray, str]:
    """Return a file's pixels, uint8 ``[H, W, 3]``, black where they are transparent; its alpha; and its format."""
    image = Image.open(io.BytesIO(encoded))
    rgba = np.asarray(image.convert("RGBA"))
    return np.where(rgba[..., 3:], rgba[..., :3], 0), rgba[..., 3], image.format


def with_chunk(png: bytes, kind: bytes, data: bytes, count: int = 1) -> bytes:
    """Return the PNG with a chunk after its first, the header."""
    return png[:33] + count * hostile_photos.chunk(kind, data) + png[33:]


def with_wrong_checksum(png: bytes) -> bytes:
    """Return the PNG with a wrong checksum in its last IDAT chunk, which only the decoder notices."""
    return png[:-16] + bytes(4) + png[-12:]


def with_segments(jpeg: bytes, marker: int, contents: Iterable[bytes]) -> bytes:
    """Return the JPEG with segments in front of all others."""
    return b"".join([jpeg[:2], *(hostile_photos.segment(marker, data) for data in contents), jpeg[2:]])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images in dB."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two boolean masks."""
    return (a & b).sum() / (a | b).sum()


def patched_toy(folder: Path, code: str) -> Path:
    """Return a script that runs some code and then the toy server."""
    script = folder / "patched_toy.py"
    script.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n{code}\n{RUN_TOY}")
    return script


RUN_TOY = "import toy_server\ntoy_server.main()\n"


def wait_for(condition: Callable[[], object], timeout_s: float = 20) -> None:
    """Return when the condition holds. Fails if it does not within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition does not hold in time"
        time.sleep(0.02)


def infer_until_rejected(connection: Connection, photo: bytes = PHOTO, **parameters: object) -> tuple[int, str]:
    """Send a photo until a request fails. Return the number of successful requests, and the error."""
    succeeded = 0
    while True:
        try:
            response = connection.infer(photo, parameters=parameters)
        except InferenceError as error:
            return succeeded, str(error)
        assert {array.shape[:3] for array in response.values() if array.ndim == 4} == {(1, *decode(photo).shape[:2])}
        succeeded += 1


def http_request(photo: bytes, model_name: str = MODEL_NAME) -> bytes:
    """Return the bytes of the simplest HTTP request with a photo that Triton accepts."""
    head = (
        f"POST /v2/models/{model_name}/infer HTTP/1.1\r\nHost: test\r\nContent-Length: {len(photo)}\r\n"
        "Inference-Header-Content-Length: 0\r\n\r\n"
    )
    return head.encode() + photo


_running: list["RunningStages"] = []


class RunningStages:
    """Stages as a worker runs them, without Triton and in this process."""

    def __init__(self, stages: type[Stages], options: argparse.Namespace, device: str):
        """Create them, and compute their example."""
        _running.append(self)  # until the end of the process, because its memory may be pinned
        self.device = device
        self._limits = stages.limits(options)
        self._memories: dict[Channel, ResponseMemory] = {}
        self._open_channel()
        self._executor = Executor(stages, options, device, self._memories)
        self.stages = self._executor.stages

    def _open_channel(self) -> Channel:
        (channel,) = open_channels(1, *self._limits)
        self._memories |= open_memories([channel], self._limits[1], self.device)
        return channel

    def job(self, content: object) -> Job:
        """Return a job for the stages, with its own channel."""
        return Job(self._open_channel(), content, self.stages.weigh(content))

    def __call__(self, jobs: Sequence[Job]) -> list[dict[str, np.ndarray] | Exception]:
        """Return the outputs of each job, or why it failed. They are valid until its next call."""
        responses = zip(jobs, self._executor.compute(jobs), strict=True)
        return [complete(job.channel.response_memory, response) for job, response in responses]


def complete(memory: np.ndarray, response: StoredResponse | Exception) -> dict[str, np.ndarray] | Exception:
    """Return the arrays that a client gets, from the memory of the response."""
    return response if isinstance(response, Exception) else unpack(memory, response.complete())


def sample(class_name: str, size: tuple[int, int] | None = None) -> Image.Image:
    """Return one of the sample photos, resized to width and height if they are given."""
    image = Image.open(SAMPLES[class_name][0]).convert("RGB")
    return image.resize(size) if size else image


def as_array(encoded: bytes) -> np.ndarray:
    """Return bytes as uint8 ``[N]``."""
    return np.frombuffer(encoded, np.uint8)


def as_photo(encoded: bytes) -> Photo:
    """Return a file as the stages get it."""
    return read_photo(as_array(encoded), max_pixels=25_000_000)
