# SPDX-License-Identifier: Apache-2.0
"""Makes PyTriton's code in Triton's stub processes give back the shared memory of failed requests."""

from pytriton.models.model import Model

# PyTriton raises an exception in the stub for each failed request. The exception and the frame that raised it refer to
# each other, and the frame to the request, which lies in Triton's shared memory until Python collects this cycle. By
# default that takes 21 more requests, and each collection leaves the current one to the next generation: without this,
# /dev/shm fills up by one photo per 252 failed ones.
COLLECT_OFTEN = b"""
import gc

gc.freeze()  # what is there now, so that a collection only looks at what requests leave behind
gc.set_threshold(25, 1, 1)  # a failed request leaves more than 25 objects
"""


class CollectingModel(Model):
    """PyTriton's model, whose stub processes soon give back the memory of failed requests."""

    def get_proxy_model_files(self) -> dict[str, bytes]:
        """Return the files that PyTriton runs in the stub processes."""
        files = super().get_proxy_model_files()
        files[f"file:{self.model_version}/model.py"] += COLLECT_OFTEN
        return files
