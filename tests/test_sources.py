"""The 2D data sources: phantom, folder, BBBC039, DSB2018."""

import os
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage.measure import label as connected_regions

from gdlib.data.files import SPLITS, published_split
from gdlib.data.sources.bbbc039 import bbbc039, decode
from gdlib.data.sources.dsb2018 import dsb2018
from gdlib.data.sources.folder import _split, folder
from gdlib.data.sources.nuclei_phantom import MIN_AREA, nuclei_phantom
from gdlib.io import DataError
from gdlib.registry import SOURCES

RAW = Path(os.environ.get("GDLIB_RAW", Path(__file__).parents[1].parent / "shared" / "data"))
IMAGES = {"train": 3, "val": 1, "test": 1}


def needs(name):
    return pytest.mark.skipif(not (RAW / name).is_dir(), reason=f"no raw data in {name}; set GDLIB_RAW to their folder")


@pytest.mark.parametrize("name", ["bbbc039", "dsb2018", "folder", "nuclei_phantom"])
def test_registered_and_first_line_names_the_licence(name):
    source = SOURCES.get(name)
    assert source.__name__ == name
    assert SOURCES.parameters(name)
    if name != "folder":
        assert "CC0 1.0" in sys.modules[source.__module__].__doc__.splitlines()[0]


# --- phantom ---------------------------------------------------------------------------------------------------------


def test_phantom_sample_depends_on_seed_split_and_number_only():
    few = {split: list(samples) for split, samples in nuclei_phantom(None, images=IMAGES).items()}
    more = nuclei_phantom(None, images={"train": 9, "val": 2, "test": 2})
    for split, samples in few.items():
        for one, other in zip(samples, more[split], strict=False):
            assert one.id == other.id
            np.testing.assert_array_equal(one.image, other.image)
            np.testing.assert_array_equal(one.label, other.label)
    other = next(nuclei_phantom(None, images=IMAGES, seed=1)["train"])
    firsts = [few["train"][0], few["train"][1], few["val"][0], few["test"][0], other]
    assert len({sample.image.tobytes() for sample in firsts}) == len(firsts)


@pytest.mark.parametrize("size", [(256, 256), (96, 200)])
def test_phantom_labels_are_exact(size):
    for sample in nuclei_phantom(None, size=size, images=IMAGES)["train"]:
        image, label = sample.image, sample.label
        assert image.shape == (1, *size)
        assert image.dtype == np.uint16
        assert label.shape == size
        ids = np.unique(label[label > 0])
        assert ids.tolist() == list(range(1, len(ids) + 1))
        assert len(ids) >= 4
        assert connected_regions(label, connectivity=1, background=0).max() == len(ids)
        assert np.bincount(label.ravel())[1:].min() >= MIN_AREA
        assert image.min() > 110
        assert image.max() <= 4095


def test_phantom_labels_agree_with_the_light():
    """Without haze, overlap, texture and noise, labelled pixels are the bright ones."""
    plain = {"touching": 0.0, "overlap": 0.0, "haze": 0.0, "illumination": 0.0, "blur": 0.3, "dim": 0.0, "texture": 0.0}
    for sample in nuclei_phantom(None, images=IMAGES, gain=0.01, read_noise=0.1, **plain)["train"]:
        bright = sample.image[0] > 110 + 40 + 30
        assert (bright & (sample.label > 0)).sum() / (bright | (sample.label > 0)).sum() > 0.95


def test_phantom_nuclei_touch():
    """Far fewer connected foreground regions than nuclei: that is what makes it hard."""
    samples = list(nuclei_phantom(None, images=IMAGES)["train"])
    regions = sum(connected_regions(sample.label > 0).max() for sample in samples)
    assert regions < 0.6 * sum(sample.label.max() for sample in samples)


def test_phantom_needs_every_split():
    with pytest.raises(DataError, match="one number each"):
        nuclei_phantom(None, images={"train": 3})


# --- folder ----------------------------------------------------------------------------------------------------------


def _where(names, **fractions):
    split = _split(names, **({"val_fraction": 0.2, "test_fraction": 0.2} | fractions))
    assert sorted(name for own in split.values() for name in own) == sorted(names)
    return {name: key for key, own in split.items() for name in own}


def test_folder_adding_and_removing_images_moves_none():
    names = [f"image{i}" for i in range(200)]
    everything = _where(names)
    assert 100 <= list(everything.values()).count("train") <= 140
    for part in (names[:100], names[50:], names[::3]):
        assert _where(part) == {name: everything[name] for name in part}


def test_folder_split_of_few_images():
    names = [f"image{i}" for i in range(40)]
    settled = _where(names)
    for start in range(20):
        few = names[start : start + 3 + start % 4]
        split = _where(few)
        assert set(split.values()) == set(SPLITS)
        # At most one image per split that would be empty is not where it will stay.
        moved = sum(split[name] != settled[name] for name in few)
        assert moved <= len(set(SPLITS) - {settled[name] for name in few})


@pytest.mark.parametrize("fractions", [{"val_fraction": 0.0}, {"test_fraction": 0.0}, {"val_fraction": 0.8}])
def test_folder_fractions(fractions):
    with pytest.raises(DataError, match="must be above 0"):
        _where(["a", "b", "c"], **fractions)


def _folder(root):
    for part in ("images", "labels"):
        (root / part).mkdir()
        for name in "abcd":
            tifffile.imwrite(root / part / f"{name}.tif", np.ones((8, 8), np.uint8))
    (root / "images/.hidden.tif").write_text("left by a file browser")
    return root


def test_folder_split_lists(tmp_path):
    _folder(tmp_path)
    for split, names in {"train": "c\n", "val": "b.tif\n\n", "test": "a"}.items():
        (tmp_path / f"{split}.txt").write_text(names)
    ids = {split: [sample.id for sample in samples] for split, samples in folder(tmp_path).items()}
    assert ids == {"train": ["c"], "val": ["b"], "test": ["a"]}
    (tmp_path / "val.txt").write_text("e")
    with pytest.raises(DataError, match=r'val.txt: there is no image "e"'):
        folder(tmp_path)
    (tmp_path / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val.txt: the split list is missing"):
        folder(tmp_path)


# --- BBBC039 and DSB2018 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "split", "sizes"), [("bbbc039", "heldout", [80, 20, 50]), ("dsb2018", "subset60", [40, 8, 12])]
)
def test_published_lists_are_disjoint_and_sorted(source, split, sizes):
    lists = published_split(source, split)
    assert [len(lists[name]) for name in SPLITS] == sizes
    assert len(set().union(*lists.values())) == sum(sizes)
    assert all(names == sorted(names) for names in lists.values())


def test_unknown_published_split():
    with pytest.raises(DataError, match='did you mean "heldout"'):
        published_split("bbbc039", "held_out")


def test_decode_keeps_touching_nuclei_apart_and_drops_specks():
    code = np.zeros((20, 20), np.uint8)
    code[2:8, 2:8], code[8:14, 2:8], code[16, 16] = 1, 2, 1
    expected = np.where(code == 1, 1, code)
    expected[16, 16] = 0
    np.testing.assert_array_equal(decode(code, 20), expected)
    assert decode(code, 1).max() == 3
    assert decode(np.zeros((4, 4), np.uint8), 20).max() == 0


@needs("bbbc039")
def test_bbbc039_lists_follow_their_rule():
    official = {
        name: sorted(line.removesuffix(".png") for line in (RAW / f"bbbc039/metadata/{name}.txt").read_text().split())
        for name in ("training", "validation")
    }
    lists = published_split("bbbc039", "heldout")
    assert lists["test"] == official["validation"]
    assert lists["val"] == official["training"][4::5]
    assert sorted(lists["train"] + lists["val"]) == official["training"]


@needs("bbbc039")
def test_bbbc039_decodes_more_than_binarisation():
    samples = list(islice(bbbc039(RAW / "bbbc039")["val"], 4))
    for sample in samples:
        assert sample.image.shape == (1, 520, 696)
        assert sample.image.dtype == np.uint16
        area = np.bincount(sample.label.ravel())[1:]
        assert area[area > 0].min() >= 20
    instances = sum(len(np.unique(sample.label)) - 1 for sample in samples)
    merged = sum(connected_regions(sample.label > 0).max() for sample in samples)
    assert merged < 0.95 * instances


@needs("bbbc039")
def test_bbbc039_official_says_what_is_missing():
    if (RAW / "bbbc039/metadata/test.txt").exists():
        assert len(list(bbbc039(RAW / "bbbc039", split="official")["test"])) == 50
    else:
        with pytest.raises(DataError, match=r"test.txt: the split list is missing"):
            bbbc039(RAW / "bbbc039", split="official")


def test_bbbc039_missing_image(tmp_path):
    with pytest.raises(DataError, match=r"IXMtest_.*: the file is missing"):
        next(bbbc039(tmp_path)["train"])
    with pytest.raises(DataError, match="no such folder"):
        bbbc039(tmp_path / "nowhere")


@needs("dsb2018")
def test_dsb2018_lists_follow_their_rule_and_masks_are_one_label():
    ids = sorted(path.name for path in (RAW / "dsb2018/stage1_train").iterdir())
    lists = published_split("dsb2018", "subset60")
    if len(ids) == 60:
        assert lists == {"test": ids[:12], "val": ids[12:20], "train": ids[20:]}
    sample = next(dsb2018(RAW / "dsb2018")["val"])
    masks = sorted((RAW / "dsb2018/stage1_train" / sample.id / "masks").iterdir())
    assert sample.image.dtype == np.uint8
    assert sample.image.shape == (1, *sample.label.shape)
    assert sample.label.max() == len(masks)
    np.testing.assert_array_equal(sample.label == 1, np.asarray(Image.open(masks[0])) > 0)


def test_dsb2018_first_mask_keeps_the_overlap(tmp_path):
    name = published_split("dsb2018", "subset60")["train"][0]
    for part in ("images", "masks"):
        (tmp_path / "stage1_train" / name / part).mkdir(parents=True)
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[0, 1:4, 1:4] = masks[1, 3:6, 3:6] = 255
    here = tmp_path / "stage1_train" / name
    Image.fromarray(np.full((8, 8, 4), 9, np.uint8)).save(here / "images" / f"{name}.png")
    for key, mask in zip("ab", masks, strict=True):
        Image.fromarray(mask).save(here / "masks" / f"{key}.png")
    sample = next(dsb2018(tmp_path)["train"])
    assert sample.image.shape == (1, 8, 8)
    np.testing.assert_array_equal(sample.label, np.where(masks[0], 1, np.where(masks[1], 2, 0)))
