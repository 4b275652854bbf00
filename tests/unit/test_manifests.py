# SPDX-License-Identifier: Apache-2.0
"""The manifests fit Kubernetes' own schemas, the server and the proxy. Clients reach the proxy only."""

import shlex

import kubernetes_validate
import pytest
import yaml
from conftest import MODEL_NAME, ROOT

import server
from photo import max_photo_bytes
from serving.memory import SHM_BYTES_PER_BYTE, SHM_BYTES_PER_INSTANCE
from serving.options import MOST_DEFAULT_INSTANCES
from serving.triton import _configure

DEPLOY = ROOT / "deploy"
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
PROXY_CONFIGURATION = (DEPLOY / "nginx.conf").read_text()
MAX_PIXELS = server.parse_options([]).max_pixels
MESSAGE_BYTES = max_photo_bytes(MAX_PIXELS) + server.answer_bytes(MAX_PIXELS)
# What the defaults need on a GPU.
SHM_BYTES = MOST_DEFAULT_INSTANCES * (SHM_BYTES_PER_INSTANCE + SHM_BYTES_PER_BYTE * MESSAGE_BYTES)


def manifest(kind: str) -> dict:
    (found,) = (manifest for manifest in MANIFESTS if manifest["kind"] == kind)
    return found


def pod() -> dict:
    return manifest("Deployment")["spec"]["template"]["spec"]


def containers() -> tuple[dict, dict]:
    """Return the server's and the proxy's container."""
    by_name = {container["name"]: container for container in pod()["containers"]}
    return by_name["server"], by_name["proxy"]


def options_of(command: str):
    """Return the options of a command that starts the server."""
    return server.parse_options(
        shlex.split(command.split("python server.py ")[1].replace("${WEIGHTS:-pretrained}", "auto"))
    )


@pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=lambda manifest: f"{manifest['kind']} {manifest['metadata']['name']}"
)
def test_kubernetes_accepts_the_manifests(manifest):
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_in_a_pod_only_the_proxy_and_the_metrics_can_be_reached(monkeypatch):
    server_container, proxy = containers()
    options = options_of(server_container["args"][-1])
    for variable in server_container["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    triton = _configure(options)
    assert (triton.http_address, triton.grpc_address, triton.metrics_address) == ("127.0.0.1", "127.0.0.1", "0.0.0.0")
    assert triton.metrics_port == server_container["ports"][0]["containerPort"]
    assert "address" not in options  # Triton listens on loopback, where the proxy's configuration expects it
    assert options.behind_proxy
    assert options.weights == "pretrained"  # never the demonstration weights
    assert [port["name"] for port in server_container["ports"]] == ["metrics"]
    ports = {port["name"]: port["containerPort"] for port in proxy["ports"]}
    assert f"listen {ports['http']};" in PROXY_CONFIGURATION
    assert f"listen {ports['grpc']} http2;" in PROXY_CONFIGURATION
    for container in (server_container, proxy):
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]


def test_the_services_and_the_autoscaler_find_the_pods():
    deployment = manifest("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"] for container in containers() for port in container["ports"]}
    services = [found["spec"] for found in MANIFESTS if found["kind"] == "Service"]
    assert services
    for service in services:
        assert service["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in service["ports"]} <= ports
    target = manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])


def test_the_network_policy_shows_the_metrics_to_prometheus_only():
    policy = manifest("NetworkPolicy")["spec"]
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    everyone, prometheus = policy["ingress"]
    assert [port["port"] for port in everyone["ports"]] == ["http", "grpc"]
    assert [port["port"] for port in prometheus["ports"]] == ["metrics"]
    assert prometheus["from"]
    assert policy["egress"] == []
    assert {"Ingress", "Egress"} == set(policy["policyTypes"])


def test_a_pod_is_ready_if_clients_are_answered_and_has_the_time_to_stop():
    server_container, proxy = containers()
    assert proxy["readinessProbe"]["httpGet"] == {"path": f"/v2/models/{MODEL_NAME}/ready", "port": "http"}
    options = options_of(server_container["args"][-1])
    pause = int(server_container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod()["terminationGracePeriodSeconds"] >= pause + options.drain_s + 8


def test_the_pods_get_the_configuration_of_the_proxy_and_enough_shared_memory():
    (generator,) = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())["configMapGenerator"]
    assert generator["files"] == ["nginx.conf", "servers.conf"]
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert volumes["proxy"]["configMap"]["name"] == generator["name"]
    assert int(volumes["shm"]["emptyDir"]["sizeLimit"].removesuffix("Gi")) << 30 >= SHM_BYTES


def test_in_compose_only_the_proxy_can_be_reached():
    services = COMPOSE["services"]
    assert "ports" not in services["server"]
    assert services["server"]["networks"] == ["internal"]
    assert COMPOSE["networks"]["internal"]["internal"]
    options = options_of(services["server"]["command"])
    assert options.behind_proxy
    assert options.address == "0.0.0.0"
    assert int(services["server"]["stop_grace_period"].removesuffix("s")) >= options.drain_s + 8
    assert int(services["server"]["shm_size"].removesuffix("gb")) << 30 >= SHM_BYTES
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "on-failure"
        assert "container_name" not in service  # --scale


def test_the_two_lists_of_servers_differ_in_their_addresses_only():
    alone, compose = ((DEPLOY / name).read_text() for name in ("servers.conf", "compose-servers.conf"))
    directives = [
        [line.split("#")[0].split() for line in text.splitlines() if line.split("#")[0].strip()]
        for text in (alone.replace("127.0.0.1:", "server:"), compose)
    ]
    assert directives[0] == directives[1]
