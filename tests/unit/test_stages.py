# SPDX-License-Identifier: Apache-2.0
"""Each stage by itself, without Triton, compared with an independent reference."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLES, as_array, as_photo, decode, encode, psnr, run_python, sample
from gpu import DEVICES, NEEDS_GPU
from PIL import Image
from torch.fx.experimental.optimization import fuse
from torchvision.models import get_model
from torchvision.models.segmentation import DeepLabV3_ResNet101_Weights, deeplabv3_resnet101
from torchvision.transforms import v2

import maps
from maps import label_map, probability_map, soft_cut_out
from model_inference import (
    ConvReLU,
    PackedConv,
    SegmentationNetwork,
    build_module,
    fuse_relu,
    load_network,
    pick_precision,
    pretrained_weights,
)
from photo import Photo
from pipelines import Postprocess, Preprocess
from server import NETWORK
from serving.errors import InvalidRequest, UsageError
from weights.loading import load_weights

HAS_AMX = torch.cpu.get_capabilities().get("amx_bf16", False)

PRETRAINED = DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1
PRESET = PRETRAINED.transforms()


@functools.cache
def preprocess(device: str) -> Preprocess:
    return Preprocess(torch.device(device), 224)


def to_arrays(batch) -> list[np.ndarray]:
    return [np.asarray(array) for array in batch.as_cpu()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [None, (1281, 851), (100, 60), (1, 1)])
@pytest.mark.parametrize("class_name", SAMPLES)
def test_preprocessing_matches_torchvision(device, size, class_name):
    photo = sample(class_name, size)
    photos, images = preprocess(device)([as_photo(encode(photo, "PNG"))])
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
def test_decoding_matches_pillow(device, subsampling, progressive, class_name):
    encoded = encode(sample(class_name), "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    photos, _ = preprocess(device)([as_photo(encoded)])
    assert psnr(to_arrays(photos)[0], decode(encoded)) > 40


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_color_noise_matches_pillow(device):
    # The worst case of color subsampling: every pixel of another color.
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 403, 3), dtype=np.uint8))
    encoded = encode(noise, "JPEG", quality=90, subsampling="4:2:0")
    photos, _ = preprocess(device)([as_photo(encoded)])
    assert psnr(to_arrays(photos)[0], decode(encoded)) > 40


@pytest.mark.parametrize("device", DEVICES)
def test_preprocessing_continues_after_a_photo_that_cannot_be_decoded(device):
    preprocessing = preprocess(device)
    good = encode(sample("cat"), "PNG")
    at = good.index(b"IDAT")
    for bad in (good[: at + 4] + b"damage" + good[at + 10 :], encode(sample("cat").resize((9, 7)), "WEBP")[:50]):
        bad = Photo(as_array(bad), 9, 7, orientation=1)
        with pytest.raises(InvalidRequest, match="cannot be decoded"):
            preprocessing([bad])
        photos, _ = preprocessing([as_photo(good)])
        np.testing.assert_array_equal(to_arrays(photos)[0], decode(good))


def interpolate(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Linear interpolation with pixel centers at half, values repeated beyond the edge, in float64."""
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
def test_postprocessing_matches_numpy(device, sizes):
    random = np.random.default_rng(1)
    photos = [random.integers(1, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    probability = random.random((len(sizes), 224, 224), dtype=np.float32)
    thresholds = [0.6, 0.5, 0.25, 0.9][: len(sizes)]
    device = torch.device(device)
    batch, _ = Preprocess(device, 224, len(sizes))(
        [as_photo(encode(Image.fromarray(photo), "PNG")) for photo in photos]
    )
    outputs = Postprocess(device, len(sizes))(batch, torch.from_numpy(probability).to(device), thresholds)
    segmented, masks = map(to_arrays, outputs)
    for index, photo in enumerate(photos):
        exact = interpolate(probability[index].astype(np.float64), sizes[index])
        expected = photo * (exact > thresholds[index])[..., None]
        differs = (segmented[index] != expected).any(axis=2)
        np.testing.assert_array_equal(masks[index], 255 * segmented[index].all(axis=2))  # no pixel of a photo is 0
        # Exactly, except where the threshold is closer than float32 can tell.
        assert np.abs(exact - thresholds[index])[differs].max(initial=0) < 1e-5


def random_probabilities(seed: int) -> np.ndarray:
    """Return probabilities of 21 classes that add up to 1, with regions of some size, float32 ``[21, 56, 56]``."""
    logits = np.random.default_rng(seed).normal(0, 4, (21, 9, 9))
    exponentials = np.exp([interpolate(values, (56, 56)) for values in logits])
    return (exponentials / exponentials.sum(axis=0)).astype(np.float32)


MAP_SIZES = [(56, 56), (300, 451), (1, 1), (1, 7), (9, 4), (4000, 1), (3, 5000)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", MAP_SIZES)
def test_maps_match_numpy(device, size, monkeypatch):
    monkeypatch.setitem(maps.BAND_PIXELS, device, 4096)  # several bands, and rows that are longer than a band
    probabilities = random_probabilities(seed=1)
    exact = np.array([interpolate(values, size) for values in probabilities.astype(np.float64)])
    on_device = torch.from_numpy(probabilities).to(device)
    soft, labels = (call.cpu().numpy() for call in (probability_map(on_device[3], size), label_map(on_device, size)))
    assert (soft.dtype, soft.shape, labels.dtype, labels.shape) == (np.uint8, size, np.uint8, size)
    assert np.abs(soft - 255 * exact[3]).max() < 0.5 + 1e-2  # 1e-2 is for float32
    # Exactly, except where two classes are closer than float32 can tell.
    chosen = np.take_along_axis(exact, labels[None].astype(int), axis=0)[0]
    assert (exact.max(axis=0) - chosen).max() < 1e-5
    assert len(np.unique(labels)) > 5 or min(size) < 9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("threshold", "edge"), [(0.6, 0.4), (0.5, 1), (0.1, 0.6), (0.9, 0.6), (0, 0.1), (1, 0.1)])
def test_a_soft_edge_matches_numpy(device, threshold, edge):
    size, random = (301, 203), np.random.default_rng(2)
    photo = random.integers(1, 256, (*size, 3), dtype=np.uint8)
    probability = random.random((56, 56), dtype=np.float32)
    probability[:8], probability[8:16] = 0, 1
    exact = interpolate(probability.astype(np.float64), size)
    result = soft_cut_out(torch.from_numpy(photo).to(device), torch.from_numpy(probability).to(device), threshold, edge)
    result = result.cpu().numpy()
    low, high = max(0, threshold - edge / 2), min(1, threshold + edge / 2)
    assert np.abs(result[..., 3] - np.interp(exact, [low, high], [0, 255])).max() < 0.5 + 1e-2
    np.testing.assert_array_equal(result[..., :3], photo * (result[..., 3:] > 0))
    assert {0, 255} < set(np.unique(result[..., 3]))  # impossible, certain, and something in between


@pytest.mark.parametrize("device", DEVICES)
def test_the_narrowest_edge_is_a_hard_one(device):
    photo, size = torch.full((90, 90, 3), 7, dtype=torch.uint8, device=device), (90, 90)
    probability = torch.from_numpy(random_probabilities(seed=3)[0]).to(device)
    expected = interpolate(probability.cpu().numpy().astype(np.float64), size)
    for edge in (1e-6, 1e-300):
        alpha = soft_cut_out(photo, probability, 0.5, edge)[..., 3].cpu().numpy()
        clear = np.abs(expected - 0.5) > 1e-5
        np.testing.assert_array_equal(alpha[clear], 255 * (expected > 0.5)[clear])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("edge", [1, 1e-4, 1e-6, 1e-300])
@pytest.mark.parametrize("threshold", [0, 1e-320, 0.5, 1])
def test_at_any_edge_0_is_transparent_and_1_opaque(device, threshold, edge):
    photo = torch.full((2, 2, 3), 7, dtype=torch.uint8, device=device)
    for probability, alpha in ((0.0, 0), (1.0, 255)):
        pixels = soft_cut_out(photo, torch.full((2, 2), probability, device=device), threshold, edge)
        assert pixels[..., 3].unique().tolist() == [alpha]


LARGE_MAPS = """
import resource, torch
from maps import label_map, probability_map
torch.set_num_threads(1)
small = torch.rand(21, 32, 32).softmax(dim=0)
sizes = [(2000, 2000), (4_000_000, 1)]
label_map(small, (100, 100))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in sizes:
    assert label_map(small, size).shape == probability_map(small[0], size).shape == size
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_maps_of_large_and_long_photos_need_little_memory():
    done = run_python("-c", LARGE_MAPS)
    assert done.returncode == 0, done.stderr
    # In KB. All probabilities of a photo together would be 336 MB.
    assert int(done.stdout) < 300_000


@pytest.mark.parametrize("device", DEVICES)
def test_a_call_that_failed_leaves_nothing_behind_for_the_next_one(device):
    device = torch.device(device)
    postprocess, probability = Postprocess(device, 2), torch.ones(1, 8, 8, device=device)
    for value in (10, 20, 30):
        batch, _ = Preprocess(device, 224)([as_photo(encode(Image.new("RGB", (9, 7), 3 * (value,)), "PNG"))])
        if value == 10:
            with pytest.raises(RuntimeError):
                postprocess(batch, probability, [0.5] * 3)  # more thresholds than the batch can have
        else:
            cut_out, mask = (to_arrays(output)[0] for output in postprocess(batch, probability, [0.5]))
            assert (cut_out == value).all()
            assert (mask == 255).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_postprocessing_at_the_ends_of_the_threshold(device, threshold):
    photo = Image.new("RGB", (30, 20), (10, 20, 30))
    batch, _ = preprocess(device)([as_photo(encode(photo, "PNG"))])
    probability = torch.full((1, 224, 224), 0.5, device=device)
    (segmented,), (mask,) = map(to_arrays, Postprocess(torch.device(device))(batch, probability, [threshold]))
    np.testing.assert_array_equal(mask, np.full((20, 30), 255 * (threshold < 0.5)))
    np.testing.assert_array_equal(segmented, np.asarray(photo) * (threshold < 0.5))


@pytest.mark.parametrize("device", DEVICES)
def test_the_network_matches_torchvision_with_weights_from_torchs_cache(device, tmp_path, monkeypatch, caplog):
    # torchvision's own loading path, with a file in torch's cache instead of a download.
    torch.manual_seed(0)
    reference = deeplabv3_resnet101(weights=None, weights_backbone=None, aux_loss=True)
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    reference.classifier[-1].weight.data *= 1.5e-4  # moderate logits: not all probabilities are 0 or 1
    file = tmp_path / "hub" / "checkpoints" / PRETRAINED.url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.save(reference.state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    reference = deeplabv3_resnet101(weights=PRETRAINED).eval()
    caplog.set_level("INFO")
    state_dict = load_weights("auto", NETWORK)
    assert "COCO_WITH_VOC_LABELS_V1" in caplog.text
    assert "WARNING" not in caplog.text
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = reference(images)["out"].softmax(dim=1)
    assert expected.std() > 0.03
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    probabilities = SegmentationNetwork(NETWORK, state_dict, torch.device(device))(images).cpu()
    assert probabilities.shape == (2, 21, 224, 224)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2, 224, 224))
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-4)


def test_the_class_names_are_those_of_pascal_voc():
    names = pretrained_weights(NETWORK).meta["categories"]
    assert len(names) == 21
    assert names.index("person") == 15
    assert names.index("cat") == 8


@pytest.mark.parametrize(
    ("instructions", "precision"),
    [
        ("AVX512_CORE", "fp32"),
        pytest.param("ALL", "bf16", marks=pytest.mark.skipif(not HAS_AMX, reason="needs a CPU with AMX")),
    ],
)
def test_on_a_cpu_the_automatic_precision_is_bf16_if_that_is_faster(instructions, precision):
    code = "import torch, model_inference; print(model_inference.pick_precision(torch.device('cpu')))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}  # oneDNN uses no others
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == precision


def test_on_a_gpu_the_automatic_precision_depends_on_the_hardware_alone(monkeypatch):
    for capability, precision in (((6, 1), "fp32"), ((7, 0), "fp16"), ((9, 0), "fp16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert pick_precision(torch.device("cuda")) == precision


def test_weights_too_large_for_fp16_are_noticed():
    state_dict = load_weights("demo", NETWORK)
    state_dict["classifier.4.weight"] = state_dict["classifier.4.weight"] * 1e6
    for precision, expected in (("fp16", True), ("fp32", False)):
        assert SegmentationNetwork(NETWORK, state_dict, torch.device("cpu"), precision).overflows(32) is expected
    with pytest.raises(UsageError, match="--precision fp16 overflows with these weights: use bf16, fp32 or auto"):
        load_network(NETWORK, state_dict, torch.device("cpu"), "fp16", 32)


def test_each_relu_after_a_convolution_is_fused():
    module = fuse_relu(fuse(build_module(NETWORK, load_weights("demo", NETWORK))))
    called = [module.get_submodule(node.target) for node in module.graph.nodes if node.op == "call_module"]
    assert not any(isinstance(layer, torch.nn.ReLU) for layer in called)
    fused = [node for node in module.graph.nodes if isinstance(node.target, str) and node.target.endswith("_relu")]
    assert len(fused) == 107
    assert sum(len(node.args) == 2 for node in fused) == 33  # the residual blocks of ResNet101


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs a CPU that oneDNN supports in bf16")
@pytest.mark.parametrize("dilation", [1, 12, 27, 28, 36])
def test_a_packed_convolution_returns_the_same(dilation):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(64, 32, 3, padding=dilation, dilation=dilation, dtype=torch.bfloat16).requires_grad_(False)
    images = torch.randn(2, 64, 28, 28, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    packed = PackedConv(conv)
    torch.testing.assert_close(packed(images), conv(images))
    assert packed(torch.full_like(images, torch.nan)).isnan().all()
    with torch.inference_mode():
        images[0, 0, 0, 0] = torch.nan  # reaches the pixels that have it under a tap
        assert torch.equal(packed(images).isnan(), conv(images).isnan())


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs a CPU that oneDNN supports in bf16")
@pytest.mark.parametrize("name", ["fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_other_networks_agree_with_torchvision_in_bf16_on_a_cpu(name):
    torch.manual_seed(0)
    network = get_model(name, weights=None, weights_backbone=None, num_classes=21, aux_loss=False).eval()
    images = torch.randn(2, 3, 224, 224)
    packed = SegmentationNetwork(name, network.state_dict(), torch.device("cpu"), "bf16")
    assert any(isinstance(layer, PackedConv) for layer in packed._module.modules())
    with torch.inference_mode():
        expected = network(images)["out"].softmax(1)
    assert (packed(images) - expected).abs().mean() < 0.1 * expected.std()


@NEEDS_GPU
@pytest.mark.parametrize("name", ["fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_other_networks_agree_in_fp16_and_fp32(name):
    torch.manual_seed(0)
    network = get_model(name, weights=None, weights_backbone=None, num_classes=21, aux_loss=False)
    images = torch.randn(2, 3, 224, 224)
    fp16, fp32 = (
        SegmentationNetwork(name, network.state_dict(), torch.device("cuda"), precision)(images)
        for precision in ("fp16", "fp32")
    )
    assert (fp16 - fp32).abs().mean() < 0.1 * fp32.std()


@NEEDS_GPU
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_no_fused_layer_hides_nan(precision):
    network = SegmentationNetwork(NETWORK, load_weights("demo", NETWORK), torch.device("cuda"), precision)
    passed = []
    for layer in network._module.modules():
        if isinstance(layer, ConvReLU):
            layer.register_forward_hook(lambda _layer, _inputs, output: passed.append(bool(output.isnan().all())))
    for batch_size in (1, 2, 4, 7):
        assert network(torch.full((batch_size, 3, 224, 224), torch.nan)).isnan().all()
    assert len(passed) == 4 * 107
    assert all(passed)


@NEEDS_GPU
def test_weights_too_large_for_fp16_are_served_in_fp32(caplog):
    state_dict = load_weights("demo", NETWORK)
    state_dict["classifier.4.weight"] = state_dict["classifier.4.weight"] * 1e6
    with torch.cuda.stream(torch.cuda.Stream()):  # on which it captures its graphs
        assert load_network(NETWORK, state_dict, torch.device("cuda"), "auto", 224).precision == "fp32"
    assert "FP16 OVERFLOW" in caplog.text
