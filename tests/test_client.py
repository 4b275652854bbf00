# SPDX-License-Identifier: Apache-2.0
"""The command line of client.py against a real server."""

import http.server
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SAMPLES, decode, encode, free_ports, psnr, run_client
from PIL import Image

PERSON, CAT = SAMPLES["person"][0], SAMPLES["cat"][0]


@pytest.fixture(params=["http", "grpc"])
def url(server, request) -> str:
    return server.http_url if request.param == "http" else server.grpc_url


def image(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_without_arguments_it_reports_on_the_sample(server, tmp_path):
    done = run_client("--url", server.http_url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "orig.jpg: 512 x 512 pixels, 4" in done.stdout
    assert "% kept" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_dump_images_in_the_order_of_the_paths(url, tmp_path):
    small = tmp_path / "small photo.png"
    Image.open(CAT).resize((90, 60)).save(small)
    done = run_client(
        "--url", url, "--dump-images", "--image-paths", PERSON, small, CAT, "--class-name", "cat", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("*.jpg")} == {
        f"{kind}{i}.jpg" for kind in ("orig", "segm") for i in range(3)
    }
    for index, path in enumerate([PERSON, small, CAT]):
        original, segmented = image(tmp_path / f"orig{index}.jpg"), image(tmp_path / f"segm{index}.jpg")
        assert psnr(original, decode(path.read_bytes())) > 35  # the colours are true
        assert segmented.shape == original.shape
    assert image(tmp_path / "segm0.jpg").mean() < 3  # no cat there
    cat = image(tmp_path / "segm2.jpg")
    assert psnr(cat[100:200, 100:250], image(tmp_path / "orig2.jpg")[100:200, 100:250]) > 35
    assert Image.open(tmp_path / "orig0.jpg").quantization == Image.open(reference(tmp_path)).quantization


def reference(folder: Path) -> Path:
    """Return a JPEG of quality 95, to compare quantisation tables with."""
    Image.open(PERSON).save(folder / "quality95.jpg", quality=95)
    return folder / "quality95.jpg"


def test_output_dir_is_made(server, tmp_path):
    done = run_client("--url", server.http_url, "--dump-images", "--output-dir", "a/b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "b" / "segm0.jpg").exists()


def test_threshold_and_class_name_go_along(server, tmp_path):
    done = run_client("--url", server.http_url, "--threshold", 1, cwd=tmp_path)
    assert " 0% kept" in done.stdout
    done = run_client("--url", server.http_url, "--class-name", "cat", "--image-paths", CAT, cwd=tmp_path)
    assert 75 < int(done.stdout.split("pixels,")[1].split("%")[0]) < 85  # the cat fills 79 % of the photo


def test_a_url_without_a_scheme_is_http(server, tmp_path):
    assert run_client("--url", f"127.0.0.1:{server.http_port}", cwd=tmp_path).returncode == 0


def test_progress_bar_for_more_than_one_photo(server, tmp_path):
    assert "photo/s" not in run_client("--url", server.http_url, cwd=tmp_path).stderr
    done = run_client("--url", server.http_url, "--image-paths", *[PERSON] * 5, "--concurrency", 2, cwd=tmp_path)
    assert done.returncode == 0
    assert "5/5" in done.stderr


def test_a_bad_photo_is_named_and_the_rest_goes_on(url, tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "cut off.jpg").write_bytes(PERSON.read_bytes()[:50_000])
    (tmp_path / "note.txt").write_text("no photo")
    files = [PERSON, "empty.jpg", "cut off.jpg", "note.txt", CAT]
    done = run_client("--url", url, "--dump-images", "--image-paths", *files, cwd=tmp_path)
    assert done.returncode == 1
    assert "empty.jpg: the file is empty" in done.stderr
    assert "cut off.jpg: the photo is truncated" in done.stderr
    assert "note.txt: the photo's 8 bytes are of no known kind" in done.stderr
    assert "3 of 5 photos failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.glob("orig*.jpg")} == {"orig0.jpg", "orig4.jpg"}


def test_wrong_parameters_are_refused_by_the_server(url, tmp_path):
    done = run_client("--url", url, "--class-name", "unicorn", cwd=tmp_path)
    assert done.returncode == 1
    assert "class_name 'unicorn' is none of" in done.stderr
    done = run_client("--url", url, "--threshold", "7", cwd=tmp_path)
    assert done.returncode == 1
    assert "threshold 7.0 is no number from 0 to 1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--image-paths", "missing.jpg"], "missing.jpg cannot be read: No such file"),
        (["--image-paths", "."], "Is a directory"),
        (["--dump-images", "--output-dir", "/proc/nothing"], "--output-dir /proc/nothing cannot be made"),
        (["--url", "ftp://127.0.0.1:8000"], "is none of http://host:port, grpc://host:port and host"),
        (["--url", "http://127.0.0.1:999999"], "Port out of range"),
        (["--url", "http://"], "is none of"),
        (["--concurrency", "0"], "--concurrency"),
        (["--threshold", "high"], "invalid float value"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments, expected, tmp_path):
    done = run_client(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_no_server_is_one_line_and_status_2(scheme, tmp_path):
    url = f"{scheme}://127.0.0.1:{free_ports()[0]}"
    done = run_client("--url", url, "--init-timeout-s", "0.5", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"client.py: {url}: no server answers there")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_keeps_silent_is_one_line_and_status_2(scheme, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        done = run_client("--url", url, "--init-timeout-s", "1", cwd=tmp_path)
        assert time.monotonic() - began < 10
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"client.py: {url}: no server answers there")


def test_a_server_of_something_else_is_one_line_and_status_2(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        done = run_client("--url", url, "--init-timeout-s", "0.5", cwd=tmp_path)
        other.shutdown()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"client.py: {url}: the server does not have the model ResNet101 ready"
    )


def test_it_imports_nothing_of_the_server():
    script = "import sys, client; print([name for name in ('torch', 'nvidia.dali', 'pytriton') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_large_photo(server, tmp_path):
    path = tmp_path / "large.jpg"
    path.write_bytes(encode(Image.open(PERSON).resize((4000, 3000)), "JPEG"))
    done = run_client("--url", server.grpc_url, "--image-paths", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4000 x 3000 pixels" in done.stdout
