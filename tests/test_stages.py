# SPDX-License-Identifier: Apache-2.0
"""Each stage alone, without Triton, against an independent reference."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import DEVICES, SAMPLES, decode, encode, iou, psnr
from PIL import Image
from torchvision.models.segmentation import DeepLabV3_ResNet101_Weights, deeplabv3_resnet101
from torchvision.transforms import v2

import model_inference
from batching import FORK, Batcher, lay_out, open_channels
from model_inference import SegmentationNetwork, load_weights, pick_precision
from pipelines import Postprocess, Preprocess
from request import InvalidRequest, PhotoRequest
from segmentation import HostMemory, Segmenter
from worker import MAX_BATCH_SIZE

PRESET = DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1.transforms()


def sample(class_name: str, size: tuple[int, int] | None = None) -> Image.Image:
    image = Image.open(SAMPLES[class_name][0]).convert("RGB")
    return image.resize(size) if size else image


def to_arrays(batch) -> list[np.ndarray]:
    return [np.asarray(array) for array in batch.as_cpu()]


def as_array(encoded: bytes) -> np.ndarray:
    return np.frombuffer(encoded, np.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [None, (1281, 851), (100, 60), (1, 1)])
@pytest.mark.parametrize("class_name", SAMPLES)
def test_preprocess_is_torchvisions(device, size, class_name):
    photo = sample(class_name, size)
    photos, images = Preprocess(torch.device(device), 224)([as_array(encode(photo, "PNG"))])
    np.testing.assert_array_equal(to_arrays(photos)[0], np.asarray(photo))
    small = v2.functional.resize(v2.functional.pil_to_tensor(photo).float() / 255, [224, 224], antialias=True)
    expected = v2.functional.normalize(small, PRESET.mean, PRESET.std)
    assert images.shape == (1, 3, 224, 224)
    assert images.dtype == torch.float32
    assert images.device.type == device
    difference = (images[0].cpu() - expected).abs()
    # DALI and torchvision round the filter's support differently: a few pixels at the edges differ.
    assert difference.mean() < 3e-4
    assert difference.max() < 0.25


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("class_name", SAMPLES)
def test_decoding_is_pillows(device, subsampling, progressive, class_name):
    encoded = encode(sample(class_name), "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    photos, _ = Preprocess(torch.device(device), 224)([as_array(encoded)])
    assert psnr(to_arrays(photos)[0], decode(encoded)) > 40


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_colour_noise_is_pillows(device):
    # The worst case of colour subsampling: every pixel of another colour.
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 403, 3), dtype=np.uint8))
    encoded = encode(noise, "JPEG", quality=90, subsampling="4:2:0")
    photos, _ = Preprocess(torch.device(device), 224)([as_array(encoded)])
    assert psnr(to_arrays(photos)[0], decode(encoded)) > 40


@pytest.mark.parametrize("device", DEVICES)
def test_preprocess_goes_on_after_a_photo_that_cannot_be_decoded(device):
    preprocess = Preprocess(torch.device(device), 224)
    good = encode(sample("cat"), "PNG")
    for bad in (good[:20_000], b"no photo at all"):
        with pytest.raises(InvalidRequest, match="cannot be decoded"):
            preprocess([as_array(bad)])
        photos, _ = preprocess([as_array(good)])
        np.testing.assert_array_equal(to_arrays(photos)[0], decode(good))


def interpolate(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Linear interpolation with pixel centres at half, values repeated beyond the edge, in float64."""
    for axis, length in enumerate(size):
        position = (np.arange(length) + 0.5) * values.shape[axis] / length - 0.5
        below = np.floor(position).astype(int)
        share = (position - below).reshape(-1, *[1] * (1 - axis))
        lower, upper = (np.take(values, (below + step).clip(0, values.shape[axis] - 1), axis) for step in (0, 1))
        values = lower * (1 - share) + upper * share
    return values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "sizes", [[(512, 512)], [(851, 1281)], [(1, 1)], [(4000, 1)], [(100, 60), (300, 451), (224, 224), (1, 7)]]
)
def test_postprocess_is_numpys(device, sizes):
    random = np.random.default_rng(1)
    photos = [random.integers(1, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    probability = random.random((len(sizes), 224, 224), dtype=np.float32)
    thresholds = [0.6, 0.5, 0.25, 0.9][: len(sizes)]
    device = torch.device(device)
    batch, _ = Preprocess(device, 224, len(sizes))(
        [as_array(encode(Image.fromarray(photo), "PNG")) for photo in photos]
    )
    segmented = to_arrays(Postprocess(device, len(sizes))(batch, torch.from_numpy(probability).to(device), thresholds))
    for index, photo in enumerate(photos):
        exact = interpolate(probability[index].astype(np.float64), sizes[index])
        expected = photo * (exact > thresholds[index])[..., None]
        differs = (segmented[index] != expected).any(axis=2)
        # Exactly, but where the threshold is nearer than float32 can tell.
        assert np.abs(exact - thresholds[index])[differs].max(initial=0) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_postprocess_at_the_ends_of_the_threshold(device, threshold):
    device = torch.device(device)
    photo = Image.new("RGB", (30, 20), (10, 20, 30))
    batch, _ = Preprocess(device, 224)([as_array(encode(photo, "PNG"))])
    probability = torch.full((1, 224, 224), 0.5, device=device)
    segmented = to_arrays(Postprocess(device)(batch, probability, [threshold]))[0]
    np.testing.assert_array_equal(segmented, np.asarray(photo) * (threshold < 0.5))


@pytest.mark.parametrize("device", DEVICES)
def test_network_is_torchvisions_through_its_own_cache(device, tmp_path, monkeypatch):
    # torchvision's own way, with a file in torch's cache in place of the download.
    torch.manual_seed(0)
    reference = deeplabv3_resnet101(weights=None, weights_backbone=None, aux_loss=True)
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    reference.classifier[-1].weight.data *= 1.5e-4  # logits of a few, for probabilities that are neither all 0 or 1
    file = tmp_path / "hub" / "checkpoints" / DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1.url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.save(reference.state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    reference = deeplabv3_resnet101(weights=DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1).eval()
    weights = load_weights("auto")
    assert weights.warning == ""
    assert "COCO_WITH_VOC_LABELS_V1" in weights.source
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = reference(images)["out"].softmax(dim=1)
    assert expected.std() > 0.03
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    probabilities = SegmentationNetwork(weights.state_dict, torch.device(device))(images).cpu()
    assert probabilities.shape == (2, 21, 224, 224)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2, 224, 224))
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=DEVICES)
def segmenter(request) -> Segmenter:
    device = torch.device(request.param)
    network = SegmentationNetwork(load_weights("demo").state_dict, device, pick_precision("auto", device))
    return Segmenter(network, 224, MAX_BATCH_SIZE["cuda"])


def ask(class_name: str, *size: tuple[int, int], outputs: tuple[str, ...] = ("original", "segmented")) -> PhotoRequest:
    encoded = as_array(encode(sample(class_name, *size), "JPEG", quality=90))
    return PhotoRequest(encoded, model_inference.CLASS_NAMES.index(class_name), 0.6, outputs, memory())


def memory() -> HostMemory:
    return HostMemory(np.empty(1281 * 851 * 6, np.uint8))


def test_a_photos_answer_does_not_depend_on_its_company(segmenter):
    company = [ask("cat"), ask("person", (1281, 851)), ask("person", (20, 30))]
    wanted = ask("person")
    (alone,) = segmenter([wanted])
    for size in (2, 3, 4):
        together = segmenter([*company[: size - 1], wanted])[-1]
        np.testing.assert_array_equal(together["original"], alone["original"])
        assert iou(together["segmented"].any(axis=2), alone["segmented"].any(axis=2)) > 0.995


@pytest.mark.parametrize("device", DEVICES)
def test_masks_in_fp16_are_those_of_fp32(device):
    device, state_dict = torch.device(device), load_weights("demo").state_dict
    fast, exact = (Segmenter(SegmentationNetwork(state_dict, device, name), 224, 1) for name in ("fp16", "fp32"))
    for class_name in SAMPLES:
        (one,), (other,) = fast([ask(class_name)]), exact([ask(class_name)])
        np.testing.assert_array_equal(one["original"], other["original"])
        assert iou(one["segmented"].any(axis=2), other["segmented"].any(axis=2)) >= 0.99


def test_weights_too_large_for_fp16_are_noticed():
    state_dict = load_weights("demo").state_dict
    state_dict["classifier.4.weight"] = state_dict["classifier.4.weight"] * 1e6
    for precision, expected in (("fp16", True), ("fp32", False)):
        assert SegmentationNetwork(state_dict, torch.device("cpu"), precision).overflows(224) is expected


def test_answers_outlive_the_next_batches(segmenter):
    requests = [ask("person"), ask("cat")]
    answers = segmenter(requests)
    copies = [{name: array.copy() for name, array in answer.items()} for answer in answers]
    for _ in range(10):
        segmenter([ask("cat", (700, 500)), ask("person", (512, 512)), ask("cat")])
    for answer, copy in zip(answers, copies, strict=True):
        for name in answer:
            np.testing.assert_array_equal(answer[name], copy[name])


def test_only_what_is_asked_for_is_made(segmenter, monkeypatch):
    monkeypatch.setattr(segmenter, "_network", None)  # to call it would fail
    (answer,) = segmenter([ask("cat", outputs=("original",))])
    assert set(answer) == {"original"}


class Forked:
    """A batcher in a process of its own, as the server has it, and a thread for each channel to call it with."""

    def __init__(self, worker, count: int, max_batch_size: int, explain=lambda error: error):
        self.channels = open_channels(count, 1000, 1000)
        batcher = Batcher(self.channels, lambda *item: item, [worker], explain, max_batch_size)
        self.process = FORK.Process(target=batcher.run, daemon=True)
        self.process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


def test_one_at_fault_in_a_batch_fails_alone():
    release = FORK.Event()

    def worker(items):
        release.wait()  # until all of them wait: the first call takes one or two, the next all others
        if any(message == "bad" for _, _, message in items):
            raise InvalidRequest("this one is bad")
        return [{} for _ in items]

    messages = ["good", "bad", "good", "bad", "good"]
    with Forked(worker, len(messages), 8) as forked, ThreadPoolExecutor(len(messages)) as pool:
        answers = [
            pool.submit(channel.call, as_array(b"photo"), message)
            for channel, message in zip(forked.channels, messages, strict=True)
        ]
        release.set()
        for message, answer in zip(messages, answers, strict=True):
            if message == "bad":
                with pytest.raises(InvalidRequest, match="this one is bad"):
                    answer.result()
            else:
                assert answer.result() == {}


def test_batches_are_of_what_waits():
    entered, release, sizes = FORK.Event(), FORK.Event(), FORK.SimpleQueue()

    def worker(items):
        entered.set()
        release.wait()
        sizes.put(len(items))
        answers = [lay_out(channel.response, {"doubled": array.shape}) for channel, array, _ in items]
        for answer, (_, array, _) in zip(answers, items, strict=True):
            answer["doubled"][:] = 2 * array
        return answers

    with Forked(worker, 11, max_batch_size=4) as forked, ThreadPoolExecutor(11) as pool:
        requests = [np.array([number], np.uint8) for number in range(11)]
        first = pool.submit(forked.channels[0].call, requests[0], None)
        entered.wait()
        others = [
            pool.submit(channel.call, request, None)
            for channel, request in zip(forked.channels[1:], requests[1:], strict=True)
        ]
        while forked.channels[0].waiting.get_value() < 10:
            time.sleep(0.01)
        release.set()
        assert [future.result()["doubled"].tolist() for future in [first, *others]] == [[2 * n] for n in range(11)]
        assert [sizes.get() for _ in range(4)] == [1, 4, 4, 2]


def test_a_worker_that_returns_too_little_is_an_error_of_the_batcher():
    with Forked(lambda items: [], 1, max_batch_size=4) as forked, ThreadPoolExecutor(1) as pool:  # noqa: ARG005
        call = pool.submit(forked.channels[0].call, as_array(b"photo"), None)
        forked.process.join(10)
        assert forked.process.exitcode == 1
        forked.channels[0].break_off()
        with pytest.raises(ConnectionError):
            call.result()


def test_a_worker_that_is_gone_fails_its_callers():
    with Forked(lambda items: os._exit(1), 1, max_batch_size=1) as forked, ThreadPoolExecutor(1) as pool:  # noqa: ARG005
        call = pool.submit(forked.channels[0].call, as_array(b"photo"), None)
        forked.process.join()
        forked.channels[0].break_off()
        with pytest.raises(ConnectionError):
            call.result()
        with pytest.raises(ConnectionError):
            forked.channels[0].call(as_array(b"photo"), None)


def test_the_class_names_are_pascal_vocs():
    assert len(model_inference.CLASS_NAMES) == 21
    assert model_inference.CLASS_NAMES.index("person") == 15
    assert model_inference.CLASS_NAMES.index("cat") == 8


def test_demo_weights_catch_other_random_numbers(tmp_path):
    content = torch.load(model_inference.DEMO_PATH, weights_only=True)
    content["fingerprint"] += 1
    torch.save(content, tmp_path / "demo.pt")
    with pytest.raises(model_inference.WeightsError, match="draws other random numbers"):
        load_weights("demo", tmp_path / "demo.pt")


def test_demo_weights_are_small():
    assert model_inference.DEMO_PATH.stat().st_size < 2_000_000
