"""Teacher maps: what is cut from them is where the label was cut, and what they say is what the
teacher says."""

import itertools

import h5py
import numpy as np
import pytest
import torch

from gdlib import io
from gdlib.data.maps import TeacherMaps
from gdlib.data.patches import PatchSampler
from gdlib.kernels.levels import label_at
from gdlib.models import build, folded
from gdlib.predict.predictor import Predictor
from gdlib.train import loop
from gdlib.train.ask import ask
from gdlib.train.trainer import Trainer

HALF = 2.0**-11  # relative error of a number in half precision
STILL = {
    "empty": 0.0,
    "geometry": {"flip": False, "rotate90": False, "scale": (1.0, 1.0), "elastic": 0.0},
    "intensity": {"contrast": 0.0, "brightness": 0.0, "gamma": 0.0, "blur": 0.0, "noise": 0.0},
}
WILD = {
    "empty": 0.0,
    "geometry": {
        "flip": True, "rotate90": True, "scale": (0.7, 1.4), "elastic": 3.0, "rotate": 40, "misalign": 4, "probability": 0.7
    },
    "intensity": {"noise": 0.3, "blur": 2.0, "invert": 0.5},
    "sections": {"missing": 0.3},
}  # fmt: skip
SHAPES = {2: (46, 60), 3: (9, 40, 33)}
PATCHES = {2: (24, 24), 3: (4, 24, 16)}
LEVELS = {
    2: {"stride2": (2, 2), "stride3": (3, 3), "stride8": (8, 8)},
    3: {"stride4": (1, 4, 4), "stride3": (2, 3, 3)},
}
CORNERS = {
    2: {"stride2": (0, 0), "stride3": (-2, -1), "stride8": (-5, 0)},
    3: {"stride4": (0, 0, -1), "stride3": (-1, 0, -2)},
}


@pytest.fixture(scope="module")
def maps(tmp_path_factory, splits, teacher):
    """Return files with what the teacher says about the training images: embedding and level."""
    folder = tmp_path_factory.mktemp("maps")
    for level in (None, "stride2"):
        ask(
            teacher,
            splits["train"],
            folder / f"{level or 'embedding'}.h5",
            level=level,
            precision="float32",
            device="cpu",
        )
    return sorted(folder.glob("*.h5"))


def coordinates(shape):
    return np.stack(np.indices(shape), -1).astype(np.float16)


def samples_and_maps(folder, ndim):
    """Write two images in which every pixel has its own label, and maps in which every vector is
    its own place."""
    shape = SHAPES[ndim]
    label = np.arange(1, 1 + np.prod(shape), dtype=np.uint32).reshape(shape)
    image = np.random.default_rng(0).integers(0, 255, (1, *shape), np.uint8)
    io.write_samples(
        folder / "train.h5", [io.Sample("a", image, label), io.Sample("b", image[:, ::-1], label)]
    )
    known = {name: [ndim, list(stride)] for name, stride in LEVELS[ndim].items()}
    about = {"teacher": "t", "samples": io.sha256(folder / "train.h5"), "levels": known}
    with io.create_h5(folder / "embedding.h5", **about, parts=["embedding", "foreground"]) as file:
        for name in "ab":
            file[f"{name}/embedding"] = coordinates(shape)
            file[f"{name}/foreground"] = coordinates(shape)[..., -1:]
    for level, stride in LEVELS[ndim].items():
        with io.create_h5(folder / f"{level}.h5", **about, parts=[level]) as file:
            corner = CORNERS[ndim][level]
            sides = [-(-(n - c) // s) for n, c, s in zip(shape, corner, stride, strict=True)]
            for name in "ab":
                file.create_dataset(f"{name}/{level}", data=coordinates(sides)).attrs["corner"] = (
                    corner
                )
    paths = [folder / f"{part}.h5" for part in ("embedding", *LEVELS[ndim])]
    return folder / "train.h5", TeacherMaps(paths, folder / "train.h5")


@pytest.mark.parametrize(("ndim", "more"), [*itertools.product((2, 3), (0, 1, 2))])
def test_maps_are_cut_where_the_label_is_cut(ndim, more, make_spec, tmp_path):
    """Under every augmentation, to the pixel.

    `more` is how many voxels a student's map is larger than its patch.
    """
    train, maps = samples_and_maps(tmp_path, ndim)
    spec = make_spec("none", patch=PATCHES[ndim], augment=WILD, batch_size=4)
    levels = {
        level: tuple(-(-n // s) + more for n, s in zip(PATCHES[ndim], stride, strict=True))
        for level, stride in LEVELS[ndim].items()
    }
    sampler = PatchSampler(train, **spec.drawing, margin=(3,) * ndim, maps=maps, levels=levels)
    for step in range(12):
        batch = sampler.batch(step)
        pixels = torch.stack(torch.unravel_index(batch.label - 1, SHAPES[ndim]), 1)
        assert torch.equal(batch.teacher.embedding, pixels.half())
        assert torch.equal(batch.teacher.foreground, pixels[:, -1:].half())
        for level, stride in LEVELS[ndim].items():
            label, inner = label_at(batch.label, levels[level], stride)
            pixels = torch.stack(torch.unravel_index(label - 1, SHAPES[ndim]), 1)
            column = (1, ndim) + (1,) * ndim
            corner, stride = (
                torch.tensor(x).reshape(column) for x in (CORNERS[ndim][level], stride)
            )
            assert batch.teacher.features[level].shape[2:] == levels[level]
            assert torch.equal(
                batch.teacher.features[level][(..., *inner)], ((pixels - corner) // stride).half()
            )


def test_the_patches_are_those_without_maps(make_spec, tmp_path):
    train, maps = samples_and_maps(tmp_path, 2)
    spec = make_spec("none", patch=PATCHES[2], augment=WILD | {"empty": 0.5})
    with_maps, without = (
        PatchSampler(train, **spec.drawing, maps=maps),
        PatchSampler(train, **spec.drawing),
    )
    for step in range(4):
        one, other = with_maps.batch(step), without.batch(step)
        assert other.teacher is None
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.label, other.label)
        assert torch.equal(one.ids, other.ids)


def test_of_noise_the_teacher_says_what_it_says_of_background(make_spec, splits, maps):
    known = TeacherMaps(maps, splits["train"])
    levels = {"stride2": (16, 16)}
    both = []
    for empty in (0.0, 1.0):
        spec = make_spec("none", augment=STILL | {"empty": empty})
        both.append(
            PatchSampler(splits["train"], **spec.drawing, maps=known, levels=levels).batch(5)
        )
    before, after = both
    assert not after.label.any()
    for part, stride in (("embedding", 1), ("foreground", 1), ("stride2", 2)):
        old, new = (
            dict(zip(("embedding", "foreground"), b.teacher, strict=False)) | b.teacher.features
            for b in both
        )
        background = before.label[:, ::stride, ::stride] == 0
        for image in range(2):
            mean = old[part][image].float()[:, background[image]].mean(1)
            expected = mean[:, None, None].expand(new[part][image].shape)
            torch.testing.assert_close(new[part][image].float(), expected, rtol=2 * HALF, atol=1e-4)


def _asked(spec, train, source):
    """Return the distiller of a run, and its batches."""
    trainer = Trainer(spec, source, torch.device("cpu"))
    known = source if isinstance(source, TeacherMaps) else None
    sampler = PatchSampler(
        train, **spec.drawing, margin=trainer.margin, maps=known, levels=trainer.levels
    )
    return trainer.distiller, sampler


@pytest.mark.parametrize("method", ["grd", "levels"])
def test_maps_and_online_are_the_same_where_the_patch_is_the_image(
    method, make_spec, squares, teacher, tmp_path
):
    """Of whole images nothing is cut off, and half precision is all that differs.

    A number in it is wrong by a part `HALF`, and so is a vector in length and direction; a cosine
    of two by twice that. A loss that is the mean of squares, d^2, of K such numbers moves by 2 d c
    + c^2 at most if each moves by c.
    """
    shape = (48, 64)
    train = tmp_path / "train.h5"
    io.write_samples(train, [io.Sample(f"{i}", *squares(i, shape)) for i in range(3)])
    for level in (None, "stride2"):
        ask(
            teacher,
            train,
            tmp_path / f"{level}.h5",
            level=level,
            precision="float32",
            engine="torch",
            device="cpu",
        )
    paths = [tmp_path / "None.h5", tmp_path / "stride2.h5"]
    online, cut = (
        _asked(make_spec(method, patch=shape, augment=STILL, teacher=kind), train, source)
        for kind, source in (("online", teacher), ("maps", TeacherMaps(paths, train)))
    )
    for step in range(3):
        with torch.no_grad():
            losses = [
                distiller(sampler.batch(step), step)[1] for distiller, sampler in (online, cut)
            ]
        assert losses[0].keys() == losses[1].keys()
        longest = max(1.0, float(cut[1].batch(step).teacher.embedding.float().norm(dim=1).max()))
        moved = 4 * HALF * longest * len(make_spec(method).offsets) ** 0.5
        for name, loss in losses[0].items():
            bound = (
                0
                if name in ("supervised", "foreground")
                else 2 * float(loss) ** 0.5 * moved + moved**2
            )
            assert abs(float(losses[1][name] - loss)) <= bound, name
    assert all(float(loss) > 0 for loss in losses[1].values())


@pytest.mark.parametrize(
    ("model", "widths", "shape", "block"),
    [
        ("resunet", (2, 2, 4, 4, 4), (40, 60), 16),
        ("resunet3d", (2, 2, 3, 3, 3), (5, 40, 36), (2, 16, 24)),
        pytest.param("mala", (2, 2, 3, 3), (6, 40, 61), (4, 27, 30), marks=pytest.mark.long),
    ],
)
def test_every_part_is_what_the_network_says_of_the_whole_image(
    model, widths, shape, block, make_spec, tmp_path
):
    """Block by block and at once, maps of every resolution, networks that pad and one that does
    not."""
    patch = {"resunet": (32, 32), "resunet3d": (4, 32, 32), "mala": (3, 56, 56)}[model]
    options = {"widths": list(widths), "embedding_dim": 4} | (
        {"decoder": [3, 3, 4]} if model == "mala" else {}
    )
    spec = make_spec("none", model=model, widths=widths, patch=patch)
    torch.manual_seed(1)
    network = build(model, options)
    header = spec.model_dump(mode="json", include={"channels", "offsets", "normalisation"})
    header["normalisation"] = {"lower": 1.0, "upper": 99.8}
    header |= {"model": model, "options": options, "segmentation": {"mutex_watershed": {}}}
    io.save_weights(tmp_path / "t.safetensors", network.state_dict(), header)
    image = np.random.default_rng(0).integers(0, 255, (1, *shape), np.uint8)
    io.write_samples(tmp_path / "train.h5", [io.Sample("a", image, np.ones(shape, np.uint32))])

    predictor = Predictor(folded(network), header, precision="float32", device="cpu", block=10**6)
    source = predictor.source(image)
    whole = [
        -(-max(n - r, 0 if r else 1) // d) * d + r
        for n, r, d in zip(shape, network.remainder, network.divisor, strict=True)
    ]
    seen = source.read(
        [-m for m in network.margin], [n + m for n, m in zip(whole, network.margin, strict=True)]
    )
    with torch.no_grad():
        said = folded(network)(torch.from_numpy(seen)[None])

    for level in (None, *network.levels, "stride100"):
        out = tmp_path / f"{level}.h5"
        options = {"level": level, "block": block, "precision": "float32", "device": "cpu"}
        ask(tmp_path / "t.safetensors", tmp_path / "train.h5", out, **options)
        with h5py.File(out) as file:
            if level is None:
                inner = tuple(slice(0, n) for n in shape)
                for part, expected in (
                    ("embedding", said.embedding),
                    ("foreground", said.foreground),
                ):
                    expected = expected[0][(slice(None), *inner)].movedim(0, -1).numpy()
                    np.testing.assert_allclose(
                        file["a"][part][()], expected, rtol=2 * HALF, atol=1e-4
                    )
            elif level not in network.levels:
                assert not list(file)
            else:
                array, feature = file["a"][level], said.features[level][0].movedim(0, -1).numpy()
                assert all(
                    -s < c <= 0
                    for c, s in zip(array.attrs["corner"], network.levels[level][1], strict=True)
                )
                there, mine = [], []
                for n, w, c, m, s in zip(
                    shape,
                    whole,
                    array.attrs["corner"],
                    feature.shape[:-1],
                    network.levels[level][1],
                    strict=True,
                ):  # the voxels that hold each pixel: here, and in a map that has one centre with what was put out
                    pixel = np.arange(n)
                    mine.append((pixel - c) // s)
                    there.append(np.floor((pixel + 0.5 - w / 2) / s + m / 2).astype(int))
                np.testing.assert_allclose(
                    array[()][np.ix_(*mine)], feature[np.ix_(*there)], rtol=2 * HALF, atol=1e-4
                )


def test_what_is_killed_leaves_nothing_under_its_name_and_goes_on(
    splits, teacher, tmp_path, monkeypatch
):
    embed, asked = Predictor.embed, []

    def counted(self, source, box):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(box)
        return embed(self, source, box)

    monkeypatch.setattr(Predictor, "embed", counted)
    out = tmp_path / "maps.h5"
    with pytest.raises(KeyboardInterrupt):
        ask(teacher, splits["train"], out, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == [".maps.h5.partial"]
    monkeypatch.setattr(Predictor, "embed", lambda *args: asked.append(args[2]) or embed(*args))
    ask(teacher, splits["train"], out, device="cpu")
    assert len(asked) == 4  # as many as images
    assert [path.name for path in tmp_path.iterdir()] == ["maps.h5"]
    ask(teacher, splits["train"], tmp_path / "at_once.h5", device="cpu")
    assert out.read_bytes() == (tmp_path / "at_once.h5").read_bytes()


def test_what_was_begun_with_another_teacher_begins_anew(splits, teacher, tmp_path, monkeypatch):
    state, header = io.load_weights(teacher)
    other = tmp_path / "other.safetensors"
    io.save_weights(
        other,
        {
            name: value * 0.5 if value.is_floating_point() else value
            for name, value in state.items()
        },
        header,
    )
    embed, asked = Predictor.embed, []

    def interrupted(self, source, box):
        if asked:
            raise KeyboardInterrupt
        asked.append(box)
        return embed(self, source, box)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "embed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(teacher, splits["train"], tmp_path / "maps.h5", device="cpu")
    ask(other, splits["train"], tmp_path / "maps.h5", device="cpu")
    ask(other, splits["train"], tmp_path / "fresh.h5", device="cpu")
    assert (tmp_path / "maps.h5").read_bytes() == (tmp_path / "fresh.h5").read_bytes()


def test_files_that_do_not_belong_together_are_refused(splits, maps, tmp_path):
    with pytest.raises(
        io.DataError,
        match=r"embedding.h5: the teacher was asked about other images than " r".*val.h5; ask",
    ):
        TeacherMaps(maps, splits["val"])
    with h5py.File(maps[1]) as old, h5py.File(tmp_path / "other.h5", "w") as new:
        new.attrs.update(old.attrs)
        new.attrs["teacher"] = "0" * 64
    with pytest.raises(io.DataError, match=r"other.h5: another teacher than in .*embedding.h5"):
        TeacherMaps([maps[0], tmp_path / "other.h5"], splits["train"])
    with pytest.raises(io.DataError, match=r"val.h5: these are no maps"):
        TeacherMaps([splits["val"]], splits["train"])


def test_values_too_large_for_half_precision_are_refused(splits, teacher, tmp_path):
    state, header = io.load_weights(teacher)
    state["embedding.weight"] *= 1e7
    io.save_weights(tmp_path / "loud.safetensors", state, header)
    with pytest.raises(io.DataError, match=r"train0: .* too large for half precision"):
        ask(
            tmp_path / "loud.safetensors",
            splits["train"],
            tmp_path / "out.h5",
            device="cpu",
            precision="float32",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["loud.safetensors"]


def test_the_disk_is_asked_first(splits, teacher, tmp_path, monkeypatch, capsys):
    ask(teacher, splits["train"], tmp_path / "out.h5", device="cpu")
    size = 4 * 40 * 44 * (4 + 1) * 2
    assert f"embedding and foreground of 4 images: {size / 1e6:,.1f} MB" in capsys.readouterr().out
    with h5py.File(tmp_path / "out.h5") as file:
        assert sum(array.size * 2 for group in file.values() for array in group.values()) == size
    left = type("", (), {"free": 2 * size - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda path: left)
    with pytest.raises(
        io.DataError,
        match=r"other.h5: there is no room for embedding and " r"foreground of 4 images",
    ):
        ask(teacher, splits["train"], tmp_path / "other.h5", device="cpu")


def test_a_run_says_from_where_it_learns(make_spec, train, splits, maps, teacher, tmp_path):
    for spec, use, message in (
        (
            make_spec("grd", teacher="maps"),
            {"teacher": teacher},
            "learns from the maps of a teacher: give them",
        ),
        (
            make_spec("grd", teacher="online"),
            {"maps": maps},
            "a teacher that is asked online: give its weights",
        ),
        (
            make_spec("grd", teacher="online"),
            {},
            "a teacher that is asked online: give its weights",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(spec, tmp_path, **use)


@pytest.mark.parametrize("method", ["grd", "levels"])
def test_resumed_as_if_never_stopped(method, make_spec, train, maps, tmp_path):
    spec = make_spec(method, steps=8, teacher="maps")
    train(spec, tmp_path / "whole", maps=maps)
    with pytest.raises(loop.Interrupted):
        train(spec, tmp_path / "parts", max_seconds=0, maps=maps)
    train(spec, tmp_path / "parts", maps=maps)
    for name in ("weights.safetensors", "history.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_teacher_whose_patches_would_not_fit_can_be_asked(make_spec, train, splits, tmp_path):
    """A student of 20 pixels a side cannot share its patches with a network that takes multiples of
    16; its maps it can."""
    spec = make_spec("teacher", steps=2)
    train(spec, tmp_path)
    ask(tmp_path / "weights.safetensors", splits["train"], tmp_path / "maps.h5", device="cpu")
    maps = TeacherMaps([tmp_path / "maps.h5"], splits["train"])
    spec = make_spec("grd", patch=(20, 20), teacher="maps")
    batch = PatchSampler(splits["train"], **spec.drawing, maps=maps).batch(0)
    assert batch.teacher.embedding.shape == (2, 4, 20, 20)
