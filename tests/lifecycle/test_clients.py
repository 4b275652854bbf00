# SPDX-License-Identifier: Apache-2.0
"""client.py with servers that are busy, restart, or are behind the proxy with TLS and a key: no photo is lost."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from conftest import PROTOCOLS, ROOT, Server, encode, sample, wait_for
from front_door import KEY, NEEDS_NGINX, Proxy, make_certificate

from client import ClientError, Connection, InferenceError
from tools.launch import free_ports


def restart(server: Server) -> None:
    """Stop a server and start it again on the same ports, as a supervisor does."""
    assert server.stop() == 0
    with server.log.open("a") as log:
        server.process = subprocess.Popen(
            server.process.args,
            env=os.environ | {"PYTRITON_HOME": str(server.home)},
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=server.log.parent,
            start_new_session=True,
        )


@pytest.fixture
def photos(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a folder with a number of photos."""

    def make(count: int) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir()
        photo = encode(sample("cat", (120, 80)), "JPEG")
        for index in range(count):
            (folder / f"{index}.jpg").write_bytes(photo)
        return folder

    return make


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_full_queue_costs_no_photo(run_client, mask_server, photos, protocol):
    arguments = ("--url", mask_server.connect(protocol).url, "--image-paths", photos(40), "--concurrency", 16)
    done = run_client(*arguments, "--retry-s", 0)
    assert done.status == 1
    busy = "the server is busy and its queue is full: send the photo again later"
    rejected = len(re.findall(rf"/\d+\.jpg: {busy}\n", done.err))
    assert f"client.py: 40 of 40 photos, {rejected} failed, " in done.err
    done = run_client(*arguments)
    assert done.status == 0, done.err
    assert "client.py: 40 of 40 photos, 0 failed, " in done.err


def test_a_restart_of_the_server_costs_no_photo(mask_server, photos, tmp_path):
    folder = photos(120)
    clients = {}
    for protocol in PROTOCOLS:
        options = ("--format", "png", "--keep-names", "--output-dir", tmp_path / protocol, "--concurrency", "2")
        command = [sys.executable, ROOT / "client.py", "--url", mask_server.connect(protocol).url, *options]
        clients[protocol] = subprocess.Popen(
            [*command, "--image-paths", folder], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    written = {protocol: partial(lambda out: [*out.glob("*.png")], tmp_path / protocol) for protocol in PROTOCOLS}
    wait_for(lambda: all(len(files()) > 20 for files in written.values()))
    restart(mask_server)
    assert all(len(files()) < 120 for files in written.values())
    for protocol, client in clients.items():
        with client:
            _, said = client.communicate(timeout=120)
        assert "retrying" in said
        assert "client.py: 120 of 120 photos, 0 failed, " in said
        assert client.returncode == 0
        assert len(written[protocol]()) == 120


def test_of_a_hundred_clients_none_loses_a_photo(mask_server):
    photo = encode(sample("cat", (120, 80)), "JPEG")

    def send(index: int) -> int:
        connection = Connection(mask_server.connect(PROTOCOLS[index % 2]).url, retry_s=120)
        return connection.infer(photo, ("mask",))["mask"].size

    with ThreadPoolExecutor(100) as pool:
        assert {*pool.map(send, range(100))} == {120 * 80}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_stays_away_is_waited_for_once_and_not_for_each_photo(protocol):
    connection = Connection(f"{protocol}://127.0.0.1:{free_ports(1)[0]}", retry_s=1)
    began = time.monotonic()
    for _ in range(5):
        with pytest.raises(InferenceError, match=r"(?i)connection refused") as error:
            connection.infer(b"photo")
        assert error.value.transient
    assert 0.5 < time.monotonic() - began < 2.5


@pytest.fixture(scope="module")
def proxy(mask_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    certificate = make_certificate(tmp_path_factory.mktemp("tls"))
    with Proxy([mask_server], certificate, api_keys=f"{KEY} alice;\n") as proxy:
        proxy.certificate = certificate
        yield proxy


@NEEDS_NGINX
@pytest.mark.parametrize("protocol", ["https", "grpcs"])
def test_photos_go_through_the_proxy_with_tls_and_a_key_that_is_never_shown(run_client, proxy, protocol, monkeypatch):
    url = f"{protocol}://localhost:{proxy.https_port if protocol == 'https' else proxy.grpcs_port}"
    arguments = ("--url", url, "--ca-file", proxy.certificate, "--format", "png")
    done = run_client(*arguments, "--api-key", KEY, "--verbose")
    assert done.status == 0, done.err
    assert "kept" in done.out
    assert KEY not in done.out + done.err
    monkeypatch.setenv("API_KEY", KEY)
    assert run_client(*arguments).status == 0
    monkeypatch.setenv("API_KEY", KEY.replace("6", "7"))
    done = run_client(*arguments)
    assert (done.status, done.out) == (2, "")
    assert done.err == (
        f"client.py: {url}: send a valid API key: Authorization: Bearer KEY. "
        "Set --api-key, or API_KEY in the environment\n"
    )


@NEEDS_NGINX
@pytest.mark.parametrize(
    ("url", "trusted", "said"),
    [
        (
            "https://localhost:{https_port}",
            False,
            "the server's certificate is not trusted (self-signed certificate): ",
        ),
        (
            "grpcs://localhost:{grpcs_port}",
            False,
            "the server's certificate is not trusted (self-signed certificate): ",
        ),
        ("https://127.0.0.1:{https_port}", True, "the server's certificate is not trusted (IP address mismatch, "),
        ("grpcs://127.0.0.1:{grpcs_port}", True, "the server's certificate is not trusted (IP address mismatch, "),
        # The proxy without TLS.
        ("https://localhost:{http_port}", True, "this port is for http: set --url http://localhost:{http_port}"),
        ("https://localhost:{grpc_port}", True, "this port is for grpc: set --url grpc://localhost:{grpc_port}"),
        *(
            (
                f"{scheme}://localhost:{{{right}_port}}",
                True,
                f"this port is for {right}: set --url {right}://localhost:{{{right}_port}}",
            )
            for scheme, right in product([*PROTOCOLS, "https", "grpcs"], ["https", "grpcs"])
            if scheme != right
        ),
    ],
)
def test_a_url_and_a_certificate_that_do_not_fit_are_one_line_that_says_what_to_do(proxy, url, trusted, said):
    url, said = (text.format(**vars(proxy)) for text in (url, said))
    connection = Connection(url, ca_file=proxy.certificate if trusted else None, api_key=KEY)
    began = time.monotonic()
    with pytest.raises(ClientError) as error:
        connection.wait_for_model(timeout_s=60)
    assert time.monotonic() - began < 10
    assert str(error.value).startswith(f"{url}: {said}")
    assert "set --" in str(error.value) or "in --url" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_proxies_in_the_environment_are_ignored(mask_server, protocol, monkeypatch):
    for name in ("http_proxy", "grpc_proxy"):  # no proxy listens there
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    mask_server.connect(protocol).wait_for_model(timeout_s=10)
