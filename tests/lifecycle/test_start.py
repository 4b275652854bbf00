# SPDX-License-Identifier: Apache-2.0
"""How the server starts: its errors, its fallbacks, and signals during the start."""

import argparse
import contextlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import (
    PHOTO,
    PROTOCOLS,
    ROOT,
    TOY_SERVER,
    Server,
    decode,
    get,
    patched_toy,
    processes_of,
    run_python,
    running_together,
    skip_if_in_tmp,
    start_toy,
    wait_for,
    with_tmpfs,
)
from tritonclient.utils import InferenceServerException

import tools.page
from serving.errors import UsageError
from serving.lifecycle import Lifecycle
from serving.options import add_serving_options, make_parser
from serving.triton import Triton
from serving.workspace import create_workspace, find_folder
from tools.launch import free_ports

TOKEN = "a-token_of-24-characters"


def in_shell(script: str) -> list[str]:
    """Return a prefix for a command so that a shell runs a script first."""
    return ["sh", "-c", f'{script}; exec "$@"', "sh"]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Server]]:
    """Servers by the way they are started. They start in parallel, which is faster."""
    folder = tmp_path_factory.mktemp("start")
    # A port that the command line overrides, and an option that the command line does not have.
    environment = {"PYTRITON_TRITON_CONFIG_HTTP_PORT": "1", "PYTRITON_TRITON_CONFIG_ALLOW_METRICS": ""}
    environment["TRITON_ACCESS_TOKEN"] = TOKEN
    servers = {
        "environment": start_toy(
            folder / "environment", "--verbose", environment=environment, prefix=("env", "-u", "PATH", "-u", "HOME")
        ),
        # With few open files, and without stdin and stdout.
        "many instances": start_toy(
            folder / "instances", "--instances", 8, prefix=in_shell("ulimit -Sn 256; exec <&- >&-")
        ),
        "two workers": start_toy(folder / "workers", "--device", "cpu,cpu", "--start", "warn"),
    }
    with running_together(servers) as running:
        yield running


# Servers that do not start, as code that runs before, with their status and what their last line says.
NOT_STARTED = {
    "no memory": (
        "sys.argv += ['--start', 'no memory']",
        1,
        "a worker failed to start: CUDA out of memory. Tried to allocate 20 MiB.;",
    ),
    "exit": ("sys.argv += ['--start', 'exit']", 1, "a worker exited during startup (exit status 3)"),
    "wrong option": ("sys.argv += ['--start', 'wrong option']", 2, "--start must not be wrong"),
    "no batching": (
        "toy_server.ModelConfig = lambda **_: ModelConfig(batching=False)",
        2,
        "ModelConfig must have batching=True and decoupled=False",
    ),
    "hang": ("sys.argv += ['--start', 'hang', '--start-timeout-s', '2']", 1, "did not start within 2 s"),
}

# Errors of a user's class, as code that replaces a part of the toy's.
WRONG_STAGES = {
    "limits that are not whole numbers": (
        "Inversion.limits = classmethod(lambda cls, options: (1e6, 1e6))",
        "the limits of Inversion failed: 'float' object cannot be interpreted as an integer; --verbose shows where",
    ),
    "limits that are negative": (
        "Inversion.limits = classmethod(lambda cls, options: (-1, 9))",
        "the limits of Inversion failed: they must not be negative; --verbose shows where",
    ),
    "an example that is not a request": (
        "Inversion.example = classmethod(lambda cls, options: {'image': blank_photo(options.max_pixels)})\n"
        "Inversion.read = lambda *_: (np.zeros((1, 1, 3), np.uint8), {}, ['mean'])",
        "the example of Inversion failed: 'dict' object has no attribute 'data'; --verbose shows where",
    ),
    "a weight that is not a number": (
        "Inversion.weigh = lambda *_: None",
        "a worker failed to start: float() argument must be a string or a real number, not 'NoneType'; --verbose",
    ),
    "an example that is rejected": (
        "Inversion.example = classmethod(lambda cls, options: Request({'image': np.zeros(9, np.uint8)}, {}))",
        "a worker failed to start: the photo ",
    ),
    "an example that cannot be computed": (
        "Inversion.__call__ = lambda self, jobs: [] [0]",
        "a worker failed to start: list index out of range; --verbose shows where",
    ),
    "a batch with a result missing": (
        "Inversion.__call__ = lambda self, jobs: []",
        "a worker failed to start: Inversion returned 0 results for a batch of 1; --verbose shows where",
    ),
    "an example whose result is not valid": (
        "Inversion.__call__ = lambda self, jobs: [Checked({}, False, ValueError('not finite'))] * len(jobs)",
        "a worker failed to start: not finite; --verbose shows where",
    ),
    "an example that is too large": (
        "Inversion.limits = classmethod(lambda cls, options: (10, 10_000_000))",
        "the example of Inversion failed: the request has ",
    ),
    "a response that is too large": (
        "Inversion.limits = classmethod(lambda cls, options: (10_000_000, 10))",
        "a worker failed to start: the response exceeds the limit of ",
    ),
    "an output of another type": (
        "Inversion.__call__ = lambda self, jobs: [{'mean': np.zeros(3, np.float32)}] * len(jobs)",
        "the example of Inversion failed: the output mean is declared as float64 [3], but is float32 [3]; --verbose",
    ),
    "an exception without a message": (
        "def raise_it(*_): raise AssertionError\nInversion.__init__ = raise_it",
        "a worker failed to start: AssertionError; --verbose shows where",
    ),
    "an exception with a message of several lines": (
        "def raise_it(*_): raise RuntimeError('\\n first\\nsecond')\nInversion.__init__ = raise_it",
        "a worker failed to start: first; --verbose shows where",
    ),
    "an exception that cannot be pickled": (
        "def raise_it(*_):\n    class Own(Exception): pass\n    raise Own(raise_it)\nInversion.__init__ = raise_it",
        "a worker failed to start: <function raise_it at ",
    ),
    "a recursion": (
        "def recurse(*arguments): recurse(*arguments)\nInversion.__init__ = recurse",
        "a worker failed to start: maximum recursion depth exceeded",
    ),
    "an end of the process": (
        "Inversion.__init__ = lambda *_: sys.exit('no license')",
        "a worker failed to start: no license; --verbose shows where",
    ),
}
# Parts of PyTriton that another version may lack, as code that deletes them, and what the error says.
LACKING = {
    "a method": ("import pytriton.models.model as m; del m.Model.setup", "'Model' has no attribute 'setup'"),
    "a private method": (
        "import pytriton.models.model as m; del m.Model._get_triton_model_config",
        "'_get_triton_model_config'",
    ),
    "a property": (
        "import pytriton.models.manager as m; del m.ModelManager.models",
        "'ModelManager' has no attribute 'models'",
    ),
    "a class": ("import pytriton.proxy.inference as m; del m.RequestsResponsesConnector", "RequestsResponsesConnector"),
    "the store": (
        "import pytriton.proxy.data as m; del m.TensorStoreSerializerDeserializer",
        "TensorStoreSerializerDe",
    ),
    "a function": (
        "import pytriton.proxy.communication as m; del m.get_config_from_handshake_server",
        "get_config_from_handshake_server",
    ),
    "the log": ("import pytriton.server.triton_server as m; del m.TritonServer._record_logs", "'_record_logs'"),
}

# Runs a toy server for each piece of code, which changes it first. PyTriton is imported only once, which saves a second
# for each. A server writes its output into one file; the name of another file contains its exit status.
RUN_EACH = """
import os
from pathlib import Path

import numpy as np
from photo import blank_photo
from pytriton.model_config import ModelConfig
from pytriton.proxy.types import Request
from serving import Checked
import toy_server
from toy_server import Inversion

for what, code in {codes!r}.items():
    if not (child := os.fork()):
        output = os.open(what, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        try:
            exec(code)
            toy_server.main()
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(99)
    Path(f"{{what}}, status {{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}}").touch()
sys.exit()
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[str]]:
    """Returns the lines that a changed server has printed, and checks its exit status."""
    folder = tmp_path_factory.mktemp("ended")
    codes = {what: code for what, (code, *_) in (NOT_STARTED | WRONG_STAGES | LACKING).items()}
    with start_toy(folder / "log", script=patched_toy(folder, RUN_EACH.format(codes=codes))) as server:
        assert server.process.wait(timeout=100) == 0, server.log.read_text()
        assert server.left_behind() == []

    def lines(what: str, status: int) -> list[str]:
        text = (folder / what).read_text()
        assert (folder / f"{what}, status {status}").exists(), text
        return text.splitlines()

    return lines


@pytest.mark.parametrize("what", NOT_STARTED)
def test_a_server_that_does_not_start_says_why_in_one_line(ended, what):
    _, status, expected = NOT_STARTED[what]
    lines = ended(what, status)
    assert lines[-1].startswith("patched_toy.py: ")
    assert expected in lines[-1]
    assert not [line for line in lines if "Traceback" in line]


@pytest.mark.parametrize("what", WRONG_STAGES)
def test_stages_that_are_wrong_end_the_server_with_one_line(ended, what):
    *before, last = ended(what, 1)
    assert last.startswith(f"patched_toy.py: {WRONG_STAGES[what][1]}")
    assert [line for line in before if " INFO " not in line and " WARNING " not in line] == []


@pytest.mark.parametrize("what", LACKING)
def test_a_pytriton_that_lacks_something_is_one_line(ended, what):
    (line,) = ended(what, 2)
    assert line.startswith("patched_toy.py: this server does not support PyTriton 0.7.0 (")
    assert LACKING[what][1] in line
    assert line.endswith("): install the packages in requirements.txt")


def serving_options(*arguments: object) -> argparse.Namespace:
    """Return the options of a server that gets these arguments, and free ports otherwise."""
    parser = make_parser("A server.")
    add_serving_options(parser)
    http, grpc, metrics = free_ports()
    ports = ("--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics)
    return parser.parse_args(list(map(str, ports + arguments)))


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port", "--metrics-port"])
def test_a_port_in_use_is_named_with_its_option(flag):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError) as error:
            Triton(serving_options(flag, port), Lifecycle(2))
    assert str(error.value) == (
        f"cannot listen on 127.0.0.1:{port} (Address already in use): choose another {flag} or --address"
    )


TAKE_PORTS_LATER = """
import os
import serving.triton
from pytriton.server.triton_server import TritonServer
check, start = serving.triton._check_ports, TritonServer.start

def pass_once(_config):
    serving.triton._check_ports = check

def start_with_another(self):
    os.mkdir({folder!r})
    start(self)

serving.triton._check_ports, TritonServer.start = pass_once, start_with_another
sys.argv += {arguments}
"""


def test_of_two_servers_that_start_together_one_names_the_port_and_the_other_one_serves(servers, tmp_path):
    first = servers["environment"]
    ports = ["--http-port", str(first.http_port), "--grpc-port", str(first.grpc_port)]
    folder = Path(f"/tmp/python_env_{first.http_port}")  # like those that Triton creates
    script = patched_toy(tmp_path, TAKE_PORTS_LATER.format(arguments=ports, folder=str(folder)))
    with start_toy(tmp_path / "log", script=script, environment={"TRITON_ACCESS_TOKEN": TOKEN}) as second:
        assert second.process.wait(timeout=30) == 2
        assert second.log.read_text().splitlines()[-1] == (
            f"patched_toy.py: cannot listen on 127.0.0.1:{first.http_port} (Address already in use): "
            "choose another --http-port or --address"
        )
        assert second.left_behind() == []
    folder.rmdir()  # it is still there
    for protocol in PROTOCOLS:
        assert (first.connect(protocol).infer(PHOTO)["inverted"][0] == 255 - decode(PHOTO)).all()


def test_an_address_of_another_machine_is_named():
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1:\d+ \(Cannot assign requested address\)"):
        Triton(serving_options("--address", "192.0.2.1"), Lifecycle(2))


def test_another_version_of_python_is_named(monkeypatch):
    options = serving_options()
    monkeypatch.setattr(sys, "version_info", namedtuple("Version", "major minor")(3, 15))
    with pytest.raises(UsageError, match=r"PyTriton does not support Python 3\.15; use Python 3\.11 or 3\.12"):
        Triton(options, Lifecycle(2))


def test_two_ports_that_are_the_same_are_rejected():
    port = free_ports(1)[0]
    with pytest.raises(UsageError, match="choose another --metrics-port"):
        Triton(serving_options("--http-port", port, "--metrics-port", port), Lifecycle(2))


def test_triton_options_come_from_the_environment_and_the_command_line_wins(servers):
    server = servers["environment"]  # it is ready at the port of the command line
    ready = next(line for line in server.log.read_text().splitlines() if "ready: model" in line)
    assert f"http://127.0.0.1:{server.http_port}, grpc://127.0.0.1:{server.grpc_port}" in ready
    assert "/metrics" not in ready
    with pytest.raises(OSError, match="refused"):
        get(server.metrics_port, "/metrics")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"HTTP_PORT": "99999"}, "port must be 0-65535"), ({"ALLOW_HTTP": "", "ALLOW_GRPC": ""}, "has to be allowed")],
)
def test_triton_options_in_the_environment_that_cannot_work_are_rejected(environment, expected, monkeypatch):
    options = serving_options()
    del options.http_port  # it would win
    for name, value in environment.items():
        monkeypatch.setenv(f"PYTRITON_TRITON_CONFIG_{name}", value)
    with pytest.raises(UsageError, match=expected):
        Triton(options, Lifecycle(2))


def test_a_wrong_triton_option_in_the_environment_is_one_line(tmp_path):
    environment = {"PYTRITON_TRITON_CONFIG_GRPC_KEEPALIVE_TIME": "soon"}
    with start_toy(tmp_path / "log", environment=environment) as server:
        assert server.process.wait(timeout=30) == 2
        assert "PYTRITON_TRITON_CONFIG_" in server.log.read_text().splitlines()[-1]
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("protocol", "header", "said"),
    [
        ("http", "triton-access-token", "This API is restricted"),
        ("grpc", "triton-grpc-protocol-triton-access-token", "This protocol is restricted"),
    ],
)
def test_administrative_endpoints_need_the_access_token_in_the_documented_header(servers, protocol, header, said):
    assert f"`{header}`" in (ROOT / "docs" / "protocol.md").read_text()
    client = servers["environment"].connect(protocol).client
    for headers in ({}, {header: "another-token"}):
        with pytest.raises(InferenceServerException, match=said) as error:
            client.get_inference_statistics("Toy", headers=headers)
        assert error.value.status() in ("403", "StatusCode.UNAVAILABLE")
    assert client.get_inference_statistics("Toy", headers={header: TOKEN})


def test_many_instances_start_at_the_same_time(servers):
    # If they start in parallel, some of them miss the first one, at the latest on a busy machine.
    server = servers["many instances"]
    assert len(server.processes("stubs")) == 8
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(server.connect("grpc").infer, [PHOTO] * 8))
    assert all((response["inverted"][0] == 255 - decode(PHOTO)).all() for response in responses)


def test_warnings_of_all_workers_stand_right_above_the_line_that_says_ready(servers):
    lines = servers["two workers"].log.read_text().splitlines()
    ready = next(index for index, line in enumerate(lines) if "ready: model Toy" in line)
    assert "WARNING server: FALLBACK: of this worker" in lines[ready - 1]
    assert sum("FALLBACK" in line for line in lines) == 3  # once from each worker, and once more for both


def test_each_device_has_a_worker_and_all_of_them_respond(servers):
    server = servers["two workers"]

    def busy() -> list[float]:
        return [process.cpu_times().user for process in server.processes("worker")]

    before = busy()
    assert len(before) == 2
    connection = server.connect("grpc")

    def all_have_worked() -> bool:
        with ThreadPoolExecutor(4) as pool:
            for response in pool.map(connection.infer, [PHOTO] * 4):
                assert (response["inverted"][0] == 255 - decode(PHOTO)).all()
        return all(late > early for early, late in zip(before, busy(), strict=True))

    wait_for(all_have_worked)


@pytest.mark.parametrize(
    ("home", "expected"),
    [
        ("/proc/nowhere", "PyTriton cannot create its workspace: "),
        (f"/tmp/{'x' * 90}", f"the path of PyTriton's folder, /tmp/{'x' * 90}, is too long for the sockets in it: "),
        *((f"/tmp/{name}", "characters that Triton does not support: ") for name in ("a b", "a&b", "a'b", "jürgen")),
    ],
)
def test_a_workspace_that_cannot_be_created_is_one_line(home, expected, monkeypatch):
    monkeypatch.setenv("PYTRITON_HOME", home)
    with pytest.raises(UsageError) as error:
        Triton(serving_options(), Lifecycle(2))
    assert expected in str(error.value)
    assert str(error.value).endswith(": set PYTRITON_HOME to another folder, such as /tmp/pytriton")


def with_mount(what: str) -> list[str]:
    """Return a prefix for a command that gives it its own mount."""
    with_tmpfs("/mnt", "1m")  # skips the test if it cannot mount
    if what.endswith("/tmp"):
        skip_if_in_tmp()
    return ["unshare", "-rm", *in_shell(f"mount -t tmpfs {what}")]


@pytest.mark.parametrize(
    ("kind", "what", "expected"),
    [
        (with_mount, "-o noexec tmpfs $PYTRITON_HOME", "is on a file system that is mounted noexec: set PYTRITON_HOME"),
        (with_mount, "-o ro tmpfs /dev/shm", "/dev/shm must be a writable tmpfs, but: Read-only file system"),
        (with_mount, "-o ro tmpfs /tmp", "Triton needs to create files in /tmp: mount a writable folder there"),
        (in_shell, "ulimit -n 256", "the hard limit of open files is 256, but must be at least 1024: raise it"),
        (in_shell, "mkdir gone; cd gone; rmdir ../gone", "the working directory was deleted: start the server in"),
    ],
)
def test_a_machine_that_triton_cannot_use_is_one_line(tmp_path, kind, what, expected):
    with start_toy(tmp_path / "log", prefix=kind(what)) as server:
        assert server.process.wait(timeout=30) == 2
        (line,) = server.log.read_text().splitlines()
        assert line.startswith("toy_server.py: ")
        assert expected in line


@pytest.mark.parametrize("home", ["", "/proc/nowhere", "/tmp/a b", "/tmp/jürgen", "/tmp/$HOME", f"/tmp/{'x' * 90}"])
def test_a_home_that_triton_cannot_use_does_not_matter(home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("PYTRITON_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home)
    with create_workspace("model") as workspace:
        assert Path(workspace).parent in (Path("/tmp"), Path("/.cache/pytriton"))
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_is_a_loop_of_links_is_no_traceback(monkeypatch, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    monkeypatch.setenv("PYTRITON_HOME", str(loop))
    with pytest.raises(UsageError, match="set PYTRITON_HOME to another folder"):
        find_folder()
    monkeypatch.delenv("PYTRITON_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(loop))
    assert find_folder() == Path("/tmp")


def test_many_idle_connections_write_nothing_into_the_log(servers):
    server = servers["many instances"]  # its limit of open files was 256
    before = server.log.read_text()
    with contextlib.ExitStack() as stack:
        for port in 200 * [server.http_port, server.grpc_port]:
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert (server.connect("http").infer(PHOTO)["inverted"][0] == 255 - decode(PHOTO)).all()
    assert server.log.read_text() == before


WAIT_AND_EXIT = "from client import *; Connection(sys.argv[-1], 'Toy').wait_for_model(30); sys.exit(7)"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--", "-c", WAIT_AND_EXIT), 7, "ready: model Toy at http://127.0.0.1:"),
        (("--nonsense", "--", "-c", "import time; time.sleep(1000)"), 2, "unrecognized arguments: --nonsense"),
    ],
)
def test_a_server_is_launched_for_as_long_as_a_client_runs(arguments, status, said):
    with tempfile.TemporaryDirectory(prefix="pytriton-") as home:
        done = run_python("-m", "tools.launch", TOY_SERVER, *arguments, environment={"PYTRITON_HOME": home})
        assert done.returncode == status
        assert said in done.stderr
        wait_for(lambda: not processes_of(home))


def test_the_launcher_says_how_to_use_it():
    done = run_python("-m", "tools.launch", TOY_SERVER)
    assert (done.returncode, done.stderr) == (
        2,
        "usage: python -m tools.launch SERVER.py [OPTION ...] -- CLIENT.py [OPTION ...]\n",
    )


def test_an_interpreter_that_does_not_exist_is_named_by_make():
    done = subprocess.run(["make", "-n", "run", "PYTHON=nope"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "PYTHON=nope is not found: install it, or name another Python 3.11 or 3.12." in done.stderr
    assert ".venv" not in done.stderr


def test_without_nginx_make_page_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tools.page, "MODULE", tmp_path / "missing.so")
    with pytest.raises(SystemExit) as error:
        tools.page.main([])
    assert error.value.code == 2
    assert capsys.readouterr().err == (
        "tools.page: nginx or its njs module is missing: run apt install nginx libnginx-mod-http-js\n"
    )


@pytest.mark.parametrize("port", ["0", "-1", "65536", "http"])
def test_make_page_says_which_ports_there_are(port):
    done = run_python("-m", "tools.page", "--port", port)
    assert (done.returncode, done.stdout) == (2, "")
    expected = f"tools.page: error: argument --port: must be a whole number between 1 and 65535, not {port}\n"
    assert done.stderr == expected


def test_make_page_listens_on_its_own_addresses():
    done = run_python("-m", "tools.page", "--address=127.0.0.2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tools.page: omit --address: the page needs its own addresses and ports\n"


def test_make_page_copies_no_keys_and_no_other_files(tmp_path):
    server = SimpleNamespace(http_port=1, grpc_url="grpc://127.0.0.1:2")
    assert tools.page.configure(tmp_path, 3, 4, server).parent == tmp_path / "deploy"
    copied = {path.name for path in (tmp_path / "deploy").iterdir()}
    assert copied == {"nginx.conf", "servers.conf", "infer.js", "api_keys.conf", "page"}
    assert (tmp_path / "deploy" / "api_keys.conf").read_text() == "default anyone;\n"


def test_a_full_disk_is_one_line(tmp_path):
    with start_toy(tmp_path / "log", prefix=with_tmpfs("$PYTRITON_HOME", "1m")) as server:
        assert server.process.wait(timeout=60) == 1
        assert "No space left on device" in server.log.read_text().splitlines()[-1]
        assert "Traceback" not in server.log.read_text()


def test_without_shared_memory_the_server_says_how_to_get_it(tmp_path):
    with start_toy(tmp_path / "log", prefix=with_tmpfs("/dev/shm", "1m")) as server:
        assert server.process.wait(timeout=30) == 2
        line = server.log.read_text().splitlines()[-1]
        assert line.startswith(
            "toy_server.py: /dev/shm has only 1 MB free, not enough for any request: use docker run --shm"
        )


def test_a_signal_while_the_workers_start_ends_the_server(tmp_path):
    with start_toy(tmp_path / "log", "--start", "hang") as server:
        wait_for(lambda: "device: CPU" in server.log.read_text())
        assert server.stop() == 0
        assert server.left_behind() == []


def test_a_frontend_that_is_killed_while_the_worker_starts_is_noticed_if_it_is_needed(tmp_path):
    go_on = tmp_path / "go on"
    servers = {name: start_toy(tmp_path / name, "--start", go_on, "--frontends", 2) for name in ("needed", "idle")}
    with servers["needed"] as needed, servers["idle"] as idle:
        for server, index in ((needed, 0), (idle, -1)):
            wait_for(lambda server=server: len(server.processes("frontend")) == 2)
            server.processes("frontend")[index].kill()  # with one instance, the second has nothing to do
        go_on.touch()
        assert needed.process.wait(timeout=30) == 1
        (line,) = [line for line in needed.log.read_text().splitlines() if " INFO " not in line]
        assert line.endswith("CRITICAL server: stopping: a frontend exited")
        assert needed.left_behind() == []
        idle.wait_until_ready()
        assert len(idle.processes("frontend")) == 1
        assert idle.stop() == 0
        assert "Traceback" not in idle.log.read_text()


SIGNAL_AFTER_FORK = """
import os, signal
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
"""


def test_a_signal_right_after_the_fork_of_a_worker_leaves_no_process_behind(tmp_path):
    script = patched_toy(tmp_path, SIGNAL_AFTER_FORK)
    with Server(tmp_path / "log", "--start", "hang", script=script) as server:
        assert server.process.wait(timeout=20) == 0
        assert server.left_behind() == []


SIGNAL_AFTER_MKDIR = """
import os, signal
mkdir = os.mkdir

def mkdir_and_signal(path, *arguments, **options):
    mkdir(path, *arguments, **options)
    if "{prefix}" in str(path):
        os.kill(os.getpid(), signal.SIGTERM)

os.mkdir = mkdir_and_signal
"""


@pytest.mark.parametrize("prefix", ["workers_", "workspace_"])
def test_a_signal_right_after_a_folder_is_created_leaves_no_folder_behind(prefix, tmp_path):
    script = patched_toy(tmp_path, SIGNAL_AFTER_MKDIR.format(prefix=prefix))
    with start_toy(tmp_path / "log", script=script, environment={"TMPDIR": str(tmp_path)}) as server:
        assert server.process.wait(timeout=20) == 0
        assert "ready: " not in server.log.read_text()
        assert server.left_behind() == []
        assert list(tmp_path.glob("workers_*")) == []


PARENT_DIES_FIRST = """
import contextlib, ctypes, os, signal, time
import serving.processes

SERVER = os.getpid()

class Ctypes:
    def CDLL(self, name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(SERVER, signal.SIGKILL)
        while os.getppid() == SERVER:
            time.sleep(0.01)
        return ctypes.CDLL(name)

serving.processes.ctypes = Ctypes()
"""


def test_a_worker_whose_server_dies_before_the_worker_can_watch_it_ends(tmp_path):
    with Server(tmp_path / "log", "--start", "hang", script=patched_toy(tmp_path, PARENT_DIES_FIRST)) as server:
        server.process.wait(timeout=20)
        assert psutil.wait_procs(server.family(), timeout=10)[1] == []


# Ends a server once Triton has started the first of its stub processes.
KILLED_BEFORE_READY = """
import os, psutil, signal, threading, time
import serving.triton

def kill():
    while not any(process.name().startswith("triton_python") for process in psutil.Process().children(recursive=True)):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

start = serving.triton.Triton._start
serving.triton.Triton._start = lambda *arguments: (threading.Thread(target=kill).start(), start(*arguments))
"""


def test_a_server_that_is_killed_while_triton_starts_leaves_no_process_and_no_shared_memory(tmp_path):
    script = patched_toy(tmp_path, KILLED_BEFORE_READY)
    with start_toy(tmp_path / "log", "--frontends", 2, "--instances", 4, script=script) as server:
        assert server.process.wait(timeout=30) == -signal.SIGKILL
        assert psutil.wait_procs(server.family(), timeout=20)[1] == []
        assert not server.segments()


def test_verbose_shows_the_log_of_triton_between_the_lines_of_the_server(servers):
    log = servers["environment"].log.read_text()
    for service in ("HTTPService", "GRPCInferenceService"):
        assert re.search(rf'^I.* "Started {service} at 127\.0\.0\.1:\d+"$', log, re.MULTILINE)
    assert not re.search(r".\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", log)
    assert "http_server.cc:" not in servers["two workers"].log.read_text()


def test_a_server_that_a_shell_starts_in_the_background_listens_to_sigint(tmp_path):
    ignoring_sigint = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")  # as a shell does with a command before &
    with start_toy(tmp_path / "log", "--start", "hang", prefix=ignoring_sigint) as server:
        wait_for(lambda: "device: CPU" in server.log.read_text())
        assert server.stop(signal.SIGINT) == 0
