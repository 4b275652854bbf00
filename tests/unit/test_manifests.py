# SPDX-License-Identifier: Apache-2.0
"""The manifests fit Kubernetes' own schemas, the server and the proxy. Clients reach the proxy only."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kubernetes_validate
import pytest
import yaml
from conftest import MODEL_NAME, PHOTO, PROTOCOLS, ROOT
from front_door import KEY, NEEDS_NGINX, NGINX, Proxy, image_files

import server
from client import Connection, InferenceError
from jobs import PARAMETERS
from photo import max_photo_bytes
from serving.memory import SHM_BYTES_PER_BYTE, SHM_BYTES_PER_INSTANCE
from serving.options import MAX_DEFAULT_INSTANCES
from serving.triton import configure
from tools.launch import free_ports

DEPLOY = ROOT / "deploy"
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
PROXY_CONFIGURATION = (DEPLOY / "nginx.conf").read_text()
MAX_PIXELS = server.parse_options([]).max_pixels
MESSAGE_BYTES = sum(server.Segmentation.limits(server.parse_options([])))
# Of a server with the defaults on a GPU.
SHM_BYTES = MAX_DEFAULT_INSTANCES * (SHM_BYTES_PER_INSTANCE + SHM_BYTES_PER_BYTE * MESSAGE_BYTES)


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
    triton = configure(options)
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


def test_a_pod_has_the_time_to_stop():
    server_container, _ = containers()
    options = options_of(server_container["args"][-1])
    pause = int(server_container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod()["terminationGracePeriodSeconds"] >= pause + options.drain_s + 8


def test_the_pods_have_enough_shared_memory():
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
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


@pytest.mark.skipif(not shutil.which("tini"), reason="needs tini: apt install tini")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-c", "raise SystemExit(0)"], 0),
        (["-c", "raise SystemExit(1)"], 1),
        (["-c", "import os; os.kill(os.getpid(), 9)"], 128 + signal.SIGKILL),
        ([ROOT / "server.py", "--threshold", "1.5"], 0),  # status 2
    ],
)
def test_compose_restarts_the_server_after_any_failure_but_status_2(arguments, expected):
    entrypoint = COMPOSE["services"]["server"]["entrypoint"]
    assert f" {entrypoint[0]} " in (ROOT / "Dockerfile").read_text()
    finished = subprocess.run([*entrypoint, sys.executable, *arguments], check=False, capture_output=True, text=True)
    assert finished.returncode == expected
    assert ("--threshold: must be" in finished.stderr) == ("--threshold" in arguments)


@pytest.mark.skipif(not shutil.which("tini"), reason="needs tini: apt install tini")
def test_in_compose_a_signal_reaches_the_server():
    entrypoint = COMPOSE["services"]["server"]["entrypoint"]
    wait = "import signal; print('waits', flush=True); raise SystemExit(signal.sigwait([signal.SIGTERM]) == 9)"
    block = f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); {wait}"
    with subprocess.Popen([*entrypoint, sys.executable, "-c", block], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.terminate()
        assert process.wait(timeout=10) == 0


def test_the_two_lists_of_servers_differ_in_their_addresses_only():
    alone, compose = ((DEPLOY / name).read_text() for name in ("servers.conf", "compose-servers.conf"))
    directives = [
        [line.split("#")[0].split() for line in text.splitlines() if line.split("#")[0].strip()]
        for text in (alone.replace("127.0.0.1:", "server:"), compose)
    ]
    assert directives[0] == directives[1]


def compose_files() -> dict[str, Path]:
    """Return the files in the proxy's /etc/proxy with Compose: the image's files, some of them replaced."""
    volumes = [volume.split(":") for volume in COMPOSE["services"]["proxy"]["volumes"]]
    return image_files() | {Path(there).name: DEPLOY / here for here, there, _ in volumes}


def pod_files() -> dict[str, Path]:
    """Return the files in the proxy's /etc/proxy in a pod, where the volume hides the image's files."""
    kustomization = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())
    generated = {
        (kind, generator["name"]): {Path(name).name: DEPLOY / name for name in generator["files"]}
        for kind in ("configMap", "secret")
        for generator in kustomization[f"{kind}Generator"]
    }
    (volume,) = (volume for volume in pod()["volumes"] if volume["name"] == "proxy")
    files = {}
    for source in volume["projected"]["sources"]:
        ((kind, reference),) = source.items()
        there = generated.pop((kind, reference["name"]))
        items = reference.get("items", [{"key": name, "path": name} for name in there])
        assert {item["key"] for item in items} == there.keys()
        files |= {item["path"]: there[item["key"]] for item in items}
    assert not generated
    return files


DEPLOYMENTS = {"image": image_files, "Compose": compose_files, "pod": pod_files}


@NEEDS_NGINX
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_each_deployment_requires_a_key_that_one_command_adds(deployment, tmp_path):
    files = DEPLOYMENTS[deployment]()
    deploy = tmp_path / "deploy"
    deploy.mkdir()
    keys = Path(shutil.copy(files["api_keys.conf"], deploy))
    (command,) = (line.strip("# ") for line in keys.read_text().splitlines() if "openssl" in line)
    key = subprocess.check_output(["bash", "-c", command], cwd=tmp_path, text=True).strip()
    http_port, grpc_port, _ = free_ports()
    nobody = SimpleNamespace(http_port=http_port, grpc_port=grpc_port, model_name=MODEL_NAME)

    def responses(proxy: Proxy, api_key: str) -> set[str]:
        said = set()
        for protocol in PROTOCOLS:
            connection = Connection(proxy.url(protocol), api_key=api_key)
            with pytest.raises(InferenceError) as error:
                connection.infer(PHOTO)
            said.add(str(error.value))
        return said

    rejected, let_in = "send a valid API key", "no server can be reached"
    for added, expected in ((files["api_keys.conf"], rejected), (keys, let_in)):
        with Proxy([nobody], api_keys="", files=files | {"api_keys.conf": added}) as proxy:
            for api_key in ("", KEY):
                assert all(rejected in said for said in responses(proxy, api_key))
            assert all(expected in said for said in responses(proxy, key))


def test_compose_limits_swap_to_none():
    """Docker adds swap to the limit of memory, and rejects a sum below it."""
    server = COMPOSE["services"]["server"]
    assert server["memswap_limit"] == server["mem_limit"]


def test_each_deployment_has_all_files_of_the_proxy():
    assert compose_files().keys() == pod_files().keys() == image_files().keys()


@NEEDS_NGINX
@pytest.mark.parametrize("missing", [name for name in image_files() if "/" not in name])
def test_the_proxy_does_not_start_if_one_of_its_files_is_missing(missing, tmp_path):
    for name, path in image_files().items():
        if name != missing and "/" not in name:
            shutil.copy(path, tmp_path)
    command = [NGINX, "-t", "-p", tmp_path, "-c", tmp_path / "nginx.conf"]
    assert missing in subprocess.run(command, check=False, capture_output=True, text=True).stderr
    shutil.copy(DEPLOY / missing, tmp_path)
    subprocess.run(command, check=True, capture_output=True)


def test_the_proxy_knows_the_contract():
    code = (DEPLOY / "infer.js").read_text()
    assert f"MODEL = '{server.MODEL_NAME}'" in code
    assert f"OUTPUTS = {[tensor.name for tensor in server.OUTPUTS]}" in code
    (parameters,) = re.findall(r"^const PARAMETERS = \{(.*?)\};", code, re.MULTILINE | re.DOTALL)
    assert re.findall(r"(\w+):", parameters) == [*PARAMETERS, "timeout"]


def test_the_page_knows_the_contract():
    from torchvision.models.segmentation import DeepLabV3_ResNet101_Weights

    code = (DEPLOY / "page" / "app.js").read_text()
    assert f"MODEL = '{server.MODEL_NAME}'" in code
    assert f"MAX_PHOTO_BYTES = {max_photo_bytes(MAX_PIXELS):_}" in code
    (names,) = re.findall(r"CLASSES = \[(.*?)\]", code, re.DOTALL)
    categories = DeepLabV3_ResNet101_Weights.DEFAULT.meta["categories"]
    assert re.findall(r"'(\w+)'", names) == [name for name in categories if name != "__background__"]


def test_the_memory_of_each_container_is_limited_and_leaves_room_for_shared_memory():
    for kind, limits in (
        ("Compose", [COMPOSE["services"][name]["mem_limit"] for name in ("server", "proxy")]),
        ("pod", [container["resources"]["limits"]["memory"] for container in containers()]),
    ):
        server_gb, proxy_gb = (int(limit.lower().rstrip("gib")) for limit in limits)
        assert server_gb << 30 >= SHM_BYTES + (8 << 30), kind
        assert proxy_gb > 4, kind  # for the bodies


def test_health_checks_ask_for_the_model():
    server_container, proxy = containers()
    path = f"/v2/models/{MODEL_NAME}/ready"
    assert proxy["readinessProbe"]["httpGet"] == {"path": path, "port": "http"}
    for probe in ("startupProbe", "livenessProbe"):
        assert path in server_container[probe]["exec"]["command"][-1]
    for dockerfile in (ROOT / "Dockerfile", DEPLOY / "proxy.Dockerfile"):
        assert path in dockerfile.read_text().split("HEALTHCHECK")[1]
