# SPDX-License-Identifier: Apache-2.0
"""The metrics count as documented, and the autoscaler follows one of them."""

import pytest
import yaml
from conftest import MODEL_NAME, PHOTO, ROOT, Server, get, wait_for
from prometheus_client.parser import text_string_to_metric_families

from client import InferenceError

MANIFESTS = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text()))


def test_the_autoscaler_follows_one_of_tritons_metrics(server: Server):
    (scaler,) = (manifest for manifest in MANIFESTS if manifest["kind"] == "HorizontalPodAutoscaler")
    name = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
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
