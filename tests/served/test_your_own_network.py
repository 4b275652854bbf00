# SPDX-License-Identifier: Apache-2.0
"""docs/your-own-network.md: the classifier on the page, another segmentation network, and other kinds of servers.

The segmentation network has its own weights, and many options.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from conftest import OFFLINE, PHOTO, PROTOCOLS, ROOT, Server, decode, encode, iou, psnr, running_together, sample
from torchvision.models import ResNet50_Weights, get_model
from torchvision.models.segmentation import FCN_ResNet50_Weights
from torchvision.transforms import v2

from client import InferenceError

PAGE = (ROOT / "docs" / "your-own-network.md").read_text()
CLASSIFIER = ROOT / "examples" / "classifier.py"
LABELS = ResNet50_Weights.DEFAULT.meta["categories"]
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
    # Moderate logits, so that the probabilities are neither all alike nor only 0 and 1.
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
    """Return the class with the most pixels in the sample photo, the median of its probability, and its mask."""
    with torch.inference_mode():
        probabilities = segmenter(small_image(INPUT_SIZE))["out"].softmax(dim=1)
    index = int(probabilities.mean(dim=(0, 2, 3)).argmax())
    large = torch.nn.functional.interpolate(probabilities, size=(512, 512), mode="bilinear")[0, index]
    threshold = float(large.median())
    return CLASS_NAMES[index], threshold, (large > threshold).numpy()


@pytest.fixture(scope="module")
def servers(tmp_path_factory, classifier, segmenter, found) -> Iterator[Mapping[str, Server]]:
    """The servers of the page, and two of other kinds. They start in parallel, which is faster."""
    folder = tmp_path_factory.mktemp("own")
    torch.save(classifier.state_dict(), folder / "classifier.pth")
    torch.save(segmenter.state_dict(), folder / "fcn.pth")
    removed, added = re.fullmatch(r"-(.*\n)\+(.*\n)", code("diff")).groups()
    lesson = (ROOT / "server.py").read_text()
    assert lesson.count(removed.strip()) == 1
    (line,) = (line for line in lesson.splitlines(keepends=True) if line.startswith(removed.strip()))
    (folder / "fcn_server.py").write_text(lesson.replace(line, added))

    def start(name: str, *arguments: object, **options: object) -> Server:
        return Server(folder / f"{name}.log", *arguments, "--instances", 2, **options)

    class_name, threshold, _ = found
    small = ["--max-batch-size", 1, "--max-pixels", 300_000]
    options = ["--weights", "fcn.pth", "--class-name", class_name, "--threshold", threshold]
    options += ["--input-size", INPUT_SIZE, "--precision", "fp32", "--address", "localhost"]
    servers = {
        "classifier": start(
            "classifier", "--weights", "classifier.pth", *small, script=CLASSIFIER, model_name="ResNet50"
        ),
        # The page says to change server.py. This copy imports the modules next to it.
        "FCN": start("fcn", *options, *small, script=folder / "fcn_server.py", environment={"PYTHONPATH": str(ROOT)}),
        "text": start("text", script=ROOT / "tests" / "text_server.py", model_name="Words"),
        "pair": start("pair", script=ROOT / "tests" / "pair_server.py", model_name="SideBySide"),
    }
    with running_together(servers) as running:
        yield running


def infer(server: Server, protocol: str, inputs: Mapping[str, np.ndarray], *outputs: str) -> list[np.ndarray]:
    """Call a server with Triton's own client. Inputs and outputs are without a batch dimension."""
    triton, url = (tritonclient.http, server.http_url) if protocol == "http" else (tritonclient.grpc, server.grpc_url)
    tensors = []
    for name, array in inputs.items():
        tensors.append(triton.InferInput(name, (1, *array.shape), "BYTES" if array.dtype == object else "UINT8"))
        tensors[-1].set_data_from_numpy(array[None])
    with triton.InferenceServerClient(url.partition("://")[2]) as client:
        result = client.infer(server.model_name, tensors)
    return [result.as_numpy(name)[0] for name in outputs]


@pytest.fixture(scope="module")
def expected(classifier) -> tuple[list[bytes], np.ndarray]:
    """Return the labels of the sample photo and their probabilities, the highest first, according to torchvision."""
    with torch.inference_mode():
        probabilities, classes = classifier(small_image()).softmax(dim=1)[0].sort(descending=True)
    return [LABELS[index].encode() for index in classes], probabilities.numpy()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_classifier_gives_torchvisions_labels_and_probabilities(servers, expected, protocol):
    labels, probabilities = expected
    connection = servers["classifier"].connect(protocol)
    response = connection.infer(PHOTO, parameters={"top": 10})
    assert response["labels"].shape == response["probabilities"].shape == (1, 10)
    assert response["probabilities"].dtype == np.float32
    assert probabilities[0] > 10 / 1000
    np.testing.assert_allclose(response["probabilities"][0], probabilities[:10], atol=0.02 * probabilities[0])
    by_label = dict(zip(labels, probabilities, strict=True))
    for label, probability in zip(response["labels"][0], response["probabilities"][0], strict=True):
        assert probability == pytest.approx(by_label[label], abs=0.02 * probabilities[0])
    assert response["labels"][0, 0] == labels[0]
    assert connection.infer(PHOTO)["labels"].tolist() == response["labels"][:, :5].tolist()
    only = connection.infer(PHOTO, ["labels"], {"top": 1})
    assert {name: array.tolist() for name, array in only.items()} == {"labels": [labels[:1]]}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_classifier_says_what_is_wrong_with_a_request(servers, protocol):
    connection = servers["classifier"].connect(protocol)
    with pytest.raises(InferenceError, match="this server's limit is 300000 pixels: scale it down"):
        connection.infer(encode(sample("person", (600, 600)), "JPEG"))
    for top in (0, 11, "5", True):
        with pytest.raises(InferenceError, match=r"^top must be a whole number between 1 and 10, not "):
            connection.infer(PHOTO, parameters={"top": top})
    with pytest.raises(InferenceError, match=r"^unknown parameter 'tops': the only one is top"):
        connection.infer(PHOTO, parameters={"tops": 5})


def test_the_page_quotes_the_classifier():
    assert code("python") == CLASSIFIER.read_text()


def test_the_client_on_the_page_prints_the_labels(servers, expected, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    block = re.match(r"\n(    .*\n|\n)+", PAGE.partition("\nIn Python:\n")[2])[0]
    client = textwrap.dedent(block)
    assert "127.0.0.1:8000" in client
    exec(client.replace("127.0.0.1:8000", f"127.0.0.1:{servers['classifier'].http_port}"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith(f" {expected[0][0].decode()}")


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("IMAGENET1K_V2", "URLError: .*"),
        ("other.pth", r"RuntimeError: Error\(s\) in loading state_dict for ResNet: .*"),
    ],
)
def test_weights_that_the_classifier_cannot_load_are_one_line_and_a_status(tmp_path, weights, reason):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    environment = OFFLINE | {"TORCH_HOME": str(tmp_path)}
    with Server(tmp_path / "log", "--weights", weights, script=CLASSIFIER, environment=environment) as server:
        assert server.process.wait(60) == 2
        assert server.left_behind() == []
        lines = server.log.read_text().splitlines()
    assert re.fullmatch(
        rf"classifier\.py: --weights {weights} failed \({reason}\): use the path of a state dict, or IMAGENET1K_V1, .*",
        lines[-1],
    )
    assert all(" INFO server: " in line or line.startswith("Downloading: ") for line in lines[:-1])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_network_changes_with_one_line_and_the_server_does_what_its_options_say(servers, found, protocol):
    connection = servers["FCN"].connect(protocol)
    response = connection.infer(PHOTO)
    original, segmented = response["original"][0], response["segmented"][0]
    assert psnr(original, decode(PHOTO)) > 40
    assert iou(segmented.any(axis=2), found[2] & original.any(axis=2)) > 0.95
    with pytest.raises(InferenceError, match="this server's limit is 300000 pixels: scale it down"):
        connection.infer(encode(sample("person", (600, 600)), "JPEG"))
    assert "DEMONSTRATION" not in servers["FCN"].log.read_text()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_takes_and_returns_any_number_of_strings(servers, protocol):
    for texts in (["two words", "", "größer  als"], ["word"] * 1000, ["x" * 100_000]):
        array = np.array([text.encode() for text in texts], object)
        words, counts = infer(servers["text"], protocol, {"texts": array}, "words", "counts")
        assert words.tolist() == [word.encode() for text in texts for word in text.upper().split()]
        assert counts.tolist() == [len(text.split()) for text in texts]
    for texts, reason in (
        ([b"\xff"], "the texts must be UTF-8"),
        ([b" ", b""], "the texts have no words"),
        ([b"x" * 100_001], "the texts have more than 100000 characters"),
        ([b"x" * 1_000_000], "the inputs or parameters of the request are too large"),
    ):
        with pytest.raises(tritonclient.utils.InferenceServerException, match=f"InvalidRequest: {reason}"):
            infer(servers["text"], protocol, {"texts": np.array(texts, object)})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_takes_two_images_of_different_sizes(servers, protocol):
    left, right = np.asarray(sample("person", (300, 200))), np.asarray(sample("cat", (170, 400)))
    (both,) = infer(servers["pair"], protocol, {"left": left, "right": right}, "both")
    assert both.shape == (400, 470, 3)
    np.testing.assert_array_equal(both[:200, :300], left)
    np.testing.assert_array_equal(both[:, 300:], right)
    assert not both[200:, :300].any()
    with pytest.raises(tritonclient.utils.InferenceServerException, match="at most 1000 pixels wide and high"):
        infer(servers["pair"], protocol, {"left": np.zeros((1, 1001, 3), np.uint8), "right": right})


def test_a_running_server_outlives_changes_of_its_weights_and_stops_cleanly(servers):
    server = servers["FCN"]
    before = server.connect("http").infer(PHOTO)["segmented"]
    (server.log.parent / "fcn.pth").write_bytes(b"half an upload")
    np.testing.assert_array_equal(server.connect("grpc").infer(PHOTO)["segmented"], before)
    with ThreadPoolExecutor() as pool:
        assert {*pool.map(Server.stop, servers.values())} == {0}
    assert [left for server in servers.values() for left in server.left_behind()] == []


def test_the_changes_are_short():
    assert len(code("diff").splitlines()) == 2
    assert len(CLASSIFIER.read_text().splitlines()) <= 160
