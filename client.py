# SPDX-License-Identifier: Apache-2.0
"""Send photos to the server, and report or write the results.

    python client.py --image-paths a.jpg b.jpg --dump-images

Exit status: 0 if all photos succeeded, 1 if some failed or the report is incomplete, 2 if nothing could be sent, 130
after Ctrl-C, 141 if no program reads stdout any longer and there are no files to write. Details: docs/client.md
"""

import argparse
import functools
import io
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from client_files import OutputFolder, PhotoFile, find_photos
from client_report import Report, Result, Speaker, plural, say
from connection import MODEL_NAME, ClientError, Connection, InferenceError
from palette import palette_png
from photo import read_photo

SAMPLE_PHOTO = Path(__file__).parent / "images" / "orig.jpg"
MAPS = ("mask", "probability", "labels")
FORMATS = {"raw": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}  # and their file extensions
PROGRESS = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} photos [{elapsed}<{remaining}, {rate_noinv_fmt}]"

LOGGER = logging.getLogger("client")

Image.MAX_IMAGE_PIXELS = None  # the server decides how large a photo may be


def wanted_files(options: argparse.Namespace) -> dict[str, str]:
    """Return the kinds of files to write for each photo, with their extensions."""
    extensions = {}
    if options.dump_images:
        extensions["orig"] = "jpg"
    if options.dump_images or options.format != "raw":
        extensions["segm"] = FORMATS[options.format]
    return extensions | {name: "png" for name in MAPS if getattr(options, name)}


def segment_file(
    connection: Connection, path: Path, targets: Mapping[str, Path], output: OutputFolder, options: argparse.Namespace
) -> Result:
    """Send one photo and write its files. Raises the errors of Pillow, the connection and the file system."""
    began = time.monotonic()
    encoded = path.read_bytes()
    if not encoded:
        raise InferenceError("the file is empty")
    # Always request the mask: with one byte per pixel, it shows the exact share of the pixels that is kept.
    outputs, parameters = ["mask"], options.parameters
    if options.format != "raw":
        outputs, parameters = ["mask", "encoded"], parameters | {"format": options.format}
    elif options.dump_images:
        outputs = ["mask", "original"]  # from which the client computes "segmented"
    outputs += [name for name in MAPS if name in targets and name not in outputs]
    response = {name: array[0] for name, array in connection.infer(encoded, outputs, parameters).items()}
    took = time.monotonic() - began
    mask, original, cut_out = response["mask"], response.get("original"), response.get("encoded")
    height, width = mask.shape
    contents = {
        "orig": lambda: file_of(upright(encoded) if original is None else Image.fromarray(original), "JPEG"),
        "segm": lambda: cut_out.tobytes() if cut_out is not None else file_of(cut(original, mask), "JPEG"),
        "mask": lambda: file_of(Image.fromarray(mask).convert("1", dither=Image.Dither.NONE), "PNG"),
        "probability": lambda: file_of(Image.fromarray(response["probability"]), "PNG"),
        "labels": lambda: palette_png(response["labels"]),
    }
    for kind, target in targets.items():
        output.write(path, target, contents[kind]())
    size = None if cut_out is None else len(cut_out)
    kept = round(float((mask > 0).mean()), 6)
    files = [str(target) for target in targets.values()]
    return Result(str(path), width, height, kept, size, round(took * 1000, 1), files)


def cut(original: np.ndarray, mask: np.ndarray) -> Image.Image:
    """Return the photo, uint8 ``[H, W, 3]``, with black where the mask, uint8 ``[H, W]``, is 0: ``segmented``."""
    return Image.fromarray(np.where(mask[..., None] > 0, original, np.uint8(0)))


def upright(encoded: bytes) -> Image.Image:
    """Return the photo in a file as the server reads it, with its EXIF orientation applied."""
    photo = read_photo(np.frombuffer(encoded, np.uint8), max_pixels=sys.maxsize)
    image = Image.open(io.BytesIO(photo.encoded))
    image.getexif()[ExifTags.Base.Orientation] = photo.orientation
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def file_of(image: Image.Image, kind: str) -> bytes:
    """Return the image as a ``JPEG`` or ``PNG`` file."""
    stream = io.BytesIO()
    # PNG ignores these options. Chroma subsampling would blur the edge between the cut-out and black.
    image.save(stream, kind, quality=95, subsampling=0)
    return stream.getvalue()


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. An error ends the process with one line and status 2."""
    parser = argparse.ArgumentParser(
        description=f"Send photos to the model {MODEL_NAME}, and report or write the results.",
        usage=argparse.SUPPRESS,  # argparse would print it above every error message
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_flag = functools.partial(add, action="store_true")
    add_optional = functools.partial(add, default=argparse.SUPPRESS)  # the formatter appends other defaults to the help
    add_optional(
        "--image-paths",
        nargs="+",
        metavar="PATH",
        help="photos to send: files, folders and patterns such as 'photos/*.jpg' (default: images/orig.jpg)",
    )
    add_flag("--dump-images", help="write orig0.jpg, segm0.jpg, orig1.jpg, ... in the order of the photos")
    add("--format", choices=FORMATS, default="raw", help="format of the cut-out; files are written unchanged")
    add_flag("--mask", help="write mask0.png, ...: white where the class was found")
    add_flag("--probability", help="write probability0.png, ...: white where the class is certain")
    add_flag("--labels", help="write labels0.png, ...: the color of the most probable class")
    add_optional(
        "--edge",
        type=float,
        help="range of probabilities that become half transparent in png and webp files (default: 0, a hard edge)",
    )
    add_flag("--keep-names", help="name the files after the photos: beach.png instead of segm0.png")
    add_flag("--skip-existing", help="skip photos whose files exist, to resume a run; implies --keep-names")
    add("--output-dir", type=Path, default=Path(), help="folder for the files; created if missing")
    add_flag("--overwrite", help="replace files that the client did not write, but never a photo")
    add_optional(
        "--report",
        type=Path,
        metavar="FILE",
        help="write one line of JSON for each photo; - means stdout (default: none)",
    )
    add(
        "--url",
        default="http://127.0.0.1:8000",
        help="http://host:port, https://host:port, grpc://host:port, grpcs://host:port or host",
    )
    add_optional("--api-key", help="key for the proxy in front of the server (default: API_KEY in the environment)")
    add_optional(
        "--ca-file", type=Path, metavar="FILE", help="certificates to trust, in PEM format (default: the system's)"
    )
    add("--init-timeout-s", type=float, default=30, help="seconds to wait for the model to be ready")
    add("--retry-s", type=float, default=300, help="seconds to retry a photo if the server is busy or unreachable")
    add_optional("--class-name", help="class or classes to keep, such as person or cat,dog (default: the server's)")
    add_optional("--threshold", type=float, help="probability to exceed, between 0 and 1 (default: the server's)")
    add("--concurrency", type=int, default=4, help="number of photos in flight")
    add_flag("--verbose", help="log each request and each retry")
    defaults = argparse.Namespace(
        image_paths=[str(SAMPLE_PHOTO)], api_key=os.environ.get("API_KEY", ""), ca_file=None, report=None
    )
    options = parser.parse_args(arguments, defaults)
    if options.concurrency < 1:
        parser.error(f"argument --concurrency: must be a whole number >= 1, not {options.concurrency}")
    for name, seconds in (("--init-timeout-s", options.init_timeout_s), ("--retry-s", options.retry_s)):
        if not 0 <= seconds < math.inf:
            parser.error(f"argument {name}: must be a finite number >= 0, not {seconds}")
    for name, is_set in (("--skip-existing", options.skip_existing), ("--keep-names", options.keep_names)):
        if is_set and not wanted_files(options):
            parser.error(f"argument {name}: requires --dump-images, a --format other than raw, or a map such as --mask")
    if any("\ud800" <= character <= "\udfff" for character in getattr(options, "class_name", "")):
        parser.error("argument --class-name: must be valid UTF-8")
    if hasattr(options, "edge") and options.format not in ("png", "webp"):
        parser.error("argument --edge: requires --format png or webp")
    options.keep_names |= options.skip_existing
    options.parameters = {
        name: getattr(options, name) for name in ("class_name", "threshold", "edge") if hasattr(options, name)
    }
    return options


class Task(NamedTuple):
    """A photo to send, and the files to write, by kind."""

    photo: PhotoFile
    targets: Mapping[str, Path]


def plan_tasks(
    photos: Sequence[PhotoFile], output: OutputFolder, extensions: Mapping[str, str], options: argparse.Namespace
) -> list[Task]:
    """Return the photos to send. Raises ClientError if this would overwrite a file that the client did not write."""
    if options.keep_names:
        tasks = [Task(photo, output.named(photo.path, extensions)) for photo in dict.fromkeys(photos)]
    else:
        tasks = [Task(photo, output.numbered(index, extensions)) for index, photo in enumerate(photos)]
    todo = [
        task
        for task in tasks
        if task.photo.problem or not (options.skip_existing and all(map(os.path.lexists, task.targets.values())))
    ]
    if skipped := len(tasks) - len(todo):
        say(f"skipping {skipped} of {plural(len(tasks), 'photo')}: the output files exist")
    targets = [target for task in todo if not task.photo.problem for target in task.targets.values()]
    if obstacles := [obstacle for target in targets if (obstacle := output.obstacle(target))]:
        others = f" (and {plural(len(obstacles) - 1, 'other')})" if obstacles[1:] else ""
        advice = "set another --output-dir, or --keep-names" + ", or --overwrite" * ("exists" in obstacles[0])
        raise ClientError(f"{obstacles[0]}{others}: {advice}")
    return todo


def send_all(options: argparse.Namespace) -> int:
    """Send all photos, and return the exit status. Raises ClientError."""
    extensions = wanted_files(options)
    photos = find_photos(options.image_paths, options.output_dir if extensions else None)
    if not photos:
        raise ClientError("--image-paths: this client wrote all of these files: set another --output-dir")
    problems = [photo for photo in photos if photo.problem]
    if len(problems) == len(photos):
        for photo in problems[:-1]:
            say(f"client.py: --image-paths: {photo.path} {photo.problem}")
        raise ClientError(f"--image-paths: {problems[-1].path} {problems[-1].problem}")
    output = OutputFolder(options.output_dir, [photo.path for photo in photos], options.overwrite)
    tasks = plan_tasks(photos, output, extensions, options)
    if not tasks:
        return 0
    if extensions:
        output.create()
    report = Report(options.report, output.obstacle(options.report) if options.report else "")
    connection = Connection(options.url, api_key=options.api_key, ca_file=options.ca_file, retry_s=options.retry_s)
    connection.wait_for_model(options.init_timeout_s)
    report.begin()
    with ThreadPoolExecutor(options.concurrency) as pool:
        return send_tasks(tasks, pool, connection, output, report, options)


def send_tasks(
    tasks: Sequence[Task],
    pool: ThreadPoolExecutor,
    connection: Connection,
    output: OutputFolder,
    report: Report,
    options: argparse.Namespace,
) -> int:
    """Send photos, report on each, and return the exit status. Raises ClientError."""
    began = time.monotonic()
    succeeded = failed = 0

    def say_summary() -> None:
        seconds = time.monotonic() - began
        photos = f"{succeeded + failed} of {plural(len(tasks), 'photo')}, {failed} failed"
        say(f"client.py: {photos}, {seconds:.1f} s, {succeeded / seconds:.1f} photos/s")

    futures: dict[Future, Path] = {}
    try:
        for task in tasks:
            if task.photo.problem:
                report.add(Result(str(task.photo.path), error=task.photo.problem))
                failed += 1
            else:
                future = pool.submit(segment_file, connection, task.photo.path, task.targets, output, options)
                futures[future] = task.photo.path
        hide = True if len(futures) < 2 else None  # None: unless stderr is a terminal
        finished = as_completed(futures)
        for future in tqdm(finished, total=len(futures), unit=" photos", bar_format=PROGRESS, disable=hide):
            try:
                result = future.result()
                succeeded += 1
            except Exception as error:  # Pillow can raise anything on a damaged file
                if getattr(error, "denied", False) and not succeeded:
                    pool.shutdown(wait=False, cancel_futures=True)  # the others would be denied as well
                    raise ClientError(f"{connection.url}: {error}") from error
                result = Result(str(futures[future]), error=getattr(error, "strerror", None) or str(error))
                failed += 1
            report.add(result)
            if not report.is_read and not wanted_files(options):
                os._exit(1 if report.incomplete else 128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        output.stop()
        say_summary()
        say("client.py: interrupted")
        os._exit(130)  # Python's own exit would wait for the requests in flight
    say_summary()
    return 1 if failed or report.incomplete else 0


def main() -> None:
    """Run the client. The module's docstring lists the exit statuses."""
    options = parse_options()
    if not options.verbose:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # otherwise, gRPC's library writes to stderr as well
    logging.basicConfig(handlers=[Speaker()])
    LOGGER.setLevel(logging.DEBUG if options.verbose else logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # and not closed
            stream.reconfigure(errors="backslashreplace")  # so that it can print the name of any file
    try:
        sys.exit(send_all(options))
    except ClientError as error:
        say(f"client.py: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
