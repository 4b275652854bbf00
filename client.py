# SPDX-License-Identifier: Apache-2.0
"""Send photos to the server, and report or write what comes back.

    python client.py --image-paths a.jpg b.jpg --dump-images

Exit status: 0 if all photos were answered, 1 if some were not, 2 if nothing could be sent, 130 after Ctrl-C.
"""

import argparse
import glob
import io
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
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from photo import read_photo

MODEL_NAME = "ResNet101"
SAMPLE_PHOTO = Path(__file__).parent / "images" / "orig.jpg"
DEFAULT_PORTS = {"http": 8000, "grpc": 8001}
FORMATS = {"raw": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}  # and the endings of their files
PHOTO_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
PROGRESS = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} photos [{elapsed}<{remaining}, {rate_noinv_fmt}]"
REQUEST_TIMEOUT_S = 300.0  # enough for a long queue at a server without a GPU

LOGGER = logging.getLogger("client")

Image.MAX_IMAGE_PIXELS = None  # the server decides how large a photo may be


class ClientError(Exception):
    """Nothing can be sent. The message is one line for the user."""


class InferenceError(Exception):
    """One request was not answered. The message is the server's sentence."""


class Connection:
    """Talks to a model on one server. Any thread may use it."""

    def __init__(self, url: str, model_name: str = MODEL_NAME, verbose: bool = False, api_key: str = ""):
        """``url`` is http://host:port, grpc://host:port or host; the port may be omitted. Raises ClientError.

        ``api_key`` is for the proxy in front of a server; see docs/security.md.
        """
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise ClientError(f"--url {url}: {error}") from None
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname or parts.path.strip("/"):
            raise ClientError(f"--url must be http://host:port, grpc://host:port or host, not {url}")
        if port is None:
            port = DEFAULT_PORTS[parts.scheme]
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self._address = f"{host}:{port}"
        self.url = f"{parts.scheme}://{self._address}"
        self.model_name = model_name
        self._verbose = verbose
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
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
                state = f"cannot reach the server ({explain(error)})"
            if time.monotonic() > deadline:
                raise ClientError(
                    f"{self.url}: {state}. Start it with `python server.py`, or set --url or --init-timeout-s"
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
        """Return the outputs that are named, or the server's default ones, with a batch dimension of 1.

        ``encoded`` are the bytes of a photo. The server refuses it once it has waited for ``timeout_us`` microseconds.
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
                headers=self._headers,
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


def target_files(index: int, options: argparse.Namespace) -> dict[str, Path]:
    """Return the files to write for a photo, by ``orig``, ``segm`` and ``mask``."""
    endings = {}
    if options.dump_images:
        endings["orig"] = "jpg"
    if options.dump_images or options.format != "raw":
        endings["segm"] = FORMATS[options.format]
    if options.mask:
        endings["mask"] = "png"
    return {name: options.output_dir / f"{name}{index}.{ending}" for name, ending in endings.items()}


def segment_file(connection: Connection, path: Path, targets: Mapping[str, Path], options: argparse.Namespace) -> str:
    """Send one photo, write its files, and return one line of report. Raises what Pillow or the connection raises."""
    began = time.monotonic()
    encoded = path.read_bytes()
    if not encoded:
        raise InferenceError("the file is empty")
    if options.format == "raw":
        outputs, parameters = ["original", "segmented"], options.parameters
    else:
        outputs, parameters = ["encoded"], options.parameters | {"format": options.format}
    answer = connection.infer(encoded, outputs + ["mask"] * options.mask, parameters)
    answer = {name: array[0] for name, array in answer.items()}
    took = time.monotonic() - began
    contents = {
        "orig": lambda: jpeg_file(Image.fromarray(answer["original"]) if "original" in answer else upright(encoded)),
        "segm": lambda: answer["encoded"] if "encoded" in answer else jpeg_file(Image.fromarray(answer["segmented"])),
        "mask": lambda: png_file(Image.fromarray(answer["mask"])),
    }
    for name, target in targets.items():
        write_file(contents[name](), target)
    return ", ".join([f"{path}: {describe(answer)}", f"{took * 1000:.0f} ms", *map(str, targets.values())])


def describe(answer: Mapping[str, np.ndarray]) -> str:
    """Return the size of the photo in an answer, how much of it was kept, and the size of the file."""
    if "encoded" in answer:
        width, height = Image.open(io.BytesIO(answer["encoded"])).size
    else:
        height, width, _ = answer["original"].shape
    facts = [f"{width} x {height} pixels"]
    if "mask" in answer:
        facts.append(f"{(answer['mask'] > 0).mean():.0%} kept")
    elif "original" in answer:
        # Where the photo itself is black, nobody can tell whether it was kept.
        kept = answer["segmented"].any(axis=2).sum() / max(1, answer["original"].any(axis=2).sum())
        facts.append(f"{kept:.0%} kept")
    if "encoded" in answer:
        facts.append(f"{len(answer['encoded']) / 1000:.0f} KB")
    return ", ".join(facts)


def upright(encoded: bytes) -> Image.Image:
    """Return the photo in a file as the server reads it, with its EXIF orientation applied."""
    photo = read_photo(np.frombuffer(encoded, np.uint8), max_pixels=sys.maxsize)
    image = Image.open(io.BytesIO(photo.encoded))
    image.getexif()[ExifTags.Base.Orientation] = photo.orientation
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # which Pillow would clip instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def jpeg_file(image: Image.Image) -> bytes:
    """Return the image as a JPEG file. Chroma subsampling would blur the edge between the cut-out and black."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95, subsampling=0)
    return stream.getvalue()


def png_file(mask: Image.Image) -> bytes:
    """Return a mask of 0 and 255 as a PNG file with one bit per pixel."""
    stream = io.BytesIO()
    mask.convert("1", dither=Image.Dither.NONE).save(stream, "PNG")
    return stream.getvalue()


def write_file(content: bytes | np.ndarray, target: Path) -> None:
    """Write a file. After an interruption, it is either complete or not there."""
    unfinished = target.with_name(f"{target.name}.part")
    unfinished.write_bytes(content)
    unfinished.replace(target)


def find_photos(patterns: Sequence[str]) -> list[Path]:
    """Return the files that the arguments of ``--image-paths`` mean, in a stable order. Raises ClientError."""
    photos = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in PHOTO_ENDINGS)
            if not found:
                raise ClientError(f"--image-paths: {path} contains no photos ({', '.join(sorted(PHOTO_ENDINGS))})")
        elif path.exists() or not glob.has_magic(pattern):
            found = [path]
        else:
            found = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207 - Path.glob takes no absolute pattern
            if not found:
                raise ClientError(f"--image-paths: {pattern} matches no file")
        photos += found
    for photo in photos:
        try:
            photo.open("rb").close()
        except OSError as error:
            raise ClientError(f"--image-paths: cannot read {photo} ({error.strerror})") from error
    return photos


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line. A mistake ends the process with one line and status 2."""
    parser = argparse.ArgumentParser(
        description=f"Send photos to the model {MODEL_NAME}, and report or write what comes back.",
        usage=argparse.SUPPRESS,  # it would appear above every error message
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--image-paths",
        nargs="+",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="photos to send: files, folders and patterns such as 'photos/*.jpg' (default: images/orig.jpg)",
    )
    add(
        "--dump-images",
        action="store_true",
        help="write orig0.jpg, segm0.jpg, orig1.jpg, ... in the order of the photos",
    )
    add(
        "--format",
        choices=FORMATS,
        default="raw",
        help="how the server sends the cut-out; jpeg, png and webp files are written unchanged",
    )
    add("--mask", action="store_true", help="write mask0.png, ...: white where the class was found")
    add(
        "--skip-existing",
        action="store_true",
        help="skip photos whose files exist, to resume with the same photos",
    )
    add("--output-dir", type=Path, default=Path(), help="folder for the files; created if missing")
    add("--url", default="http://127.0.0.1:8000", help="http://host:port, grpc://host:port or host")
    add(
        "--api-key",
        default=argparse.SUPPRESS,
        help="key for the proxy in front of the server (default: API_KEY in the environment, or none)",
    )
    add("--init-timeout-s", type=float, default=30, help="seconds to wait for the model to be ready")
    add(
        "--class-name",
        default=argparse.SUPPRESS,
        help="what to cut out, such as person or cat,dog (default: the server's)",
    )
    add(
        "--threshold",
        type=float,
        default=argparse.SUPPRESS,
        help="probability to exceed, between 0 and 1 (default: the server's)",
    )
    add("--concurrency", type=int, default=4, help="how many photos to keep in flight")
    add("--verbose", action="store_true", help="log what Triton's client does")
    defaults = argparse.Namespace(image_paths=[str(SAMPLE_PHOTO)], api_key=os.environ.get("API_KEY", ""))
    options = parser.parse_args(arguments, defaults)
    if options.concurrency < 1:
        parser.error(f"argument --concurrency: must be at least 1, not {options.concurrency}")
    if options.skip_existing and not target_files(0, options):
        parser.error("argument --skip-existing: needs --dump-images, --mask or a --format other than raw")
    options.parameters = {
        name: getattr(options, name) for name in ("class_name", "threshold") if hasattr(options, name)
    }
    return options


def send_all(options: argparse.Namespace) -> tuple[int, int]:
    """Send all photos, and return how many were sent and how many failed. Raises ClientError."""
    jobs = [(path, target_files(index, options)) for index, path in enumerate(find_photos(options.image_paths))]
    if target_files(0, options):
        try:
            options.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClientError(f"--output-dir: cannot create {options.output_dir} ({error.strerror})") from error
    if options.skip_existing:
        missing = [job for job in jobs if not all(target.exists() for target in job[1].values())]
        print(f"skipping {len(jobs) - len(missing)} of {len(jobs)} photos: their output files exist")
        jobs = missing
        if not jobs:
            return 0, 0
    connection = Connection(options.url, verbose=options.verbose, api_key=options.api_key)
    connection.wait_for_model(options.init_timeout_s)

    failures = []
    with ThreadPoolExecutor(options.concurrency) as pool:
        try:
            paths = {pool.submit(segment_file, connection, *job, options): job[0] for job in jobs}
            progress = tqdm(
                as_completed(paths), total=len(paths), unit=" photos", bar_format=PROGRESS, disable=len(paths) < 2
            )
            for future in progress:
                try:
                    tqdm.write(future.result())
                except Exception as error:  # Pillow raises whatever the damage makes it stumble over
                    failures.append(f"{paths[future]}: {error}")
        except KeyboardInterrupt:
            print(*failures, "client.py: interrupted", sep="\n", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(130)  # Python's own exit would wait for the requests in flight
    print(*failures, sep="\n", end="\n" if failures else "", file=sys.stderr)
    return len(jobs), len(failures)


def main() -> None:
    """Run the client. The exit status is described at the top of this file."""
    options = parse_options()
    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.INFO, format="%(message)s")
    try:
        sent, failed = send_all(options)
    except ClientError as error:
        print(f"client.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if failed:
        print(f"client.py: {failed} of {sent} photos failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
