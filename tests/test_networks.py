"""The 2D networks beside ResUNet: the sizes and costs of the papers, attention, the page about all
networks, a first training."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gdlib.config import RunSpec, load
from gdlib.data.patches import PatchSampler
from gdlib.data.prepare import prepare
from gdlib.models import Layer, build, enlarged, radius
from gdlib.predict.cost import count_macs, count_parameters, network_table, profile
from gdlib.predict.predictor import Predictor
from gdlib.registry import NETWORKS
from gdlib.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
AREA = 544 * 544
FLAT = [name for name in NETWORKS.names() if NETWORKS.get(name).ndim == 2]

# --- Parameters and operations --------------------------------------------------------------------------------------


def sizes(name):
    """Parameters and 10^9 multiply-accumulates at 544 x 544, both without the foreground head, of
    an image of 3 channels."""
    options = {"in_channels": 3}
    counts = count_parameters(name, options)
    # The head is one convolution at this stride, transposed where a kernel of 2 x 2 makes 4 pixels
    # of one.
    stride = {"mobilenetv2": 8, "segformer": 4, "nestedunet": 1}.get(name, 2)
    head = (counts["foreground"] - 1) * AREA // stride**2
    return counts["embedding"], (count_macs(name, options, (544, 544)) - head) / 1e9


def test_mobilenetv2_of_the_paper():
    parameters, giga = sizes("mobilenetv2")
    classifier = 1280 * 16 + 16  # is never used
    assert parameters == 2_264_864 - classifier
    assert giga == pytest.approx(19.3, abs=0.05)


def test_enet_of_the_paper():
    parameters, giga = sizes("enet")
    # a block: convolutions, normalisations, slopes
    unused = 2 * 128 * 32 + 9 * 32 * 32 + 2 * (32 + 32 + 128) + 3
    assert unused == 17_795
    assert parameters == 354_657 - unused
    assert giga == pytest.approx(2.12, abs=0.005)


def test_erfnet_of_the_paper():
    parameters, giga = sizes("erfnet")
    classifier = 128 * 16 + 16
    # biases before normalisations, of two convolutions each
    blocks = 2 * (5 * 64 + 8 * 128 + 2 * 64 + 2 * 16)
    others = 13 + 48 + 64 + 64 + 16  # and of the layers that shrink and enlarge
    assert (parameters + classifier + blocks + others) / 1e6 == pytest.approx(2.07, abs=0.005)
    assert giga == pytest.approx(15.0, abs=0.05)


def test_espnet_of_its_authors():
    """The count in the specification, 196,325 and 1.71, is that of a variant: with one slope per
    activation instead of one per channel ours would have 196,322. Three slopes, and 1.5 % of the
    operations, are not explained."""
    parameters, giga = sizes("espnet")

    def pyramid(i, o, kernel):
        n = o // 5
        return kernel**2 * i * n + 9 * n * (o - 4 * n) + 4 * 9 * n * n + 3 * o

    # stem; normalisation and slopes of what is concatenated
    expected = 9 * 3 * 16 + 3 * 16 + 3 * (19 + 131 + 256)
    expected += (
        pyramid(19, 64, 3)
        + 2 * pyramid(64, 64, 1)
        + pyramid(131, 128, 3)
        + 3 * pyramid(128, 128, 1)
    )
    expected += 256 * 16 + 2 * 16 + 131 * 16 + 3 * 32 + pyramid(32, 16, 1)
    # three transposed convolutions, the last convolution
    expected += 3 * 4 * 16 * 16 + 3 * 16 + 9 * 35 * 16 + 3 * 16
    assert parameters == expected
    slopes = 16 + 19 + 64 * 3 + 131 + 128 * 4 + 256 + 32 + 16 * 3
    assert expected - slopes + 15 == 196_325 - 3
    assert giga == pytest.approx(1.71, rel=0.016)


def test_nestedunet_of_the_paper():
    parameters, giga = sizes("nestedunet")
    widths = (64, 128, 256, 512, 1024)
    biases = sum(2 * width * (5 - row) for row, width in enumerate(widths))  # before normalisations
    assert parameters == 36_630_608 - biases
    assert giga == pytest.approx(622.6, abs=0.05)


def test_segformer_of_its_authors():
    """Layer by layer, and from the count of the original in the paper's code, which has no
    normalisations in places and more 1x1 convolutions."""
    parameters, giga = sizes("segformer")
    stages = list(
        zip(
            (64, 128, 320, 512),
            (8, 8, 4, 4),
            (8, 4, 2, 1),
            (3, 3, 18, 3),
            (49, 9, 9, 9),
            (4, 8, 16, 32),
            strict=True,
        )
    )
    decoder = 256
    ours = original = attention = convolutions = 0
    enter = 3
    for dim, expansion, reduction, depth, kernel, stride in stages:
        wide, area = dim * expansion, (544 // stride) ** 2
        coarse = area // reduction**2
        patches = enter * kernel * dim + dim
        outer = (
            2 * 2 * dim + dim * dim + 2 * dim * wide + dim + wide + (9 + 1) * wide
        )  # norms, query, widen and narrow, filter
        reduce = (reduction**2 * dim * dim + dim + 2 * dim) if reduction > 1 else 0
        ours += (
            patches
            + 2 * 2 * dim
            + depth * (outer + reduce + 2 * dim * dim + dim * dim + dim)
            + dim * decoder
        )
        mixing = wide * wide + wide  # after the filter, in the original
        original += (
            patches
            + depth * (outer + 2 * reduction**2 * dim * dim + dim * dim + mixing)
            + dim * decoder
            + decoder
        )
        attention += depth * 2 * area * coarse * dim
        reduced = reduction**2 * dim * dim * coarse if reduction > 1 else 0
        per_pixel = dim * dim + dim * dim + 2 * dim * wide + 9 * wide
        convolutions += enter * kernel * dim * area + dim * decoder * area
        convolutions += depth * (per_pixel * area + reduced + 2 * dim * dim * coarse)
        enter = dim
    ours += 4 * decoder * decoder + 2 * decoder + decoder * 16 + 16
    original += 4 * decoder * decoder + decoder + decoder * 16 + 16
    convolutions += (4 * decoder * decoder + 16 * decoder) * AREA // 16
    assert original == 95_774_608
    assert parameters == ours < 0.47 * original
    assert giga == pytest.approx((convolutions + attention) / 1e9, rel=1e-9)
    assert 7e9 < attention < 8e9  # which the counter sees


def test_page_about_the_networks_is_up_to_date():
    config = load(ROOT)
    groups = (("teacher", config.teachers), ("student", config.students))
    rows = [
        (name, n.title, role, n.model, n.options)
        for role, group in groups
        for name, n in ((name, config.network(name)) for name in group)
    ]
    page = (ROOT / "docs" / "networks.md").read_text()
    assert page == network_table(rows) + "\n", (
        "make it again: gdlib models --markdown > docs/networks.md"
    )
    for name, *_, model, options in rows:
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in build(model, options).parameters())
        assert f"{count:,}" in line


# --- Receptive fields -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([Layer(3)], 1),
        ([Layer(3), Layer(5, dilation=4)], 1 + 8),
        ([Layer(2, 2), Layer(2, up=2)], 1),  # of two pixels, each sees the other
        # the second sees two pixels to the left: the kernel is around the first
        ([Layer(3, 2), Layer(2, up=2)], 2),
        ([Layer(2, 2), Layer(3), Layer(2, up=2)], 1 + 2),
        ([Layer(2, 2), Layer.linear(2)], 2),  # the first pixel sees the two before it
        ([Layer(3, 3), Layer.linear(3)], 3),
        # the last of three pixels sees all of the next three
        ([Layer(3, 3), Layer(4, up=3)], 3),
        ([Layer.linear(1)], 0),
    ],
)
def test_radius(layers, expected):
    assert radius(layers) == expected


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_linear_upsampling_keeps_the_places_of_pixels(factor):
    """The mean of what becomes of a pixel is where the pixel was: a ramp stays a ramp of the same
    height."""
    x = torch.arange(6, dtype=torch.float64).expand(1, 1, 4, 6)
    large = enlarged(x, factor)[0, 0]
    place = (torch.arange(6 * factor, dtype=torch.float64) + 0.5) / factor - 0.5
    torch.testing.assert_close(large[0], place.clamp(0, 5))
    assert large.shape == (4 * factor, 6 * factor)


# --- Attention ------------------------------------------------------------------------------------------------------

SMALL = {"dims": [4, 4, 6, 8], "heads": [1, 2, 3, 2], "depths": [1, 1, 1, 1], "decoder_dim": 6}
HEADER = {
    "channels": 1,
    "normalisation": {"lower": 0.0, "upper": 100.0},
    "offsets": [[-1, 0], [0, -1], [0, -9]],
}


def test_attention_takes_an_image_in_one_piece(monkeypatch):
    torch.manual_seed(0)
    network = build("segformer", SMALL).eval()
    # longer than the usual block
    image = np.random.default_rng(0).integers(0, 256, (1, 70, 1300)).astype(np.uint8)
    tool = Predictor(network, HEADER, device="cpu", precision="float32")
    seen = []
    forward = tool.forward
    monkeypatch.setattr(tool, "forward", lambda x: seen.append(x) or forward(x))
    prediction = tool(image, keep_embedding=True)
    assert [tuple(x.shape) for x in seen] == [(1, 96, 1312)]
    with torch.no_grad():
        expected = network(seen[0][None]).embedding[0, :, :70, :1300]
    np.testing.assert_allclose(prediction.embedding, expected, rtol=1e-4, atol=1e-5)
    # A part of it too is computed from the whole.
    part = tool.predict(
        tool.source(image), (slice(10, 20), slice(0, 40)), (slice(10, 20), slice(0, 40))
    )
    np.testing.assert_allclose(part.embedding, expected[:, 10:20, :40], rtol=1e-4, atol=1e-5)
    # a step of rounding
    assert np.abs(part.affinity.astype(int) - prediction.affinity[:, 10:20, :40]).max() <= 1


def test_attention_sees_the_whole_image():
    torch.manual_seed(0)
    network = build("segformer", SMALL).double().eval()
    image = torch.randn(1, 1, 64, 640, dtype=torch.float64)
    other = image.clone()
    other[..., -1] += 10
    with torch.no_grad():
        difference = network(image).embedding - network(other).embedding
    assert difference[..., 0].abs().max() > 1e-9


def test_who_asks_attention_for_blocks_is_told():
    with pytest.raises(ValueError, match=r"every pixel sees the whole image.*leave the block out"):
        Predictor(build("segformer", SMALL), HEADER, device="cpu", block=64)


def test_costs_are_known_where_the_system_does_not_tell_the_memory():
    """On Windows there is no `resource`."""
    code = (
        "import sys; sys.modules['resource'] = None; from gdlib.predict import cost; "
        "print(cost.profile('resunet', {'widths': [2, 2, 2, 2, 2]}, (32, 32), device='cpu', "
        "precision='float32', engine='torch', repeats=1)['peak_memory_mib'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == 0


def test_a_profile_of_attention_is_that_of_the_image():
    result = profile("segformer", SMALL, (40, 1100), device="cpu", repeats=1)
    assert result["image_shape"] == [40, 1100]
    assert result["macs"] == count_macs("segformer", SMALL, (64, 1120))


# --- Training -------------------------------------------------------------------------------------------------------

QUICK = {
    "resunet": {"widths": [4, 8, 16, 32, 64]},
    "nestedunet": {"widths": [4, 8, 16, 32, 64]},
    "segformer": {
        "dims": [16, 32, 40, 64],
        "heads": [1, 2, 5, 8],
        "depths": [1, 1, 1, 1],
        "decoder_dim": 32,
    },
}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """Return the samples file of a few training images, and the catalogue."""
    config = load(ROOT)
    dataset = config.datasets["nuclei_phantom_small"]
    folder = tmp_path_factory.mktemp("phantom")
    files = {split: folder / f"{split}.h5" for split in ("train", "val", "test")}
    options = dataset.options | {"images": {"train": 4, "val": 1, "test": 1}}
    prepare(dataset.source, options, None, files, (64, 64), 1)
    return files["train"], dataset.offsets


def losses(name, phantom, steps, precision):
    """The supervised losses of a training as the studies do it, but always on the same patches:
    another loss is not chance."""
    train, offsets = phantom
    recipe = {
        "steps": steps,
        "batch_size": 4,
        "patch": (64, 64),
        "precision": precision,
        "validate_every": steps,
    }
    options = QUICK.get(name, {}) | {"in_channels": 1, "embedding_dim": 16}
    run = {
        "dataset": "phantom",
        "network": name,
        "model": name,
        "method": "none",
        "seed": 0,
        "options": options,
        "terms": [],
    }
    data = {
        "channels": 1,
        "offsets": offsets,
        "normalisation": {},
        "targets": {},
        "segmenters": ["mutex_watershed"],
    }
    spec = RunSpec.model_validate({**run, **data, "recipe": recipe})
    trainer = Trainer(spec, None, torch.device("cpu"))
    batch = PatchSampler(train, **spec.drawing).batch(0)
    for _ in range(steps):
        trainer.advance([batch])
        trainer.flush_losses()
    return [value for _, _, key, value in trainer.history if key == "loss"]


@pytest.mark.long
@pytest.mark.parametrize("name", FLAT)
def test_training_lowers_the_loss(name, phantom):
    values = losses(name, phantom, 30, "float32")
    assert np.mean(values[-5:]) < 0.8 * values[0]


@pytest.mark.long
@pytest.mark.parametrize("name", FLAT)
def test_bfloat16_is_enough_precision(name, phantom):
    """The first losses are about the same; dropout draws the same channels."""
    exact, rounded = (losses(name, phantom, 2, precision) for precision in ("float32", "bfloat16"))
    np.testing.assert_allclose(rounded, exact, rtol=0.1)
