# SPDX-License-Identifier: Apache-2.0
"""The served model responds correctly to everything that the contract allows, over HTTP and gRPC."""

import functools
import io
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import MODEL_NAME, ROOT, SAMPLES, decode, encode, iou, psnr, running_server, sample
from gpu import NEEDS_GPU
from PIL import Image, ImageOps
from torchvision.models.segmentation import DeepLabV3_ResNet101_Weights, deeplabv3_resnet101
from torchvision.transforms import v2

from server import NETWORK
from weights.loading import load_weights

THRESHOLD = 0.6
PRESET = DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1.transforms()
CLASS_NAMES = DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
OTHER_CLASS = {"person": "cat", "cat": "person"}


def reference_mask(class_name: str) -> Image.Image:
    """Return the mask of the class in its sample photo, 255 or 0 in each pixel."""
    return Image.open(SAMPLES[class_name][1]).point(lambda value: 255 * (value > 0))


def kept(response: dict) -> np.ndarray:
    """Return the pixels of the cut-out as a boolean mask. A pixel is either unchanged or black."""
    original, segmented = response["original"][0], response["segmented"][0]
    mask = segmented.any(axis=2)
    np.testing.assert_array_equal(segmented, original * mask[..., None])
    return mask


def agreement(response: dict, mask: np.ndarray) -> float:
    """Return the intersection over union of the cut-out and a mask, without the black pixels of the photo."""
    return iou(kept(response), mask & response["original"][0].any(axis=2))


@functools.cache
def plain_network() -> torch.nn.Module:
    network = deeplabv3_resnet101(weights=None, weights_backbone=None).eval()
    network.load_state_dict(load_weights("demo", NETWORK))
    return network


@functools.cache
def plain_probabilities(encoded: bytes) -> torch.Tensor:
    """Return the probabilities that Pillow and torchvision alone give, in fp32, at the photo's size, ``[21, H, W]``."""
    photo = Image.fromarray(decode(encoded))
    small = v2.functional.pil_to_tensor(photo.resize((224, 224), Image.Resampling.BILINEAR)) / 255
    with torch.inference_mode():
        logits = plain_network()(v2.functional.normalize(small, PRESET.mean, PRESET.std)[None])["out"]
    return torch.nn.functional.interpolate(logits.softmax(dim=1), size=photo.size[::-1], mode="bilinear")[0]


def plain_pipeline(encoded: bytes, class_name: str) -> np.ndarray:
    """Return the mask that Pillow and torchvision alone give."""
    return (plain_probabilities(encoded)[CLASS_NAMES.index(class_name)] > THRESHOLD).numpy()


def test_the_metadata_states_the_contract(connection):
    as_json = {"as_json": True} if connection.url.startswith("grpc") else {}
    metadata = connection.client.get_model_metadata(MODEL_NAME, **as_json)
    tensors = {
        tensor["name"]: (tensor["datatype"], [int(length) for length in tensor["shape"]])
        for tensor in metadata["inputs"] + metadata["outputs"]
    }
    assert tensors == {
        "image": ("UINT8", [-1, -1]),
        "original": ("UINT8", [-1, -1, -1, 3]),
        "segmented": ("UINT8", [-1, -1, -1, 3]),
        "mask": ("UINT8", [-1, -1, -1]),
        "probability": ("UINT8", [-1, -1, -1]),
        "labels": ("UINT8", [-1, -1, -1]),
        "encoded": ("UINT8", [-1, -1]),
    }


@pytest.mark.parametrize("class_name", SAMPLES)
def test_the_response_is_the_photo_and_the_pixels_of_the_class(connection, class_name):
    encoded = SAMPLES[class_name][0].read_bytes()
    response = connection.infer(encoded, parameters={"class_name": class_name})
    assert response["original"].dtype == response["segmented"].dtype == np.uint8
    assert response["original"].shape == response["segmented"].shape == (1, *decode(encoded).shape)
    assert psnr(response["original"][0], decode(encoded)) > 40
    mask = np.asarray(reference_mask(class_name)) > 0
    assert agreement(response, mask) >= {"person": 0.90, "cat": 0.95}[class_name]
    assert agreement(response, plain_pipeline(encoded, class_name)) > 0.98


@pytest.mark.parametrize(
    ("class_name", "variant"), [("person", "1281x851"), ("cat", "320x213"), ("person", "mirrored"), ("cat", "mirrored")]
)
def test_the_class_is_found_in_photos_of_other_sizes_and_mirrored(http_connection, class_name, variant):
    photo, mask = sample(class_name), reference_mask(class_name)
    if variant == "mirrored":
        photo, mask = ImageOps.mirror(photo), ImageOps.mirror(mask)
    else:
        size = tuple(int(number) for number in variant.split("x"))
        photo, mask = photo.resize(size), mask.resize(size, Image.Resampling.NEAREST)
    encoded = encode(photo, "JPEG", quality=90)
    response = http_connection.infer(encoded, parameters={"class_name": class_name})
    assert agreement(response, np.asarray(mask) > 0) >= 0.85
    # Lower than for the samples themselves: the demonstration weights are sure of two photos, not of their copies.
    assert agreement(response, plain_pipeline(encoded, class_name)) > 0.95


@pytest.mark.parametrize("class_name", SAMPLES)
def test_a_class_that_is_not_in_the_photo_is_not_found(http_connection, class_name):
    encoded = SAMPLES[class_name][0].read_bytes()
    assert kept(http_connection.infer(encoded, parameters={"class_name": OTHER_CLASS[class_name]})).mean() < 0.02


def test_parameters_have_defaults(http_connection):
    encoded = SAMPLES["person"][0].read_bytes()
    explicit = http_connection.infer(encoded, parameters={"class_name": "person", "threshold": THRESHOLD})
    np.testing.assert_array_equal(http_connection.infer(encoded)["segmented"], explicit["segmented"])


def test_a_higher_threshold_keeps_less(http_connection):
    encoded = SAMPLES["person"][0].read_bytes()
    shares = [
        kept(http_connection.infer(encoded, parameters={"threshold": threshold})).mean()
        for threshold in (0, 0.3, 0.95, 1)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[1] > shares[2]
    assert shares[-1] == 0


@pytest.mark.parametrize("outputs", [("original",), ("segmented",), ("mask", "encoded"), ("labels", "probability"), ()])
def test_a_request_gets_the_outputs_that_it_names(connection, outputs):
    response = connection.infer(SAMPLES["cat"][0].read_bytes(), outputs)
    assert set(response) == set(outputs or ("original", "segmented"))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_the_mask_and_the_image_file_agree_with_the_raw_pixels(connection, kind):
    outputs, parameters = ("original", "segmented", "mask", "encoded"), {"class_name": "cat", "format": kind}
    response = connection.infer(SAMPLES["cat"][0].read_bytes(), outputs, parameters)
    mask = response["mask"][0]
    np.testing.assert_array_equal(response["segmented"][0], response["original"][0] * (mask > 0)[..., None])
    assert set(np.unique(mask)) == {0, 255}
    file = Image.open(io.BytesIO(response["encoded"][0].tobytes()))
    assert file.format == kind.upper()
    if kind == "jpeg":
        assert psnr(np.asarray(file), response["segmented"][0]) > 35
        return
    pixels = np.asarray(file)
    np.testing.assert_array_equal(pixels[..., 3], mask)
    original, found = response["original"][0][mask > 0], pixels[mask > 0][:, :3]
    assert psnr(found, original) > (30 if kind == "webp" else 1000)  # a PNG loses nothing


def test_the_probability_and_the_labels_agree_with_torchvision(connection):
    encoded = SAMPLES["cat"][0].read_bytes()
    expected = plain_probabilities(encoded)
    response = connection.infer(encoded, ("probability", "labels"), {"class_name": "cat,dog"})
    probability, labels = response["probability"][0], response["labels"][0]
    assert probability.dtype == labels.dtype == np.uint8
    assert probability.shape == labels.shape == (300, 451)
    error = np.abs(probability - 255 * expected[[8, 12]].sum(dim=0).numpy())
    # Pillow and DALI scale photos down a little differently, which moves the edge of the cat by a part of a pixel.
    assert error.mean() < 1
    assert np.percentile(error, 99) < 25
    assert (labels == expected.argmax(dim=0).numpy()).mean() > 0.995
    assert {0, 8} <= set(np.unique(labels))


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_soft_edge_is_alpha_by_the_documented_formula(http_connection, kind):
    outputs, parameters = ("original", "mask", "probability", "encoded"), {"class_name": "cat", "format": kind}
    response = http_connection.infer(
        SAMPLES["cat"][0].read_bytes(), outputs, parameters | {"threshold": 0.5, "edge": 0.8}
    )
    response = {name: array[0] for name, array in response.items()}
    pixels = np.asarray(Image.open(io.BytesIO(response["encoded"].tobytes())))
    alpha = pixels[..., 3]
    expected = 255 * ((response["probability"] / 255 - 0.1) / 0.8).clip(0, 1)
    assert np.abs(alpha - expected).max() < 1.5  # probability and alpha are both rounded
    assert ((alpha > 0) & (alpha < 255)).mean() > 0.01
    assert (response["mask"] == 255 * (alpha > 127)).mean() > 0.999  # the other outputs keep their hard edge
    seen = alpha > 0
    assert psnr(pixels[seen][:, :3], response["original"][seen]) > (30 if kind == "webp" else 1000)
    assert kind == "webp" or not pixels[~seen].any()


def test_a_palette_png_has_the_labels_and_the_indices_are_documented(http_connection):
    response = http_connection.infer(SAMPLES["person"][0].read_bytes(), ("labels", "encoded"), {"content": "labels"})
    image = Image.open(io.BytesIO(response["encoded"][0].tobytes()))
    assert (image.format, image.mode) == ("PNG", "P")
    np.testing.assert_array_equal(np.asarray(image), response["labels"][0])
    documented = re.findall(r"(\d+) `(\w+)`", (ROOT / "docs" / "protocol.md").read_text())
    assert {int(index): name for index, name in documented} == dict(enumerate(CLASS_NAMES))


def test_the_probabilities_of_several_classes_add_up(http_connection):
    encoded = SAMPLES["cat"][0].read_bytes()
    cat, both, all_but_cat = (
        http_connection.infer(encoded, ("mask",), {"class_name": names, "threshold": 0.5})["mask"] > 0
        for names in ("cat", "person,cat", ",".join(name for name in CLASS_NAMES if name != "cat"))
    )
    assert (both >= cat).all()
    assert (cat ^ all_but_cat).mean() > 0.999  # a pixel is one or the other


PICTURE = sample("person", (90, 70))
ALPHA = np.dstack([np.asarray(PICTURE), np.linspace(0, 255, 6300).reshape(70, 90)]).astype(np.uint8)
KINDS = {
    "gray JPEG": encode(PICTURE.convert("L"), "JPEG"),
    "CMYK JPEG": encode(PICTURE.convert("CMYK"), "JPEG"),
    "progressive JPEG": encode(PICTURE, "JPEG", progressive=True),
    "JPEG with a second picture": encode(PICTURE, "MPO", save_all=True, append_images=[PICTURE.resize((50, 50))]),
    "JPEG with a film after it": encode(PICTURE, "JPEG") + b"\xff\xda and then something else" * 100,
    "PNG": encode(PICTURE, "PNG"),
    "16-bit PNG": encode(Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257), "PNG"),
    "palette PNG": encode(PICTURE.quantize(64), "PNG"),
    "PNG with alpha": encode(Image.fromarray(ALPHA), "PNG"),
    "1-bit PNG": encode(PICTURE.convert("1"), "PNG"),
    "lossy WebP": encode(PICTURE, "WEBP"),
    "lossless WebP": encode(PICTURE, "WEBP", lossless=True),
    "BMP": encode(PICTURE, "BMP"),
    "1 x 1": encode(PICTURE.resize((1, 1)), "PNG"),
    "1 x 4000": encode(PICTURE.resize((1, 4000)), "PNG"),
    "4000 x 1": encode(PICTURE.resize((4000, 1)), "JPEG"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_photo_is_decoded_as_pillow_decodes_it(connection, kind):
    original, expected = connection.infer(KINDS[kind], ("original",))["original"], decode(KINDS[kind])
    assert original.shape == (1, *expected.shape)
    assert psnr(original[0], expected) > 40


@pytest.mark.parametrize("kind", ["1-bit PNG", "1 x 1", "1 x 4000", "4000 x 1"])
def test_photos_of_odd_sizes_are_cut_out(http_connection, kind):
    response = http_connection.infer(KINDS[kind], parameters={"threshold": 0})
    assert response["segmented"].shape == response["original"].shape
    kept(response)


def oriented(image: Image.Image, orientation: int, kind: str = "JPEG", **options: object) -> bytes:
    """Return the image as a file that tells viewers to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_come_back_upright(connection, orientation, kind):
    encoded = oriented(PICTURE, orientation, kind, quality=95)
    original = connection.infer(encoded, ("original",))["original"]
    assert original.shape == ((1, 70, 90, 3) if orientation < 5 else (1, 90, 70, 3))
    assert psnr(original[0], decode(encoded)) > 40


def test_a_person_is_found_in_a_photo_that_lies_on_its_side(http_connection):
    # The viewer turns it a quarter to the right. The mask is found in the upright photo.
    encoded = oriented(sample("person").transpose(Image.Transpose.ROTATE_90), 6, quality=95)
    assert agreement(http_connection.infer(encoded), np.asarray(reference_mask("person")) > 0) >= 0.90


def test_many_requests_at_the_same_time_get_their_own_responses(server):
    tasks = [
        (class_name, (200 + 31 * index, 150 + 17 * index), server.connect("http" if index % 2 else "grpc"))
        for index in range(4)
        for class_name in SAMPLES
    ]

    def ask(task: tuple) -> tuple[np.ndarray, dict]:
        class_name, size, connection = task
        encoded = encode(sample(class_name, size), "PNG")
        return decode(encoded), connection.infer(encoded, parameters={"class_name": class_name})

    with ThreadPoolExecutor(8) as pool:
        for (class_name, size, _), (expected, response) in zip(tasks, pool.map(ask, tasks), strict=True):
            np.testing.assert_array_equal(response["original"][0], expected, err_msg=f"{class_name} {size}")
            assert kept(response).mean() > 0.3


@NEEDS_GPU
def test_responses_from_a_gpu_match_those_from_a_cpu(server, tmp_path):
    assert torch.cuda.get_device_name() in server.log.read_text()
    with running_server(tmp_path / "log", "--weights", "demo", "--device", "cpu") as on_cpu:
        for class_name, (path, _) in SAMPLES.items():
            gpu, cpu = (
                which.connect("grpc").infer(path.read_bytes(), parameters={"class_name": class_name})
                for which in (server, on_cpu)
            )
            assert psnr(gpu["original"][0], cpu["original"][0]) > 40
            assert iou(kept(gpu), kept(cpu)) > 0.98
