# SPDX-License-Identifier: Apache-2.0
"""The command lines: each error is one line that names the option and the valid values, with status 2."""

import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import SAMPLES

import benchmark.__main__
import client
import server
from serving.device import list_devices, resolve_device
from serving.errors import UsageError
from serving.options import DEVICE_DEFAULTS, device_default
from serving.triton import _secure, configure


def error_line(parse_options, arguments: list[str], capsys) -> str:
    """Return the error that a command line prints."""
    with pytest.raises(SystemExit) as end:
        parse_options(arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--device", "tpu", "must be auto, all, cpu, cuda, cuda:N, or several devices separated by commas, not tpu"),
        ("--device", "cpu,", "must be auto, all, cpu, cuda, cuda:N, or several devices separated by commas, not cpu,"),
        ("--threshold", "1.5", "must be a number between 0 and 1, not 1.5"),
        ("--threshold", "nan", "must be a number between 0 and 1, not nan"),
        ("--threshold", "", "must be a number between 0 and 1, not empty"),
        ("--input-size", "0", "must be a whole number between 32 and 2048, not 0"),
        ("--max-pixels", "-3", "must be a whole number >= 1, not -3"),
        ("--instances", "many", "must be a whole number between 0 and 64, not many"),
        ("--max-batch-size", "65", "must be a whole number between 0 and 64, not 65"),
        ("--executors", "9", "must be a whole number between 0 and 8, not 9"),
        ("--frontends", "17", "must be a whole number between 0 and 16, not 17"),
        ("--max-queue", "1.5", "must be a whole number >= 0, not 1.5"),
        ("--http-port", "99999", "must be a whole number between 1 and 65535, not 99999"),
        ("--drain-s", "-1", "must be a number between 0 and 86400, not -1"),
        ("--start-timeout-s", "inf", "must be a number between 1 and 86400, not inf"),
        ("--worker-timeout-s", "soon", "must be a number between 1 and 86400, not soon"),
        ("--triton-timeout-s", "0.9", "must be a number between 1 and 86400, not 0.9"),
        ("--address", "", "must not be empty; 0.0.0.0 listens on all addresses"),
        ("--address", "a..b", "must be an IPv4 address or a known host name, not a..b"),
        ("--address", "no.such.host.invalid", "must be an IPv4 address or a known host name, not no.such.host.invalid"),
        ("--precision", "fp64", "invalid choice: 'fp64' (choose from "),
    ],
)
def test_a_bad_value_names_the_option_and_the_valid_range(option, value, expected, capsys):
    line = error_line(server.parse_options, [f"{option}={value}"], capsys)
    assert f"error: argument {option}: {expected}" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--output", "/nope/x.json"], "argument --output: cannot write /nope/x.json (No such file or directory)"),
        (["--plot", "/nope/x.png"], "argument --plot: cannot write /nope/x.png (No such file or directory)"),
        (["--plot", "x.json"], "argument --plot: must end with one of ."),
    ],
)
def test_the_benchmark_checks_its_files_before_it_measures(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in error_line(benchmark.__main__.parse_options, arguments, capsys)


def test_without_matplotlib_the_benchmark_does_not_begin_to_plot(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    line = error_line(benchmark.__main__.parse_options, ["--plot", "x.png"], capsys)
    assert line.endswith("argument --plot: needs matplotlib: install requirements-dev.txt")


@pytest.mark.parametrize("parse_options", [server.parse_options, client.parse_options])
def test_an_unknown_option_is_named(parse_options, capsys):
    assert "error: unrecognized arguments: --nonsense" in error_line(parse_options, ["--nonsense"], capsys)


@pytest.mark.parametrize("parse_options", [server.parse_options, client.parse_options])
def test_help_shows_each_option_with_its_default(parse_options, capsys):
    with pytest.raises(SystemExit) as end:
        parse_options(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "(default: " in text
    assert "None" not in text
    assert "==SUPPRESS==" not in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--concurrency", "0"], "argument --concurrency: must be a whole number >= 1, not 0"),
        (["--threshold", "high"], "argument --threshold: invalid float value: 'high'"),
        (["--image-paths"], "argument --image-paths: expected at least one argument"),
        (["--format", "gif"], "argument --format: invalid choice: 'gif' (choose from "),
        (["--retry-s", "-1"], "argument --retry-s: must be a finite number >= 0, not -1"),
        (["--init-timeout-s", "nan"], "argument --init-timeout-s: must be a finite number >= 0, not nan"),
        (["--keep-names"], "argument --keep-names: requires --dump-images, a --format other than raw, or a map"),
        (["--class-name", "\udcff"], "argument --class-name: must be valid UTF-8"),
        (["--edge", "0.5"], "argument --edge: requires --format png or webp"),
        (["--skip-existing"], "argument --skip-existing: requires --dump-images, a --format other than raw, or a map"),
    ],
)
def test_an_error_in_the_clients_options_is_one_line(arguments, expected, capsys):
    assert expected in error_line(client.parse_options, arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--image-paths", "missing.jpg"], "--image-paths: missing.jpg cannot be read (No such file or directory)"),
        (["--image-paths", "*.missing"], "--image-paths: *.missing matches no file"),
        (["--dump-images", "--output-dir", "/proc/nothing"], "--output-dir: cannot write /proc/nothing ("),
        (["--url", "ftp://127.0.0.1:8000"], "--url must be http://host:port, grpc://host:port, https://"),
        (["--url", "http://127.0.0.1:999999"], "--url http://127.0.0.1:999999: Port out of range"),
        (["--url", "http://"], "--url must be"),
        (["--url", "http://user:secret@127.0.0.1"], "--url must be"),
        (["--ca-file", "missing.pem"], "--ca-file: cannot read missing.pem (No such file or directory)"),
        (["--ca-file", "/dev/null"], "--ca-file: /dev/null contains no certificate in PEM format"),
        (["--api-key", "two words"], "--api-key must consist of printable ASCII characters without spaces"),
        (["--report", "missing/report"], "--report: cannot write missing/report (No such file or directory)"),
        (["--url", "http://[::1"], "--url http://[::1: Invalid IPv6 URL"),
        (["--url", "https://a..example"], "--url https://a..example: a..example is not a valid host name"),
    ],
)
def test_an_error_before_sending_is_one_line(arguments, expected):
    with pytest.raises(client.ClientError) as error:
        client.send_all(client.parse_options(arguments))
    assert str(error.value).startswith(expected)
    assert len(str(error.value).splitlines()) == 1


def test_certificates_of_the_system_that_are_none_are_one_line(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", __file__)
    with pytest.raises(client.ClientError, match=r"^SSL_CERT_FILE: .* contains no certificate in PEM format$"):
        client.Connection("grpcs://localhost")
    client.Connection("grpc://localhost")  # needs none


@pytest.mark.parametrize("token", ["", "too short", "with:a-colon-and=more"])
def test_a_bad_access_token_is_rejected(token, monkeypatch):
    monkeypatch.setenv("TRITON_ACCESS_TOKEN", token)
    with pytest.raises(UsageError, match="TRITON_ACCESS_TOKEN in the environment, must have at least 16 letters"):
        _secure(server.parse_options([]))
    assert _secure(server.parse_options(["--access-token", 20 * "x"])).access_token == 20 * "x"


def test_a_server_without_options_has_the_documented_defaults():
    options = server.parse_options([])
    assert (options.weights, options.class_name, options.threshold) == ("auto", "person", 0.6)
    assert (options.input_size, options.precision, options.device) == (224, "auto", "auto")
    assert (options.max_pixels, options.drain_s) == (25_000_000, 2)
    assert (options.instances, options.max_batch_size, options.executors, options.max_queue) == (0, 0, 0, 0)
    assert (options.frontends, options.behind_proxy, options.verbose) == (0, False, False)
    assert (options.start_timeout_s, options.worker_timeout_s, options.triton_timeout_s) == (600, 300, 30)
    assert DEVICE_DEFAULTS == {
        "cuda": {"instances": 20, "max_batch_size": 7, "executors": 2, "max_queue": 512},
        "cpu": {"instances": 5, "max_batch_size": 4, "executors": 1, "max_queue": 12},
    }
    assert device_default(options, "instances", "cuda") == 20
    assert device_default(server.parse_options(["--instances", "3"]), "instances", "cuda") == 3


def test_without_options_triton_listens_on_loopback(monkeypatch):
    config = configure(server.parse_options([]))
    assert [config.http_address, config.grpc_address, config.metrics_address] == ["127.0.0.1"] * 3
    assert [config.http_port, config.grpc_port, config.metrics_port] == [8000, 8001, 8002]
    monkeypatch.setenv("PYTRITON_TRITON_CONFIG_HTTP_PORT", "9000")
    monkeypatch.setenv("PYTRITON_TRITON_CONFIG_GRPC_ADDRESS", "127.0.0.2")
    config = configure(server.parse_options(["--grpc-port", "9001"]))
    assert [config.http_port, config.grpc_port, config.grpc_address] == [9000, 9001, "127.0.0.2"]
    config = configure(server.parse_options(["--http-port", "9002", "--address", "localhost"]))
    assert [config.http_port, config.grpc_address] == [9002, "127.0.0.1"]


def test_vertex_ai_and_sagemaker_are_off_by_default():
    config = configure(server.parse_options([]))
    assert (config.allow_vertex_ai, config.allow_sagemaker) == (False, False)


def test_a_class_that_the_network_does_not_know_is_rejected_before_it_is_served():
    # Before the weights, which may be a download.
    options = server.parse_options(["--weights", "missing.pth", "--class-name", "cat,unicorn"])
    with pytest.raises(UsageError, match=r"--class-name must be one of __background__, .*, not 'cat,unicorn'$"):
        server.Segmentation(options, "cpu")


def test_a_gpu_that_does_not_exist_is_named():
    with pytest.raises(UsageError, match="--device cuda:99: torch finds "):
        resolve_device("cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_only_auto_and_cpu_work():
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="--device cuda: torch finds 0 GPUs; "):
        resolve_device("cuda")
    with pytest.raises(UsageError, match="--device all: torch finds no GPU; "):
        list_devices("all", 60)


def test_devices_are_listed_in_order():
    assert list_devices("cpu", 60) == ["cpu"]
    assert list_devices("cuda:1,cuda:0", 60) == ["cuda:1", "cuda:0"]


def test_all_means_each_gpu_and_counting_them_leaves_no_process(monkeypatch):
    monkeypatch.setattr("serving.device._count_gpus", lambda: 2)
    before = psutil.Process().children()
    assert list_devices("all", 60) == ["cuda:0", "cuda:1"]
    assert set(psutil.Process().children()) <= set(before)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("gpu-server", "http://gpu-server:8000"),
        ("grpc://gpu-server", "grpc://gpu-server:8001"),
        ("http://[::1]", "http://[::1]:8000"),
        ("https://example.com", "https://example.com:443"),
        ("grpcs://example.com", "grpcs://example.com:443"),
    ],
)
def test_ports_may_be_omitted(url, expected):
    assert client.Connection(url).url == expected


def test_a_client_without_options_has_the_documented_defaults():
    options = client.parse_options([])
    assert client.find_photos(options.image_paths) == [(SAMPLES["person"][0], "")]
    assert (options.format, options.url, options.concurrency) == ("raw", "http://127.0.0.1:8000", 4)
    assert (options.output_dir, options.init_timeout_s, options.retry_s) == (Path(), 30, 300)
    assert (options.keep_names, options.overwrite, options.report, options.ca_file) == (False, False, None, None)
    assert client.parse_options(["--mask", "--skip-existing"]).keep_names
    assert options.parameters == {}
    parameters = client.parse_options(["--class-name", "cat", "--threshold", "0.5"]).parameters
    assert parameters == {"class_name": "cat", "threshold": 0.5}


def test_folders_and_patterns_mean_their_photos_in_a_stable_order(tmp_path, capsys):
    names = ["b.jpg", "a.PNG", "c.webp", "note.txt", "other/e.jpeg", "other/d.bmp"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*patterns: str) -> list[str]:
        photos = client.find_photos([f"{tmp_path}/{pattern}" for pattern in patterns])
        return [photo.problem or str(photo.path.relative_to(tmp_path)) for photo in photos]

    assert found("") == ["a.PNG", "b.jpg", "c.webp"]
    assert capsys.readouterr().err == "skipping 1 file: 1 .txt\n"
    assert found("note.txt", "other", "b.jpg") == ["note.txt", "other/d.bmp", "other/e.jpeg", "b.jpg"]
    assert found("[bc].*") == ["b.jpg", "c.webp"]
    assert found("**/*.jp*g") == ["b.jpg", "other/e.jpeg"]
    (tmp_path / "[1].jpg").touch()  # a name that looks like a pattern
    assert found("[1].jpg") == ["[1].jpg"]
    (tmp_path / "empty").mkdir()
    nothing = "contains no photos (.bmp, .jfif, .jpe, .jpeg, .jpg, .png, .webp)"
    assert found("empty", "b.jpg") == [nothing, "b.jpg"]
