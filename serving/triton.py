# SPDX-License-Identifier: Apache-2.0
"""Runs Triton through PyTriton: start, supervision, draining and clean-up."""

import argparse
import asyncio
import contextlib
import ctypes
import io
import ipaddress
import logging
import os
import re
import resource
import socket
import sys
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from multiprocessing import connection
from pathlib import Path
from types import ModuleType

import psutil
import pytriton.triton
import uvloop
from pytriton.exceptions import PyTritonError
from pytriton.triton import TritonConfig, TritonSecurityConfig
from pytriton.utils.distribution import get_stub_path

from serving.errors import ServerError, UsageError
from serving.fleet import Fleet
from serving.leftovers import helpers_of, is_named, kill_processes, model_folders, remove_leftovers, segments
from serving.lifecycle import Lifecycle
from serving.options import DEFAULT_ADDRESS, DEFAULT_PORTS
from serving.watchdog import TritonProbe, Watchdog
from serving.workspace import create_workspace, find_folder

# Seconds that Triton waits for clients to close their connections when it exits. `docker stop` kills after 10 s.
EXIT_TIMEOUT_S = 2

# For the processes that Triton starts. By default, glibc maps and unmaps memory for each image, and the kernel zeroes
# its pages. With these settings, images are on the heap. 32 MiB is the highest threshold that glibc accepts.
MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

# Each instance gets the address of PyTriton's shared memory from the first one, through a socket. If instances start in
# parallel, some may connect before it listens, and Triton does not start.
INSTANCES_ONE_BY_ONE = {"TRITON_PARALLEL_INSTANCE_LOADING": "0"}

# The token becomes part of an option of Triton, in which other characters have a special meaning.
TOKEN = re.compile(r"[\w-]{16,}", re.ASCII)

# Triton keeps 16 bytes per chunk of a request on the stack of a thread, and 96 per bracket of its JSON. With the usual
# 8 MB, 0.1 MB of brackets from a client crash Triton. Unused parts of a stack take up no memory.
STACK_BYTES = 1 << 30

# Folders that Triton's Python backend creates in /tmp, and removes unless it is killed.
ENVIRONMENTS = "python_env_*"

# Each connection needs one file, and each instance several.
MIN_OPEN_FILES = 1024

LOGGER = logging.getLogger("server")


class Triton:
    """Wraps PyTriton's class of this name: serves a model until a signal arrives."""

    def __init__(self, options: argparse.Namespace, lifecycle: Lifecycle):
        """Check the environment, addresses and ports. Raises UsageError if Triton cannot use them."""
        self._options = options
        self._lifecycle = lifecycle
        self._config = configure(options)
        self._security = _secure(options)
        self._internals = _load_internals()
        self._environments: set[Path] = set()
        _check_ports(self._config)
        find_folder()
        prepare_environment()

    def serve(self, fleet: Fleet, model_name: str, **model: object) -> None:
        """Start Triton, connect it to the fleet, and serve until a signal arrives.

        Takes the keyword arguments of PyTriton's ``bind``. Raises SystemExit or ServerError; never returns.
        """
        with contextlib.ExitStack() as stack:
            with self._lifecycle.signals_deferred():
                workspace = stack.enter_context(create_workspace(model_name))
            self._serve_from(Path(workspace), fleet, model_name, **model)

    def _serve_from(self, workspace: Path, fleet: Fleet, model_name: str, **model: object) -> None:
        triton = pytriton.triton.Triton(
            config=self._config, workspace=workspace / "triton", security_config=self._security
        )
        helpers: list[psutil.Process] = []
        try:
            bound = self._internals.bind(triton, model_name=model_name, **model)
            fleet.check_example(bound)
            self._start(triton)
            if not (tritonservers := _tritonservers()):
                raise ServerError("Triton exited unexpectedly; --verbose shows its log")
            fleet.connect(bound, [workspace, *self._environments])
            helpers = helpers_of(tritonservers)
            sockets = list((workspace / "triton").glob("*.sock"))
            watched = triton, helpers, sockets
            threading.Thread(target=self._watch_helpers, args=watched, daemon=True).start()
            is_private = all(_is_loopback(address) for _, address, _ in _listening(self._config))
            if not is_private and not self._options.behind_proxy:
                LOGGER.warning("EXPOSED: anyone who reaches this server can crash it; see docs/security.md for a proxy")
            LOGGER.info("ready: model %s at %s", model_name, _urls(self._config))
            endpoint = next(_listening(self._config))  # HTTP's, or gRPC's if HTTP is off
            probe = TritonProbe(*endpoint, model_name)
            with Watchdog(probe.is_ready, self._options.triton_timeout_s, self._on_triton_hang):
                triton.serve(monitoring_period_s=1)
            self._lifecycle.ignore_signals()
            raise ServerError("Triton exited unexpectedly; --verbose shows its log")
        except SystemExit:
            self._lifecycle.drain(fleet.traffic, fleet.abandon)
            raise
        finally:
            self._clean_up(triton, helpers)

    def _start(self, triton: pytriton.triton.Triton) -> None:
        environments = set(Path("/tmp").glob(ENVIRONMENTS))
        started = threading.Event()
        threading.Thread(target=_hide_segments, args=(started,), daemon=True).start()
        try:
            triton.run()
        except Exception as error:
            if not _tritonservers():
                _check_ports(self._config)  # another program may have taken one since the first check
            # The relevant line of an exception in one of Triton's stub processes is in the middle of a traceback.
            lines = str(error).split("\nAt:\n")[0].strip().splitlines() or [type(error).__name__]
            raise ServerError(f"Triton did not start ({lines[-1]}); --verbose shows its log") from error
        finally:
            started.set()
        created = set(Path("/tmp").glob(ENVIRONMENTS)) - environments
        if len(created) == 1:  # otherwise, nothing shows which of them belong to other servers
            self._environments = created

    def _watch_helpers(
        self, triton: pytriton.triton.Triton, helpers: Sequence[psutil.Process], sockets: Sequence[Path]
    ) -> None:
        # Triton would start another helper, which cannot attach to the memory of the first.
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            ends = [os.pidfd_open(helper.pid) for helper in helpers]
            while not connection.wait(ends, timeout=1):
                # Instances that have already connected would continue, but the others would always fail. If Triton is
                # ending, its helpers delete sockets and end as well.
                deleted = [path for path in sockets if not path.exists()]
                if deleted and not connection.wait(ends, timeout=1):
                    self._lifecycle.fail(f"stopping: {deleted[0]} was deleted")
                    return
        if triton.is_alive():  # otherwise, the main thread notices
            self._lifecycle.fail("stopping: one of Triton's helper processes exited")

    def _on_triton_hang(self) -> None:
        self._lifecycle.fail(f"stopping: Triton has not responded for {self._options.triton_timeout_s:g} s")
        # This ends the requests in flight, and the server if the signal from fail() is lost.
        kill_processes(_tritonservers())

    def _clean_up(self, triton: pytriton.triton.Triton, helpers: Sequence[psutil.Process]) -> None:
        """Stop Triton, and remove its leftovers, even if it was killed or ran out of time."""
        helpers = {*helpers, *helpers_of(_tritonservers())}
        folders = [*self._environments, *model_folders(helpers)]
        # Triton's exit timeout does not cover all of its waits.
        killer = threading.Timer(2 * EXIT_TIMEOUT_S, kill_processes, args=[_tritonservers()])
        killer.start()
        # PyTriton prints the output of Triton's processes, which ends with warnings of their resource trackers.
        quiet = contextlib.nullcontext() if self._options.verbose else contextlib.redirect_stdout(io.StringIO())
        with self._lifecycle.signals_deferred(), quiet:
            try:
                triton.stop()
            finally:
                killer.cancel()
                remove_leftovers(os.getpid(), helpers, folders)


def configure(options: argparse.Namespace) -> TritonConfig:
    """Return Triton's configuration. The command line takes precedence over the environment."""
    config: dict[str, object] = {
        **{f"{protocol}_port": port for protocol, port in DEFAULT_PORTS.items()},
        **{f"{protocol}_address": DEFAULT_ADDRESS for protocol in DEFAULT_PORTS},
        # Without a GPU, these would only print a warning.
        "allow_gpu_metrics": Path("/dev/nvidiactl").exists(),
        # With AIP_MODE=PREDICTION in the environment, Triton would listen on another port.
        "allow_vertex_ai": False,
        "allow_sagemaker": False,
        "exit_timeout_secs": EXIT_TIMEOUT_S,
        # Triton logs a page for each rejected request.
        "log_file": None if options.verbose else os.devnull,
        "log_verbose": int(options.verbose),
    }
    try:
        from_environment = TritonConfig.from_env().to_dict()
    except (PyTritonError, TypeError, ValueError) as error:
        raise UsageError(f"invalid environment variable PYTRITON_TRITON_CONFIG_...: {error}") from error
    config |= {name: value for name, value in from_environment.items() if value is not None}
    for protocol in DEFAULT_PORTS:
        if hasattr(options, "address"):
            config[f"{protocol}_address"] = options.address
        if hasattr(options, f"{protocol}_port"):
            config[f"{protocol}_port"] = getattr(options, f"{protocol}_port")
    return TritonConfig(**config)


def _load_internals() -> ModuleType:
    try:
        import serving.pytriton_internals as internals
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"this server does not support PyTriton {version('nvidia-pytriton')} ({error}): "
            "install the packages in requirements.txt"
        ) from error
    return internals


def _secure(options: argparse.Namespace) -> TritonSecurityConfig:
    """Return the token for the administrative endpoints. Without one, PyTriton generates it."""
    token = getattr(options, "access_token", os.environ.get("TRITON_ACCESS_TOKEN"))
    if token is not None and not TOKEN.fullmatch(token):
        raise UsageError(
            "--access-token, or TRITON_ACCESS_TOKEN in the environment, must have at least 16 letters, digits, - and _"
        )
    return TritonSecurityConfig(access_token=token)


def _listening(config: TritonConfig) -> Iterator[tuple[str, str, int]]:
    for protocol in DEFAULT_PORTS:
        if getattr(config, f"allow_{protocol}") in (True, None):
            yield protocol, getattr(config, f"{protocol}_address"), getattr(config, f"{protocol}_port")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(socket.gethostbyname(address)).is_loopback


def _check_ports(config: TritonConfig) -> None:
    # Otherwise, Triton fails late, and PyTriton waits for it for minutes.
    with contextlib.ExitStack() as sockets:
        for protocol, address, port in _listening(config):
            try:
                sockets.enter_context(socket.create_server((address, port)))
            except (OSError, OverflowError) as error:
                reason = (getattr(error, "strerror", "") or str(error)).split(" (")[0]
                raise UsageError(
                    f"cannot listen on {address}:{port} ({reason}): choose another --{protocol}-port or --address"
                ) from error


def _urls(config: TritonConfig) -> str:
    suffix = {"http": "", "grpc": "", "metrics": "/metrics"}
    return ", ".join(
        f"{'grpc' if protocol == 'grpc' else 'http'}://{address}:{port}{suffix[protocol]}"
        for protocol, address, port in _listening(config)
    )


def prepare_environment() -> None:
    """Set the environment and the limits that Triton inherits, and tune the threads of this process."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UsageError("the working directory was deleted: start the server in another one") from None
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not get_stub_path(python).exists():
        raise UsageError(f"PyTriton does not support Python {python}; use Python 3.11 or 3.12")
    # Triton's Python backend finds libpython through the loader's path. Put this interpreter's first.
    library = f"libpython{python}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"]
    found = [folder for folder in folders if folder and os.access(f"{folder}/{library}", os.R_OK)]
    if not found:
        try:
            ctypes.CDLL(library)
        except OSError:
            raise UsageError(
                f"Triton needs {library}, which this Python does not provide: use a Python built with --enable-shared, "
                f"or on Debian and Ubuntu, apt install libpython{python}"
            ) from None
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, [*found, os.environ.get("LD_LIBRARY_PATH")]))
    for name, value in (MALLOC_ENVIRONMENT | INSTANCES_ONE_BY_ONE | {"PATH": os.defpath}).items():
        os.environ.setdefault(name, value)
    # Not RLIM_INFINITY, with which glibc gives threads 2 MB.
    _, highest = resource.getrlimit(resource.RLIMIT_STACK)
    stack_bytes = STACK_BYTES if highest == resource.RLIM_INFINITY else min(STACK_BYTES, highest)
    resource.setrlimit(resource.RLIMIT_STACK, (stack_bytes, highest))
    # Clients with many connections could use up all files. Then, Triton logs each connection that it cannot accept.
    _, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    if highest < MIN_OPEN_FILES:
        raise UsageError(
            f"the hard limit of open files is {highest}, but must be at least {MIN_OPEN_FILES}: raise it with "
            "LimitNOFILE of systemd, or docker run --ulimit nofile"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))
    # An instance waits for the GIL several times per request, by default up to 5 ms each time.
    sys.setswitchinterval(0.0005)
    # PyTriton runs an event loop per instance. uvloop holds the GIL for less time than asyncio's own loop.
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def _hide_segments(started: threading.Event) -> None:
    """Make Triton's segments private until it has started. It creates them readable for all users of the machine."""
    done = False
    while not done:
        done = started.wait(0.01)
        for segment in segments(os.getpid()):
            with contextlib.suppress(FileNotFoundError):
                segment.chmod(0o600)


def _tritonservers() -> list[psutil.Process]:
    """Return the process that PyTriton started, if it is running."""
    return [child for child in psutil.Process().children() if is_named(child, "tritonserver")]
