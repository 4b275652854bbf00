# SPDX-License-Identifier: Apache-2.0
"""The manifests fit Kubernetes' own schemas and this server, and the metrics count what the documentation says."""

import kubernetes_validate
import pytest
import yaml
from conftest import MODEL_NAME, PHOTO, ROOT, Server, get, wait_for
from prometheus_client.parser import text_string_to_metric_families

import server as lesson
from client import InferenceError

MANIFESTS = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text()))


def manifest(kind: str) -> dict:
    (found,) = (manifest for manifest in MANIFESTS if manifest["kind"] == kind)
    return found


@pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=lambda manifest: f"{manifest['kind']} {manifest['metadata']['name']}"
)
def test_kubernetes_accepts_the_manifests(manifest):
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_deployment_fits_the_server(server: Server):
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    assert container["startupProbe"]["httpGet"]["path"] == f"/v2/models/{MODEL_NAME}/ready"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get(server.http_port, container[probe]["httpGet"]["path"])
    # Nothing is mounted over weights that the image may have.
    assert [volume["mountPath"] for volume in container["volumeMounts"]] == ["/dev/shm"]
    command = container["args"][-1].split("python server.py ")[1]
    options = lesson.parse_options(command.split())
    assert options.weights == "pretrained"  # never the demonstration weights
    # Kubernetes waits until the server has drained and Triton has ended.
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert options.drain_s > lesson.parse_options([]).drain_s
    assert pod["terminationGracePeriodSeconds"] >= pause + options.drain_s + 8


def test_the_autoscaler_follows_one_of_tritons_metrics(server: Server):
    name = manifest("HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert f'{name}{{model="{MODEL_NAME}"' in get(server.metrics_port, "/metrics")


def scrape(server: Server) -> dict[tuple[str, ...], float]:
    """Return the model's metrics as Prometheus reads them, by name and, for failures, reason."""
    return {
        (sample.name.removesuffix("_total"), *filter(None, [sample.labels.get("reason")])): sample.value
        for family in text_string_to_metric_families(get(server.metrics_port, "/metrics"))
        for sample in family.samples
        if sample.labels.get("model") == MODEL_NAME
    }


def test_the_metrics_count_what_the_documentation_says(server: Server):
    before = scrape(server)
    connection = server.connect("http")
    connection.infer(PHOTO, ("original",))
    with pytest.raises(InferenceError):
        connection.infer(PHOTO, parameters={"class_name": "unicorn"})
    # Triton counts a failure after it has told the client.
    failures = ("nv_inference_request_failure", "BACKEND")
    wait_for(lambda: scrape(server)[failures] == before[failures] + 1)
    after = scrape(server)
    assert after["nv_inference_request_success",] == before["nv_inference_request_success",] + 1
    assert after["nv_inference_compute_infer_duration_us",] > before["nv_inference_compute_infer_duration_us",]
    assert after["nv_inference_queue_duration_us",] >= before["nv_inference_queue_duration_us",]
    assert after["nv_inference_pending_request_count",] == 0
    page = (ROOT / "docs" / "production.md").read_text()
    for name, *reason in after:
        if "request_" in name or "queue_duration" in name or "infer_duration" in name:
            assert not reason or reason[0] != "BACKEND" or f'{name}{{reason="BACKEND"}}' in page
    for name in ("pending_request_count", "request_success", "queue_duration_us", "compute_infer_duration_us"):
        assert f"`nv_inference_{name}`" in page
