# SPDX-License-Identifier: Apache-2.0
"""docs/your-own-network.md: its code, taken from the page, serves a classifier and another segmentation network.

The latter has its own weights, and many options.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from conftest import PHOTO, PROTOCOLS, ROOT, Server, decode, encode, iou, psnr, running_together, sample
from torchvision.models import ResNet50_Weights, get_model
from torchvision.models.segmentation import FCN_ResNet50_Weights
from torchvision.transforms import v2

from client import InferenceError

PAGE = (ROOT / "docs" / "your-own-network.md").read_text()
CLASS_NAMES = FCN_ResNet50_Weights.DEFAULT.meta["categories"]
INPUT_SIZE = 225
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def code(language: str) -> str:
    """Return the page's only block in this language."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return block


def random_network(name: str, last_layer: str, **options: object) -> torch.nn.Module:
    """Return torchvision's network with random weights that tell pictures apart."""
    torch.manual_seed(0)
    network = get_model(name, weights=None, **options).eval()
    # Logits of a few, so that the probabilities are neither all alike nor 0 and 1.
    with torch.inference_mode():
        logits = network(small_image())
        logits = logits["out"] if isinstance(logits, dict) else logits
        network.get_submodule(last_layer).weight.mul_(2 / logits.std())
    return network


def small_image(size: int = 224) -> torch.Tensor:
    """Return the sample photo as the network sees it, float32 ``[1, 3, S, S]``, made by torchvision."""
    photo = v2.functional.pil_to_tensor(sample("person")).float() / 255
    return v2.functional.normalize(v2.functional.resize(photo, [size, size], antialias=True), MEAN, STD)[None]


@pytest.fixture(scope="module")
def classifier() -> torch.nn.Module:
    return random_network("resnet50", "fc")


@pytest.fixture(scope="module")
def segmenter() -> torch.nn.Module:
    return random_network("fcn_resnet50", "classifier.4", weights_backbone=None)


@pytest.fixture(scope="module")
def found(segmenter) -> tuple[str, float, np.ndarray]:
    """Return the class of which there is most in the sample photo, the median of its probability, and its mask."""
    with torch.inference_mode():
        probabilities = segmenter(small_image(INPUT_SIZE))["out"].softmax(dim=1)
    index = int(probabilities.mean(dim=(0, 2, 3)).argmax())
    large = torch.nn.functional.interpolate(probabilities, size=(512, 512), mode="bilinear")[0, index]
    threshold = float(large.median())
    return CLASS_NAMES[index], threshold, (large > threshold).numpy()


@pytest.fixture(scope="module")
def servers(tmp_path_factory, classifier, segmenter, found) -> Iterator[Mapping[str, Server]]:
    """The servers of the page. Both at once, which is faster."""
    folder = tmp_path_factory.mktemp("own")
    # The page says to save files beside server.py. These import what is there without lying there.
    environment = {"PYTHONPATH": str(ROOT), "TORCH_HOME": str(folder)}

    cache = folder / "hub" / "checkpoints" / ResNet50_Weights.DEFAULT.url.rsplit("/", 1)[1]
    cache.parent.mkdir(parents=True)
    torch.save(classifier.state_dict(), cache)
    (folder / "classifier.py").write_text(code("python"))

    torch.save(segmenter.state_dict(), folder / "fcn.pth")
    removed, added = re.fullmatch(r"-(.*\n)\+(.*\n)", code("diff")).groups()
    lesson = (ROOT / "server.py").read_text()
    (line,) = (line for line in lesson.splitlines(keepends=True) if line.startswith(removed.strip()))
    (folder / "fcn_server.py").write_text(lesson.replace(line, added))

    def start(script: str, model_name: str, *arguments: object) -> Server:
        log = folder / f"{script} {model_name}.log"
        arguments += ("--instances", 1, "--max-batch-size", 1, "--max-pixels", 300_000)
        return Server(log, *arguments, script=folder / script, model_name=model_name, environment=environment)

    class_name, threshold, _ = found
    options = ["--weights", "fcn.pth", "--class-name", class_name, "--threshold", threshold]
    options += ["--input-size", INPUT_SIZE, "--precision", "fp32", "--address", "localhost"]
    servers = {
        "classifier": start("classifier.py", "Classifier"),
        "FCN": start("fcn_server.py", "ResNet101", *options),
    }
    with running_together(servers) as running:
        yield running


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_classifier_on_the_page_gives_torchvisions_probabilities(servers, classifier, protocol):
    with torch.inference_mode():
        expected = classifier(small_image()).softmax(dim=1).numpy()
    connection = servers["classifier"].connect(protocol)
    probabilities = connection.infer(PHOTO)["probabilities"]
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (1, 1000)
    assert expected.max() > 10 / 1000
    assert probabilities.argmax() == expected.argmax()
    np.testing.assert_allclose(probabilities, expected, atol=0.02 * expected.max())
    with pytest.raises(InferenceError, match="this server accepts at most 300000 pixels"):
        connection.infer(encode(sample("person", (600, 600)), "JPEG"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_network_changes_with_one_line_and_the_server_does_what_its_options_say(servers, found, protocol):
    connection = servers["FCN"].connect(protocol)
    answer = connection.infer(PHOTO)
    original, segmented = answer["original"][0], answer["segmented"][0]
    assert psnr(original, decode(PHOTO)) > 40
    assert iou(segmented.any(axis=2), found[2] & original.any(axis=2)) > 0.95
    with pytest.raises(InferenceError, match="this server accepts at most 300000 pixels"):
        connection.infer(encode(sample("person", (600, 600)), "JPEG"))
    assert "DEMONSTRATION" not in servers["FCN"].log.read_text()


def test_a_running_server_outlives_changes_of_its_weights_and_stops_cleanly(servers):
    server = servers["FCN"]
    before = server.connect("http").infer(PHOTO)["segmented"]
    (server.log.parent / "fcn.pth").write_bytes(b"half an upload")
    np.testing.assert_array_equal(server.connect("grpc").infer(PHOTO)["segmented"], before)
    assert server.stop() == 0
    assert server.left_behind() == []


def test_both_changes_are_short():
    for language in ("python", "diff"):
        assert len([line for line in code(language).splitlines() if line]) <= 40
