"""The network's input and the rectangle of the picture that it shows."""

import json

import numpy as np
import pytest
from PIL import Image

from embedcam.errors import ImageError, InputError
from embedcam.preprocess import (
    CustomPreprocess,
    Preprocess,
    custom,
    from_transform,
    preprocess_from_dict,
)

SIZES = [(224, 224), (257, 255), (500, 333), (37, 1001), (225, 301), (1, 1), (3, 2), (640, 479)]


def agrees(theirs, sizes=SIZES):
    ours = from_transform(theirs)
    assert isinstance(ours, Preprocess)
    for width, height in sizes:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        # The other library may order the arithmetic otherwise; values are below 3.
        np.testing.assert_allclose(ours(image), theirs(image).numpy(), rtol=0, atol=1e-6)
    return ours


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resize_to", "crop"), [(256, 224), (232, 224), (73, 64), (40, 65)])
def test_crop_equals_torchvision(interpolation, resize_to, crop):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    mode = InterpolationMode(interpolation)
    theirs = ImageClassification(crop_size=crop, resize_size=resize_to, interpolation=mode)
    assert agrees(theirs) == Preprocess((crop, crop), "crop", resize_to, interpolation)


def test_chains_equal_torchvision():
    from torchvision import transforms

    to_tensor = transforms.ToTensor()
    normalize = transforms.Normalize((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    steps = [transforms.Resize(48), transforms.CenterCrop((96, 31)), to_tensor, normalize]
    ours = Preprocess((96, 31), "crop", 48, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert agrees(transforms.Compose(steps)) == ours
    squash = agrees(transforms.Compose([transforms.Resize((20, 33)), to_tensor]))
    assert squash.resize == "squash"
    assert squash.extent(7, 9) == (0, 0, 7, 9)
    resize = transforms.Resize((8, 8))
    for extra in (transforms.ColorJitter(), transforms.Pad(2)):
        chain = transforms.Compose([resize, extra, to_tensor])
        assert from_transform(chain, name="training") == CustomPreprocess(chain, "training")
    no_crop = transforms.Compose([transforms.Resize(8), to_tensor])
    assert isinstance(from_transform(no_crop), CustomPreprocess)


def test_timm_transforms_are_recognised():
    timm_data = pytest.importorskip("timm.data")
    theirs = timm_data.create_transform((3, 96, 96), interpolation="bicubic", crop_pct=0.875)
    assert agrees(theirs, [(150, 201)]).resize_to == 109


def test_values_are_normalised_per_channel():
    image = Image.new("RGB", (5, 7), (255, 0, 51))
    output = Preprocess((2, 3), mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0))(image)
    assert (output.dtype, output.shape) == (np.float32, (3, 2, 3))
    assert output.flags.c_contiguous
    np.testing.assert_allclose(output[:, 0, 0], [1.0, -0.5, 0.1], rtol=1e-6)
    gray = Preprocess(size=(4, 6), mean=(0.5,), std=(0.25,))
    white = Image.new("RGB", (9, 9), (255, 255, 255))
    np.testing.assert_allclose(gray(white), np.full((1, 4, 6), 2.0))
    assert Preprocess.from_dict(gray.to_dict()) == gray


@pytest.mark.parametrize("mean", [(0.485, 0.456, 0.406), (0.4,)])
def test_the_bits_are_those_of_one_number_after_another(mean):
    std = (0.229, 0.224, 0.225)[: len(mean)]
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    levels = np.asarray(image.convert("L"))[..., None] if len(mean) == 1 else pixels

    values = Preprocess((6, 5), mean=mean, std=std)(image)

    assert values.flags.c_contiguous
    assert values.shape == (len(mean), 6, 5)
    for (channel, row, column), value in np.ndenumerate(values):
        level = np.float32(levels[row, column, channel]) / np.float32(255)
        assert value == (level - np.float32(mean[channel])) / np.float32(std[channel])


@pytest.mark.parametrize(("width", "height"), [(400, 300), (301, 517), (100, 1000)])
def test_extent_says_where_the_pixels_come_from(width, height):
    """A ramp along x (y) reads, at each input column (row), the coordinate that extent implies."""
    preprocess = Preprocess((64, 48), "crop", 80, mean=(0, 0, 0), std=(1, 1, 1))
    down, across = np.mgrid[:height, :width] / np.array([height, width])[:, None, None] * 255
    ramp = np.stack([across, down, down], axis=-1).round().astype(np.uint8)
    output = preprocess(Image.fromarray(ramp))
    x0, y0, x1, y1 = preprocess.extent(width, height)
    columns = (x0 + (np.arange(48) + 0.5) / 48 * (x1 - x0) - 0.5) / width
    rows = (y0 + (np.arange(64) + 0.5) / 64 * (y1 - y0) - 0.5) / height
    np.testing.assert_allclose(output[0].mean(axis=0)[1:-1], columns[1:-1], atol=0.006)
    np.testing.assert_allclose(output[1].mean(axis=1)[1:-1], rows[1:-1], atol=0.006)


def test_extent_by_hand():
    preprocess = Preprocess.imagenet()
    assert preprocess == Preprocess((224, 224), "crop", 256)
    # 512 x 1024 -> 256 x 512; the crop begins at (16, 144): twice that in the original.
    assert preprocess.extent(512, 1024) == (32.0, 288.0, 480.0, 736.0)
    # The longer side is cut to int(256 * 333 / 500): an uneven stretch that extent keeps exactly.
    x0, y0, x1, y1 = preprocess.extent(333, 500)
    assert (x0, x1) == (16 * 333 / 256, 240 * 333 / 256)
    assert (y0, y1) == (80 * 500 / 384, 304 * 500 / 384)


def test_a_padded_crop_reaches_beyond_the_picture():
    preprocess = Preprocess((10, 10), "crop", 4, mean=(0, 0, 0), std=(1, 1, 1))
    output = preprocess(Image.new("RGB", (8, 8), "white"))
    assert preprocess.extent(8, 8) == (-6.0, -6.0, 14.0, 14.0)
    np.testing.assert_array_equal(np.argwhere(output[0])[[0, -1]], [[3, 3], [6, 6]])


def test_a_thread_of_a_picture_is_refused_before_it_fills_the_memory():
    with pytest.raises(ImageError, match=r"1 x 100000 .* too long and thin.*squash"):
        Preprocess.imagenet()(Image.new("RGB", (1, 100_000)))
    assert Preprocess((8, 8))(Image.new("RGB", (1, 100_000))).shape == (3, 8, 8)


def test_settings_that_cannot_be_used():
    for settings, message in (
        ({"size": 224}, r"size is 224; give \(height, width\)"),
        ({"size": (0, 224)}, r"size\[0\] = 0; give a whole number from 1 to 8,192"),
        ({"size": (224, 1e9)}, r"size\[1\] = 1000000000.0; give a whole number"),
        ({"size": (224, True)}, "whole number"),
        ({"size": "22"}, "size is '22'"),
        ({"resize": "stretch"}, "unknown; .*known: squash, crop"),
        ({"resize": "crop"}, "'crop' .* with resize_to=None; 'crop' needs resize_to"),
        ({"resize_to": 256}, "'squash' .* with resize_to=256; .*'squash' takes none"),
        ({"interpolation": "cubic"}, "'cubic' is unknown; .*known: nearest, box, bilinear"),
        ({"mean": (0.5,)}, r"mean is \(0.5,\) and std .* three finite numbers"),
        ({"mean": 0.5}, "three finite numbers"),
        ({"mean": "abc"}, "three finite numbers"),
        ({"std": (0.5, float("nan"), 0.5)}, "std .*nan.* three finite numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std above 0"),
    ):
        with pytest.raises(InputError, match=message):
            Preprocess(**settings)


def test_dicts_come_back_through_json_or_are_refused():
    ours = Preprocess((224, 160), "crop", 240, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    restored = Preprocess.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert restored == ours
    assert hash(restored) == hash(ours)
    for change, message in (
        ({"zoom": 2}, "unknown settings zoom"),
        ({"kind": "other"}, "kind is 'other'"),
        ({"kind": "custom", "name": "mine"}, "'mine' is a transform .* pass the same transform"),
        ({"size": [1, 2, 3]}, r"\(height, width\)"),
    ):
        with pytest.raises(InputError, match=message):
            Preprocess.from_dict({**Preprocess().to_dict(), **change})


def test_custom_transforms():
    import torch

    def halves(image):
        return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 510

    ours = from_transform(halves)
    assert isinstance(ours, CustomPreprocess)
    assert ours.name.endswith("halves")
    assert ours.to_dict() == {"kind": "custom", "name": ours.name, "extent": "whole"}
    output = ours(Image.new("RGB", (5, 4), "white"))
    assert isinstance(output, np.ndarray)
    np.testing.assert_array_equal(output, np.full((3, 4, 5), 0.5, dtype=np.float32))
    assert ours.extent(5, 4) == (0, 0, 5, 4)
    told = custom(halves, name="left half", extent=lambda width, height: (0, 0, width / 2, height))
    assert (told.name, told.extent(5, 4)) == ("left half", (0, 0, 2.5, 4))
    assert from_transform(told) is told


def test_of_a_custom_transform_an_index_knows_the_name():
    image = Image.new("RGB", (5, 4))
    whole = preprocess_from_dict(custom(np.asarray, name="mine").to_dict())
    assert whole.extent(5, 4) == (0, 0, 5, 4)
    with pytest.raises(InputError, match=r"'mine' is a transform .* pass the same transform"):
        whole(image)
    told = custom(np.asarray, name="mine", extent=lambda width, height: (0, 0, 1, 1))
    part = preprocess_from_dict(json.loads(json.dumps(told.to_dict())))
    assert part.to_dict() == told.to_dict()
    with pytest.raises(InputError, match="pass the same transform"):
        part.extent(5, 4)
    assert preprocess_from_dict(Preprocess().to_dict()) == Preprocess()
    for change in ({"extent": "half"}, {"more": 1}, {"name": ""}):
        with pytest.raises(InputError, match=r"described by kind, name|give the transform a name"):
            preprocess_from_dict({**told.to_dict(), **change})


def test_custom_wrappers_that_cannot_be_used():
    full, image = np.full, Image.new("RGB", (4, 4))
    outputs = [full((4, 4, 3), 0), full((1, 3, 4, 4), 0), full((3, 4, 4), np.nan), "picture"]
    for output in (*outputs, full((3, 1, 1), "a")):
        with pytest.raises(InputError, match=r"mine: expected an array \[C H W\] of .* of shape"):
            custom(lambda image, output=output: output, name="mine")(image)
    upside_down = custom(lambda image: image, extent=lambda width, height: (0, height, width, 0))
    for call, message in (
        (lambda: from_transform(3), "expected a transform"),
        (lambda: custom(lambda image: image, name=""), "name is ''"),
        (lambda: CustomPreprocess(3, "three"), "expected a function"),
        (lambda: upside_down.extent(4, 4), "expected x0 < x1 and y0 < y1"),
        (lambda: Preprocess()(image.convert("L")), "given L; read it with embedcam.images"),
        (lambda: Preprocess()(np.asarray(image)), "given ndarray"),
        (lambda: Preprocess().extent(0, 4), "0 x 4 pixels has no extent"),
        (lambda: Preprocess.from_dict({"interpolation": "box"}), "missing settings size, resize"),
        (lambda: Preprocess.from_dict([1]), "expected a table"),
    ):
        with pytest.raises(InputError, match=message):
            call()
