# SPDX-License-Identifier: Apache-2.0
"""docs/your-own-network.md: its code, taken from the page, serves a classifier and another segmentation network."""

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


def small_image() -> torch.Tensor:
    """Return the sample photo as the network sees it, float32 ``[1, 3, 224, 224]``, made by torchvision."""
    photo = v2.functional.pil_to_tensor(sample("person")).float() / 255
    return v2.functional.normalize(v2.functional.resize(photo, [224, 224], antialias=True), MEAN, STD)[None]


@pytest.fixture(scope="module")
def classifier() -> torch.nn.Module:
    return random_network("resnet50", "fc")


@pytest.fixture(scope="module")
def segmenter() -> torch.nn.Module:
    return random_network("fcn_resnet50", "classifier.4", weights_backbone=None)


@pytest.fixture(scope="module")
def servers(tmp_path_factory, classifier, segmenter) -> Iterator[Mapping[str, Server]]:
    """The servers of the page, and one that cannot start. All at once, which is faster."""
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
        return Server(log, *arguments, script=folder / script, model_name=model_name, environment=environment)

    with start("fcn_server.py", "demo", "--weights", "demo") as demo:
        servers = {
            "classifier": start("classifier.py", "Classifier", "--max-pixels", 300_000),  # it has these options, too
            "FCN": start("fcn_server.py", "ResNet101", "--weights", "fcn.pth"),
        }
        with running_together(servers) as running:
            yield running | {"FCN with demo weights": demo}


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


def test_the_network_changes_with_one_line(servers, segmenter):
    with torch.inference_mode():
        probabilities = segmenter(small_image())["out"].softmax(dim=1)
    large = torch.nn.functional.interpolate(probabilities, size=(512, 512), mode="bilinear")[0]
    index = int(probabilities.mean(dim=(0, 2, 3)).argmax())
    threshold = float(large[index].median())
    parameters = {"class_name": CLASS_NAMES[index], "threshold": threshold}
    for protocol in PROTOCOLS:
        answer = servers["FCN"].connect(protocol).infer(PHOTO, ("original", "segmented"), parameters)
        original, segmented = answer["original"][0], answer["segmented"][0]
        assert psnr(original, decode(PHOTO)) > 40
        visible = original.any(axis=2)
        assert iou(segmented.any(axis=2), (large[index] > threshold).numpy() & visible) > 0.95


def test_demonstration_weights_of_another_network_are_one_line(servers):
    server = servers["FCN with demo weights"]
    assert server.process.wait(timeout=60) == 2
    log = server.log.read_text()
    assert re.match(r"fcn_server.py: .*demo.pt does not fit fcn_resnet50: ", log.splitlines()[-1])
    assert "Traceback" not in log


def test_both_changes_are_short():
    for language in ("python", "diff"):
        assert len([line for line in code(language).splitlines() if line]) <= 40
