# SPDX-License-Identifier: Apache-2.0
"""Send photos to the model ResNet101 and write what comes back to disk.

    python client.py --image-paths a.jpg b.jpg --dump-images

Exit status: 0 when all photos were answered, 1 when some were not, 2 when nothing could be sent.
"""

import argparse
import logging
import re
import sys
import threading
import time
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
REQUEST_TIMEOUT_S = 300.0  # enough for a long queue in front of a server without a GPU

LOGGER = logging.getLogger("client")


class UsageError(Exception):
    """Nothing can be sent; the message is one line for the user."""


class RequestError(Exception):
    """One photo was not answered; the message is the server's sentence."""


class Connection:
    """Talks to one server. Triton's HTTP client is not thread-safe, so every thread gets a client of its own."""

    def __init__(self, url: str, verbose: bool):
        """``url``: http://host:port, grpc://host:port or host; the port may be left out. Raises UsageError."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname or parts.path.strip("/"):
            raise UsageError(f"--url {url} is none of http://host:port, grpc://host:port and host")
        try:
            port = parts.port or DEFAULT_PORTS[parts.scheme]
        except ValueError as error:
            raise UsageError(f"--url {url}: {error}") from None
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self._address = f"{host}:{port}"
        self.url = f"{parts.scheme}://{self._address}"
        self._verbose = verbose
        self._triton: ModuleType = tritonclient.grpc if parts.scheme == "grpc" else tritonclient.http
        self._clients = threading.local()

    def wait_for_model(self, timeout_s: float) -> None:
        """Return when the model is ready. Raises UsageError when it is not within ``timeout_s`` seconds."""
        deadline = time.monotonic() + timeout_s
        announced = False
        while True:
            try:
                if self._is_ready(max(0.1, deadline - time.monotonic())):
                    return
                state = f"the server does not have the model {MODEL_NAME} ready"
            except Exception as error:  # refused, unknown host, no HTTP: each library has exceptions of its own for it
                state = f"no server answers there ({sentence(error)})"
            if time.monotonic() > deadline:
                raise UsageError(
                    f"{self.url}: {state}; start it with `python server.py` or see --url and --init-timeout-s"
                )
            if not announced:
                LOGGER.info("waiting up to %g s for %s to serve %s", timeout_s, self.url, MODEL_NAME)
                announced = True
            time.sleep(0.2)

    def _is_ready(self, timeout_s: float) -> bool:
        if self._triton is tritonclient.grpc:
            return self._client().is_model_ready(MODEL_NAME, client_timeout=timeout_s)
        timeouts = {"connection_timeout": timeout_s, "network_timeout": timeout_s}
        with tritonclient.http.InferenceServerClient(self._address, **timeouts) as client:
            return client.is_model_ready(MODEL_NAME)

    def segment(self, encoded: bytes, parameters: dict) -> tuple[np.ndarray, np.ndarray]:
        """Return ``original`` and ``segmented``, uint8 ``[H, W, 3]`` each. Raises RequestError."""
        photo = np.frombuffer(encoded, np.uint8)[None]
        image = self._triton.InferInput("image", photo.shape, "UINT8")
        image.set_data_from_numpy(photo)
        outputs = [self._triton.InferRequestedOutput(name) for name in ("original", "segmented")]
        try:
            result = self._client().infer(
                MODEL_NAME, [image], outputs=outputs, parameters=parameters, **self._timeout()
            )
        except Exception as error:
            raise RequestError(sentence(error)) from error
        return result.as_numpy("original")[0], result.as_numpy("segmented")[0]

    def _client(self):
        if not hasattr(self._clients, "client"):
            options = {"network_timeout": REQUEST_TIMEOUT_S} if self._triton is tritonclient.http else {}
            self._clients.client = self._triton.InferenceServerClient(self._address, verbose=self._verbose, **options)
        return self._clients.client

    def _timeout(self) -> dict:
        return {"client_timeout": REQUEST_TIMEOUT_S} if self._triton is tritonclient.grpc else {}


def sentence(error: Exception) -> str:
    """Return the line of an error that says what was wrong: PyTriton wraps the server's into tracebacks."""
    text = str(error).split("\nAt:\n")[0].strip() or type(error).__name__
    if "Exceeds maximum queue size" in text:
        return "the server is busy, and as many as it lets wait do so: send the photo again later"
    found = re.search(r"(InvalidRequest|InferenceFailed): (.*)", text)
    return found[2] if found else text.splitlines()[-1]


def segment_file(connection: Connection, path: Path, index: int, options: argparse.Namespace) -> str:
    """Send one photo, dump the images if wanted and return a line of report. Raises RequestError."""
    began = time.monotonic()
    encoded = path.read_bytes()
    if not encoded:
        raise RequestError("the file is empty")
    original, segmented = connection.segment(encoded, options.parameters)
    took = time.monotonic() - began
    height, width, _ = original.shape
    line = f"{path}: {width} x {height} pixels, {segmented.any(axis=2).mean():.0%} kept, {took * 1000:.0f} ms"
    if options.dump_images:
        for name, image in (("orig", original), ("segm", segmented)):
            target = options.output_dir / f"{name}{index}.jpg"
            # Without subsampling: the edge between the cut-out and black is what one looks at.
            Image.fromarray(image).save(target, quality=95, subsampling=0)
            line += f", {target}"
    return line


class OneLineParser(argparse.ArgumentParser):
    """Answers a mistake with a line, where argparse prints its usage, too."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse_options() -> argparse.Namespace:
    """Read the command line; a mistake on it ends the process with status 2."""
    parser = OneLineParser(
        description=f"Send photos to the model {MODEL_NAME} and report or write what comes back.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--image-paths", type=Path, nargs="+", metavar="FILE", default=[SAMPLE_PHOTO], help="the photos to send")
    add(
        "--dump-images",
        action="store_true",
        help="write orig0.jpg, segm0.jpg, orig1.jpg, ... in the order of the paths",
    )
    add("--output-dir", type=Path, default=Path(), help="where to write them; made if missing")
    add("--url", default="http://127.0.0.1:8000", help="http://host:port, grpc://host:port or host")
    add("--init-timeout-s", type=float, default=30, help="how long to wait for the model to be ready")
    add("--class-name", help="the class to cut out, a Pascal VOC name (default: the server's)")
    add("--threshold", type=float, help="the probability to exceed, 0 to 1 (default: the server's)")
    add("--concurrency", type=int, default=4, help="how many photos to keep in flight")
    add("--verbose", action="store_true", help="log what Triton's client does")
    options = parser.parse_args()
    if options.concurrency < 1:
        parser.error("--concurrency has to be at least 1")
    options.parameters = {
        name: value
        for name, value in (("class_name", options.class_name), ("threshold", options.threshold))
        if value is not None
    }
    return options


def send_all(options: argparse.Namespace) -> int:
    """Send all photos and return how many failed. Raises UsageError."""
    for path in options.image_paths:
        try:
            path.open("rb").close()
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if options.dump_images:
        try:
            options.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output-dir {options.output_dir} cannot be made: {error.strerror}") from error
    connection = Connection(options.url, options.verbose)
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
                except (RequestError, OSError) as error:
                    failed += 1
                    tqdm.write(f"{paths[future]}: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def main() -> None:
    """Run the client; the exit status is described above."""
    options = parse_options()
    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.INFO, format="%(message)s")
    try:
        failed = send_all(options)
    except UsageError as error:
        print(f"client.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if failed:
        print(f"client.py: {failed} of {len(options.image_paths)} photos failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
