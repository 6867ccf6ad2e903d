"""The contract of every network, and the networks of the paper: sizes, cost, wiring."""

import ast
import inspect
import itertools
import math

import pytest
import torch
from torch import nn

from gdlib import io, registry
from gdlib.models import build, folded, shortened
from gdlib.models.resunet import ResidualBlock
from gdlib.predict.cost import count_macs, count_parameters
from gdlib.registry import NETWORKS, SOURCES, TERMS, UnknownName
from gdlib.types import Embedding

# widths, parameters without the foreground head, 10^9 multiply-accumulates at 544 x 544 with the
# original's head
RESUNETS = {
    "teacher": ((32, 64, 179, 349, 680), 33_609_092, 581.8, 0.05),
    "student": ((4, 8, 16, 32, 64), 295_884, 5.62, 0.005),
    "middle": ((16, 32, 64, 128, 256), 4_703_424, 88.7, 0.05),
}
# options, parameters without the foreground head, 10^9 multiply-accumulates for 25 x 56 x 56 and
# for 56^3 voxels
MALAS = {
    "teacher": ({"widths": (12, 60, 300, 1500)}, 84_020_644, 206.7, 366.4),
    "student": ({"widths": (8, 16, 32, 64), "decoder": (32, 32, 8)}, 367_648, 12.8, 21.8),
}
# Narrow, so that the tests are quick; a new network is tested with its defaults.
NARROW = {
    "resunet": {"widths": (2, 3, 4, 5, 6)},
    "resunet3d": {"widths": (2, 3, 4, 5, 6)},
    "leanunet": {"widths": (2, 3, 4, 5, 6)},
    "leanunet3d": {"widths": (2, 3, 4, 5, 6)},
    "mala": {"widths": (1, 2, 2, 3), "decoder": (3, 2, 1)},
    "mobilenetv2": {},
    "enet": {},
    "erfnet": {},
    "espnet": {},
    "nestedunet": {"widths": (2, 3, 4, 5, 6)},
    "ensemble": {"members": [{"model": "resunet", "options": {"widths": [2, 3, 4, 5, 6]}}]},
    "segformer": {
        "dims": (4, 4, 6, 8),
        "heads": (1, 2, 3, 2),
        "depths": (1, 2, 1, 1),
        "decoder_dim": 6,
    },
}


def narrow(name, **options):
    return build(name, NARROW.get(name, {}) | options)


def randomise(network, seed=0):
    """Weights, statistics and biases that are neither 0 nor 1, so that a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                if "running_var" in name or (tensor.ndim == 1 and "weight" in name):
                    tensor.copy_(0.5 + noise)
                elif tensor.ndim == 1:
                    tensor.copy_(noise - 0.5)
                else:
                    tensor.copy_((noise - 0.5) * (6 / tensor[0].numel()) ** 0.5 * 2)
    return network


def output_sides(network, cells):
    """The legal sides with so many divisors in them, but never 0."""
    sides = zip(cells, network.divisor, network.remainder, strict=True)
    return tuple(n * d + r if n or r else d for n, d, r in sides)


def image_sides(network, shape):
    return tuple(n + 2 * m for n, m in zip(shape, network.margin, strict=True))


def small_image(network, batch=1, channels=1, cells=None, dtype=torch.float32):
    """Noise of which the network makes few pixels."""
    cells = cells or (0 if any(network.margin) else 2,) * network.ndim
    generator = torch.Generator().manual_seed(3)
    sides = image_sides(network, output_sides(network, cells))
    return torch.randn(batch, channels, *sides, dtype=dtype, generator=generator)


def assert_same(one, other, network):
    """Equal but for rounding, as in sums of the same numbers in another order, or over parts of an
    image of another size.

    A sum of n products is off by at most n roundings of the largest number in it; on the way
    through the network these add up.
    """
    products = sum(max(p[0].numel(), p[:, 0].numel()) for p in network.parameters() if p.ndim > 1)
    limit = products * torch.finfo(other.dtype).eps * float(other.abs().max())
    torch.testing.assert_close(one, other, rtol=0, atol=limit)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- Every network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS.names())
class TestEveryNetwork:
    def test_the_contract_is_there_for_every_axis(self, name):
        network = narrow(name)
        assert registry.axes(name) in (network.ndim, None)
        assert (registry.axes(name) is None) == isinstance(NETWORKS.get(name).ndim, property)
        if registry.axes(name):
            assert registry.NETWORKS.written(name, "divisor") == network.divisor
            assert registry.NETWORKS.written(name, "remainder") == network.remainder
        halo = network.halo or network.margin  # None: every pixel sees all others
        for value in (network.divisor, network.remainder, network.margin, halo):
            assert len(value) == network.ndim
            assert all(isinstance(n, int) for n in value)
        for d, r, m, h in zip(
            network.divisor, network.remainder, network.margin, halo, strict=True
        ):
            assert 0 <= r < d
            assert 0 <= m <= h

    def test_shapes(self, name):
        network = randomise(narrow(name)).eval()
        cells = [(1, 1), (1, 2), (3, 2)] if network.ndim == 2 else [(1, 0, 0), (2, 1, 0), (3, 0, 1)]
        for number, batch in itertools.product(cells, (1, 2)):
            shape = output_sides(network, number)
            with torch.no_grad():
                output = network(torch.randn(batch, 1, *image_sides(network, shape)))
            assert isinstance(output, Embedding)
            assert output.embedding.shape == (batch, 16, *shape)
            assert output.foreground.shape == (batch, 1, *shape)
            assert torch.isfinite(output.embedding).all()
            for feature in output.features.values():
                assert feature.shape[0] == batch
                assert feature.ndim == network.ndim + 2

    @pytest.mark.parametrize("embedding_dim", [1, 5])
    @pytest.mark.parametrize("in_channels", [1, 3])
    def test_options(self, name, in_channels, embedding_dim):
        network = narrow(name, in_channels=in_channels, embedding_dim=embedding_dim).eval()
        with torch.device("meta"):
            output = network.to("meta")(small_image(network, 1, in_channels).to("meta"))
        shape = tuple(
            n - 2 * m for n, m in zip(small_image(network).shape[2:], network.margin, strict=True)
        )
        assert output.embedding.shape == (1, embedding_dim, *shape)
        assert output.foreground.shape == (1, 1, *shape)

    def test_saved_weights_are_the_network(self, name, tmp_path):
        options = NARROW.get(name, {}) | {"embedding_dim": 4}
        network = randomise(build(name, options), 1).eval()
        network = network.to(
            memory_format={2: torch.channels_last, 3: torch.channels_last_3d}[network.ndim]
        )
        header = {
            "model": name,
            "options": {key: list(v) if isinstance(v, tuple) else v for key, v in options.items()},
        }
        io.save_weights(tmp_path / "weights.safetensors", network.state_dict(), header)
        state, read = io.load_weights(tmp_path / "weights.safetensors")
        assert read == header
        again = build(read["model"], read["options"]).eval()
        for key, tensor in network.state_dict().items():
            assert torch.equal(state[key], tensor)
            assert state[key].dtype == tensor.dtype
        again.load_state_dict(state)
        # In float64: the memory order differs, and with it the order of sums.
        network, again, image = (
            network.double(),
            again.double(),
            small_image(network, dtype=torch.float64),
        )
        with torch.no_grad():
            assert_same(again(image).embedding, network(image).embedding, network)
            assert_same(again(image).foreground, network(image).foreground, network)

    def test_images_of_a_batch_do_not_see_each_other(self, name):
        network = randomise(narrow(name)).double().eval()
        images = small_image(network, 3, dtype=torch.float64)
        with torch.no_grad():
            together = network(images)
            alone = network(images[1:2])
        assert_same(together.embedding[1:2], alone.embedding, network)
        assert_same(together.foreground[1:2], alone.foreground, network)
        assert (
            together.embedding[0] - together.embedding[1]
        ).abs().max() > 1e-3 * alone.embedding.abs().max()

    def test_every_parameter_is_trained(self, name):
        """A parameter whose gradient is lost, or nothing but rounding, would be dead."""
        network = narrow(name).double().train()
        output = network(small_image(network, 2, dtype=torch.float64))
        weight = torch.rand_like(output.embedding)
        ((weight * output.embedding).square().sum() + output.foreground.square().sum()).backward()
        parameters = dict(network.named_parameters())
        size = {
            key: 0.0 if p.grad is None else float(p.grad.abs().max())
            for key, p in parameters.items()
        }
        dead = {key for key in parameters if size[key] < 1e-11 * max(size.values())}
        # As published, these have shifts that the next normalisation takes away.
        kept = {"mobilenetv2": ("convolve_norm.bias",), "segformer": ("stages.3.settle.bias",)}
        kept |= dict.fromkeys(("resunet", "resunet3d", "ensemble"), ("enter.bias", "leave.bias"))
        assert {key for key in dead if not key.endswith(kept.get(name, ()))} == set()

    def test_shortened_vectors_have_the_same_lengths_and_angles(self, name):
        network = folded(randomise(narrow(name)))
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        random = torch.get_rng_state()
        short, basis = shortened(network)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
        last = getattr(network, getattr(network, "vectors_by", ""), None)
        if last is None or last.in_channels + 1 >= last.out_channels:
            assert short is network
            assert basis is None
            return
        image = small_image(network)
        with torch.no_grad():
            long, found = network(image), short(image)
            assert short.double()(image.double()).embedding.dtype == torch.float64
        assert_same(long.foreground, found.foreground, network)
        assert found.embedding.shape[1] == last.in_channels + 1
        assert torch.allclose(basis.T @ basis, torch.eye(last.in_channels + 1), atol=1e-6)
        back = torch.einsum("dr,br...->bd...", basis, found.embedding)
        largest = long.embedding.abs().max()
        assert torch.allclose(back, long.embedding, rtol=1e-4, atol=1e-5 * largest)
        with torch.no_grad():
            last.weight[0] = torch.nan  # what a training that diverged has
        assert shortened(network) == (network, None)

    def test_folded_for_inference_it_is_the_same_function(self, name):
        network = randomise(narrow(name)).double().train()
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        fast = folded(network)
        # What remains has no convolution before it: a convolution is concatenated with something
        # else, or added to it.
        left = [
            key
            for key, module in fast.named_modules()
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d)
        ]
        assert len(left) == {"enet": 1, "erfnet": 3, "espnet": 12}.get(name, 0)
        assert not any(key.endswith("_norm") for key in left)
        assert network.training
        assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
        image = small_image(network, dtype=torch.float64)
        with torch.no_grad():
            a, b = fast(image), network.eval()(image)
        assert_same(a.embedding, b.embedding, network)
        assert_same(a.foreground, b.foreground, network)

    def test_heads_are_named_and_separate(self, name):
        """Profiles count the foreground head apart, and the embedding must not depend on it."""
        network = randomise(narrow(name)).eval()
        counts = count_parameters(name, NARROW.get(name, {}))
        assert counts["foreground"] == sum(p.numel() for p in network.foreground.parameters()) > 0
        assert counts["total"] == counts["embedding"] + counts["foreground"]
        image = small_image(network)
        with torch.no_grad():
            before = network(image)
            for parameter in network.foreground.parameters():
                parameter.add_(1)
            after = network(image)
        assert torch.equal(before.embedding, after.embedding)
        assert not torch.equal(before.foreground, after.foreground)


# --- Where an output looks: every axis of every network -------------------------------------------------------------

AXES = [
    (name, axis)
    for name in NETWORKS.names()
    for axis in range(registry.axes(name) or 0)  # an ensemble has those of its members
    if NETWORKS.get(name).halo
]


def attentive(name):
    """A network in which whatever can reach an output does: a larger pixel makes everything that
    sees it larger."""
    network = narrow(name, embedding_dim=1).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # positive, of sum 1, so that nothing is clipped and nothing explodes
            if parameter.ndim > 1:
                positive = 0.5 + torch.rand(
                    parameter.shape, generator=generator, dtype=torch.float64
                )
                parameter.copy_(
                    positive / positive.flatten(1).sum(1).reshape(-1, *[1] * (parameter.ndim - 1))
                )
            elif name.endswith("bias"):  # so that nothing is too small to be seen beside it
                parameter.zero_()
    return network


def along(array, axis, start, stop):
    """A part of (B, C, *shape) along one spatial axis."""
    return array.narrow(axis + 2, start, stop - start)


@pytest.mark.parametrize(
    ("name", "axis"),
    # the first axis of every network, and all of those whose axes differ
    [(name, axis) for name, axis in AXES if axis == 0 or registry.axes(name) == 3],
)
def test_the_output_moves_with_the_image(name, axis):
    """By one divisor; for networks that pad, away from the borders that only one of the two images
    has."""
    network = randomise(narrow(name, embedding_dim=2)).double().eval()
    d, m, h = network.divisor[axis], network.margin[axis], network.halo[axis]
    context = -(-(h - m) // d)  # divisors
    cells = [0 if any(network.margin) else 1] * network.ndim
    cells[axis] = 2 * context + 2
    image = small_image(network, cells=cells, dtype=torch.float64)
    with torch.no_grad():
        whole = network(image).embedding
        part = network(along(image, axis, d, image.shape[axis + 2])).embedding
    assert part.shape[axis + 2] == whole.shape[axis + 2] - d
    start = context * d
    moved, part = (
        along(whole, axis, start + d, whole.shape[axis + 2]),
        along(part, axis, start, part.shape[axis + 2]),
    )
    assert_same(part, moved, network)
    if d > 1:  # or the divisor could be smaller
        other = along(whole, axis, start + d - 1, whole.shape[axis + 2] - 1)
        assert (part - other).abs().max() > 1e-3 * moved.abs().max()


@pytest.mark.parametrize(
    ("name", "axis"),
    # the last one, likewise
    [(name, axis) for name, axis in AXES if axis == 1 or registry.axes(name) == 3],
)
def test_halo_is_true_and_tight(name, axis):
    """Nothing farther than the halo of a block changes it, down to the last bit.

    At the halo, something does.

    A block of a network that pads may be a single pixel, at any place; else it starts at a multiple
    of the divisor and is the smallest legal one. A network that is new may have a halo that is less
    than one divisor too large.
    """
    network = attentive(name)
    d, r, m, h = (getattr(network, key)[axis] for key in ("divisor", "remainder", "margin", "halo"))
    start = (-(-(h - m) // d) + 1) * d
    blocks = [(start, start + d + r)] if m else [(p, p + 1) for p in range(start, start + d)]
    cells = [0 if any(network.margin) else 1] * network.ndim
    cells[axis] = (blocks[-1][1] - r + h - m) // d + 2
    slack = 1 if name in NARROW else d
    # Flat, so that pools pass on whatever is raised within them; raised by little, so that nothing
    # saturates, but a lot more than there was, so that it is seen through the thin ends of many
    # layers.
    image = torch.full_like(small_image(network, cells=cells, dtype=torch.float64), 1e-30)
    end = image.shape[axis + 2]
    with torch.no_grad():
        before = network(image).embedding
        seen = {"left": [], "right": []}
        for a, b in blocks:
            low, high = a + m - h, b + m + h  # of the image, all that may matter
            assert low >= 1
            assert end - high >= 1

            def change(*parts, a=a, b=b):
                other = image.clone()
                for part in parts:
                    along(other, axis, *part).add_(1e-3)
                return not torch.equal(
                    *(along(x, axis, a, b) for x in (before, network(other).embedding))
                )

            assert not change((0, low), (high, end)), (a, b)
            seen["left"].append(change((0, low + slack)))
            seen["right"].append(change((high - slack, end)))
    # A convolution of 3 that halves the sides sees, for the second of two pixels, two to the left
    # and none to the right.
    tight = [any(side) for side in seen.values()]
    assert any(tight) if name in ("mobilenetv2", "enet", "erfnet", "espnet") else all(tight)


# --- ResUNet --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "parameters"), [(w, n) for w, n, _, _ in RESUNETS.values()], ids=RESUNETS
)
def test_parameters_of_the_paper(widths, parameters):
    counts = count_parameters("resunet", {"widths": widths, "in_channels": 3})
    assert counts == {
        "embedding": parameters,
        "foreground": widths[1] + 1,
        "total": parameters + widths[1] + 1,
    }


@pytest.mark.parametrize(
    ("widths", "giga", "rounding"), [(w, g, r) for w, _, g, r in RESUNETS.values()], ids=RESUNETS
)
def test_multiply_accumulates_of_the_paper(widths, giga, rounding):
    size = 544 * 544
    macs = count_macs("resunet", {"widths": widths, "in_channels": 3}, (544, 544))
    f1 = widths[1]
    original_head = f1 * f1 + 2 * f1  # two 1x1 convolutions, where ours is one
    assert (macs + (original_head - f1) * size) / 1e9 == pytest.approx(giga, abs=rounding)

    f0, f1, f2, f3, f4 = widths  # and exactly: (in, out, side divided by) of every residual block
    blocks = [(3, f0, 1), (f0, f1, 1), (f1, f2, 2), (f2, f3, 4), (f3, f4, 8)]
    blocks += [(f4, f4, 8), (f4 + f3, f3, 4), (f3 + f2, f2, 2), (f2 + f1, f1, 1)]
    assert (
        macs == sum(9 * (2 * i * o + o * o) * size // s**2 for i, o, s in blocks) + 17 * f1 * size
    )


def test_multiply_accumulates_are_those_of_the_padded_image():
    options = {"widths": (4, 8, 16, 32, 64)}
    assert count_macs("resunet", options, (33, 48)) == count_macs("resunet", options, (48, 48))


# Kernels and pools from full resolution to 1/8, as the documentation of the networks says.
PLANS = {
    "resunet": ([(3, 3)] * 4, [(2, 2)] * 4),
    "resunet3d": (
        [(1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)],
        [(1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2)],
    ),
}


def residual_parameters(i, o, kernel):
    """Three convolutions with biases, and three normalisations."""
    return math.prod(kernel) * (2 * i * o + o * o) + 3 * o + 6 * o


def test_parameters_in_3d():
    def count(widths):
        f0, f1, f2, f3, f4 = widths
        k0, k1, k2, k3 = PLANS["resunet3d"][0]
        blocks = [(1, f0, k0), (f0, f1, k0), (f1, f2, k1), (f2, f3, k2), (f3, f4, k3)]
        blocks += [(f4, f4, k3), (f4 + f3, f3, k2), (f3 + f2, f2, k1), (f2 + f1, f1, k0)]
        expected = sum(residual_parameters(*block) for block in blocks) + 16 * (f1 + 1)
        counts = count_parameters("resunet3d", {"widths": widths})
        assert counts == {"embedding": expected, "foreground": f1 + 1, "total": expected + f1 + 1}
        return counts["embedding"]

    teacher, student = count((32, 64, 128, 256, 512)), count((4, 8, 16, 24, 32))
    assert teacher / 1e6 == pytest.approx(55.66, abs=0.005)
    assert student < 0.01 * teacher


class Unfused(nn.Module):
    """The residual block as the paper draws it: two convolutions, and a third as shortcut."""

    def __init__(self, i, o, kernel=(3, 3)):
        super().__init__()
        convolution, norm = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[
            len(kernel)
        ]
        options = {"kernel_size": kernel, "padding": "same"}
        self.first, self.first_norm = convolution(i, o, **options), norm(o)
        self.second, self.second_norm = convolution(o, o, **options), norm(o)
        self.shortcut, self.shortcut_norm = convolution(i, o, **options), norm(o)

    def forward(self, x):
        main = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(
            self.second_norm(self.second(main)) + self.shortcut_norm(self.shortcut(x))
        )

    def take(self, block):
        """Copy the weights of a fused block: the first half of what enters is the main path."""
        mine = {}
        for key, value in block.state_dict().items():
            part, _, kind = key.partition(".")
            half = value.chunk(2) if part.startswith("enter") and value.ndim else (value, value)
            names = {
                "enter": ("first", "shortcut"),
                "enter_norm": ("first_norm", "shortcut_norm"),
            }.get(part)
            for name, tensor in zip(
                names or (part.replace("leave", "second"),), half, strict=False
            ):
                mine[f"{name}.{kind}"] = tensor.clone()
        self.load_state_dict(mine)


@pytest.mark.parametrize(
    ("i", "o", "kernel", "training"),
    [
        (3, 4, (3, 3), False),
        (5, 2, (3, 3), True),
        (4, 4, (1, 3, 3), False),
        (3, 4, (1, 3, 3), True),
        (5, 2, (3, 3, 3), False),
        (4, 4, (3, 3, 3), True),
    ],
)
def test_fused_block_equals_the_unfused(i, o, kernel, training):
    fused = randomise(ResidualBlock(i, o, kernel)).double().train(training)
    plain = Unfused(i, o, kernel).double().train(training)
    plain.take(fused)
    a = torch.randn(2, i, *(3, 6, 7)[-len(kernel) :], dtype=torch.float64, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    out = fused(a)
    torch.testing.assert_close(out, plain(b))
    assert (out == 0).any()
    assert (out > 0).any()
    (out**2).sum().backward()
    (plain(b) ** 2).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in plain.parameters())
    if training:
        fused.eval()
        copy = Unfused(i, o, kernel).double().eval()
        copy.take(fused)
        assert not torch.equal(copy(a), plain(a))  # statistics have moved on
        torch.testing.assert_close(copy(a), fused(a))


def shrink(x, factors):
    """The largest of every window."""
    for axis, factor in reversed(list(enumerate(factors, start=2))):
        x = x.unflatten(axis, (-1, factor)).amax(axis + 1)
    return x


def enlarge(x, factors):
    """Linear between the centres of pixels, one matrix per axis.

    Beyond the first and last centre nothing changes.
    """
    for axis, factor in enumerate(factors, start=2):
        n = x.shape[axis]
        centre = ((torch.arange(factor * n, dtype=torch.float64) + 0.5) / factor - 0.5).clamp(
            0, n - 1
        )
        matrix = (1 - (centre[:, None] - torch.arange(n)).abs()).clamp(min=0)
        x = torch.movedim(torch.movedim(x, axis, -1) @ matrix.T, -1, axis)
    return x


def assert_output(output, network, features):
    """Feature maps are these, and both heads are 1x1 convolutions of the last one."""
    x = list(features.values())[-1]
    for head in ("embedding", "foreground"):
        layer = getattr(network, head)
        expected = torch.einsum("dc,bc...->bd...", layer.weight.flatten(1), x)
        expected = expected + layer.bias.reshape(-1, *[1] * (x.ndim - 2))
        torch.testing.assert_close(getattr(output, head), expected)
    assert list(output.features) == list(features)
    for key, feature in features.items():
        torch.testing.assert_close(output.features[key], feature)


@pytest.mark.parametrize("pooled_skips", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_resunet_equals_the_unfused_network(name, pooled_skips):
    """Every block replaced by its drawing, and wired anew from the description."""
    kernels, pools = PLANS[name]
    network = randomise(
        build(name, {"widths": (2, 3, 4, 5, 6), "in_channels": 2, "pooled_skips": pooled_skips})
    )
    network = network.double().eval()
    plain = {}
    of_level = [0, *range(4), *reversed(range(4))]  # stem, down, up
    blocks = {
        key: module for key, module in network.named_modules() if isinstance(module, ResidualBlock)
    }
    for (key, module), level in zip(blocks.items(), of_level, strict=True):
        plain[key] = (
            Unfused(module.enter.in_channels, module.leave.out_channels, kernels[level])
            .double()
            .eval()
        )
        plain[key].take(module)
    shape = (4, 32, 48)[-len(kernels[0]) :]
    image = torch.randn(2, 2, *shape, dtype=torch.float64)

    features = {}
    with torch.no_grad():
        full = plain["down.0"](plain["stem"](image))
        half = plain["down.1"](shrink(full, pools[0]))
        quarter = plain["down.2"](shrink(half, pools[1]))
        eighth = plain["down.3"](shrink(quarter, pools[2]))
        x = features["stride8"] = plain["up.0"](enlarge(shrink(eighth, pools[3]), pools[3]))
        for number, skip in ((1, quarter), (2, half), (3, full)):
            pool = pools[3 - number]
            x = torch.cat([x, shrink(skip, pool)] if pooled_skips else [enlarge(x, pool), skip], 1)
            x = enlarge(x, pool) if pooled_skips else x
            x = features[f"stride{8 >> number}"] = plain[f"up.{number}"](x)
        output = network(image)
    assert_output(output, network, features)
    assert features["stride8"].shape[1:] == (
        6,
        *(n // d for n, d in zip(shape, (2, 8, 8)[-len(shape) :], strict=True)),
    )
    assert network.divisor == tuple(math.prod(sides) for sides in zip(*pools, strict=True))


# --- LeanUNet -------------------------------------------------------------------------------------------------------

# Kernels of five levels, and the pools between them, as the documentation says.
LEAN = {
    "leanunet": ([(3, 3)] * 5, [(2, 2)] * 4),
    "leanunet3d": ([(1, 3, 3)] + [(3, 3, 3)] * 4, PLANS["resunet3d"][1]),
}


def convolved(x, layer, kernel):
    """A convolution as a sum over its taps, and then its normalisation."""
    weight, norm = layer.convolve.weight, layer.convolve_norm
    assert tuple(weight.shape[2:]) == kernel
    assert layer.convolve.bias is None
    sides = x.shape[2:]
    padded = nn.functional.pad(x, [n // 2 for n in reversed(kernel) for _ in range(2)])
    out = 0
    for tap in itertools.product(*map(range, kernel)):
        part = padded[(..., *(slice(t, t + n) for t, n in zip(tap, sides, strict=True)))]
        out = out + torch.einsum("dc,bc...->bd...", weight[(..., *tap)], part)
    return normalised(out, norm)


def spread(x, layer, pool):
    """Every pixel becomes as many as its window has, each by a matrix of its own."""
    weight = layer.convolve.weight
    assert tuple(weight.shape[2:]) == pool
    sides = [n * p for n, p in zip(x.shape[2:], pool, strict=True)]
    out = x.new_zeros(len(x), weight.shape[1], *sides)
    for tap in itertools.product(*map(range, pool)):
        places = tuple(slice(t, None, p) for t, p in zip(tap, pool, strict=True))
        out[(..., *places)] = torch.einsum("cd,bc...->bd...", weight[(..., *tap)], x)
    return normalised(out, layer.convolve_norm)


def normalised(x, norm):
    column = (-1, *[1] * (x.ndim - 2))
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean.reshape(column)) * scale.reshape(column) + norm.bias.reshape(
        column
    )


@pytest.mark.parametrize("name", LEAN)
def test_leanunet_equals_its_description(name):
    kernels, pools = LEAN[name]
    network = randomise(build(name, {"widths": (2, 3, 4, 5, 6), "in_channels": 2})).double().eval()
    shape = (4, 32, 48)[-len(kernels[0]) :]
    image = torch.randn(2, 2, *shape, dtype=torch.float64)
    with torch.no_grad():
        x, skips, features = image, [], {}
        for level, kernel in enumerate(kernels):
            x = shrink(x, pools[level - 1]) if level else x
            for layer in network.down[level]:
                x = convolved(x, layer, kernel).clamp(min=0)
            skips.append(x)
        for number, level in enumerate((3, 2, 1, 0)):
            kernel, pool = kernels[level], pools[level]
            side = convolved(skips[level], network.skip[number], kernel)
            x = (side + spread(x, network.below[number], pool)).clamp(min=0)
            x = convolved(x, network.up[number], kernel).clamp(min=0)
            features[f"stride{2**level}"] = x
        output = network(image)
    assert_output(output, network, features)
    assert network.divisor == tuple(math.prod(sides) for sides in zip(*pools, strict=True))


def test_leanunet_has_less_than_a_hundredth_of_the_teachers_parameters():
    teacher = count_parameters("resunet", {"widths": (32, 64, 179, 349, 680)})["total"]
    assert count_parameters("leanunet", {})["total"] < 0.01 * teacher
    teacher = count_parameters("resunet3d", {"widths": (32, 64, 128, 256, 512)})["total"]
    assert count_parameters("leanunet3d", {})["total"] < 0.01 * teacher


# --- MALA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "parameters", "crop", "cube"), MALAS.values(), ids=MALAS)
def test_mala_of_the_paper(options, parameters, crop, cube):
    counts = count_parameters("mala", options)
    head = (options.get("decoder") or options["widths"])[-1 if "decoder" in options else 0] + 1
    assert counts == {"embedding": parameters, "foreground": head, "total": parameters + head}
    for depth, giga in ((25, crop), (56, cube)):
        shape = (depth, 56, 56)
        with torch.device("meta"):
            output = build("mala", options)(torch.empty(2, 1, depth + 28, 268, 268))
        assert output.embedding.shape == (2, 16, *shape)
        assert output.foreground.shape == (2, 1, *shape)
        if depth == 25:
            sides = {key: tuple(feature.shape[2:]) for key, feature in output.features.items()}
            assert sides == {
                "stride27": (37, 4, 4),
                "stride9": (33, 8, 8),
                "stride3": (29, 20, 20),
                "stride1": shape,
            }
        macs = count_macs("mala", options, shape) - (head - 1) * math.prod(shape)
        assert macs / 1e9 == pytest.approx(giga, abs=0.05)


@pytest.mark.parametrize("side", [27 * k + r for k in (1, 2) for r in (1, 2, 3)])
def test_mala_makes_its_legal_sides_and_no_other(side):
    """One pixel less than a legal side, and the pools no longer fit."""
    with torch.device("meta"):
        network, image = build("mala", {}), torch.empty(1, 1, 29, side + 212, 214)
        if side % 27 == 2:
            assert network(image).embedding.shape[2:] == (1, side, 2)
        else:
            try:
                shape = network(image).embedding.shape[2:]
            except RuntimeError:  # what comes from below is larger than the skip
                return
            assert shape != (1, side, 2)


def test_mala_equals_its_description():
    """Functional, from the weights alone: convolutions as sums over shifted images, no module of
    torch."""
    network = build(
        "mala", {"widths": (2, 3, 2, 4), "decoder": (3, 2, 3), "in_channels": 2, "embedding_dim": 3}
    )
    network = randomise(network).double()
    state = {key: value for key, value in network.state_dict().items()}

    def convolve(x, key):
        weight, bias = state[f"{key}.weight"], state[f"{key}.bias"]
        kernel = weight.shape[2:]
        sides = [n - k + 1 for n, k in zip(x.shape[2:], kernel, strict=True)]
        out = bias.reshape(1, -1, 1, 1, 1)
        for z, y, x0 in itertools.product(*map(range, kernel)):
            part = x[:, :, z : z + sides[0], y : y + sides[1], x0 : x0 + sides[2]]
            out = out + torch.einsum("oi,bizyx->bozyx", weight[:, :, z, y, x0], part)
        return out

    def pair(x, key):
        for layer in (f"{key}.0", f"{key}.2"):
            x = convolve(x, layer)
            x = torch.where(x > 0, x, 0.005 * x)
        return x

    def upsample(x, key):
        """Every voxel becomes a pattern of 3 x 3 times its value."""
        pattern = state[f"{key}.enlarge.weight"][:, 0, 0]
        large = torch.einsum("bczyx,cij->bczyixj", x, pattern)
        return convolve(large.flatten(5, 6).flatten(3, 4), f"{key}.mix")

    def cut(x, like):
        for axis in (2, 3, 4):
            spare = x.shape[axis] - like.shape[axis]
            assert spare % 2 == 0  # or there is no centre
            x = x.narrow(axis, spare // 2, like.shape[axis])
        return x

    image = torch.randn(1, 2, 30, 214, 241, dtype=torch.float64)
    with torch.no_grad():
        x, skips = image, []
        for level in range(3):
            x = pair(x, f"down.{level}")
            skips.append(x)
            x = shrink(x, (1, 3, 3))
        x = pair(x, "bottom")
        features = {"stride27": x}
        for level, name in enumerate(("stride9", "stride3", "stride1")):
            x = upsample(x, f"grow.{level}")
            x = features[name] = pair(torch.cat([x, cut(skips[2 - level], x)], 1), f"up.{level}")
        output = network(image)
    assert x.shape == (1, 3, 2, 2, 29)
    for key, feature in features.items():
        assert_same(output.features[key], feature, network)
    assert_same(output.embedding, convolve(x, "embedding"), network)
    assert_same(output.foreground, convolve(x, "foreground"), network)
    assert output.embedding.std() > 0.1


def test_mala_starts_as_in_the_paper():
    """Kaiming: variance 2 / ((1 + 0.005^2) inputs), no bias."""
    network = build("mala", {"widths": (12, 60, 30, 20)})
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv3d) and module.weight.numel() > 5000:
            expected = math.sqrt(2 / (1 + 0.005**2) / module.weight[0].numel())
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.05), name
            assert module.bias.abs().max() == 0


# --- Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registry", [NETWORKS, TERMS, SOURCES], ids=lambda r: r.package)
def test_every_plugin_file_exports_exactly_one_object(registry):
    assert registry.names()
    for name in registry.names():
        tree = ast.parse((registry.folder / f"{name}.py").read_text())
        assigned = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            and any(getattr(t, "id", None) == "__all__" for t in node.targets)
        ]
        assert len(assigned) == 1
        assert len(assigned[0]) == 1
        plugin = registry.get(name)
        assert plugin.__name__ == assigned[0][0]
        assert plugin.__module__ == f"{registry.package}.{name}"
        options = [
            p.name
            for p in inspect.signature(plugin).parameters.values()
            if p.kind == p.KEYWORD_ONLY
        ]
        assert list(registry.parameters(name)) == options


@pytest.mark.parametrize(
    ("registry", "wrong", "right"),
    [(NETWORKS, "resnet", "resunet"), (TERMS, "superviced", "supervised"), (TERMS, "igdd", "igd")],
)
def test_a_wrong_name_gives_the_nearest(registry, wrong, right):
    for act in (registry.get, registry.check):
        with pytest.raises(
            UnknownName, match=f'no {registry.kind} "{wrong}": did you mean "{right}"'
        ):
            act(wrong)
    with pytest.raises(UnknownName, match=f"valid names: .*{right}"):
        registry.get("zzzzzzzz")


def test_a_wrong_option_gives_the_nearest():
    NETWORKS.check("resunet", {"widths": [1] * 5})
    with pytest.raises(UnknownName, match='"resunet" has no option "width": did you mean "widths"'):
        NETWORKS.check("resunet", {"width": [1] * 5})


def test_networks_of_ones_own():
    assert isinstance(
        build("torch.nn:Conv2d", {"in_channels": 1, "out_channels": 2, "kernel_size": 1}), nn.Conv2d
    )
    for name in ("torch.nn:Nothing", "no_such_package:Thing"):
        with pytest.raises(UnknownName, match="cannot load network"):
            build(name, {})


@pytest.mark.parametrize("last", ["vectors_by", None])
def test_vectors_of_ones_own_network_are_shortened_if_it_says_by_what_they_are_made(last):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv2d(1, 8, 1)

        def forward(self, image):
            return self.last(image)

    class Further(Own):
        """It does not say so itself, and does more."""

        def forward(self, image):
            return self.last(image) + 1

    if last is not None:
        setattr(Own, last, "last")
    basis = shortened(Own())[1]
    assert (basis is not None) == (last == "vectors_by")
    assert shortened(Further())[1] is None
