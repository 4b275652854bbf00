# SPDX-License-Identifier: Apache-2.0
"""All code that relies on PyTriton's private parts, for PyTriton 0.7.0.

PyTriton has no public way to run its handlers in several processes, or to add to the code in Triton's stub processes.
This file uses ``Model``, which ``Triton.bind`` creates, and the parts of its ``setup``: the handshake with the stub
process of the first instance, which returns the address of the tensor store, a RequestsResponsesConnector for each
instance's socket, and an InferenceHandler that calls the instance.
"""

import base64
import contextlib
import threading
import time
from collections.abc import Mapping
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytriton.triton
import sh
from pytriton.model_config.triton_model_config import TritonModelConfig
from pytriton.models.manager import ModelManager
from pytriton.models.model import Model
from pytriton.proxy.communication import get_config_from_handshake_server
from pytriton.proxy.data import TensorStoreSerializerDeserializer
from pytriton.proxy.inference import InferenceHandler, RequestsResponsesConnector
from pytriton.proxy.validators import TritonResultsValidator
from pytriton.server.triton_server import TritonServer
from pytriton.triton import Triton

from serving.instance import Instance
from serving.options import DEFAULT_PORTS

LISTEN_TIMEOUT_S = 30  # then, PyTriton tries to connect anyway

# The attributes that the classes below override or call. The import of this file fails if one is missing.
_ = (
    pytriton.triton.Model,
    pytriton.triton.TritonServer,
    TritonServer.start,
    TritonServer.is_alive,
    TritonServer._record_logs,
    sh.Command._call_args,
    Model.setup,
    Model.is_alive,
    Model.get_proxy_model_files,
    Model._get_triton_model_config,
    ModelManager.clean,
    ModelManager.models,
)

# Added to PyTriton's model.py, which Triton's stub processes run. They ignore PYTHON... variables.
#
# PyTriton raises an exception for each failed request. The exception and the frame that raised it refer to each other,
# and the frame refers to the request, which stays in Triton's shared memory until Python collects this cycle. By
# default, that takes 21 more requests, and each collection leaves the current cycle to the next generation: one request
# in 252 stays.
#
# PyTriton never releases requests that it cannot send to the server. No request is in flight when execute() returns,
# unless a model is decoupled.
STUB_ADDITION = """

import gc

gc.freeze()  # so that a collection only visits objects of requests
gc.set_threshold(25, 1, 1)  # a failed request leaves more than 25 objects


class TritonPythonModel(TritonPythonModel):
    def execute(self, triton_requests):
        for request in triton_requests:
            self._check(request)
        try:
            return super().execute(triton_requests)
        finally:
            self._requests.clear()

    def _check(self, request):
        try:
            parameters = request.parameters()
        except UnicodeDecodeError:
            raise pb_utils.TritonModelException("InvalidRequest: a parameter is not valid UTF-8") from None
        if len(parameters) > 65_536:  # as JSON; parsing takes many times this memory
            raise pb_utils.TritonModelException("InvalidRequest: the parameters of the request are too large")
        for tensor in request.inputs():
            if tensor.as_numpy().size == 0:
                raise pb_utils.TritonModelException(f"InvalidRequest: the input {tensor.name()} is empty")
"""


class FrontendModel(Model):
    """PyTriton's model without handlers: these run in frontend processes."""

    _loaded = False

    def setup(self) -> None:
        """PyTriton calls this when Triton has loaded the model. The overridden method starts the handlers."""
        self._loaded = True

    def is_alive(self) -> bool:
        """Return whether the model is loaded. PyTriton calls this each second."""
        return self._loaded

    def get_proxy_model_files(self) -> dict[str, bytes]:
        """Return the files that PyTriton runs in the stub processes."""
        files = super().get_proxy_model_files()
        files[f"file:{self.model_version}/model.py"] += STUB_ADDITION.encode()
        return files

    @property
    def triton_config(self) -> TritonModelConfig:
        """The configuration of the model in Triton."""
        return self._get_triton_model_config()


class TritonProcess(TritonServer):
    """PyTriton's tritonserver process, in its own session."""

    _output = b""  # since the last line

    def start(self) -> None:
        """Start Triton, and wait until it listens. Raises RuntimeError if it exits.

        Ctrl-C in a terminal does not reach it, so that requests in flight can finish.
        """
        sh.Command._call_args["new_session"] = True  # PyTriton does not pass this argument
        super().start()
        # PyTriton would load the model into any Triton at its address, such as that of a server with the same ports.
        deadline = time.monotonic() + LISTEN_TIMEOUT_S
        while not self._listens() and time.monotonic() < deadline:
            if not self.is_alive():
                raise RuntimeError("it exited")
            time.sleep(0.05)

    def _listens(self) -> bool:
        config = self._server_config
        ports = {config[f"{name}-port"] for name in DEFAULT_PORTS if config[f"allow-{name}"] in (True, None)}
        with contextlib.suppress(psutil.Error):
            connections = psutil.Process(self._tritonserver_running_cmd.pid).net_connections("tcp")
            return ports <= {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
        return False

    def _record_logs(self, line: bytes | str) -> None:
        """Print whole lines. PyTriton would print single characters, and keep them in memory."""
        output = self._output + (line if isinstance(line, bytes) else line.encode())
        lines, end, self._output = output.rpartition(b"\n")
        if end:
            with contextlib.suppress(OSError):  # raised here, it would end the thread that reads Triton's output
                print(lines.decode(errors="replace") + "\n", end="", flush=True)


def bind(triton: Triton, **model: object) -> FrontendModel:
    """Call ``triton.bind`` with these arguments, and return the model that it creates."""
    # PyTriton has no arguments for these.
    pytriton.triton.Model = FrontendModel
    pytriton.triton.TritonServer = TritonProcess
    triton.bind(**model)
    (bound,) = triton._model_manager.models
    # PyTriton calls this after Triton has stopped, and would unload the model from another Triton at its address.
    triton._model_manager.clean = lambda: None
    return bound


def start_handlers(config: TritonModelConfig, instances: Mapping[int, Instance]) -> list[threading.Thread]:
    """Start the handlers of instances, keyed by their numbers in Triton, in this process. Returns the threads."""
    # The tensor store belongs to another process, but Python would remove it when this one ends. From Python 3.13 on,
    # SharedMemory has an argument for this.
    resource_tracker.register = resource_tracker.unregister = lambda *_: None
    workspace = Path(config.backend_parameters["workspace-path"])
    handshake = get_config_from_handshake_server(workspace / f"{config.model_name}-config.sock")
    store = TensorStoreSerializerDeserializer()
    store.connect(handshake["data_socket"], base64.decodebytes(handshake["authkey"].encode()))
    validator = TritonResultsValidator(config, strict=False)
    threads = []
    for number, instance in instances.items():
        instance.outputs = config.outputs
        socket = workspace / f"{config.model_name}_0_{number}-server.sock"
        connector = RequestsResponsesConnector(f"ipc://{socket}", store)
        handler = InferenceHandler(instance, connector, validator, f"instance {number}")
        connector.start()
        handler.start()
        threads += [connector, handler]
    return threads
