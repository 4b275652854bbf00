# SPDX-License-Identifier: Apache-2.0
"""Weights: each source is loaded or rejected with one line, and no file can run code."""

import os
from pathlib import Path

import pytest
import torch

from model_inference import pretrained_weights
from server import NETWORK
from serving.errors import UsageError
from weights.loading import DEMO_PATH, load_weights

URL = pretrained_weights(NETWORK).url


@pytest.fixture(scope="module")
def demo() -> dict:
    """The demonstration weights. Copy the dictionary before you change it."""
    return load_weights("demo", NETWORK)


@pytest.fixture
def cached_file(tmp_path, monkeypatch) -> Path:
    """Where torch expects the pretrained file, on a machine without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    path = tmp_path / "hub" / "checkpoints" / URL.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    return path


def rejection(choice: object, network: str = NETWORK) -> str:
    with pytest.raises(UsageError) as error:
        load_weights(str(choice), network)
    assert len(str(error.value).splitlines()) == 1
    assert error.value.exit_status == 2
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is not a state dict that torch can read"),
        ([1, 2, 3], "contains a list instead of a state dict"),
        ({}, "is missing (and 667 more)"),
        (lambda state: state.pop("backbone.conv1.weight"), "backbone.conv1.weight is missing"),
        (lambda state: state.update(extra=torch.ones(1)), "extra is unknown"),
        (lambda state: state.update({"classifier.4.bias": 5}), "classifier.4.bias is not a tensor"),
        (
            lambda state: state.update({"classifier.4.bias": torch.ones(5)}),
            "classifier.4.bias has shape [5] instead of [21]",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_rejected_with_what_is_wrong(content, expected, demo, tmp_path):
    file = tmp_path / "weights.pth"
    if callable(content):
        state_dict = dict(demo)
        content(state_dict)
        torch.save(state_dict, file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    line = rejection(file)
    assert line.startswith(f"--weights {file} ")
    assert expected in line


def test_a_file_that_does_not_exist_is_named():
    assert rejection("missing.pth") == "--weights missing.pth does not exist: use a file, pretrained, demo or auto"


def test_a_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save(Evil(), tmp_path / "evil.pth")
    assert "is not a state dict that torch can read" in rejection(tmp_path / "evil.pth")
    assert not (tmp_path / "it ran").exists()


def test_a_file_with_the_auxiliary_head_in_double_precision_is_loaded(demo, tmp_path):
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in demo.items()}
    torch.save(doubled | {"aux_classifier.4.bias": torch.zeros(21)}, tmp_path / "own.pth")
    loaded = load_weights(str(tmp_path / "own.pth"), NETWORK)
    assert loaded.keys() == demo.keys()
    assert all(torch.equal(loaded[name], demo[name]) and loaded[name].dtype == demo[name].dtype for name in demo)


def test_pretrained_weights_come_from_torchs_cache(demo, cached_file):
    torch.save(demo, cached_file)
    assert torch.equal(load_weights("pretrained", NETWORK)["classifier.4.bias"], demo["classifier.4.bias"])


def test_pretrained_weights_that_cannot_be_downloaded_say_where_to_put_them(cached_file):
    line = rejection("pretrained")
    assert line.startswith("--weights pretrained failed (URLError: ")
    assert f"download {URL} on another machine and put it at {cached_file}, or use --weights demo" in line


def test_a_damaged_file_in_torchs_cache_is_named(cached_file):
    cached_file.write_bytes(b"half a download")
    assert f"delete {cached_file}, which is damaged, and start the server again" in rejection("pretrained")


def test_auto_falls_back_to_the_demonstration_weights_with_a_warning(demo, cached_file, caplog):
    assert load_weights("auto", NETWORK).keys() == demo.keys()
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert record.getMessage().startswith(
        "DEMONSTRATION WEIGHTS: the server recognizes only images/orig.jpg and images/cat_orig.jpg, "
    )
    assert str(cached_file) in record.getMessage()


def test_the_demonstration_weights_fit_only_their_own_network():
    assert "demo.pt does not fit fcn_resnet50: " in rejection("demo", network="fcn_resnet50")


@pytest.mark.parametrize("choice", ["auto", "pretrained"])
def test_demonstration_weights_are_not_advised_for_another_network(cached_file, choice):
    line = rejection(choice, network="fcn_resnet50")
    path = cached_file.with_name(pretrained_weights("fcn_resnet50").url.rsplit("/", 1)[1])
    assert line.endswith(f" on another machine and put it at {path}, or use --weights with the path of a state dict")


@pytest.mark.parametrize("network", ["fcn_resnet51", "resnet50"])
def test_a_network_that_is_not_one_for_segmentation_is_named(network):
    line = rejection("auto", network=network)
    assert line.startswith("NETWORK must be one of deeplabv3_mobilenet_v3_large, ")
    assert line.endswith(f", not {network}")


def test_the_demonstration_weights_detect_other_random_numbers(tmp_path):
    content = torch.load(DEMO_PATH, weights_only=True)
    content["fingerprint"] += 1
    torch.save(content, tmp_path / "demo.pt")
    with pytest.raises(UsageError, match="generates different random numbers: "):
        load_weights("demo", NETWORK, tmp_path / "demo.pt")


def test_a_file_of_weights_is_not_taken_for_demonstration_weights(tmp_path):
    torch.save([1], tmp_path / "demo.pt")
    with pytest.raises(UsageError, match="is not a demonstration weights file: create it with "):
        load_weights("demo", NETWORK, tmp_path / "demo.pt")


def test_the_demonstration_weights_are_small():
    assert DEMO_PATH.stat().st_size < 2_000_000
