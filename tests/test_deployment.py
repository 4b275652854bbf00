# SPDX-License-Identifier: Apache-2.0
"""What is deployed: the manifests against Kubernetes' own schemas, the metrics, two servers behind a proxy."""

import csv
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import kubernetes_validate
import pytest
import yaml
from conftest import MODEL_NAME, ROOT, SAMPLES, Answers, Server, free_ports, get
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

PHOTO = SAMPLES["person"][0].read_bytes()
MANIFESTS = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text()))


@pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=lambda manifest: f"{manifest['kind']} {manifest['metadata']['name']}"
)
def test_manifests_are_what_kubernetes_takes(manifest):
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_deployment_is_of_this_server(server: Server):
    (deployment,) = (manifest for manifest in MANIFESTS if manifest["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    assert container["startupProbe"]["httpGet"]["path"] == f"/v2/models/{MODEL_NAME}/ready"
    # Never the demonstration weights, and nothing over those that the image may have.
    assert "--weights pretrained" in container["args"][-1]
    assert [volume["mountPath"] for volume in container["volumeMounts"]] == ["/dev/shm"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get(server.http_port, container[probe]["httpGet"]["path"])


def test_the_autoscalers_metric_is_one_of_tritons(server: Server):
    (scaler,) = (manifest for manifest in MANIFESTS if manifest["kind"] == "HorizontalPodAutoscaler")
    name = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert f'{name}{{model="{MODEL_NAME}"' in get(server.metrics_port, "/metrics")


def scrape(server: Server) -> dict[tuple[str, ...], float]:
    """Return the values of the model's metrics, by name and, for failures, reason, as Prometheus reads them."""
    return {
        (sample.name.removesuffix("_total"), *filter(None, [sample.labels.get("reason")])): sample.value
        for family in text_string_to_metric_families(get(server.metrics_port, "/metrics"))
        for sample in family.samples
        if sample.labels.get("model") == MODEL_NAME
    }


def test_the_metrics_to_watch(server: Server):
    before = scrape(server)
    segment = Answers(server, "http")
    segment(PHOTO, outputs=("original",))
    with pytest.raises(InferenceServerException):
        segment(PHOTO, class_name="unicorn")
    deadline, after = time.monotonic() + 5, {}  # Triton counts a failure after it has told of it
    while after.get(key := ("nv_inference_request_failure", "BACKEND")) != before[key] + 1:
        assert time.monotonic() < deadline
        after = scrape(server)
    assert after["nv_inference_request_success",] == before["nv_inference_request_success",] + 1
    assert after["nv_inference_compute_infer_duration_us",] > before["nv_inference_compute_infer_duration_us",]
    assert after["nv_inference_queue_duration_us",] >= before["nv_inference_queue_duration_us",]
    assert after["nv_inference_pending_request_count",] == 0
    readme = (ROOT / "README.md").read_text()
    assert all(name in readme for name in ("request_failure", "pending_request_count", "queue_duration_us"))


@pytest.fixture
def behind_haproxy(tmp_path: Path) -> Iterator[tuple[Server, Server, SimpleNamespace, Callable]]:
    """Two servers, the ports of a proxy before them, and a way to tell that proxy something."""
    if not shutil.which("haproxy"):
        pytest.skip("needs haproxy")
    options = ("--weights", "demo", "--device", "cpu")
    http_port, grpc_port, _ = free_ports()
    with (
        Server(tmp_path / "a.log", *options) as a,
        Server(tmp_path / "b.log", *options) as b,
    ):
        a.wait_until_ready()
        b.wait_until_ready()
        text = (ROOT / "deploy" / "haproxy.cfg").read_text()
        for here, there in {
            "/run/haproxy.sock": f"{tmp_path}/admin",
            ":8000\n    # A body": f"127.0.0.1:{http_port}\n    # A body",
            ":8001 proto h2\n    default": f"127.0.0.1:{grpc_port} proto h2\n    default",
            "10.0.0.1:8000": f"127.0.0.1:{a.http_port}",
            "10.0.0.2:8000": f"127.0.0.1:{b.http_port}",
            "10.0.0.1:8001": f"127.0.0.1:{a.grpc_port}",
            "10.0.0.2:8001": f"127.0.0.1:{b.grpc_port}",
        }.items():
            assert here in text
            text = text.replace(here, there)
        (tmp_path / "haproxy.cfg").write_text(text)
        proxy = subprocess.Popen(["haproxy", "-f", str(tmp_path / "haproxy.cfg")])

        def tell(command: str) -> str:
            with socket.socket(socket.AF_UNIX) as admin:
                admin.connect(f"{tmp_path}/admin")
                admin.sendall(command.encode() + b"\n")
                return admin.makefile().read()

        try:
            while not (tmp_path / "admin").exists() or " UP " not in tell("show stat").replace(",", " "):
                assert proxy.poll() is None
                time.sleep(0.05)
            yield a, b, SimpleNamespace(http_port=http_port, grpc_port=grpc_port), tell
        finally:
            proxy.terminate()
            proxy.wait()


def test_no_photo_is_lost_while_one_of_two_servers_is_stopped(behind_haproxy):
    a, b, proxy, tell = behind_haproxy
    stopped = threading.Event()

    def ask(protocol: str) -> list[tuple[int, ...]]:
        segment, shapes = Answers(proxy, protocol), []
        while not stopped.is_set() or len(shapes) < 5:
            shapes.append(segment(PHOTO)["segmented"].shape)  # raises where a photo is lost
        return shapes

    def in_work() -> int:
        rows = csv.DictReader(tell("show stat").removeprefix("# ").splitlines())
        return sum(int(row["scur"]) for row in rows if row["svname"] == "a")

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask, protocol) for protocol in ("http", "grpc") * 2]
        try:
            while min(a.metric("request_success"), b.metric("request_success")) < 2:  # over kept connections, too
                assert not any(client.done() for client in clients)
                time.sleep(0.05)
            assert tell("set server http/a state drain").strip() == ""
            while in_work():
                time.sleep(0.05)
            assert a.stop() == 0
        finally:
            stopped.set()
        for client in clients:
            assert set(client.result()) == {(1, 512, 512, 3)}
