"""Prediction in blocks equals prediction in one pass; images of any size; what does not fit is one sentence."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gdlib import io, ops
from gdlib.data.patches import normalise
from gdlib.inference import Predictor, choose_device, choose_precision, predict_split
from gdlib.metrics import evaluate
from gdlib.models import Embedding, build
from gdlib.segmentation import segment

OFFSETS = [[-1, 0], [0, -1], [-3, 0], [0, -3], [-9, 0], [0, -9]]
HEADER = {"channels": 1, "offsets": OFFSETS, "normalisation": {"lower": 0.0, "upper": 100.0}}


class ConvNet(nn.Module):
    """Four 3x3 convolutions with zero padding: the network sees 4 pixels far, and it sees where an image is cut."""

    divisor = 4
    ndim = 2
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

    convolution = nn.Conv3d


class Blurry(nn.Module):
    """A known function of the pixels, blurred with zero padding: direction = brightness, foreground = not black.

    Equal brightness is equal direction wherever the pixel is; at a cut that is not blended away, length and foreground fade.
    """

    divisor = 4
    ndim = 2

    def forward(self, x):
        near = F.conv2d(x, torch.ones(1, 1, 5, 5) / 25, padding=2)
        angle = 2 * torch.pi * x
        bias = torch.full_like(x, 0.5)  # the cut turns the vectors as well
        embedding = torch.cat([angle.cos() * (1 + near), angle.sin() * (1 + near), bias * near], 1)
        return Embedding(embedding, 20 * (x > 0.02) - 10 + near, {})


def predictor(network, block=10_000, halo=16, **header):
    return Predictor(network, HEADER | header, device="cpu", precision="float32", block=block, halo=halo)


def embed(network, image, **kwargs):
    with torch.inference_mode():
        embedding, foreground = predictor(network, **kwargs).embed(torch.from_numpy(image))
    assert embedding.dtype == foreground.dtype == torch.float32
    return torch.cat([embedding, foreground[None]])


def noise(*shape, seed=0):
    return np.random.default_rng(seed).random((1, *shape), np.float32)


@pytest.mark.parametrize(
    ("block", "halo"),
    [(64, 16), (64, 8), (80, 16), (128, 32), (148, 16), (149, 16), (40, 16), (16, 16), (8, 16), (64, 9)],
)
def test_blocks_equal_one_pass(block, halo):
    image = noise(150, 171)
    torch.testing.assert_close(
        embed(ConvNet(), image, block=block, halo=halo), embed(ConvNet(), image), atol=2e-6, rtol=1e-5
    )


def test_blocks_equal_one_pass_in_3d():
    image = noise(21, 45, 50)
    whole = embed(ConvNet3D(), image)
    torch.testing.assert_close(embed(ConvNet3D(), image, block=32, halo=8), whole, atol=2e-6, rtol=1e-5)


def test_without_halo_blocks_do_differ():
    image = noise(150, 171)
    assert (embed(ConvNet(), image, block=64, halo=0) - embed(ConvNet(), image)).abs().max() > 0.05


def test_blocks_are_close_to_one_pass_for_resunet():
    torch.manual_seed(0)
    network = build("resunet", {"widths": [4, 4, 8, 8, 8]}).eval()
    image = noise(200, 333)
    whole, blocks = embed(network, image), embed(network, image, block=192, halo=64)
    assert (blocks - whole).abs().max() < 5e-3 * whole.abs().max()


@pytest.mark.parametrize("size", [1, 2, 5, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 129])
@pytest.mark.parametrize("other", [7, 64, 65])
def test_any_size(size, other):
    for shape in ((size, other), (other, size)):
        image = noise(*shape)
        whole, blocks = embed(ConvNet(), image), embed(ConvNet(), image, block=64, halo=16)
        assert whole.shape == blocks.shape == (5, *shape)
        torch.testing.assert_close(blocks, whole, atol=2e-6, rtol=1e-5)
        if not any(n % ConvNet.divisor for n in shape):
            with torch.inference_mode():
                direct = torch.cat(ConvNet()(torch.from_numpy(image)[None])[:2], 1)[0]
            torch.testing.assert_close(whole, direct, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (16, 16), (17, 15), (48, 49)])
@pytest.mark.parametrize("block", [32, 1024])
def test_resunet_takes_any_size(shape, block):
    network = build("resunet", {"widths": [2, 2, 2, 2, 2], "embedding_dim": 4})
    prediction = predictor(network, block=block, halo=8)(noise(*shape))
    assert prediction.affinity.shape == (len(OFFSETS), *shape)
    assert prediction.foreground.shape == shape
    assert prediction.embedding.shape == (4, *shape)


@pytest.mark.parametrize(("block", "halo", "n"), [(64, 64, 100), (64, 64, 65), (64, 64, 128), (20, 30, 61), (1, 0, 9)])
def test_a_halo_wider_than_the_block(block, halo, n):
    image = noise(n, 8)
    halo_is_enough = halo >= 8
    whole, blocks = embed(ConvNet(), image), embed(ConvNet(), image, block=block, halo=halo)
    assert blocks.shape == whole.shape
    assert blocks.isfinite().all()
    if halo_is_enough:
        torch.testing.assert_close(blocks, whole, atol=2e-6, rtol=1e-5)


def test_no_pass_is_larger_than_a_block(monkeypatch):
    seen = []
    tiles = predictor(ConvNet(), block=64, halo=11)
    forward = tiles._forward
    monkeypatch.setattr(tiles, "_forward", lambda image: seen.append(image.shape[1:]) or forward(image))
    with torch.inference_mode():
        tiles.embed(torch.from_numpy(noise(200, 60)))
        assert len(seen) > 3
        assert max(max(shape) for shape in seen) <= 64
        seen.clear()
        tiles.embed(torch.from_numpy(noise(64, 64)))
        assert seen == [(64, 64)]
        seen.clear()
        tiles.embed(torch.from_numpy(noise(65, 64)))
        assert len(seen) == 2


def across_borders(shape, block, halo):
    """A crowd of touching objects, one over every place where a block begins or ends; neighbours differ in brightness."""
    tiles = predictor(Blurry(), block=block, halo=halo)
    index = []
    for n in shape:
        cuts = {side for piece in tiles._pieces(n) for side in piece} - {0, n}
        assert len(cuts) > 3
        starts = [k for k in range(3, n - 3, 11) if all(abs(k - cut) > 2 for cut in cuts)]
        index.append(np.searchsorted(starts, np.arange(n), side="right"))
        assert all(index[-1][cut - 1] == index[-1][cut] > 0 for cut in cuts)
    row, column = np.meshgrid(*index, indexing="ij")
    label = np.where((row > 0) & (column > 0), row * 1000 + column, 0)
    brightness = 60 * (1 + 2 * (row % 2) + (column + row // 2) % 2)
    hole = (row * column) % 7 == 6  # some background in between
    label[hole] = 0
    return np.where(label > 0, brightness, 0).astype(np.uint8)[None], label


@pytest.mark.parametrize(("block", "halo"), [(64, 16), (48, 8), (96, 32)])
def test_no_seams(block, halo):
    image, label = across_borders((200, 230), block, halo)
    whole = predictor(Blurry())(image)
    blocks = predictor(Blurry(), block=block, halo=halo)(image)
    for name in ("affinity", "foreground"):
        difference = getattr(blocks, name).astype(int) - getattr(whole, name)
        assert np.abs(difference).max() <= 1, name  # one step of 255 where float32 rounds the other way
        assert np.count_nonzero(difference) < 1e-3 * difference.size, name
    segmentations = [segment(p.affinity, p.foreground, OFFSETS, min_size=0) for p in (whole, blocks)]
    assert np.array_equal(*segmentations)
    assert evaluate(label, segmentations[1])["aji"] == 1
    # The same picture put together from blocks without a halo has seams: this test would see them.
    bare = predictor(Blurry(), block=block, halo=0)(image)
    assert np.abs(bare.affinity.astype(int) - whole.affinity).max() > 3


def test_affinities_and_foreground_are_rounded_to_uint8():
    image = noise(20, 23)
    prediction = predictor(ConvNet())(image)
    with torch.inference_mode():
        embedding, foreground = predictor(ConvNet()).embed(torch.from_numpy(normalise(image, 0, 100)))
    assert np.array_equal(prediction.embedding, embedding.numpy())
    assert prediction.embedding.dtype == np.float32
    unit = embedding / embedding.norm(dim=0)
    assert prediction.affinity.dtype == prediction.foreground.dtype == np.uint8
    clipped = 0
    for k, offset in enumerate(OFFSETS):
        here, there = ops.overlap(offset, (20, 23))
        cosine = (unit[(slice(None), *here)] * unit[(slice(None), *there)]).sum(0).numpy()
        clipped += np.count_nonzero(cosine < 0)
        exact = 255 * np.clip(cosine, 0, 1)
        assert np.abs(prediction.affinity[k][here] - exact).max() <= 0.5 + 1e-4
        outside = np.ones((20, 23), bool)
        outside[here] = False
        assert not prediction.affinity[k][outside].any()
    assert clipped > 0
    probability = 255 / (1 + np.exp(-foreground.numpy().astype(float)))
    assert np.abs(prediction.foreground - probability).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("shape", [(3, 32, 32), (32, 32), (2, 1, 32, 32), (1, 4, 32, 32), (0, 32, 32)])
def test_an_image_that_does_not_fit_is_one_sentence(shape):
    with pytest.raises(io.DataError, match="1 channel") as caught:
        predictor(ConvNet())(np.zeros(shape, np.uint8))
    assert str(shape) in str(caught.value)
    assert "\n" not in str(caught.value)


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
    assert np.array_equal(result.affinity, expected.affinity)


def test_a_flat_image_gives_finite_numbers():
    prediction = predictor(ConvNet())(np.full((1, 20, 20), 7, np.uint16))
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
    assert choose_precision("auto", cpu) in (torch.float32, torch.bfloat16)
    for wrong in ("float", "int32", "nonsense", ""):
        with pytest.raises(ValueError, match="auto, float32, bfloat16 or float16"):
            choose_precision(wrong, cpu)


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
    rough = Predictor(ConvNet(), HEADER, device="cpu", precision=precision)(image)
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
    np.testing.assert_allclose(kept, tool(next(io.read_samples(splits["test"])).image).embedding, rtol=2e-3, atol=1e-3)
    with pytest.raises(io.DataError, match="embedding"):
        io.read_array(out, "test1", "embedding")


def test_weights_of_a_network_of_ones_own(tmp_path):
    header = HEADER | {"model": f"{__name__}:ConvNet", "options": {"seed": 3}, "segmentation": {}}
    io.save_weights(tmp_path / "w.safetensors", ConvNet(seed=5).state_dict(), header)
    loaded = Predictor.load(tmp_path / "w.safetensors", device="cpu", precision="float32")
    image = noise(16, 16)
    assert np.array_equal(loaded(image).embedding, predictor(ConvNet(seed=5))(image).embedding)
    assert not np.array_equal(loaded(image).embedding, predictor(ConvNet(seed=3))(image).embedding)
