# SPDX-License-Identifier: Apache-2.0
"""What is deployed: the manifests against Kubernetes' own schemas, and against what the server does."""

import urllib.request

import kubernetes_validate
import pytest
import yaml
from conftest import MODEL_NAME, ROOT, Server

MANIFESTS = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text()))


@pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=lambda manifest: f"{manifest['kind']} {manifest['metadata']['name']}"
)
def test_manifests_are_what_kubernetes_takes(manifest):
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def get(port: int, path: str) -> str:
    """Return what ``http://127.0.0.1:port/path`` says, or raise."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as response:
        return response.read().decode()


def test_the_deployment_is_of_this_server(server: Server):
    (deployment,) = (manifest for manifest in MANIFESTS if manifest["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    assert container["startupProbe"]["httpGet"]["path"] == f"/v2/models/{MODEL_NAME}/ready"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get(server.http_port, container[probe]["httpGet"]["path"])


def test_the_autoscalers_metric_is_one_of_tritons(server: Server):
    (scaler,) = (manifest for manifest in MANIFESTS if manifest["kind"] == "HorizontalPodAutoscaler")
    name = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert f'{name}{{model="{MODEL_NAME}"' in get(server.metrics_port, "/metrics")
