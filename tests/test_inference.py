"""Prediction in blocks equals the network's own output for the whole image; images of any size.

What was killed goes on.
"""

import copy
import importlib.util
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gdlib import devices, io, kernels
from gdlib.blockwise.blocks import legal_shape
from gdlib.data.intensity import normalise
from gdlib.devices import choose_device, choose_precision
from gdlib.models import build
from gdlib.predict import engine, files, quantised
from gdlib.predict.engine import choose_engine
from gdlib.predict.files import file_identity, predict_blocks, predict_split
from gdlib.predict.predictor import Predictor
from gdlib.predict.quantised import quantised_affinities
from gdlib.registry import NETWORKS
from gdlib.segment.segmenters import segment
from gdlib.types import Embedding

ROOT = Path(__file__).resolve().parents[1]
OFFSETS = [[-1, 0], [0, -1], [-3, 0], [0, -3], [-9, 0], [0, -9]]
OFFSETS_3D = [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [-2, 0, 0], [0, -9, 0], [0, 0, 7], [2, -3, 4]]
HEADER = {"channels": 1, "normalisation": {"lower": 0.0, "upper": 100.0}}


class ConvNet(nn.Module):
    """Four 3x3 convolutions with zero padding: the network sees 4 pixels far, and it sees where an
    image is cut."""

    ndim = 2
    divisor = halo = (4, 4)
    remainder = margin = (0, 0)
    convolution = nn.Conv2d

    def __init__(self, *, in_channels=1, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(
                [self.convolution(in_channels if i == 0 else 8, 8, 3, padding=1) for i in range(4)]
            )
            self.head = self.convolution(8, 5, 1)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(2 * layer(x))
        x = self.head(x)
        return Embedding(x[:, :4], x[:, 4:], {})


class ConvNet3D(ConvNet):
    """The same in 3D."""

    ndim = 3
    divisor = (1, 4, 4)
    halo = (4, 4, 4)
    remainder = margin = (0, 0, 0)
    convolution = nn.Conv3d


class Valid(nn.Module):
    """A U-Net of one level without padding that pools by 3 within the section: what it makes is
    smaller than what it reads."""

    ndim = 2
    divisor, remainder = (3, 3), (1, 1)
    margin = halo = (5, 5)
    convolution = nn.Conv2d
    pool = 3

    def __init__(self, *, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.down, self.bottom = self.convolution(1, 6, 3), self.convolution(6, 6, 3)
            self.up, self.head = self.convolution(12, 6, 3), self.convolution(6, 5, 1)

    def forward(self, x):
        skip = torch.tanh(2 * self.down(x))
        x = (F.max_pool2d if self.ndim == 2 else F.max_pool3d)(skip, self.pool)
        x = torch.tanh(2 * self.bottom(x))
        x = F.interpolate(x, scale_factor=self.pool, mode="nearest")
        starts = [(n - m) // 2 for n, m in zip(skip.shape[2:], x.shape[2:], strict=True)]
        skip = skip[(..., *(slice(s, s + m) for s, m in zip(starts, x.shape[2:], strict=True)))]
        x = self.head(torch.tanh(2 * self.up(torch.cat([x, skip], 1))))
        return Embedding(x[:, :4], x[:, 4:], {})


class Valid3D(Valid):
    """The same in 3D; sections are not pooled."""

    ndim = 3
    divisor, remainder = (1, 3, 3), (0, 1, 1)
    margin = halo = (3, 5, 5)
    convolution = nn.Conv3d
    pool = (1, 3, 3)


def trained(name, **options):
    """A network of the package as if it had been trained: no statistics of a batch normalisation
    are 0 or 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(name, options).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


def predictor(network, block=10_000, **header):
    offsets = {"offsets": OFFSETS if network.ndim == 2 else OFFSETS_3D}
    return Predictor(
        network, HEADER | offsets | header, device="cpu", precision="float32", block=block
    )


def whole(network, image):
    """One call of the network on the mirrored image, nothing else: embedding and foreground
    logit."""
    sides = [
        next(n for n in range(1, 10_000) if n >= side and n >= d * (r == 0) and n % d == r % d)
        for side, d, r in zip(image.shape[1:], network.divisor, network.remainder, strict=True)
    ]
    pad = [
        (m, m + n - side) for n, side, m in zip(sides, image.shape[1:], network.margin, strict=True)
    ]
    x = torch.from_numpy(
        np.pad(normalise(image, **HEADER["normalisation"]), [(0, 0), *pad], mode="reflect")
    )
    with torch.inference_mode():
        embedding, foreground, _ = copy.deepcopy(network).eval()(x[None])
    assert list(embedding.shape[2:]) == sides
    inner = tuple(slice(n) for n in image.shape[1:])
    return embedding[0][(slice(None), *inner)].numpy(), foreground[0, 0][inner].numpy()


def check(prediction, network, image, tolerance=1e-5):
    """Compare a prediction with the network's own output and with the formula of affinities, pixel
    pair by pixel pair."""
    embedding, foreground = whole(network, image)
    scale = np.abs(embedding).max()
    np.testing.assert_allclose(
        prediction.embedding, embedding, rtol=tolerance, atol=tolerance * scale
    )
    probability = 255 / (1 + np.exp(-foreground.astype(float)))
    assert prediction.foreground.dtype == prediction.affinity.dtype == np.uint8
    assert np.abs(prediction.foreground - probability).max() <= 0.5 + 0.01
    unit = (embedding / np.maximum(np.linalg.norm(embedding, axis=0), 1e-12)).astype(float)
    offsets = OFFSETS if image.ndim == 3 else OFFSETS_3D
    assert len(prediction.affinity) == len(offsets)
    clipped = 0
    for affinity, offset in zip(prediction.affinity, offsets, strict=True):
        # The neighbour of each pixel by plain indices; outside the image there is none.
        index = np.stack(np.meshgrid(*map(np.arange, image.shape[1:]), indexing="ij"))
        there = index + np.reshape(offset, (-1,) + (1,) * (image.ndim - 1))
        inside = (
            (there >= 0) & (there < np.reshape(image.shape[1:], (-1,) + (1,) * (image.ndim - 1)))
        ).all(0)
        neighbour = unit[(slice(None), *np.where(inside, there, 0))]
        cosine = np.where(inside, (unit * neighbour).sum(0), 0)
        clipped += np.count_nonzero(cosine < 0)
        assert np.abs(affinity - 255 * np.clip(cosine, 0, 1)).max() <= 0.5 + 0.01
        assert not affinity[~inside].any()
    return clipped


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (1, *shape)).astype(np.uint8)


PLAIN = {
    "padded": (ConvNet(), (61, 50), [64, 16, 4, 1, (7, 100), (100, 24)]),
    "valid": (Valid(), (40, 47), [64, 12, 3, 1, (7, 100), (100, 25)]),
    "padded 3D": (ConvNet3D(), (9, 21, 30), [16, (4, 8, 12), (1, 16, 4), (100, 100, 8)]),
    "valid 3D": (Valid3D(), (8, 20, 25), [16, (3, 6, 9), (1, 12, 100), (100, 3, 12)]),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_blocks_equal_one_call_of_the_network(kind):
    network, shape, blocks = PLAIN[kind]
    image = noise(*shape)
    negative = check(predictor(network)(image, keep_embedding=True), network, image)
    assert negative > 0 or kind != "padded"  # some cosines were clipped
    for block in blocks:
        tool = predictor(network, block=block)
        assert len(tool.blocks(shape)) > 1 or block in (16, 64)
        check(tool(image, keep_embedding=True), network, image)


REAL = {
    "resunet": (trained("resunet", widths=[4, 4, 6, 8, 8]), (150, 270), [112, (64, 300)]),
    "resunet3d": (
        trained("resunet3d", widths=[2, 2, 3, 4, 4], embedding_dim=4),
        (11, 40, 133),
        [(4, 48, 64), (2, 64, 300)],
    ),
    "mala": (trained("mala", widths=[2, 2, 3, 4], embedding_dim=4), (3, 30, 40), [(2, 27, 54)]),
    "nestedunet": (trained("nestedunet", widths=[4, 4, 6, 8, 8]), (40, 330), [(40, 64)]),
    # Longer than the halo of the last two of three blocks, so that they do not see everything.
    "mobilenetv2": (trained("mobilenetv2"), (20, 300), [(20, 96)]),
    "leanunet": (trained("leanunet", widths=[2, 2, 3, 4, 4]), (40, 330), [(40, 64)]),
    "leanunet3d": (trained("leanunet3d", widths=[2, 2, 3, 4, 4]), (12, 40, 330), [(4, 40, 64)]),
    "enet": (trained("enet"), (20, 1300), [(20, 440)]),
    "erfnet": (trained("erfnet"), (20, 1300), [(20, 440)]),
    "espnet": (trained("espnet"), (20, 1700), [(20, 560)]),
    "ensemble": (
        trained(
            "ensemble",
            members=[{"model": "resunet", "options": {"widths": [2, 2, 3, 4, 4]}}] * 2,
            embedding_dim=4,
        ),
        (40, 330),
        [(40, 64), 144],
    ),
}


def test_every_network_that_has_blocks_is_here():
    assert set(REAL) == {name for name in NETWORKS.names() if NETWORKS.get(name).halo}


@pytest.mark.parametrize("kind", REAL)
def test_the_networks_of_this_package_are_exact_too(kind):
    network, shape, blocks = REAL[kind]
    image = noise(*shape)
    for block in blocks:
        tool = predictor(network, block=block)
        assert len(tool.blocks(shape)) > 1
        check(tool(image, keep_embedding=True), network, image)


@pytest.mark.parametrize("kind", ["padded", "padded 3D"])
def test_with_too_little_context_blocks_do_differ(kind):
    """The comparison sees a halo that is one pixel too small."""
    network, shape, _ = PLAIN[kind]
    narrow = copy.deepcopy(network)
    narrow.halo = tuple(h - 1 for h in network.halo)
    narrow.divisor = (1,) * network.ndim  # else the context is rounded up to the halo again
    exact = copy.deepcopy(narrow)
    exact.halo = network.halo
    image = noise(*shape)
    check(predictor(exact, block=16)(image, keep_embedding=True), exact, image)
    with pytest.raises(AssertionError):
        check(predictor(narrow, block=16)(image, keep_embedding=True), exact, image)


@pytest.mark.parametrize("size", [1, 2, 4, 5, 16, 33])
@pytest.mark.parametrize("network", [ConvNet(), Valid()], ids=["padded", "valid"])
def test_any_size(network, size):
    for shape in ((size, 7), (13, size)):
        image = noise(*shape)
        for block in (1000, 8):
            check(predictor(network, block=block)(image, keep_embedding=True), network, image)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 8), (2, 3, 2), (3, 4, 30), (9, 2, 4)])
@pytest.mark.parametrize("network", [ConvNet3D(), Valid3D()], ids=["padded", "valid"])
def test_volumes_smaller_than_the_margin(network, shape):
    image = noise(*shape)
    for block in (1000, 2):
        check(predictor(network, block=block)(image, keep_embedding=True), network, image)


def test_mala_mirrors_a_volume_of_few_sections_again_and_again():
    network = REAL["mala"][0]
    image = noise(3, 20, 12)
    check(predictor(network)(image, keep_embedding=True), network, image)


@pytest.mark.parametrize(
    "network", [ConvNet(), Valid(), ConvNet3D(), Valid3D()], ids=lambda n: type(n).__name__
)
@pytest.mark.parametrize("block", [1, 10, 30, 1000])
def test_blocks_cover_the_image_once_and_none_is_larger_than_asked(network, block):
    shape = (37, 50, 23)[-network.ndim :]
    tool = predictor(network, block=block)
    count = np.zeros(shape, int)
    for box in tool.blocks(shape):
        count[box] += 1
        for part, d in zip(box, network.divisor, strict=True):
            assert part.start % d == 0
            assert part.stop - part.start <= max(block, d)
    assert (count == 1).all()


@pytest.mark.parametrize("network", [ConvNet(), Valid3D()], ids=["padded", "valid"])
def test_what_the_network_reads_depends_on_the_block_alone(network, monkeypatch):
    seen = []
    tool = predictor(network, block=12)
    forward = tool.forward
    monkeypatch.setattr(
        tool, "forward", lambda image: seen.append(image.shape[1:]) or forward(image)
    )
    tool(noise(*(100,) * network.ndim if network.ndim == 2 else (20, 40, 50)))
    offsets = np.array(OFFSETS if network.ndim == 2 else OFFSETS_3D)
    reach = np.maximum(offsets.max(0), 0) - np.minimum(offsets.min(0), 0)
    limit = (
        12
        + reach
        + 2 * np.array(network.halo)
        + 2 * np.array(network.divisor)
        + np.array(network.remainder)
    )
    assert len(seen) > 10
    assert (np.array(seen) <= limit).all()


def test_legal_shape():
    assert legal_shape(Valid3D(), (5, 1, 2)) == (5, 1, 4)
    assert legal_shape(Valid3D(), (1, 56, 55)) == (1, 58, 55)
    assert legal_shape(ConvNet(), (1, 8)) == (4, 8)
    assert legal_shape(REAL["mala"][0], (25, 56, 57)) == (25, 56, 83)


@pytest.mark.parametrize("block", [0, -1, (16,), (8, 8, 8)])
def test_a_block_that_does_not_fit(block):
    with pytest.raises(ValueError, match="block"):
        predictor(ConvNet(), block=block)


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (2, 1, 32, 32), (1, 4, 32, 32), (0, 32, 32), (1, 0, 32), (32, 32)]
)
def test_an_image_that_does_not_fit_is_one_sentence(shape):
    with pytest.raises(io.DataError, match="1 channel") as caught:
        predictor(ConvNet())(np.zeros(shape, np.uint8))
    assert str(shape) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pixels_that_are_no_numbers():
    with pytest.raises(io.DataError, match="complex"):
        predictor(ConvNet())(np.zeros((1, 9, 9), np.complex64))
    for value in (np.nan, np.inf, -np.inf):
        image = np.random.default_rng(0).random((1, 30, 30), np.float32)
        image[0, 7, 20] = value
        with pytest.raises(io.DataError, match="NaN or infinite"):
            predictor(ConvNet(), block=8)(image)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("channel", [True, False])
def test_a_dataset_on_disk_is_the_same_as_an_array(tmp_path, dtype, channel):
    image = noise(9, 21, 30).astype(dtype) * (50 if dtype != np.uint8 else 1)
    with h5py.File(tmp_path / "v.h5", "w") as file:
        dataset = file.create_dataset("v", data=image if channel else image[0], chunks=True)
        found = predictor(ConvNet3D(), block=(4, 12, 16))(dataset)
    expected = predictor(ConvNet3D(), block=(4, 12, 16))(image)
    assert np.array_equal(found.affinity, expected.affinity)
    assert np.array_equal(found.foreground, expected.foreground)


def test_intensities_are_those_of_the_whole_image():
    """A dark corner stays dark, though the block it is in has nothing else."""
    image = noise(40, 40).astype(np.uint16) * 100
    image[:, :16, :16] //= 50
    check(predictor(ConvNet(), block=8)(image, keep_embedding=True), ConvNet(), image)


def test_the_embedding_is_only_kept_where_it_is_wanted():
    image = noise(20, 23)
    assert predictor(ConvNet())(image).embedding is None
    assert predictor(ConvNet())(image, keep_embedding=True).embedding.dtype == np.float32


def test_channels_are_those_of_the_header():
    network = ConvNet(in_channels=3)
    image = np.random.default_rng(0).random((3, 20, 20))
    assert predictor(network, channels=3)(image).affinity.shape == (len(OFFSETS), 20, 20)
    with pytest.raises(io.DataError, match="3 channel"):
        predictor(network, channels=3)(image[:1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_only_relative_brightness_matters(dtype):
    image = np.random.default_rng(0).integers(0, 200, (1, 30, 30))
    expected = predictor(ConvNet())(image.astype(np.uint8))
    result = predictor(ConvNet())((image + (0 if dtype == np.uint8 else 1000)).astype(dtype))
    # Rounding of the range of intensities may move what lies between two steps of 1 / 255 to the
    # other one.
    assert np.abs(result.affinity.astype(int) - expected.affinity).max() <= 1


def test_a_flat_image_gives_finite_numbers():
    prediction = predictor(ConvNet())(np.full((1, 20, 20), 7, np.uint16), keep_embedding=True)
    assert np.isfinite(prediction.embedding).all()


def test_the_given_network_is_left_as_it_is():
    torch.manual_seed(0)
    network = build("resunet", {"widths": [2, 2, 2, 2, 2]}).train()
    before = copy.deepcopy(network.state_dict())
    predictor(network)(noise(32, 32))
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_precision_names():
    cpu = torch.device("cpu")
    assert choose_precision("float32", cpu) == torch.float32
    assert choose_precision("bfloat16", cpu) == torch.bfloat16
    assert choose_precision("float16", cpu) == torch.float16
    for wrong in ("float", "int32", "nonsense", ""):
        with pytest.raises(ValueError, match=r"auto, float32, bfloat16 or float16, .* int8 "):
            choose_precision(wrong, cpu)


@pytest.mark.parametrize(
    ("units", "vendor", "expected"),
    [
        (["AMX", "AVX512-BF16"], "GenuineIntel", torch.bfloat16),
        (["AVX512-BF16"], "GenuineIntel", torch.float32),  # no faster there
        (["AVX512-BF16"], "AuthenticAMD", torch.bfloat16),
        ([], "AuthenticAMD", torch.float32),
    ],
)
def test_automatic_precision(units, vendor, expected, monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 6\n")
    monkeypatch.setattr(devices, "CPUINFO", cpuinfo)
    monkeypatch.setattr(devices, "bfloat16_units", lambda: units)
    monkeypatch.setattr(platform, "processor", lambda: f"Family 6, {vendor}")
    assert choose_precision("auto", torch.device("cpu")) == expected
    cpuinfo.unlink()  # as on Windows
    assert choose_precision("auto", torch.device("cpu")) == expected


def test_device_names():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    for wrong in ("nonsense", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match=f'"{wrong}"') as caught:
            choose_device(wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_close(precision):
    image = noise(40, 40)
    exact = predictor(ConvNet())(image)
    header = HEADER | {"offsets": OFFSETS}
    rough = Predictor(ConvNet(), header, device="cpu", precision=precision)(
        image, keep_embedding=True
    )
    assert rough.embedding.dtype == np.float32
    difference = np.abs(rough.affinity.astype(int) - exact.affinity)
    assert difference.max() > 0
    assert difference.mean() < 4


def test_predictions_file(teacher, splits, tmp_path):
    tool = Predictor.load(teacher, device="cpu", precision="float32")
    out = tmp_path / "predictions.h5"
    predict_split(tool, splits["test"], out, weights_sha256="abc", keep_embeddings=1)
    attrs = io.read_attrs(out)
    assert attrs["offsets"] == tool.header["offsets"]
    assert attrs["segmentation"] == tool.header["segmentation"]
    assert attrs["weights_sha256"] == "abc"
    assert attrs["kept"] == ["test0"]
    assert io.sample_ids(out) == ["test0", "test1"]
    for sample in io.read_samples(splits["test"]):
        prediction = tool(sample.image)
        for name in ("affinity", "foreground"):
            array = io.read_array(out, sample.id, name)
            assert array.dtype == np.uint8
            assert np.array_equal(array, getattr(prediction, name))
    kept = io.read_array(out, "test0", "embedding")
    assert kept.dtype == np.float16
    expected = tool(next(io.read_samples(splits["test"])).image, keep_embedding=True).embedding
    np.testing.assert_allclose(kept, expected, rtol=2e-3, atol=1e-3)
    with pytest.raises(io.DataError, match="embedding"):
        io.read_array(out, "test1", "embedding")
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.h5"]


def test_weights_of_a_network_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv(io.PLUGINS, __name__)  # weights must not say themselves which code is run
    header = HEADER | {"offsets": OFFSETS, "model": f"{__name__}:ConvNet", "options": {"seed": 3}}
    header["segmentation"] = {"mutex_watershed": {}}
    io.save_weights(tmp_path / "w.safetensors", ConvNet(seed=5).state_dict(), header)
    loaded = Predictor.load(
        tmp_path / "w.safetensors", engine="torch", device="cpu", precision="float32"
    )
    image = noise(16, 16)
    assert np.array_equal(loaded(image).affinity, predictor(ConvNet(seed=5))(image).affinity)
    assert not np.array_equal(loaded(image).affinity, predictor(ConvNet(seed=3))(image).affinity)


# --- Affinities in one pass, and engines ------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ((70, 41), [*OFFSETS, [5, -7], [0, 60], [-80, 0]]),
        ((5, 33, 20), [*OFFSETS_3D, [-9, 0, 0]]),
        ((1, 1), OFFSETS[:2]),
    ],
)
def test_affinities_in_one_pass(shape, offsets, threads, monkeypatch):
    """The formula in double precision, and the way of other devices."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    vectors = np.random.default_rng(0).normal(size=(6, *shape)).astype(np.float32)
    # some are zero
    vectors *= np.random.default_rng(1).choice([0, 1e-3, 1, 1e4], shape).astype(np.float32)
    embedding = torch.from_numpy(vectors)
    unit = vectors.astype(float) / np.maximum(np.linalg.norm(vectors.astype(float), axis=0), 1e-12)
    boxes = [
        tuple(slice(0, n) for n in shape),
        tuple(slice(n // 3, max(n // 3 + 1, n - 1)) for n in shape),
    ]
    everything = boxes[0]
    inside = tuple(slice(n // 5, n - n // 7) for n in shape)  # beyond it there is no image
    for box, within in [(boxes[0], everything), (boxes[1], everything), (inside, inside)]:
        found = quantised_affinities(embedding, offsets, box, within)
        assert found.dtype == np.uint8
        assert found.shape == (len(offsets), *(s.stop - s.start for s in box))
        for pixel in itertools.product(*(range(s.start, s.stop) for s in box)):
            inner = tuple(p - s.start for p, s in zip(pixel, box, strict=True))
            for k, offset in enumerate(offsets):
                other = tuple(p + d for p, d in zip(pixel, offset, strict=True))
                there = all(s.start <= q < s.stop for q, s in zip(other, within, strict=True))
                cosine = unit[(slice(None), *pixel)] @ unit[(slice(None), *other)] if there else 0
                assert abs(found[(k, *inner)] - 255 * max(cosine, 0)) <= 0.5 + 1e-3
        for rows in [(1, 0), (4, 1), (100, 99)]:
            wanted = found.copy()
            unwanted = np.arange(found.shape[-2]) % rows[0] != rows[1]
            wanted[len(shape) :, ..., unwanted, :] = 0
            some = quantised_affinities(embedding, offsets, box, within, rows)
            assert np.array_equal(some, wanted)
            plain = quantised._affinities_on_device(embedding, offsets, box, within, rows)
            assert np.abs(wanted.astype(int) - plain).max() <= 1


@pytest.mark.parametrize("block", [None, 48, (32, 80)])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_rows_that_a_segmenter_does_not_look_at_make_no_difference(stride, block):
    network, shape, _ = REAL["resunet"]
    image = noise(*shape)
    whole, some = predictor(network), predictor(network, block=block or 10_000)
    some.stride = stride
    found, sparse = whole(image), some(image)
    assert np.array_equal(found.affinity[:2], sparse.affinity[:2])
    rows = np.arange(shape[-2]) % stride == 0
    assert np.array_equal(found.affinity[:, rows], sparse.affinity[:, rows])
    assert not sparse.affinity[2:, ~rows].any()
    assert found.affinity[2:, ~rows].any() or stride == 1
    about = {"foreground_threshold": 0.0, "stride": stride, "min_fragment": 0, "min_size": 0}
    kept = np.random.default_rng(0).random(found.affinity.shape) < 0.5  # others repel
    labels = [
        segment(one.affinity * kept, one.foreground, OFFSETS, "mutex_watershed", **about)
        for one in (found, sparse)
    ]
    assert labels[0].max() > 3
    assert np.array_equal(*labels)


def test_a_channels_last_embedding_gives_the_same_affinities():
    embedding = torch.randn(4, 30, 50)
    rows = embedding.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    box, within = (slice(3, 30), slice(0, 44)), (slice(0, 30), slice(0, 50))
    assert np.array_equal(
        quantised_affinities(embedding, OFFSETS, box, within),
        quantised_affinities(rows, OFFSETS, box, within),
    )


@pytest.mark.parametrize("kind", ["resunet", "resunet3d"])
def test_an_augmented_image_gives_the_mean_of_eight(kind):
    """By the formula, in pixels: where an embedding was seen turned, it is turned back."""
    network, shape, blocks = REAL[kind]
    image = noise(*shape)
    offsets = OFFSETS if network.ndim == 2 else OFFSETS_3D
    header = HEADER | {"offsets": offsets}
    options = {"device": "cpu", "precision": "float32"}
    tool = Predictor(network, header, augment=True, **options)
    found = tool(image, keep_embedding=True)
    plain = predictor(network)
    exact = plain(image, keep_embedding=True)
    assert np.array_equal(found.embedding, exact.embedding)
    # of sides that need not be filled up, at which end is no question
    side = plain.network.divisor[-1]
    whole = image[..., : shape[-2] // side * side, : shape[-1] // side * side]
    total = foreground = 0
    for mirrored, quarters in itertools.product((False, True), range(4)):
        seen = np.rot90(whole[..., ::-1] if mirrored else whole, quarters, (-2, -1))
        source = plain.source(np.ascontiguousarray(seen))
        embedding, logit = plain.embed(source, tuple(slice(0, n) for n in source.shape))
        back = [np.rot90(part.numpy(), -quarters, (-2, -1)) for part in (embedding, logit)]
        vectors, logit = (part[..., ::-1] if mirrored else part for part in back)
        unit = torch.nn.functional.normalize(torch.from_numpy(vectors.copy()).double(), dim=0)
        cosine = kernels.affinities(unit.movedim(0, -1)[None], offsets)[0].clamp(min=0)
        total = total + cosine.numpy() / 8
        foreground = foreground + 1 / (1 + np.exp(-logit.astype(float))) / 8
    found = tool(whole)
    assert np.abs(found.affinity - 255 * total).max() <= 1.01
    assert np.abs(found.foreground - 255 * foreground).max() <= 1.01
    one = plain(whole)
    assert np.abs(one.affinity - 255 * total).max() > 2  # it is another one
    parts = Predictor(network, header, augment=True, block=blocks[0], **options)(whole)
    assert np.array_equal(parts.affinity, found.affinity)
    assert np.array_equal(parts.foreground, found.foreground)


def test_a_network_with_margins_cannot_be_augmented():
    network = REAL["mala"][0]
    with pytest.raises(ValueError, match="leave --augment out"):
        Predictor(network, HEADER | {"offsets": OFFSETS_3D}, augment=True)


def test_engine_names(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_engine("torch", cpu) == "torch"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert [choose_engine("auto", torch.device(name)) for name in ("cpu", "meta")] == [
        "openvino",
        "torch",
    ]
    with pytest.raises(ValueError, match="runs on the CPU"):
        choose_engine("openvino", torch.device("meta"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto", cpu) == "torch"
    with pytest.raises(ValueError, match=r'pip install "gdlib\[fast\]"'):
        choose_engine("openvino", cpu)
    with pytest.raises(ValueError, match="auto, torch or openvino"):
        Predictor(ConvNet(), HEADER | {"offsets": OFFSETS}, device="cpu", engine="onnx")


openvino = pytest.mark.skipif(
    not importlib.util.find_spec("openvino"), reason='pip install "gdlib[fast]"'
)


@openvino
# its unpooling is unknown to OpenVINO
@pytest.mark.parametrize(
    "kind",
    [*PLAIN, *(pytest.param(kind, marks=pytest.mark.long) for kind in REAL if kind != "enet")],
)
def test_openvino_computes_the_same(kind):
    network, shape, blocks = (REAL | PLAIN)[kind]
    header = HEADER | {"offsets": OFFSETS if network.ndim == 2 else OFFSETS_3D}
    tool = Predictor(
        network, header, device="cpu", precision="float32", engine="openvino", block=blocks[0]
    )
    image = noise(*shape)
    found, expected = (
        tool(image, keep_embedding=True),
        predictor(network)(image, keep_embedding=True),
    )
    assert tool.engine == "openvino"
    scale = np.abs(expected.embedding).max()
    np.testing.assert_allclose(found.embedding, expected.embedding, rtol=1e-4, atol=1e-4 * scale)
    for name in ("affinity", "foreground"):
        assert np.abs(getattr(found, name).astype(int) - getattr(expected, name)).max() <= 1


@openvino
def test_openvino_in_bfloat16_is_close():
    network = REAL["resunet"][0]
    options = {"device": "cpu", "precision": "bfloat16"}
    image = noise(60, 70)
    exact = predictor(network)(image)
    rough = Predictor(network, HEADER | {"offsets": OFFSETS}, engine="openvino", **options)(image)
    difference = np.abs(rough.affinity.astype(int) - exact.affinity)
    assert difference.mean() < 4


class Fixed(ConvNet):
    """What it adds depends on the size of the image it is traced with."""

    def forward(self, x):
        out = super().forward(x)
        return Embedding(out.embedding * len(x[0, 0]), out.foreground + float(x.shape[-1]), {})


@openvino
def test_a_network_that_cannot_be_traced_stays_with_torch():
    options = {"device": "cpu", "precision": "float32"}
    image = noise(20, 30)
    expected = predictor(Fixed())(image, keep_embedding=True)
    tool = Predictor(Fixed(), HEADER | {"offsets": OFFSETS}, engine="auto", **options)
    with pytest.warns(UserWarning, match="another size"):
        found = tool(image, keep_embedding=True)
    assert tool.engine == "torch"
    assert np.array_equal(found.embedding, expected.embedding)
    with pytest.raises(ValueError, match="choose --engine torch"):
        Predictor(Fixed(), HEADER | {"offsets": OFFSETS}, engine="openvino", **options)(image)


@openvino
def test_a_signal_is_still_handled_after_engines_came_and_went():
    """In a process of its own, because it would be this one that dies.

    Only processors with AMX can show it.
    """
    program = (
        "import signal\nimport torch\nfrom gdlib.predict.engine import make_engine\nfrom "
        "gdlib.models import build\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('handled'))\n"
        "network = build('resunet', {'widths': [2, 2, 2, 2, 2]}).eval()\n"
        "new = lambda: make_engine('openvino', network, 1, torch.device('cpu'), torch.float32)\n"
        "first, second = new(), new()\ndel first\ndel second\nsignal.raise_signal(signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


@openvino
def test_nothing_is_reported_to_anybody():
    engine.make_engine("openvino", ConvNet().eval(), 1, torch.device("cpu"), torch.float32)
    parts = [
        part
        for name, part in sys.modules.items()
        if name.startswith("openvino.") and hasattr(part, "tm")
    ]
    assert {part.tm.__name__ for part in parts} == {"openvino.tools.ovc.telemetry_stub"}


# --- Volumes as files, and what was killed --------------------------------------------------------------------------


@pytest.fixture
def volumes(tmp_path):
    """Return a samples file with two volumes, of 8 and of 4 blocks."""
    samples = [
        io.Sample(n, noise(*shape, seed=i), np.zeros(shape, np.uint32))
        for i, (n, shape) in enumerate(SHAPES)
    ]
    io.write_samples(tmp_path / "samples.h5", samples)
    return tmp_path / "samples.h5"


SHAPES = (("a", (8, 22, 30)), ("b", (4, 18, 27)))
BLOCK = (4, 12, 16)


def volume_tool(network=None, **kwargs):
    return predictor(network or ConvNet3D(), **{"block": BLOCK, "segmentation": {}, **kwargs})


class Killed(BaseException):
    """Stands for the end of the process."""


def count_blocks(monkeypatch, tool, limit=100):
    """Return a list that grows with every predicted block.

    The process "ends" before the one after `limit`.
    """
    done, predict = [], tool.predict

    def counting(*args):
        if len(done) == limit:
            raise Killed
        done.append(args[1])
        return predict(*args)

    monkeypatch.setattr(tool, "predict", counting)
    return done


def test_volumes_are_predicted_block_by_block(volumes, tmp_path, monkeypatch):
    out = tmp_path / "p.h5"
    monkeypatch.setattr(files, "KEPT_PIXELS", 3 * 22 * 30 + 5)
    tool = volume_tool()
    blocks = count_blocks(monkeypatch, tool)
    predict_split(tool, volumes, out, weights_sha256="w", keep_embeddings=1)
    assert len(blocks) == 12
    for sample in io.read_samples(volumes):
        expected = predictor(ConvNet3D())(sample.image, keep_embedding=True)
        assert np.array_equal(io.read_array(out, sample.id, "affinity"), expected.affinity)
        assert np.array_equal(io.read_array(out, sample.id, "foreground"), expected.foreground)
        if sample.id == "a":
            with h5py.File(out) as file:
                kept = file["a/embedding"]
                assert kept.attrs["origin"].tolist() == [2, 0, 0]
                # three sections in the middle, across two layers of blocks
                assert kept.shape == (4, 3, 22, 30)
                np.testing.assert_allclose(
                    kept[()], expected.embedding[:, 2:5], rtol=2e-3, atol=1e-3
                )
                assert "embedding" not in file["b"]


def test_chunks_fit_into_blocks(volumes, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_PIXELS", 100)
    predict_split(volume_tool(), volumes, tmp_path / "p.h5", weights_sha256="w")
    with h5py.File(tmp_path / "p.h5") as file:
        chunks = file["a/affinity"].chunks
        assert chunks[0] == 1
        assert np.prod(chunks) <= 100
        assert all(
            side % chunk == 0
            for side, chunk in zip(volume_tool().block_sides((8, 22, 30)), chunks[1:], strict=True)
        )


@pytest.mark.parametrize(("limit", "torn"), [(0, 0), (1, 1000), (7, 0), (7, 1), (7, 1000), (11, 1)])
def test_what_was_killed_goes_on(volumes, tmp_path, monkeypatch, limit, torn):
    predict_split(
        volume_tool(), volumes, tmp_path / "once.h5", weights_sha256="w", keep_embeddings=2
    )
    out, partial = tmp_path / "p.h5", tmp_path / ".p.h5.partial"
    with monkeypatch.context() as patch:
        tool = volume_tool()
        count_blocks(patch, tool, limit)
        with pytest.raises(Killed):
            predict_split(tool, volumes, out, weights_sha256="w", keep_embeddings=2)
    assert not out.exists()
    lost = 0
    if torn and limit:  # the last block was being written
        os.truncate(partial, partial.stat().st_size - torn)
        lost = 1
    tool = volume_tool()
    blocks = count_blocks(monkeypatch, tool)
    predict_split(tool, volumes, out, weights_sha256="w", keep_embeddings=2)
    assert len(blocks) == 12 - limit + lost
    assert io.sha256(out) == io.sha256(tmp_path / "once.h5")
    assert not partial.exists()


@pytest.mark.parametrize("change", ["weights", "data", "block", "kept", "offsets", "garbage"])
def test_blocks_of_something_else_are_not_used(volumes, tmp_path, monkeypatch, change):
    out, partial = tmp_path / "p.h5", tmp_path / ".p.h5.partial"
    with monkeypatch.context() as patch:
        tool = volume_tool()
        count_blocks(patch, tool, 5)
        with pytest.raises(Killed):
            predict_split(tool, volumes, out, weights_sha256="w")
    if change == "data":
        os.utime(volumes, ns=(1, 1))
    if change == "garbage":
        partial.write_bytes(b"nothing of ours" * 1000)
    options = {"offsets": {"offsets": OFFSETS_3D[:3]}, "block": {"block": (8, 12, 16)}}.get(
        change, {}
    )
    tool = volume_tool(**options)
    blocks = count_blocks(monkeypatch, tool)
    weights, kept = "v" if change == "weights" else "w", 1 if change == "kept" else 0
    predict_split(tool, volumes, out, weights_sha256=weights, keep_embeddings=kept)
    assert len(blocks) == (8 if change == "block" else 12)
    predict_split(
        volume_tool(**options),
        volumes,
        tmp_path / "q.h5",
        weights_sha256=weights,
        keep_embeddings=kept,
    )
    assert io.sha256(out) == io.sha256(tmp_path / "q.h5")


SLOW = """
import sys, time, torch
from test_inference import ConvNet3D, volume_tool
from gdlib.predict.files import predict_split

tool = volume_tool()
predict = tool.predict
tool.predict = lambda *args: (time.sleep(0.2), predict(*args))[1]
predict_split(tool, sys.argv[1], sys.argv[2], weights_sha256="w")
"""


def python(code, *arguments, **environment):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, stdout=subprocess.PIPE
    )


@pytest.mark.long
def test_a_process_that_is_really_killed(volumes, tmp_path, monkeypatch):
    out, partial = tmp_path / "p.h5", tmp_path / ".p.h5.partial"
    slow = python(SLOW, volumes, out)
    while not (partial.exists() and partial.stat().st_size > 40_000):  # two blocks or more
        assert slow.poll() is None, "it ended too early"
        time.sleep(0.02)
    with pytest.raises(io.DataError, match="another process"):
        predict_split(volume_tool(), volumes, out, weights_sha256="w")
    slow.send_signal(signal.SIGKILL)
    slow.communicate()
    assert not out.exists()
    tool = volume_tool()
    blocks = count_blocks(monkeypatch, tool)
    predict_split(tool, volumes, out, weights_sha256="w")
    assert 0 < len(blocks) <= 10
    predict_split(volume_tool(), volumes, tmp_path / "once.h5", weights_sha256="w")
    assert io.sha256(out) == io.sha256(tmp_path / "once.h5")


def test_a_refusal_leaves_nothing_behind(volumes, tmp_path):
    out = tmp_path / "new" / "p.h5"
    with pytest.raises(io.DataError, match=r'samples.h5: sample "a".*2 axes'):
        predict_split(predictor(ConvNet(), segmentation={}), volumes, out, weights_sha256="w")
    image = np.ones((1, 8, 20, 20), np.float32)
    image[0, 7, 19, 19] = np.nan
    io.write_samples(tmp_path / "nan.h5", [io.Sample("x", image, np.zeros((8, 20, 20), np.uint32))])
    with pytest.raises(io.DataError, match="NaN"):
        predict_split(volume_tool(), tmp_path / "nan.h5", out, weights_sha256="w")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["raw"] = np.zeros((4, 4, 4))
    with pytest.raises(io.DataError, match=r"other.h5.*not a samples file"):
        predict_split(volume_tool(), tmp_path / "other.h5", out, weights_sha256="w")
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_blocks_come_back_in_order(volumes, tmp_path):
    tool = volume_tool()
    image = next(io.read_samples(volumes)).image
    parts = list(predict_blocks(tool, {"x": tool.source(image)}, tmp_path / "partial", "me"))
    assert [box for _, box, _ in parts] == tool.blocks(image.shape[1:])
    assert {name for name, _, _ in parts} == {"x"}
    assert all(part.embedding is None for _, _, part in parts)
    assert (tmp_path / "partial").exists()  # the caller removes it


def test_identity_of_a_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("x")
    first = file_identity(path)
    assert file_identity(path) == first
    path.write_text("xy")
    assert file_identity(path) != first


MEMORY = """
import json, sys
from pathlib import Path
import h5py, numpy as np
from gdlib import io
from gdlib.data import intensity
from test_inference import Memory, predictor
from gdlib.predict.files import predict_split

intensity.SLAB = 2**18  # volumes are smaller here than what else is looked at at once
tool = predictor(Memory(), block=(16, 64, 64), segmentation={}, offsets=[[-1, 0, 0], [0, -1, 0], [0, 0, -3]])

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

folder = Path(sys.argv[1])
peaks = []
for number, shape in enumerate(json.loads(sys.argv[2])):
    data = folder / f"{number}.h5"
    with h5py.File(data, "w") as file:
        image = file.create_dataset("v/image", (1, *shape), np.uint8, chunks=(1, 16, 64, 64))
        for z in range(0, shape[0], 16):
            image[0, z : z + 16] = np.random.default_rng(z).integers(0, 255, (16, *shape[1:]))
    predict_split(tool, data, folder / f"p{number}.h5", weights_sha256="w")
    peaks.append(peak())
print(json.dumps(peaks))
"""


class Memory(ConvNet3D):
    """One convolution: fast enough for a large volume."""

    halo = (1, 1, 1)

    def __init__(self):
        super().__init__()
        self.layers = self.layers[:1]


@pytest.mark.long
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc"
)
def test_memory_does_not_grow_with_the_volume(tmp_path):
    shapes = [(16, 128, 128), (64, 192, 192), (256, 192, 192)]
    # What is freed goes back at once, so that the peak is what was in use.
    process = python(
        MEMORY,
        tmp_path,
        json.dumps(shapes),
        MALLOC_MMAP_THRESHOLD_="65536",
        MALLOC_TRIM_THRESHOLD_="65536",
    )
    out, _ = process.communicate()
    assert process.returncode == 0
    small, medium, large = json.loads(out)
    # The medium volume is 2 MiB, the large one 9 MiB, and its predictions 36 MiB: in memory, they
    # would be seen.
    assert large - medium < 8
    assert medium - small < 20
