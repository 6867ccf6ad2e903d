"""The contract of every network, and the networks of the paper: sizes, cost, wiring."""

import ast
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gdlib import io
from gdlib.models import Embedding, build, folded
from gdlib.models.resunet import ResidualBlock
from gdlib.profile import count_macs, count_parameters
from gdlib.registry import NETWORKS, SOURCES, TERMS, UnknownName

PAPER = {  # widths, parameters without the foreground head, 10^9 multiply-accumulates at 544 x 544 with the original's head
    "teacher": ((32, 64, 179, 349, 680), 33_609_092, 581.8, 0.05),
    "student": ((4, 8, 16, 32, 64), 295_884, 5.62, 0.005),
    "middle": ((16, 32, 64, 128, 256), 4_703_424, 88.7, 0.05),
}


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


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- Every network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS.names())
class TestEveryNetwork:
    def test_shapes(self, name):
        network = randomise(build(name, {})).eval()
        d = network.divisor
        sides = [(1, 1), (1, 2), (3, 2)] if network.ndim == 2 else [(1, 1, 1), (1, 2, 1), (2, 1, 2)]
        for shape, batch in itertools.product(([d * n for n in side] for side in sides), (1, 2)):
            with torch.no_grad():
                output = network(torch.randn(batch, 1, *shape))
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
        network = build(name, {"in_channels": in_channels, "embedding_dim": embedding_dim}).eval()
        shape = (network.divisor,) * network.ndim
        with torch.no_grad():
            output = network(torch.randn(1, in_channels, *shape))
        assert output.embedding.shape == (1, embedding_dim, *shape)
        assert output.foreground.shape == (1, 1, *shape)

    def test_saved_weights_are_the_network(self, name, tmp_path):
        network = randomise(build(name, {"embedding_dim": 4}), 1).eval()
        if network.ndim == 2:
            network = network.to(memory_format=torch.channels_last)
        header = {"model": name, "options": {"embedding_dim": 4}}
        io.save_weights(tmp_path / "weights.safetensors", network.state_dict(), header)
        state, read = io.load_weights(tmp_path / "weights.safetensors")
        assert read == header
        again = build(read["model"], read["options"]).eval()
        image = torch.randn(1, 1, *(network.divisor * 2,) * network.ndim)
        for key, tensor in network.state_dict().items():
            assert torch.equal(state[key], tensor)
            assert state[key].dtype == tensor.dtype
        again.load_state_dict(state)
        # In float64: the memory order differs, and with it the order of sums.
        network, again, image = network.double(), again.double(), image.double()
        with torch.no_grad():
            torch.testing.assert_close(again(image).embedding, network(image).embedding)
            torch.testing.assert_close(again(image).foreground, network(image).foreground)

    def test_images_of_a_batch_do_not_see_each_other(self, name):
        network = randomise(build(name, {})).double().eval()
        images = torch.randn(3, 1, *(network.divisor * 2,) * network.ndim, dtype=torch.float64)
        with torch.no_grad():
            together = network(images)
            alone = network(images[1:2])
        torch.testing.assert_close(together.embedding[1:2], alone.embedding)
        torch.testing.assert_close(together.foreground[1:2], alone.foreground)
        assert (together.embedding[0] - together.embedding[1]).abs().max() > 1e-3

    def test_every_parameter_is_trained(self, name):
        network = build(name, {}).train()
        output = network(torch.randn(2, 1, *(network.divisor * 2,) * network.ndim))
        (output.embedding.square().sum() + output.foreground.square().sum()).backward()
        assert [key for key, p in network.named_parameters() if p.grad is None] == []

    def test_folded_for_inference_it_is_the_same_function(self, name):
        network = randomise(build(name, {})).double().train()
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        fast = folded(network)
        assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d) for m in fast.modules())
        assert network.training
        assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
        image = torch.randn(2, 1, *(network.divisor * 2,) * network.ndim, dtype=torch.float64)
        with torch.no_grad():
            a, b = fast(image), network.eval()(image)
        torch.testing.assert_close(a.embedding, b.embedding)
        torch.testing.assert_close(a.foreground, b.foreground)

    def test_heads_are_named_and_separate(self, name):
        """Profiles count the foreground head apart, and the embedding must not depend on it."""
        network = randomise(build(name, {})).eval()
        counts = count_parameters(name, {})
        assert counts["foreground"] == sum(p.numel() for p in network.foreground.parameters()) > 0
        assert counts["total"] == counts["embedding"] + counts["foreground"]
        image = torch.randn(1, 1, *(network.divisor,) * network.ndim)
        with torch.no_grad():
            before = network(image)
            for parameter in network.foreground.parameters():
                parameter.add_(1)
            after = network(image)
        assert torch.equal(before.embedding, after.embedding)
        assert not torch.equal(before.foreground, after.foreground)


# --- ResUNet --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("widths", "parameters"), [(w, n) for w, n, _, _ in PAPER.values()], ids=PAPER)
def test_parameters_of_the_paper(widths, parameters):
    counts = count_parameters("resunet", {"widths": widths, "in_channels": 3})
    assert counts == {"embedding": parameters, "foreground": widths[1] + 1, "total": parameters + widths[1] + 1}


@pytest.mark.parametrize(("widths", "giga", "rounding"), [(w, g, r) for w, _, g, r in PAPER.values()], ids=PAPER)
def test_multiply_accumulates_of_the_paper(widths, giga, rounding):
    size = 544 * 544
    macs = count_macs("resunet", {"widths": widths, "in_channels": 3}, (544, 544))
    f1 = widths[1]
    original_head = f1 * f1 + 2 * f1  # two 1x1 convolutions, where ours is one
    assert (macs + (original_head - f1) * size) / 1e9 == pytest.approx(giga, abs=rounding)

    f0, f1, f2, f3, f4 = widths  # and exactly: (in, out, side divided by) of every residual block
    blocks = [(3, f0, 1), (f0, f1, 1), (f1, f2, 2), (f2, f3, 4), (f3, f4, 8)]
    blocks += [(f4, f4, 8), (f4 + f3, f3, 4), (f3 + f2, f2, 2), (f2 + f1, f1, 1)]
    assert macs == sum(9 * (2 * i * o + o * o) * size // s**2 for i, o, s in blocks) + 17 * f1 * size


def test_multiply_accumulates_are_those_of_the_padded_image():
    options = {"widths": (4, 8, 16, 32, 64)}
    assert count_macs("resunet", options, (33, 48)) == count_macs("resunet", options, (48, 48))


class Unfused(nn.Module):
    """The residual block as the paper draws it: two convolutions, and a third as shortcut."""

    def __init__(self, i, o):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o)
        self.second, self.second_norm = nn.Conv2d(o, o, 3, padding=1), nn.BatchNorm2d(o)
        self.shortcut, self.shortcut_norm = nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o)

    def forward(self, x):
        main = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(main)) + self.shortcut_norm(self.shortcut(x)))

    def take(self, block):
        """Copy the weights of a fused block: the first half of what enters is the main path."""
        mine = {}
        for key, value in block.state_dict().items():
            part, _, kind = key.partition(".")
            half = value.chunk(2) if part.startswith("enter") and value.ndim else (value, value)
            names = {"enter": ("first", "shortcut"), "enter_norm": ("first_norm", "shortcut_norm")}.get(part)
            for name, tensor in zip(names or (part.replace("leave", "second"),), half, strict=False):
                mine[f"{name}.{kind}"] = tensor.clone()
        self.load_state_dict(mine)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("i", "o"), [(3, 4), (5, 2), (4, 4)])
def test_fused_block_equals_the_unfused(i, o, training):
    fused = randomise(ResidualBlock(i, o)).double().train(training)
    plain = Unfused(i, o).double().train(training)
    plain.take(fused)
    a = torch.randn(2, i, 6, 7, dtype=torch.float64, requires_grad=True)
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
        copy = Unfused(i, o).double().eval()
        copy.take(fused)
        assert not torch.equal(copy(a), plain(a))  # statistics have moved on
        torch.testing.assert_close(copy(a), fused(a))


def test_resunet_equals_the_unfused_network():
    """Every block replaced by its drawing, and wired anew from the description."""
    network = randomise(build("resunet", {"widths": (2, 3, 4, 5, 6), "in_channels": 2})).double().eval()
    plain = {}
    for name, module in network.named_modules():
        if isinstance(module, ResidualBlock):
            i, o = module.enter.in_channels, module.leave.out_channels
            plain[name] = Unfused(i, o).double().eval()
            plain[name].take(module)
    image = torch.randn(2, 2, 32, 48, dtype=torch.float64)

    def enlarge(x):
        """Bilinear, corners on corners, as two matrices."""
        out = x
        for axis in (2, 3):
            n = x.shape[axis]
            position = torch.arange(2 * n, dtype=torch.float64) * (n - 1) / (2 * n - 1)
            matrix = (1 - (position[:, None] - torch.arange(n)).abs()).clamp(min=0)
            out = torch.movedim(torch.movedim(out, axis, -1) @ matrix.T, -1, axis)
        return out

    def halve(x):
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))

    with torch.no_grad():
        full = plain["down.0"](plain["stem"](image))
        half = plain["down.1"](halve(full))
        quarter = plain["down.2"](halve(half))
        eighth = plain["down.3"](halve(quarter))
        x = plain["up.0"](enlarge(halve(eighth)))
        for number, skip in ((1, quarter), (2, half), (3, full)):
            x = plain[f"up.{number}"](torch.cat([enlarge(x), skip], 1))
        embedding = torch.einsum("dc,bcyx->bdyx", network.embedding.weight[:, :, 0, 0], x)
        expected = embedding + network.embedding.bias[:, None, None]
        output = network(image)
    torch.testing.assert_close(output.embedding, expected)
    torch.testing.assert_close(output.foreground, F.conv2d(x, network.foreground.weight, network.foreground.bias))
    assert {key: tuple(f.shape[1:]) for key, f in output.features.items()} == {
        "up1": (6, 4, 6),
        "up2": (5, 8, 12),
        "up3": (4, 16, 24),
        "up4": (3, 32, 48),
    }


# --- Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registry", [NETWORKS, TERMS, SOURCES], ids=lambda r: r.package)
def test_every_plugin_file_exports_exactly_one_object(registry):
    assert registry.names()
    for name in registry.names():
        tree = ast.parse((registry.folder / f"{name}.py").read_text())
        assigned = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == "__all__" for t in node.targets)
        ]
        assert len(assigned) == 1
        assert len(assigned[0]) == 1
        plugin = registry.get(name)
        assert plugin.__name__ == assigned[0][0]
        assert plugin.__module__ == f"{registry.package}.{name}"
        options = [p.name for p in inspect.signature(plugin).parameters.values() if p.kind == p.KEYWORD_ONLY]
        assert registry.parameters(name) == options


@pytest.mark.parametrize(
    ("registry", "wrong", "right"),
    [(NETWORKS, "resnet", "resunet"), (TERMS, "superviced", "supervised"), (TERMS, "ikd", "igd")],
)
def test_a_wrong_name_gives_the_nearest(registry, wrong, right):
    for act in (registry.get, registry.check):
        with pytest.raises(UnknownName, match=f'no {registry.kind} "{wrong}": did you mean "{right}"'):
            act(wrong)
    with pytest.raises(UnknownName, match=f"valid names: .*{right}"):
        registry.get("zzzzzzzz")


def test_a_wrong_option_gives_the_nearest():
    NETWORKS.check("resunet", {"widths": [1]})
    with pytest.raises(UnknownName, match='"resunet" has no option "width": did you mean "widths"'):
        NETWORKS.check("resunet", {"width": [1]})


def test_networks_of_ones_own():
    assert isinstance(build("torch.nn:Conv2d", {"in_channels": 1, "out_channels": 2, "kernel_size": 1}), nn.Conv2d)
    for name in ("torch.nn:Nothing", "no_such_package:Thing"):
        with pytest.raises(UnknownName, match="cannot load network"):
            build(name, {})
