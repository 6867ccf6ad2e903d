"""CVPPP and C. elegans, the phantoms of worms and leaves, and what becomes of pixels of two
instances."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.ndimage import binary_dilation
from skimage.measure import label as connected_regions
from skimage.morphology import skeletonize

from gdlib import io
from gdlib.config import Config
from gdlib.data.files import OVERLAPS, SPLITS, merge_masks, published_split, read_masks
from gdlib.data.prepare import prepare
from gdlib.data.sources._phantom import smooth_noise, uneven_light
from gdlib.data.sources.celegans import celegans
from gdlib.data.sources.cvppp import cvppp
from gdlib.data.sources.leaves_phantom import MIN_AREA, leaves_phantom
from gdlib.data.sources.worms_phantom import worms_phantom
from gdlib.io.failures import DataError
from gdlib.registry import SOURCES

RAW = Path(os.environ.get("GDLIB_RAW", Path(__file__).parents[1].parent / "shared" / "data"))
IMAGES = {"train": 4, "val": 1, "test": 1}
LICENCES = {
    "celegans": "CC BY 3.0",
    "cvppp": "academic use after registration",
    "leaves_phantom": "CC0 1.0",
    "worms_phantom": "CC0 1.0",
}


@pytest.mark.parametrize("name", LICENCES)
def test_the_file_names_the_licence(name):
    source = SOURCES.get(name)
    assert source.__name__ == name
    text = " ".join(sys.modules[source.__module__].__doc__.split())
    assert LICENCES[name].lower() in text.lower()


@pytest.fixture
def prepared(tmp_path):
    """Return `make(source, root=None, options={}, patch=(16, 16), channels=1)` -> {split: list of
    samples} from the files."""

    def make(source, root=None, options=None, patch=(16, 16), channels=1):
        outputs = {split: tmp_path / "out" / f"{split}.h5" for split in SPLITS}
        prepare(source, options or {}, root, outputs, patch, channels)
        return {split: list(io.read_samples(path)) for split, path in outputs.items()}

    return make


def one_sentence(error):
    return "\n" not in str(error.value) and ("; " in str(error.value))


# --- Pixels of several instances -------------------------------------------------------------------------------------


@pytest.fixture
def three():
    """Masks of three instances in a row of eight pixels: pixel 2 is of the first two, pixel 3 of
    all, pixel 4 of the last two."""
    masks = np.zeros((3, 1, 8), bool)
    masks[0, 0, :4] = masks[1, 0, 2:5] = masks[2, 0, 3:7] = True
    return masks


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        ("first", [1, 1, 1, 1, 2, 3, 3, 0]),
        ("last", [1, 1, 2, 3, 3, 3, 3, 0]),
        ("ignore", [1, 1, 0, 0, 0, 3, 3, 0]),
    ],
)
def test_merged_masks(three, overlap, expected):
    label, ignore = merge_masks(three, (1, 8), overlap)
    assert label.dtype == np.uint32
    assert label.tolist() == [expected]
    assert ignore.tolist() == [[overlap == "ignore" and k in (2, 3, 4) for k in range(8)]]


def test_rules_for_overlaps_differ_only_there():
    masks = np.random.default_rng(0).random((6, 30, 31)) < 0.2
    count = masks.sum(0)
    found = {rule: merge_masks(masks, (30, 31), rule) for rule in OVERLAPS}
    assert (count > 1).any()
    np.testing.assert_array_equal(found["ignore"][1], count > 1)
    np.testing.assert_array_equal(found["first"][0], np.where(count, masks.argmax(0) + 1, 0))
    np.testing.assert_array_equal(found["last"][0], np.where(count, 6 - masks[::-1].argmax(0), 0))
    np.testing.assert_array_equal(found["ignore"][0], np.where(count == 1, found["first"][0], 0))


def test_masks_refuse(three, tmp_path):
    with pytest.raises(DataError, match='no rule "lst" for overlaps: did you mean "last"'):
        merge_masks(three, (1, 8), "lst")
    Image.fromarray(np.ones((4, 5), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a.png: the mask is \(4, 5\) pixels, its image \(4, 6\)"):
        list(read_masks([tmp_path / "a.png"], (4, 6)))


# --- C. elegans ------------------------------------------------------------------------------------------------------

WELLS = [f"{row}{column:02d}" for row in "ABCD" for column in range(1, 25)] + [
    f"E{k:02d}" for k in range(1, 5)
]
COMMON = [well for well in WELLS if well not in ("C13", "C14", "D24")]


def treated(well):
    return int(well[1:]) <= 12


def test_celegans_lists_follow_their_rule():
    lists = published_split("celegans", "all97")
    assert lists["test"] == COMMON[3::4]
    assert lists["val"] == COMMON[2::8]
    assert lists["train"] == [well for i, well in enumerate(COMMON) if i % 4 != 3 and i % 8 != 2]
    assert sum(map(len, lists.values())) == 97

    part = published_split("celegans", "subset43")
    assert sorted(well for own in part.values() for well in own) == [
        well for i, well in enumerate(COMMON) if i % 16 in (0, 1, 4, 5, 8, 9, 12)
    ]
    assert not set(lists["test"]) & {well for own in part.values() for well in own}
    assert {name: (len(own), sum(map(treated, own))) for name, own in part.items()} == {
        "train": (25, 14),
        "val": (6, 3),
        "test": (12, 6),
    }
    for half in (True, False):
        own = sorted(well for wells in part.values() for well in wells if treated(well) == half)
        assert [well for well in own if well in part["test"]] == [
            w for j, w in enumerate(own) if j % 7 in (2, 5)
        ]
        assert [well for well in own if well in part["val"]] == own[3::7]


def worms(seed):
    """A small well: image (Y, X) uint16, and three masks, of which the second crosses the first and
    the third has two parts."""
    image = np.random.default_rng(seed).integers(100, 3000, (24, 30)).astype(np.uint16)
    masks = np.zeros((3, 24, 30), np.uint8)
    masks[0, 4:7, 2:20] = masks[1, 2:12, 8:11] = masks[2, 15:17, 3:9] = masks[2, 15:17, 12:20] = 255
    return image, masks


@pytest.fixture
def celegans_folder(tmp_path):
    """The wells of `subset43` in the official layout, each with other pixels in each channel."""
    root = tmp_path / "raw"
    images, each = root / "BBBC010_v1_images", root / "BBBC010_v1_foreground_eachworm"
    images.mkdir(parents=True)
    each.mkdir()
    for number, well in enumerate(
        sorted(w for own in published_split("celegans", "subset43").values() for w in own)
    ):
        for channel in (1, 2):
            name = f"1649_1109_0003_Amp5-1_B_20070424_{well}_w{channel}_0A1B{number:02d}.tif"
            tifffile.imwrite(images / name, worms(10 * number + channel)[0])
        for k, mask in enumerate(worms(0)[1], start=1):
            Image.fromarray(mask).save(each / f"{well}_{k:02d}_ground_truth.png")
    return root


@pytest.mark.parametrize("channel", ["brightfield", "fluorescence"])
def test_celegans_to_files(celegans_folder, prepared, channel):
    splits = prepared("celegans", celegans_folder, {"split": "subset43", "channel": channel})
    lists = published_split("celegans", "subset43")
    assert {split: [sample.id for sample in samples] for split, samples in splits.items()} == lists
    numbers = {well: k for k, well in enumerate(sorted(w for own in lists.values() for w in own))}
    masks = worms(0)[1] > 0
    for samples in splits.values():
        for sample in samples:
            expected = worms(10 * numbers[sample.id] + (2 if channel == "brightfield" else 1))[0]
            np.testing.assert_array_equal(sample.image, expected[None])
            np.testing.assert_array_equal(sample.ignore, masks.sum(0) > 1)
            # crossed, and still one
            np.testing.assert_array_equal(sample.label == 1, masks[0] & ~masks[1])
            np.testing.assert_array_equal(sample.label == 2, masks[1] & ~masks[0])
            np.testing.assert_array_equal(sample.label == 3, masks[2])  # two parts of one mask
            assert sample.attrs["source"].startswith("BBBC010_v1_images/")


def test_celegans_overlaps_may_go_to_a_worm(celegans_folder, prepared):
    masks = worms(0)[1] > 0
    for overlap, number in (("first", 1), ("last", 2)):
        sample = prepared("celegans", celegans_folder, {"split": "subset43", "overlap": overlap})[
            "val"
        ][0]
        assert sample.ignore is None
        assert (sample.label[masks[0] & masks[1]] == number).all()


def test_celegans_refuses(celegans_folder, tmp_path):
    def refused(message, root=celegans_folder, split="subset43", **options):
        with pytest.raises(DataError, match=message) as error:
            list(celegans(root, split=split, **options)["train"])
        return error

    assert one_sentence(
        refused(r"_A07_w2_\*.tif: there is no such file; .* choose a split", split="all97")
    )
    refused('no channel "green"', channel="green")
    refused('no published split "subset44": did you mean "subset43"', split="subset44")
    refused('no rule "nearest"', overlap="nearest")
    refused("there is no such folder", root=tmp_path / "nowhere")
    first = published_split("celegans", "subset43")["train"][0]
    each = celegans_folder / "BBBC010_v1_foreground_eachworm"
    Image.fromarray(np.ones((4, 5), np.uint8)).save(each / f"{first}_02_ground_truth.png")
    refused(r"_02_ground_truth.png: the mask is \(4, 5\) pixels, its image \(24, 30\)")
    for path in each.glob(f"{first}_*"):
        path.unlink()
    assert one_sentence(refused(rf"{first}_\*_ground_truth.png: there is no such file"))
    for path in each.iterdir():
        path.unlink()
    each.rmdir()
    refused("BBBC010_v1_foreground_eachworm: there is no such folder")


@pytest.mark.skipif(
    not (RAW / "bbbc010").is_dir(), reason="no raw data in bbbc010; set GDLIB_RAW to their folder"
)
def test_celegans_real_wells_are_as_described():
    """Labels lie on the worms, which are darker than what is around them.

    Shifted by one row they would do so less.
    """
    splits = {
        split: list(samples)
        for split, samples in celegans(RAW / "bbbc010", split="subset43").items()
        if split != "train"
    }
    assert [len(samples) for samples in splits.values()] == [6, 12]
    darker = []
    for sample in (sample for samples in splits.values() for sample in samples):
        assert sample.image.shape == (1, 520, 696)
        assert sample.image.dtype == np.uint16
        area = np.bincount(sample.label.ravel())[1:]
        assert 11 <= len(area) <= 15
        assert area.min() > 400
        assert area.max() < 1500
        assert not sample.label[sample.ignore].any()

        def border(rows, sample=sample):
            worm = np.roll((sample.label > 0) | sample.ignore, rows, axis=0)
            ring = binary_dilation(worm, iterations=2) & ~worm
            return sample.image[0][ring].mean() - sample.image[0][worm].mean()

        darker.append([border(0), border(1), border(-1)])
    aligned, down, up = np.mean(darker, axis=0)
    assert aligned > max(down, up)
    assert aligned > 200


# --- CVPPP -----------------------------------------------------------------------------------------------------------

# What Huang et al. validated on.
VALIDATED = [2, 16, 29, 37, 45, 46, 55, 61, 72, 80, 88, 99, 104, 108, 115, 127, 130, 142, 148, 159]


def test_cvppp_lists():
    lists = published_split("cvppp", "local20")
    assert lists["test"] == [f"plant{k:03d}" for k in VALIDATED]
    assert len(lists["val"]) == 12
    assert lists["val"] == sorted(set(lists["val"]) - set(lists["test"]))
    assert set(lists) == {"val", "test"}


def plant(number):
    """A small rosette: colours (Y, X, 3) uint8, label (Y, X) uint8 with leaves 1, 2 and 4."""
    rng = np.random.default_rng(number)
    label = np.zeros((20, 24), np.uint8)
    label[2:9, 3:9], label[5:15, 9:14], label[12:18, 15:22] = 1, 2, 4
    return rng.integers(0, 255, (20, 24, 3)).astype(np.uint8), label


def write_plants(folder, numbers, alpha=False):
    folder.mkdir(parents=True)
    palette = [value for k in range(256) for value in (k, 255 - k, 7 * k % 256)]
    for number in numbers:
        image, label = plant(number)
        if alpha:
            image = np.dstack([image, np.full(label.shape, 255, np.uint8)])
        Image.fromarray(image).save(folder / f"plant{number:03d}_rgb.png")
        indexed = Image.fromarray(label, "L").convert("P")
        indexed.putpalette(palette)
        indexed.putdata(label.ravel().tolist())
        indexed.save(folder / f"plant{number:03d}_label.png")
        Image.fromarray((label > 0).astype(np.uint8)).save(folder / f"plant{number:03d}_fg.png")
        Image.fromarray(np.zeros_like(label)).save(folder / f"plant{number:03d}_centers.png")


LISTED = [int(name[5:]) for own in published_split("cvppp", "local20").values() for name in own]


@pytest.mark.parametrize(
    ("place", "alpha"),
    [("A1", False), ("A1/train", True), ("training/A1", False), (".", True)],
    ids=str,
)
def test_cvppp_to_files(tmp_path, prepared, place, alpha):
    root = tmp_path / "raw"
    write_plants(root / place, [*LISTED, 1, 7, 161], alpha)
    write_plants(root / "A2", [1, 3])  # other plants of the challenge are not those of A1
    splits = prepared("cvppp", root, channels=3)
    assert {
        split: [int(sample.id[5:]) for sample in samples] for split, samples in splits.items()
    } == {
        "train": [1, 7, 161],
        "val": sorted(set(LISTED) - set(VALIDATED)),
        "test": VALIDATED,
    }
    for samples in splits.values():
        for sample in samples:
            image, label = plant(int(sample.id[5:]))
            np.testing.assert_array_equal(sample.image, np.moveaxis(image, -1, 0))
            # by index, not by colour
            np.testing.assert_array_equal(sample.label, np.where(label == 4, 3, label))


def test_cvppp_refuses(tmp_path, prepared):
    root = tmp_path / "raw"
    (root / "A1").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"raw: there is no A1/plantNNN_label.png .*register at " r"https://"
    ) as error:
        cvppp(root)
    assert one_sentence(error)
    (root / "A1" / "plant001_label.png").touch()
    with pytest.raises(DataError, match='no published split "locl20": did you mean "local20"'):
        cvppp(root, split="locl20")
    (root / "A1" / "plant001_label.png").unlink()
    (root / "A1").rmdir()
    write_plants(root / "A1", LISTED)
    with pytest.raises(DataError, match='split "train" has no image'):
        prepared("cvppp", root, channels=3)
    write_plants(tmp_path / "more", [1])
    for path in (tmp_path / "more").iterdir():
        path.rename(root / "A1" / path.name)
    with pytest.raises(DataError, match="3 channels, but the dataset says 1"):
        prepared("cvppp", root)
    Image.fromarray(plant(1)[0]).save(root / "A1" / "plant001_label.png")
    with pytest.raises(DataError, match=r"plant001_label.png: the label is a colour image"):
        prepared("cvppp", root, channels=3)
    (root / "A1" / "plant001_rgb.png").unlink()
    with pytest.raises(DataError, match=r"plant001_rgb.png: the file is missing") as error:
        prepared("cvppp", root, channels=3)
    assert one_sentence(error)


# --- Phantoms --------------------------------------------------------------------------------------------------------

PHANTOMS = {"worms_phantom": worms_phantom, "leaves_phantom": leaves_phantom}


@pytest.mark.parametrize("name", PHANTOMS)
def test_phantom_sample_depends_on_seed_split_and_number_only(name):
    make = PHANTOMS[name]
    few = {
        split: list(samples) for split, samples in make(None, size=(96, 110), images=IMAGES).items()
    }
    more = make(None, size=(96, 110), images={"train": 6, "val": 2, "test": 2})
    for split, samples in few.items():
        for one, other in zip(samples, more[split], strict=False):
            assert one.id == other.id
            for part in ("image", "label", "ignore"):
                np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
    other = next(make(None, size=(96, 110), images=IMAGES, seed=1)["train"])
    firsts = [*few["train"], *few["val"], *few["test"], other]
    assert len({sample.image.tobytes() for sample in firsts}) == len(firsts)
    with pytest.raises(DataError, match=f"{name}: images must have one number each"):
        make(None, images={"train": 3})


@pytest.mark.parametrize("name", [f"{name}{size}" for name in PHANTOMS for size in ("", "_small")])
def test_phantoms_of_the_catalogue_to_files(catalogue, prepared, name):
    data = Config.parse(catalogue).datasets[name]
    options = dict(data.options) | {"images": IMAGES}
    splits = prepared(data.source, None, options, data.patch, data.channels)
    for split, samples in splits.items():
        assert len(samples) == IMAGES[split]
        for sample in samples:
            assert sample.image.shape == (data.channels, *options["size"])
            assert sample.image.dtype == (np.uint8 if data.channels == 3 else np.uint16)
            assert sample.label.max() >= 2
            if sample.ignore is not None:
                assert not sample.label[sample.ignore].any()


def test_worms_are_where_it_is_dark_in_the_well():
    """Without dirt, noise, texture and uneven light a threshold finds them."""
    plain = {"dirt": 0.0, "noise": 0.1, "texture": 0.0, "illumination": 0.0, "blur": 0.3}
    for sample in worms_phantom(None, images=IMAGES, **plain)["train"]:
        light = sample.image[0] / 2690
        worm = (sample.label > 0) | sample.ignore
        outside = connected_regions(light < 0.1, background=0)
        # the corners are dark
        well = ~np.isin(outside, np.unique(outside[[0, 0, -1, -1], [0, -1, 0, -1]]))
        dark = binary_dilation(well, iterations=1) & (light < 0.9) & (light > 0.05)
        assert 0.04 < worm.mean() < 0.3
        assert light[worm].mean() < 0.6
        assert light[~well & ~worm].mean() < 0.15
        assert (dark & worm).sum() / worm.sum() > 0.9


def test_worms_look_like_those_of_bbbc010():
    """As in the real wells: 9 pixels wide, about 100 long, in groups, with few pixels that belong
    to two."""
    samples = list(worms_phantom(None, images={"train": 8, "val": 1, "test": 1})["train"])
    masks = [sample.label == k for sample in samples for k in range(1, sample.label.max() + 1)]
    area = np.array([mask.sum() for mask in masks])
    assert 700 < np.median(area) < 1200
    whole = [mask for mask in masks if connected_regions(mask).max() == 1]
    assert 8 < np.median([mask.sum() / skeletonize(mask).sum() for mask in whole]) < 11
    ignored = sum(int(sample.ignore.sum()) for sample in samples)
    assert 0.005 < ignored / area.sum() < 0.05
    groups = sum(connected_regions((sample.label > 0) | sample.ignore).max() for sample in samples)
    assert groups < 0.8 * len(masks)


def test_worms_overlap_by_one_rule():
    found = {
        rule: list(worms_phantom(None, images=IMAGES, overlap=rule)["train"]) for rule in OVERLAPS
    }
    for ignore, first, last in zip(*(found[rule] for rule in OVERLAPS), strict=True):
        np.testing.assert_array_equal(ignore.image, first.image)
        np.testing.assert_array_equal(first.image, last.image)
        np.testing.assert_array_equal(ignore.ignore, first.label != last.label)
        np.testing.assert_array_equal(ignore.label, np.where(ignore.ignore, 0, first.label))
        assert not first.ignore.any()
        assert not last.ignore.any()
    assert any(sample.ignore.any() for sample in found["ignore"])


def test_worms_options():
    def total(part, **options):
        samples = list(
            worms_phantom(None, size=(160, 160), images=IMAGES, length=(50, 60), **options)["train"]
        )
        return sum(float(part(sample)) for sample in samples)

    def bent(sample):
        """Part of the worms' bounding boxes that they do not reach the ends of: a straight worm
        spans its length."""
        worms = [np.argwhere(sample.label == k) for k in range(1, sample.label.max() + 1)]
        return np.mean([60 - np.linalg.norm(np.ptp(worm, axis=0)) for worm in worms])

    assert total(lambda s: s.label.max(), count=(20, 20)) > 1.5 * total(
        lambda s: s.label.max(), count=(6, 6)
    )
    assert total(lambda s: s.ignore.sum(), crossing=1.0) > 2 * total(
        lambda s: s.ignore.sum(), crossing=0.0, shared=0.0
    )
    assert total(lambda s: s.ignore.sum(), shared=0.0) == 0
    assert total(bent, curled=1.0) > total(bent, curled=0.0) + 8
    assert total(lambda s: (s.image < 200).mean(), well=0.6) > 2 * total(
        lambda s: (s.image < 200).mean(), well=0.95
    )


def greenness(sample):
    red, green, blue = sample.image.astype(float)
    return green - (red + blue) / 2


def test_leaves_are_what_is_green():
    for sample in leaves_phantom(None, images=IMAGES, moss=0.0, noise=0.5, blur=0.3)["train"]:
        green = greenness(sample) > 25
        leaf = sample.label > 0
        assert (green & leaf).sum() / (green | leaf).sum() > 0.93
    for sample in leaves_phantom(None, images=IMAGES, moss=1.0)["train"]:  # but moss is green too
        assert (greenness(sample)[sample.label == 0] > 25).mean() > 0.02


def test_leaves_differ_much_in_size_and_the_youngest_is_on_top():
    samples = list(leaves_phantom(None, images={"train": 6, "val": 1, "test": 1})["train"])
    for sample in samples:
        area = np.bincount(sample.label.ravel())[1:]
        assert 4 <= len(area) <= 18
        assert area.min() >= MIN_AREA  # of what is seen, also where it has two parts
        # the last are the youngest
        assert area[: len(area) // 3].mean() > 3 * area[-len(area) // 3 :].mean()
        middle = np.argwhere(sample.label > 0).mean(0)
        place = [
            np.hypot(*(np.argwhere(sample.label == k) - middle).T).mean()
            for k in (1, 2, len(area) - 1, len(area))
        ]
        assert max(place[2:]) < max(place[:2])
    touching = sum(connected_regions(sample.label > 0).max() for sample in samples)
    assert touching < 0.3 * sum(sample.label.max() for sample in samples)


def test_leaves_options():
    def mean(part, **options):
        return np.mean(
            [
                part(s)
                for s in leaves_phantom(None, size=(128, 128), images=IMAGES, **options)["train"]
            ]
        )

    assert (
        mean(lambda s: s.label.max(), count=(16, 16))
        > mean(lambda s: s.label.max(), count=(6, 6)) + 5
    )
    assert mean(lambda s: (s.label > 0).mean(), crowding=2.0) > 1.2 * mean(
        lambda s: (s.label > 0).mean(), crowding=1.0
    )
    assert mean(lambda s: (s.label > 0).mean(), radius=(0.45, 0.46)) > 2 * mean(
        lambda s: (s.label > 0).mean(), radius=(0.2, 0.21)
    )


def test_uneven_light_and_noise():
    light = uneven_light(np.random.default_rng(0), (40, 50), 0.4)
    assert light.shape == (40, 50)
    assert light.max() == pytest.approx(1, abs=0.01)
    assert 0.6 <= light.min() < light.max()
    fine, coarse = smooth_noise(np.random.default_rng(0), (64, 64), 1.0, 5.0)
    for field in (fine, coarse):
        assert field.std() == pytest.approx(1, rel=1e-4)
    assert np.abs(np.diff(coarse)).mean() < 0.4 * np.abs(np.diff(fine)).mean()
