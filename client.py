# SPDX-License-Identifier: Apache-2.0
"""Send photos to the server, and report or write what comes back.

    python client.py --image-paths a.jpg b.jpg --dump-images

Exit status: 0 if all photos were answered, 1 if some were not, 2 if nothing could be sent, 130 after Ctrl-C.
"""

import argparse
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import numpy as np
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tqdm import tqdm

MODEL_NAME = "ResNet101"
SAMPLE_PHOTO = Path(__file__).parent / "images" / "orig.jpg"
DEFAULT_PORTS = {"http": 8000, "grpc": 8001}
REQUEST_TIMEOUT_S = 300.0  # enough for a long queue at a server without a GPU

LOGGER = logging.getLogger("client")


class ClientError(Exception):
    """Nothing can be sent. The message is one line for the user."""


class InferenceError(Exception):
    """One request was not answered. The message is the server's sentence."""


class Connection:
    """Talks to a model on one server. Any thread may use it."""

    def __init__(self, url: str, model_name: str = MODEL_NAME, verbose: bool = False):
        """``url`` is http://host:port, grpc://host:port or host; the port may be omitted. Raises ClientError."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname or parts.path.strip("/"):
            raise ClientError(f"--url must be http://host:port, grpc://host:port or host, not {url}")
        try:
            port = parts.port or DEFAULT_PORTS[parts.scheme]
        except ValueError as error:
            raise ClientError(f"--url {url}: {error}") from None
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self._address = f"{host}:{port}"
        self.url = f"{parts.scheme}://{self._address}"
        self.model_name = model_name
        self._verbose = verbose
        self._triton: ModuleType = tritonclient.grpc if parts.scheme == "grpc" else tritonclient.http
        self._local = threading.local()

    def wait_for_model(self, timeout_s: float) -> None:
        """Return when the model is ready. Raises ClientError if it is not within ``timeout_s`` seconds."""
        deadline = time.monotonic() + timeout_s
        announced = False
        while True:
            try:
                if self._is_ready(max(0.1, deadline - time.monotonic())):
                    return
                state = f"the model {self.model_name} is not ready"
            except Exception as error:  # refused, unknown host, not HTTP: each library has its own exceptions
                state = f"no server answers ({explain(error)})"
            if time.monotonic() > deadline:
                raise ClientError(
                    f"{self.url}: {state}: start one with `python server.py`, or set --url or --init-timeout-s"
                )
            if not announced:
                LOGGER.info("waiting up to %g s for %s to serve %s", timeout_s, self.url, self.model_name)
                announced = True
            time.sleep(0.2)

    def _is_ready(self, timeout_s: float) -> bool:
        if self._triton is tritonclient.grpc:
            return self.client.is_model_ready(self.model_name, client_timeout=timeout_s)
        timeouts = {"connection_timeout": timeout_s, "network_timeout": timeout_s}
        with tritonclient.http.InferenceServerClient(self._address, **timeouts) as client:
            return client.is_model_ready(self.model_name)

    def infer(
        self,
        encoded: bytes,
        outputs: Sequence[str] = (),
        parameters: Mapping[str, object] | None = None,
        timeout_us: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the outputs that are named, or all, with a batch dimension of 1. Raises InferenceError.

        ``encoded`` are the bytes of a photo. A server that has not begun after ``timeout_us`` does not begin at all.
        """
        options = {"client_timeout": REQUEST_TIMEOUT_S} if self._triton is tritonclient.grpc else {}
        if outputs:
            options["outputs"] = [self._triton.InferRequestedOutput(name) for name in outputs]
        try:
            result = self.client.infer(
                self.model_name,
                [self.image_input(encoded)],
                parameters=dict(parameters or {}),
                timeout=timeout_us,
                **options,
            )
        except Exception as error:
            raise InferenceError(explain(error)) from error
        response = result.get_response()
        received = response["outputs"] if isinstance(response, dict) else response.outputs
        names = [output["name"] if isinstance(output, dict) else output.name for output in received]
        return {name: result.as_numpy(name) for name in names}

    def image_input(self, encoded: bytes) -> tritonclient.http.InferInput | tritonclient.grpc.InferInput:
        """Return the model's input, UINT8 ``[1, N]``, for Triton's own client."""
        photo = np.frombuffer(encoded, np.uint8)[None]
        image = self._triton.InferInput("image", photo.shape, "UINT8")
        image.set_data_from_numpy(photo)
        return image

    @property
    def client(self) -> tritonclient.http.InferenceServerClient | tritonclient.grpc.InferenceServerClient:
        """Triton's own client, one for each thread, because the one for HTTP is not thread-safe."""
        if not hasattr(self._local, "client"):
            options = {"network_timeout": REQUEST_TIMEOUT_S} if self._triton is tritonclient.http else {}
            self._local.client = self._triton.InferenceServerClient(self._address, verbose=self._verbose, **options)
        return self._local.client


def explain(error: Exception) -> str:
    """Return the one line of an error that says what is wrong. PyTriton and Triton wrap it into tracebacks."""
    text = str(error).split("\nAt:\n")[0].strip() or type(error).__name__
    if "Exceeds maximum queue size" in text:
        return "the server is busy and its queue is full: send the photo again later"
    found = re.search(r"(InvalidRequest|InferenceFailed): (.*)", text)
    return found[2] if found else text.splitlines()[-1].strip()


def segment_file(connection: Connection, path: Path, index: int, options: argparse.Namespace) -> str:
    """Send one photo, write the images if wanted, and return one line of report. Raises InferenceError."""
    began = time.monotonic()
    encoded = path.read_bytes()
    if not encoded:
        raise InferenceError("the file is empty")
    answer = connection.infer(encoded, ("original", "segmented"), options.parameters)
    took = time.monotonic() - began
    original, segmented = answer["original"][0], answer["segmented"][0]
    height, width, _ = original.shape
    # Where the photo itself is black, nobody can tell whether it was kept.
    kept = segmented.any(axis=2).sum() / max(1, original.any(axis=2).sum())
    line = f"{path}: {width} x {height} pixels, {kept:.0%} kept, {took * 1000:.0f} ms"
    if options.dump_images:
        for name, image in (("orig", original), ("segm", segmented)):
            target = options.output_dir / f"{name}{index}.jpg"
            write_jpeg(image, target)
            line += f", {target}"
    return line


def write_jpeg(image: np.ndarray, target: Path) -> None:
    """Write an image, uint8 ``[H, W, 3]``. After an interruption, the file is either complete or not there."""
    unfinished = target.with_suffix(".part")
    # Without chroma subsampling, which would blur the edge between the cut-out and black.
    Image.fromarray(image).save(unfinished, "JPEG", quality=95, subsampling=0)
    unfinished.replace(target)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line. A mistake ends the process with one line and status 2."""
    parser = argparse.ArgumentParser(
        description=f"Send photos to the model {MODEL_NAME}, and report or write what comes back.",
        usage=argparse.SUPPRESS,  # it would stand above every error message
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--image-paths", type=Path, nargs="+", metavar="FILE", default=[SAMPLE_PHOTO], help="photos to send")
    add(
        "--dump-images",
        action="store_true",
        help="write orig0.jpg, segm0.jpg, orig1.jpg, ... in the order of the paths",
    )
    add("--output-dir", type=Path, default=Path(), help="where to write them; created if missing")
    add("--url", default="http://127.0.0.1:8000", help="http://host:port, grpc://host:port or host")
    add("--init-timeout-s", type=float, default=30, help="seconds to wait for the model to be ready")
    add("--class-name", default=argparse.SUPPRESS, help="class to cut out, a Pascal VOC name (default: the server's)")
    add(
        "--threshold",
        type=float,
        default=argparse.SUPPRESS,
        help="probability to exceed, between 0 and 1 (default: the server's)",
    )
    add("--concurrency", type=int, default=4, help="how many photos to keep in flight")
    add("--verbose", action="store_true", help="log what Triton's client does")
    options = parser.parse_args(arguments)
    if options.concurrency < 1:
        parser.error(f"argument --concurrency: must be at least 1, not {options.concurrency}")
    options.parameters = {
        name: getattr(options, name) for name in ("class_name", "threshold") if hasattr(options, name)
    }
    return options


def send_all(options: argparse.Namespace) -> int:
    """Send all photos and return how many failed. Raises ClientError."""
    for path in options.image_paths:
        try:
            path.open("rb").close()
        except OSError as error:
            raise ClientError(f"--image-paths: cannot read {path} ({error.strerror})") from error
    if options.dump_images:
        try:
            options.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClientError(f"--output-dir: cannot create {options.output_dir} ({error.strerror})") from error
    connection = Connection(options.url, verbose=options.verbose)
    connection.wait_for_model(options.init_timeout_s)

    failed = 0
    with ThreadPoolExecutor(options.concurrency) as pool:
        paths = {
            pool.submit(segment_file, connection, path, index, options): path
            for index, path in enumerate(options.image_paths)
        }
        try:
            for future in tqdm(as_completed(paths), total=len(paths), unit="photo", disable=len(paths) == 1):
                try:
                    tqdm.write(future.result())
                except (InferenceError, OSError) as error:
                    failed += 1
                    tqdm.write(f"{paths[future]}: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("client.py: interrupted", file=sys.stderr)
            sys.stdout.flush()
            os._exit(130)  # Python's own exit would wait for the requests in flight
    return failed


def main() -> None:
    """Run the client. The exit status is described at the top of this file."""
    options = parse_options()
    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.INFO, format="%(message)s")
    try:
        failed = send_all(options)
    except ClientError as error:
        print(f"client.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if failed:
        print(f"client.py: {failed} of {len(options.image_paths)} photos failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
