"""Unlabelled images: where a teacher is unsure, which patches they become, which loss learns what of
them, and that nothing changes where there are none."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch

from gdlib import io
from gdlib.config import Config, plan
from gdlib.data.maps import TeacherMaps
from gdlib.data.patches import PatchSampler
from gdlib.data.prepare import prepare
from gdlib.data.sources.folder import folder
from gdlib.predict.files import predict_split
from gdlib.predict.predictor import Predictor
from gdlib.segment.parameters import chosen
from gdlib.segment.segmenters import segment
from gdlib.train import loop
from gdlib.train.ask import ask
from gdlib.train.label import label_images, unsure
from gdlib.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
OFFSETS = {2: [[-1, 0], [0, -1], [-3, 0]], 3: [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, -3, 0]]}


@pytest.fixture(scope="module")
def more(tmp_path_factory, squares):
    """Samples of three images without labels."""
    path = tmp_path_factory.mktemp("more") / "unlabelled.h5"
    io.write_samples(path, [io.Sample(f"more{i}", squares(90 + i)[0], None) for i in range(3)])
    return path


@pytest.fixture(scope="module")
def found(more, teacher):
    """Samples of the same images, with what the teacher finds in them."""
    path = more.with_name("found.h5")
    label_images(teacher, more, path, sure=0.75, engine="torch", device="cpu")
    return path


@pytest.fixture(scope="module")
def maps(splits, found, teacher):
    """What the teacher says of the labelled and of the unlabelled images."""
    files = []
    for name, samples in (("train", splits["train"]), ("found", found)):
        files.append(found.with_name(f"maps_{name}.h5"))
        ask(teacher, samples, files[-1], precision="float32", engine="torch", device="cpu")
    return files


# Where a teacher is unsure


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("sure", [0.5, 0.7, 0.9])
def test_unsure_is_what_it_says_pixel_by_pixel(ndim, sure):
    rng = np.random.default_rng(ndim)
    shape = (4, 12, 14)[-ndim:]
    label = rng.integers(0, 4, shape).astype(np.uint32)
    affinity = rng.integers(0, 256, (len(OFFSETS[ndim]), *shape), np.uint8)
    foreground = rng.integers(0, 256, shape, np.uint8)
    expected = np.zeros(shape, bool)
    for p in np.ndindex(*shape):
        given = foreground[p] / 255 if label[p] else 1 - foreground[p] / 255
        expected[p] |= given < sure
        for axis, step in itertools.product(range(ndim), (-1, 1)):
            q = tuple(n + step * (i == axis) for i, n in enumerate(p))
            if not all(0 <= n < side for n, side in zip(q, shape, strict=True)):
                continue
            a = affinity[axis][p if step < 0 else q] / 255  # of the later of both
            if label[p] and label[q] and label[p] != label[q]:
                expected[p] |= 1 - a < sure
    marked = unsure(label, affinity, foreground, OFFSETS[ndim], sure)
    assert np.array_equal(marked, expected)
    assert 0 < marked.mean() < 1


def test_the_teacher_labels_as_it_segments_test_images(more, found, teacher):
    predictor = Predictor.load(teacher, engine="torch", device="cpu")
    segmenter, parameters = chosen(teacher, predictor.header, None, {})
    images = {sample: io.read_array(more, sample, "image") for sample in io.sample_ids(more)}
    for sample in io.read_samples(found):
        said = predictor(images[sample.id])
        offsets = predictor.header["offsets"]
        label = segment(said.affinity, said.foreground, offsets, segmenter, **parameters)
        assert np.array_equal(sample.image, images[sample.id])
        assert np.array_equal(sample.label, label)
        assert label.max() > 0
        marked = unsure(label, said.affinity, said.foreground, offsets, 0.75)
        assert np.array_equal(sample.ignore, marked)
    attrs = io.read_attrs(found)
    assert attrs["teacher"] == io.sha256(teacher)
    assert (attrs["sure"], attrs["segmenter"]) == (0.75, segmenter)
    assert not [path for path in found.parent.iterdir() if path.name.startswith(".")]


def test_what_was_predicted_is_not_predicted_again(more, found, teacher, tmp_path, monkeypatch):
    """Where the command was stopped after it; what other weights predicted is not used."""
    out, calls = tmp_path / "found.h5", []
    rest = {"sure": 0.75, "engine": "torch", "device": "cpu"}

    def predict(*files, **options):
        calls.append(files)
        predict_split(*files, **options)

    def stop():
        with monkeypatch.context() as patch:
            patch.setattr("gdlib.train.label.unsure", lambda *maps: {}["stopped"])
            with pytest.raises(KeyError, match="stopped"):
                label_images(teacher, more, out, **rest)

    monkeypatch.setattr("gdlib.train.label.predict_split", predict)
    stop()
    label_images(teacher, more, out, **rest)
    assert len(calls) == 1
    assert out.read_bytes() == found.read_bytes()
    assert list(tmp_path.iterdir()) == [out]
    stop()
    state, header = io.load_weights(teacher)
    io.save_weights(tmp_path / "other.safetensors", state, header | {"step": 0})
    label_images(tmp_path / "other.safetensors", more, out, **rest)
    assert len(calls) == 3


# Patches


def test_the_last_patches_of_a_batch_are_of_unlabelled_images(splits, found, maps, make_spec):
    """The labelled patches before them are those of a sampler without."""
    spec = make_spec("grd", batch_size=5, unlabelled={"share": 0.4})
    known = TeacherMaps(maps[:1], splits["train"]), TeacherMaps(maps[1:], found)
    both = PatchSampler(
        splits["train"], **spec.drawing, maps=known[0], unlabelled=found, unlabelled_maps=known[1]
    )
    alone = PatchSampler(splits["train"], **spec.drawing, maps=known[0])
    names = {"train": set(io.sample_ids(splits["train"])), "found": set(io.sample_ids(found))}
    for step in range(8):
        batch, plain = both.batch(step), alone.batch(step)
        assert (batch.unlabelled, plain.unlabelled) == (2, 0)
        chosen = [both.samples[i]["name"] for i in both.choose(step)[1]]
        assert set(chosen[:3]) <= names["train"]
        assert set(chosen[3:]) <= names["found"]
        for one, other in (
            (batch.label, plain.label),
            (batch.teacher.embedding, plain.teacher.embedding),
            (batch.ids, plain.ids),
        ):
            assert torch.equal(one[:3], other[:3])
    assert both.normalisation == alone.normalisation


def test_label_and_maps_of_unlabelled_patches_are_of_their_image(splits, found, maps, make_spec):
    still = {
        "empty": 0.0,
        "geometry": {"flip": False, "rotate90": False, "scale": (1.0, 1.0), "elastic": 0.0},
        "intensity": {"probability": 0.0},
    }
    spec = make_spec("grd", batch_size=4, patch=(40, 44), augment=still)
    known = TeacherMaps(maps[:1], splits["train"]), TeacherMaps(maps[1:], found)
    sampler = PatchSampler(
        splits["train"], **spec.drawing, maps=known[0], unlabelled=found, unlabelled_maps=known[1]
    )
    whole = {sample.id: sample for sample in io.read_samples(found)}
    with h5py.File(maps[1]) as said:
        for step in range(3):
            batch, (_, sources) = sampler.batch(step), sampler.choose(step)
            for place in (2, 3):
                name = sampler.samples[sources[place]]["name"]
                assert np.array_equal(batch.label[place], whole[name].label)
                assert np.array_equal(batch.ignore[place], whole[name].ignore)
                vectors = batch.teacher.embedding[place].movedim(0, -1)
                assert np.array_equal(vectors, said[name]["embedding"][()])


def test_every_unlabelled_image_is_drawn_and_the_seed_decides(splits, found, make_spec):
    drawn = []
    for seed in (0, 0, 1):
        spec = make_spec(seed=seed, batch_size=4)
        sampler = PatchSampler(splits["train"], **spec.drawing, unlabelled=found)
        drawn.append([sampler.choose(step)[1] for step in range(30)])
    assert drawn[0] == drawn[1] != drawn[2]
    late = [source for sources in drawn[0] for source in sources[2:]]
    assert sorted(set(late)) == [4, 5, 6]  # after four labelled ones
    assert {source for sources in drawn[0] for source in sources[:2]} == {0, 1, 2, 3}


# Losses


def losses_of(spec, batch, teacher):
    """Return the losses of a run on its first batch."""
    trainer = Trainer(spec, teacher, torch.device("cpu"))
    return {name: float(loss.detach()) for name, loss in trainer.distiller(batch, 0)[1].items()}


@pytest.mark.parametrize("labels", ["none", "teacher"])
def test_which_loss_learns_what(labels, splits, found, teacher, make_spec):
    """Losses of labels see unlabelled patches only if they shall, and there not what is ignored; what
    compares with the teacher sees all of them, ignored or not, but no instance that is ignored."""
    spec = make_spec("grd", batch_size=4, unlabelled={"labels": labels})
    sampler = PatchSampler(splits["train"], **spec.drawing, unlabelled=found)
    batch = sampler.batch(3)
    assert batch.ignore[2:].any()

    def other(b, where):
        label = b.label.clone()
        label[where] = 1 + label[where] % 3
        return replace(b, label=label)

    ignored, known = torch.zeros_like(batch.ignore), torch.zeros_like(batch.ignore)
    ignored[2:], known[2:] = batch.ignore[2:], ~batch.ignore[2:]
    base = losses_of(spec, batch, teacher)
    labels_of = {"supervised", "foreground"}
    # another label where it is ignored changes nothing at all
    changed = losses_of(spec, other(batch, ignored), teacher)
    assert changed == base
    # another label elsewhere: losses of labels, if they shall, and the nodes
    changed = losses_of(spec, other(batch, known), teacher)
    moved = {name for name in base if base[name] != changed[name]}
    assert moved & labels_of == (labels_of if labels == "teacher" else set())
    assert "igd_nodes" in moved
    assert "agd" not in moved  # the conftest's is not balanced
    # what is ignored still counts where affinities are compared
    nothing = replace(batch, ignore=torch.zeros_like(batch.ignore))
    assert losses_of(spec, nothing, teacher)["agd"] == base["agd"]


def test_losses_of_labels_are_means_over_labelled_patches(splits, found, teacher, make_spec):
    spec = make_spec("none", batch_size=4)
    batch = PatchSampler(splits["train"], **spec.drawing, unlabelled=found).batch(1)
    first = replace(
        batch, image=batch.image[:2], label=batch.label[:2], ids=batch.ids[:2],
        ignore=batch.ignore[:2], unlabelled=0,
    )  # fmt: skip
    trainer = Trainer(spec, None, torch.device("cpu"))
    trainer.distiller.eval()  # so that a patch does not depend on the others of its batch
    all_of_it, part = (trainer.distiller(one, 0)[1] for one in (batch, first))
    for name in ("supervised", "foreground"):
        assert all_of_it[name].item() == pytest.approx(part[name].item(), rel=1e-5)


def test_balanced_affinities_count_where_the_teacher_is_unsure(splits, found, teacher, make_spec):
    """`balanced` weighs by the label, and leaves out what is ignored of labelled images alone."""
    spec = make_spec("grd", batch_size=4)
    terms = [{"term": "agd", "weight": 1.0, "options": {"balanced": True}}]
    spec = type(spec).model_validate({**spec.model_dump(), "terms": terms})
    batch = PatchSampler(splits["train"], **spec.drawing, unlabelled=found).batch(2)
    masked = batch.label.masked_fill(batch.ignore, 0)
    expected = losses_of(spec, replace(batch, label=masked, ignore=None), teacher)["agd"]
    assert losses_of(spec, batch, teacher)["agd"] == pytest.approx(expected, rel=1e-6)
    unknown = replace(batch, unlabelled=0)
    assert losses_of(spec, unknown, teacher)["agd"] != pytest.approx(expected, rel=1e-3)


# Trainings


def tensors(path):
    return io.load_weights(path)[0]


@pytest.mark.parametrize(
    ("method", "labels"),
    [("grd", "none"), ("grd", "teacher"), ("none", "teacher"), ("none", "given")],
)
def test_a_training_goes_on_where_it_was(
    method, labels, splits, found, maps, train, make_spec, tmp_path
):
    teacher_maps = {"maps": maps[:1], "unlabelled_maps": maps[1:]} if method == "grd" else {}
    spec = make_spec(method, teacher="maps", batch_size=4, unlabelled={"labels": labels})
    train(spec, tmp_path / "at_once", unlabelled=found, **teacher_maps)
    calls = iter(range(100))
    with pytest.raises(loop.Interrupted):
        train(
            spec,
            tmp_path / "twice",
            unlabelled=found,
            stop=lambda: next(calls) == 3,
            **teacher_maps,
        )
    train(spec, tmp_path / "twice", unlabelled=found, **teacher_maps)
    one, two = (tensors(tmp_path / part / "last.safetensors") for part in ("at_once", "twice"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    train(spec, tmp_path / "without", **(teacher_maps and {"maps": maps[:1]}))
    without = tensors(tmp_path / "without" / "last.safetensors")
    assert any(not torch.equal(one[name], without[name]) for name in one)


def test_without_unlabelled_images_their_options_change_no_bit(
    splits, maps, train, make_spec, tmp_path
):
    weights = []
    for number, options in enumerate(({}, {"share": 0.9, "labels": "teacher", "sure": 0.9})):
        spec = make_spec("grd", teacher="maps", unlabelled=options)
        train(spec, tmp_path / str(number), maps=maps[:1])
        weights.append(tensors(tmp_path / str(number) / "last.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_maps_of_unlabelled_images_are_those_of_the_teacher(
    splits, found, maps, train, make_spec, tmp_path
):
    spec = make_spec("grd", teacher="maps", batch_size=4)
    with pytest.raises(ValueError, match="not all maps of the teacher for these images"):
        train(spec, tmp_path, unlabelled=found, maps=maps[:1])
    other = tmp_path / "other.h5"
    with h5py.File(maps[1]) as old, h5py.File(other, "w") as new:
        for name in old:
            old.copy(name, new)
        new.attrs.update({**old.attrs, "teacher": "0" * 64})
    with pytest.raises(io.DataError, match="another teacher was asked about these images"):
        train(spec, tmp_path, unlabelled=found, maps=maps[:1], unlabelled_maps=[other])


def test_images_without_labels_cannot_be_learned_from_as_they_are(
    splits, more, train, make_spec, tmp_path
):
    with pytest.raises(io.DataError, match='image "more0" has no label; let a teacher find'):
        train(make_spec("none", batch_size=4), tmp_path, unlabelled=more)
    with pytest.raises(ValueError, match="a batch of 1 patch has no room"):
        train(make_spec("none", batch_size=1), tmp_path, unlabelled=splits["test"])


# Data


def outputs(folder, *names):
    return {name: folder / f"{name}.h5" for name in names}


def written(root, squares, labels=()):
    """Write a folder of nine labelled and three unlabelled images."""
    for part in ("images", "labels", "unlabelled", *["unlabelled_labels"] * bool(labels)):
        (root / part).mkdir(parents=True)
    for seed in range(9):
        image, label = squares(seed)
        tifffile.imwrite(root / f"images/{seed}.tif", image[0])
        tifffile.imwrite(root / f"labels/{seed}.tif", label.astype(np.uint16))
    for seed in range(20, 23):
        image, label = squares(seed)
        tifffile.imwrite(root / f"unlabelled/{seed}.tif", image[0])
        if seed in labels:
            tifffile.imwrite(root / f"unlabelled_labels/{seed}.tif", label.astype(np.uint16))
    return root


def prepared(root, out, unlabelled, source="folder", options=None):
    names = ("train", "val", "test", *["unlabelled"] * bool(unlabelled))
    return prepare(source, options or {}, root, outputs(out, *names), (16, 16), 1, unlabelled)


def test_a_folder_of_unlabelled_images(squares, tmp_path):
    root = written(tmp_path / "raw", squares)
    summary = prepared(root, tmp_path, True)
    assert (summary["unlabelled"]["samples"], summary["unlabelled"]["empty_labels"]) == (3, 0)
    with h5py.File(tmp_path / "unlabelled.h5") as file:
        assert {name: set(file[name]) for name in file} == {
            str(seed): {"image"} for seed in range(20, 23)
        }
        assert np.array_equal(file["21/image"], squares(21)[0])
    assert sum(summary[split]["samples"] for split in ("train", "val", "test")) == 9


def test_labels_of_another_program_come_along(squares, tmp_path):
    prepared(written(tmp_path / "raw", squares, range(20, 23)), tmp_path, True)
    for sample in io.read_samples(tmp_path / "unlabelled.h5"):
        assert np.array_equal(sample.label, squares(int(sample.id))[1])


def test_label_files_of_stardist_come_along_as_it_wrote_them(squares, tmp_path):
    """`tests/stardist/README.md` says how they were made: by its command, and by the lines of
    docs/unlabelled.md."""
    root, files = written(tmp_path / "raw", squares, [20, 21, 22]), ROOT / "tests/stardist"
    labels = {}
    for path in (files / "labels").iterdir():
        name = path.name.replace(".stardist.tif", ".tif")
        labels[path.name.split(".")[0]] = tifffile.imread(path)
        (root / "unlabelled_labels" / name).write_bytes(path.read_bytes())
        (root / "unlabelled" / name).write_bytes((files / "images" / name).read_bytes())
    summary = prepared(root, tmp_path, True)["unlabelled"]
    assert (summary["samples"], summary["empty_labels"]) == (5, 0)
    assert {label.dtype.name for label in labels.values()} == {"int32", "uint16"}
    for name, label in labels.items():
        found = io.read_array(tmp_path / "unlabelled.h5", name, "label")
        assert len(np.unique(label)) > 5
        pairs = {(a, b) for a, b in zip(label.ravel(), found.ravel(), strict=True)}
        assert len(pairs) == len(np.unique(label)) == len(np.unique(found))  # one for one
        assert np.array_equal(label == 0, found == 0)


def test_unlabelled_images_that_nobody_wants_are_told(squares, tmp_path, capsys):
    root = written(tmp_path / "raw", squares)
    prepared(root, tmp_path, False)
    assert not (tmp_path / "unlabelled.h5").exists()
    assert "warning: the unlabelled images that are there are not used" in capsys.readouterr().err


def test_training_images_lose_their_labels_by_name(tmp_path):
    options = {"size": [64, 64], "images": {"train": 5, "val": 1, "test": 1}}
    prepared(None, tmp_path / "all", False, "nuclei_phantom", options)
    prepared(None, tmp_path, ["train_0001", "*[34]"], "nuclei_phantom", options)
    ids = [io.sample_ids(tmp_path / f"{split}.h5") for split in ("train", "unlabelled")]
    assert ids == [["train_0000", "train_0002"], ["train_0001", "train_0003", "train_0004"]]
    whole = {sample.id: sample for sample in io.read_samples(tmp_path / "all" / "train.h5")}
    with h5py.File(tmp_path / "unlabelled.h5") as file:
        for name in file:
            assert set(file[name]) == {"image"}
            assert np.array_equal(file[name]["image"], whole[name].image)
    for sample in io.read_samples(tmp_path / "train.h5"):
        assert np.array_equal(sample.label, whole[sample.id].label)


@pytest.mark.parametrize(
    ("spoil", "unlabelled", "message"),
    [
        ("twin", True, r"22.tif, which is unlabelled, and .* are the same image"),
        ("named", True, r'"3" is in split \w+ and again in unlabelled'),
        (
            "one label",
            True,
            r"unlabelled/21.tif: this image has no label; add unlabelled_labels/21",
        ),
        ("small", True, r"20.tif: the image of \(9, 9\) pixels is smaller than the patch"),
        ("none", ["9*"], 'unlabelled: there is no training image "9\\*"'),
        ("none", ["*"], 'split "train" has no image'),
        ("no folder", True, 'data source "folder" has no unlabelled images of its own'),
    ],
)
def test_a_mistake_is_one_sentence_and_no_file(spoil, unlabelled, message, squares, tmp_path):
    root = written(tmp_path / "raw", squares, [20] if spoil == "one label" else ())
    if spoil == "twin":
        test = next(folder(root)["test"])
        tifffile.imwrite(root / "unlabelled" / "22.tif", test.image[0])
    elif spoil == "named":
        (root / "unlabelled" / "22.tif").rename(root / "unlabelled" / "3.tif")
    elif spoil == "small":
        tifffile.imwrite(root / "unlabelled" / "20.tif", squares(20)[0][0, :9, :9])
    elif spoil == "no folder":
        for path in (root / "unlabelled").iterdir():
            path.unlink()
        (root / "unlabelled").rmdir()
    with pytest.raises(io.DataError, match=message) as error:
        prepared(root, tmp_path, unlabelled)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.h5"))


# Configuration


def configured(raw, dataset=None, method=None, **study):
    raw = copy.deepcopy(raw)
    raw["datasets"]["d"] = raw["datasets"]["nuclei_phantom_small"] | {
        "unlabelled": ["train_000[2-7]"]
    }
    raw["datasets"]["d"] |= dataset or {}
    raw["methods"]["m"] = method or {"recipe": {"unlabelled": {"labels": "teacher"}}}
    raw["studies"]["s"] = raw["studies"]["smoke"] | {
        "datasets": ["d"],
        "methods": ["none", "grd", "m"],
    }
    raw["studies"]["s"] |= study
    return Config.parse(raw | {"study": "s"})


def test_who_sees_unlabelled_images(raw):
    one = plan.Plan(configured(raw))
    assert one.unlabelled == {"d": {"teacher": False, "none": False, "grd": True, "m": True}}
    never = {"terms": raw["methods"]["grd"], "recipe": {"unlabelled": {"share": 0}}}
    assert not plan.Plan(configured(raw, method=never)).unlabelled["d"]["m"]
    told = configured(raw, student_recipe={"unlabelled": {"labels": "teacher"}, "steps": 4})
    assert plan.Plan(told).unlabelled["d"]["none"]
    more = configured(raw, more_teachers=["nestedunet_w8"])
    assert more.methods_of("d") == ["none", "grd", "m", "grd@nestedunet_w8", "m@nestedunet_w8"]
    without = configured(raw, dataset={"unlabelled": False}, methods=["none", "grd"])
    assert plan.Plan(without).unlabelled == {}


@pytest.mark.parametrize(
    ("dataset", "method", "message"),
    [
        ({"unlabelled": False}, None, "learns from unlabelled images, of which there are none"),
        ({"unlabelled": "A01"}, None, "must be true, or a list of names of images, each as text"),
        ({"unlabelled": [1, 2]}, None, "must be true, or a list of names of images, each as text"),
        ({}, {"recipe": {"unlabelled": {"labels": "given"}}}, "are training images without theirs"),
        (
            {"unlabelled": True},
            {"terms": [{"term": "agd", "weight": 1}], "recipe": {"unlabelled": {"labels": "given"}}},
            "learns from given labels and from a teacher",
        ),
        ({}, {"recipe": {"unlabelled": {"labels": "teacher"}, "batch_size": 1}}, "no room for both"),
        ({}, {"recipe": {"unlabelled": {"labels": "teacher", "sure": 0.9}}}, "once for all methods"),
        (
            {"segmenters": ["mutex_watershed_masked"]},
            None,
            "all segmenters of the dataset need the true foreground",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_sentence(dataset, method, message, raw):
    with pytest.raises(ValueError, match=message) as error:
        configured(raw, dataset, method)
    assert "\n" not in str(error.value)


def test_an_edit_of_unlabelled_images_is_for_those_who_see_them(raw):
    one = plan.Plan(configured(raw))
    edited = plan.Plan(
        configured(
            raw,
            student_recipe={
                **raw["studies"]["smoke"]["student_recipe"],
                "unlabelled": {"share": 0.25},
            },
        )
    )
    changed = {run[2] for run in one.runs if one.train_spec(run) != edited.train_spec(run)}
    assert changed == {"grd", "m"}
    assert one.labelling("d") == edited.labelling("d") == {
        "segmenter": "mutex_watershed", "parameters": {}, "sure": 0.75
    }  # fmt: skip
