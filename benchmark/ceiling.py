# SPDX-License-Identifier: Apache-2.0
"""A server whose stages do no work: it returns ready-made images. Its throughput is the limit of everything else.

    python -m benchmark.ceiling [--device cpu] [--frontends 2] [--http-port 8000]

It has the contract of server.py, and knows only the benchmark's photos.
"""

import numpy as np
from PIL import Image
from pytriton.model_config import ModelConfig
from pytriton.proxy.types import Request

from benchmark.photos import ROOT, SIZES, encode, photos
from server import INPUTS, MODEL_NAME, OUTPUTS
from serving import Server, Stages, add_serving_options, make_parser


def ready_made(size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return all outputs for a photo of this width and height."""
    original, segmented = (Image.open(ROOT / "images" / name).resize(size) for name in ("orig.jpg", "segm.jpg"))
    return {
        "original": np.asarray(original),
        "segmented": np.asarray(segmented),
        **dict.fromkeys(("mask", "probability", "labels"), np.asarray(segmented.convert("L"))),
        "encoded": np.frombuffer(encode(segmented, quality=95, subsampling=0), np.uint8),
    }


class ReadyMade(Stages):
    """Stages that identify a photo by its length, and return ready-made outputs."""

    @classmethod
    def limits(cls, _options):
        """Return the maximum size of a request and of a response, in bytes."""
        return 1_000_000, 10 * max(width * height for width, height in SIZES)

    @classmethod
    def example(cls, _options):
        """Return one of the photos, with all outputs."""
        return Request({"image": np.frombuffer(photos()[0], np.uint8)}, {}, None, [tensor.name for tensor in OUTPUTS])

    def __init__(self, _options, _device):
        """Create the outputs for each photo."""
        self._outputs = {len(photo): ready_made(size) for photo, size in zip(photos(), SIZES, strict=True)}

    def read(self, request):
        """Return the outputs that the request names."""
        outputs = self._outputs[len(request["image"])]
        return {name: outputs[name] for name in request.requested_output_names}

    def __call__(self, jobs):
        """Return the outputs."""
        return jobs


def main() -> None:
    """Serve until a signal arrives."""
    parser = make_parser("Return ready-made images.")
    add_serving_options(parser)
    with Server(ReadyMade, parser.parse_args()) as server:
        config = ModelConfig(max_batch_size=1)
        server.bind(model_name=MODEL_NAME, infer_func=server.instances, inputs=INPUTS, outputs=OUTPUTS, config=config)
        server.serve()


if __name__ == "__main__":
    main()
