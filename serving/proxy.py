# SPDX-License-Identifier: Apache-2.0
"""Adds to PyTriton's code in Triton's stub processes, so that a request that fails leaves nothing behind there."""

from pytriton.models.model import Model

# Added to PyTriton's model.py. Stub processes ignore PYTHON... variables, and PyTriton has no setting for this.
#
# For each failed request, PyTriton raises an exception. It and the frame that raised it refer to each other, and the
# frame to the request, which lies in Triton's shared memory until Python collects this cycle. By default that takes 21
# more requests, and each collection leaves the current one to the next generation: one in 252 stays.
#
# What PyTriton cannot pass on to the server, it keeps for good. Nothing is in flight any more when execute() returns,
# unless a model is decoupled.
ADDITION = """

import gc

gc.freeze()  # what is there now, so that a collection only looks at what requests leave behind
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
        if len(parameters) > 65_536:  # as JSON; what reads them takes many times that
            raise pb_utils.TritonModelException("InvalidRequest: the parameters of the request are too long")
        for tensor in request.inputs():
            if tensor.as_numpy().size == 0:
                raise pb_utils.TritonModelException(f"InvalidRequest: the input {tensor.name()} is empty")
"""


class CleanModel(Model):
    """PyTriton's model, whose stub processes give the memory of failed requests back."""

    def get_proxy_model_files(self) -> dict[str, bytes]:
        """Return the files that PyTriton runs in the stub processes."""
        files = super().get_proxy_model_files()
        files[f"file:{self.model_version}/model.py"] += ADDITION.encode()
        return files
