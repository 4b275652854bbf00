# SPDX-License-Identifier: Apache-2.0
"""A server for text: one input with several strings, and one output with a string for each of their words."""

import sys
from pathlib import Path

import numpy as np
from pytriton.model_config import ModelConfig, Tensor
from pytriton.proxy.types import Request

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from serving import InvalidRequest, Server, Stages
from serving.options import add_serving_options, make_parser, number


class Words(Stages):
    """Splits texts into words, in upper case."""

    size_option = "max_characters"

    @classmethod
    def limits(cls, options):
        # Of a text, and of its words: up to 4 bytes per character, and 4 bytes in front of each string.
        return 8 * options.max_characters, 16 * options.max_characters

    @classmethod
    def example(cls, options):  # noqa: ARG003
        texts = np.array([b"two words", "größer".encode()], object)
        return Request({"texts": texts}, {}, requested_output_names=["words", "counts"])

    def __init__(self, options, device):  # noqa: ARG002
        self.max_characters = options.max_characters

    def read(self, request):
        try:
            texts = [text.decode() for text in request["texts"]]
        except UnicodeDecodeError:
            raise InvalidRequest("the texts must be UTF-8") from None
        if sum(map(len, texts)) > self.max_characters:
            raise InvalidRequest(f"the texts have more than {self.max_characters} characters")
        words = [text.upper().split() for text in texts]
        if not any(words):  # PyTriton cannot pass on an empty array
            raise InvalidRequest("the texts have no words")
        return words

    def __call__(self, jobs):
        return [
            {
                "words": np.array([word for text in job for word in text]),
                "counts": np.array([len(text) for text in job]),
            }
            for job in jobs
        ]


def main():
    parser = make_parser("Split texts into words.")
    parser.add_argument("--max-characters", type=number(int, 1), default=100_000)
    add_serving_options(parser)
    parser.set_defaults(device="cpu")
    with Server(Words, parser.parse_args()) as server:
        server.bind(
            model_name="Words",
            infer_func=server.instances,
            inputs=[Tensor(name="texts", dtype=np.bytes_, shape=(-1,))],
            outputs=[
                Tensor(name="words", dtype=np.bytes_, shape=(-1,)),
                Tensor(name="counts", dtype=np.int64, shape=(-1,)),
            ],
            config=ModelConfig(max_batch_size=1),
        )
        server.serve()


if __name__ == "__main__":
    main()
