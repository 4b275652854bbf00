# SPDX-License-Identifier: Apache-2.0
"""A plain server to compare with: PyTriton as in its own examples, one instance, fp32, one photo at a time.

    python -m benchmark.plain [--device cpu] [--http-port 8000]

A first, straightforward version of the three stages, with the default outputs of server.py. Of its serving options, it
obeys only the device, the address and the ports.
"""

import os

import numpy as np
import torch
from pytriton.model_config import ModelConfig
from pytriton.triton import Triton

import server
from model_inference import build_module, pretrained_weights
from photo import read_photo
from pipelines import Postprocess, Preprocess
from server import INPUTS, MODEL_NAME, NETWORK, OUTPUTS
from serving import add_serving_options, make_parser
from serving.leftovers import remove_after_server
from serving.triton import configure, prepare_environment
from tools.launch import exit_on_signals
from weights.loading import load_weights


def main() -> None:
    """Serve until a signal arrives. The class is always person."""
    parser = make_parser("Segment photos, one at a time.")
    add_serving_options(parser)
    options, defaults = parser.parse_args(), server.parse_options([])
    name = options.device.split(",")[0]
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name in ("auto", "all") else name)
    preprocess, postprocess = Preprocess(device, defaults.input_size), Postprocess(device)
    network = build_module(NETWORK, load_weights("demo", NETWORK)).to(device)
    person = pretrained_weights(NETWORK).meta["categories"].index("person")

    @torch.inference_mode()
    def segment(requests):
        photos, images = preprocess([read_photo(requests[0]["image"][0], defaults.max_pixels)])
        probabilities = network(images)["out"].softmax(dim=1)
        cut_outs, _masks = postprocess(photos, probabilities[:, person], [defaults.threshold])
        outputs = {"original": photos, "segmented": cut_outs}
        return [{name: np.asarray(batch.as_cpu()[0])[None] for name, batch in outputs.items()}]

    outputs = [tensor for tensor in OUTPUTS if tensor.name in ("original", "segmented")]
    exit_on_signals()  # otherwise, PyTriton's workspace would remain
    prepare_environment()  # so that Triton finds the libpython of this interpreter
    try:
        with Triton(config=configure(options)) as triton:
            triton.bind(
                model_name=MODEL_NAME,
                infer_func=segment,
                inputs=INPUTS,
                outputs=outputs,
                config=ModelConfig(max_batch_size=1),
            )
            triton.serve()
    finally:
        remove_after_server(os.getpid(), ())  # PyTriton leaves stub processes if it is interrupted during its start


if __name__ == "__main__":
    main()
