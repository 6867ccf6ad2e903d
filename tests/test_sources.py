"""The data sources: phantoms, folder, BBBC039, DSB2018, AC3/AC4, CREMI."""

import itertools
import os
import sys
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.ndimage import distance_transform_edt
from scipy.ndimage import label as components_of_one
from skimage.measure import label as connected_regions

from gdlib import io
from gdlib.data.files import SPLITS, published_split, read_volume, split_components
from gdlib.data.prepare import check_sample
from gdlib.data.sources import neurites_phantom as neurites
from gdlib.data.sources.ac34 import ac34
from gdlib.data.sources.bbbc039 import bbbc039, decode
from gdlib.data.sources.cremi import UNASSIGNED, cremi
from gdlib.data.sources.dsb2018 import dsb2018
from gdlib.data.sources.folder import _split, folder
from gdlib.data.sources.joined import joined
from gdlib.data.sources.nuclei_phantom import MIN_AREA, nuclei_phantom
from gdlib.io import Sample
from gdlib.io.failures import DataError
from gdlib.registry import SOURCES

RAW = Path(os.environ.get("GDLIB_RAW", Path(__file__).parents[1].parent / "shared" / "data"))
IMAGES = {"train": 3, "val": 1, "test": 1}


def needs(name):
    return pytest.mark.skipif(
        not (RAW / name).is_dir(), reason=f"no raw data in {name}; set GDLIB_RAW to their folder"
    )


LICENCES = {
    "ac34": "ODC-By v1.0",
    "bbbc039": "CC0 1.0",
    "cremi": "https://cremi.org",
    "dsb2018": "CC0 1.0",
    "folder": "Own data",
    "neurites_phantom": "CC0 1.0",
    "nuclei_phantom": "CC0 1.0",
}


def test_every_source_is_tested():
    assert set(LICENCES) <= set(SOURCES.names())


@pytest.mark.parametrize("name", LICENCES)
def test_registered_and_the_file_names_the_licence(name):
    source = SOURCES.get(name)
    assert source.__name__ == name
    assert SOURCES.parameters(name)
    assert LICENCES[name] in sys.modules[source.__module__].__doc__


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
    plain = {
        "touching": 0.0,
        "overlap": 0.0,
        "haze": 0.0,
        "illumination": 0.0,
        "blur": 0.3,
        "dim": 0.0,
        "texture": 0.0,
    }
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


@pytest.mark.parametrize(
    "fractions", [{"val_fraction": 0.0}, {"test_fraction": 0.0}, {"val_fraction": 0.8}]
)
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


NFC, NFD = "zelle_\u00e9", "zelle_e\u0301"  # é as one character and as two
LISTS = {"train": "c\nd\n", "val": "b.tif", "test": "a"}


@pytest.mark.parametrize(
    "encode",
    [
        str.encode,
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
        lambda text: text.replace("a", "A.TIF").replace("A", "a").encode(),
    ],
)
def test_folder_split_lists_of_any_editor(tmp_path, encode):
    _folder(tmp_path)
    for split, names in LISTS.items():
        (tmp_path / f"{split}.txt").write_bytes(encode(names))
    ids = {split: [sample.id for sample in samples] for split, samples in folder(tmp_path).items()}
    assert ids == {"train": ["c", "d"], "val": ["b"], "test": ["a"]}


@pytest.mark.parametrize(
    ("listed", "image", "label"), list(itertools.product([NFC, NFD], repeat=3))
)
def test_folder_names_that_look_the_same_are_the_same(tmp_path, listed, image, label):
    _folder(tmp_path)
    for part, name in (("images", image), ("labels", label)):
        (tmp_path / part / "d.tif").rename(tmp_path / part / f"{name}.tif")
    for split, names in LISTS.items():
        (tmp_path / f"{split}.txt").write_text(names.replace("d", listed))
    assert [sample.id for sample in folder(tmp_path)["train"]] == ["c", NFC]
    for split in LISTS:
        (tmp_path / f"{split}.txt").unlink()
    settled = {
        split: [sample.id for sample in samples] for split, samples in folder(tmp_path).items()
    }
    assert sorted(itertools.chain(*settled.values())) == ["a", "b", "c", NFC]


def _rename(part, old, new):
    return lambda root: (root / part / old).rename(root / part / new)


def _lists(**changes):
    def write(root):
        for split, names in (LISTS | changes).items():
            (root / f"{split}.txt").write_bytes(
                names if isinstance(names, bytes) else names.encode()
            )

    return write


# What is done to a good folder, and what the sentence says of it.
NAMES = {
    "a list in Latin-1": (
        _lists(train="c\nzelle_\u00e9\n".encode("latin-1")),
        ["train.txt, line 2", "UTF-8"],
    ),
    "a list in UTF-16 without a mark": (
        _lists(val="b\n".encode("utf-16-le")),
        ["val.txt", "save the file as UTF-8"],
    ),
    "capitals on a list": (
        _lists(val="B"),
        ['val.txt: there is no image "B" (there is "b"; capitals count)'],
    ),
    "capitals of a label": (
        _rename("labels", "b.tif", "B.tif"),
        ['b.tif: this image has no label (there is "B"'],
    ),
    "capitals of an image": (
        lambda root: (
            _rename("images", "b.tif", "a2.tif")(root),
            _rename("labels", "b.tif", "A2.tif")(root),
        ),
        ['a2.tif: this image has no label (there is "A2"'],
    ),
    "capitals of a list's name": (
        lambda root: (_lists()(root), _rename(".", "val.txt", "Val.TXT")(root)),
        ["Val.TXT", "called train.txt, val.txt, test.txt"],
    ),
    "two names that look the same": (
        lambda root: [
            tifffile.imwrite(root / "images" / f"{name}.tif", np.ones((8, 8), np.uint8))
            for name in (NFC, NFD)
        ],
        ["the name without its ending is also that of"],
    ),
    "a name that is no text": (
        lambda root: os.rename(root / "images/b.tif", os.fsencode(root / "images") + b"/b\xff.tif"),
        ["is no UTF-8 text", "rename it"],
    ),
    "a folder of JPEGs": (
        lambda root: [
            path.rename(path.with_suffix(".jpg")) for path in (root / "images").glob("?.tif")
        ],
        [
            "images: there is no PNG, TIFF or HDF5 file in this folder, but a.jpg, b.jpg, c.jpg, "
            "d.jpg; save images as one"
        ],
    ),
}


@pytest.mark.parametrize("what", NAMES)
def test_folder_names_that_do_not_match_are_one_sentence(tmp_path, what):
    change, words = NAMES[what]
    change(_folder(tmp_path))
    with pytest.raises(DataError) as error:
        folder(tmp_path)
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == [], error.value


def test_folder_says_which_files_it_does_not_read(tmp_path, capsys):
    _folder(tmp_path)
    folder(tmp_path)
    assert capsys.readouterr().err == ""
    for name in (
        "x.jpg",
        "y.CZI",
        "notes.txt",
        "Thumbs.db",
        ".z.jpg",
        *(f"{k}.bmp" for k in range(4)),
    ):
        (tmp_path / "images" / name).write_text("")
    (tmp_path / "images" / "more").mkdir()
    folder(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    expected = (
        "images: not read: 0.bmp, 1.bmp, 2.bmp, 3.bmp, more and 2 more; save images as PNG, "
        "TIFF or HDF5"
    )
    assert line == f"warning: {tmp_path}/{expected}"


# --- BBBC039 and DSB2018 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "split", "sizes"),
    [("bbbc039", "heldout", [80, 20, 50]), ("dsb2018", "subset60", [40, 8, 12])],
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
        name: sorted(
            line.removesuffix(".png")
            for line in (RAW / f"bbbc039/metadata/{name}.txt").read_text().split()
        )
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


# --- AC3/AC4 and CREMI -----------------------------------------------------------------------------------------------


def _write_h5(path, **arrays):
    """Write datasets `a__b` = array or (array, attributes) as `a/b`."""
    with h5py.File(path, "w") as file:
        for name, item in arrays.items():
            array, attrs = item if isinstance(item, tuple) else (item, {})
            file[name.replace("__", "/")] = array
            file[name.replace("__", "/")].attrs.update(attrs)


def _volume(shape, seed=0, ids=9):
    """Blobs of several components per id, some voxels of id 0; and an image."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, ids, [-(-n // 3) for n in shape])
    label = np.kron(coarse, np.ones((3,) * len(shape), int))[tuple(slice(n) for n in shape)]
    return rng.integers(0, 255, shape).astype(np.uint8), label


def _components(label):
    """Set of components, each as the set of its flat indices; one id at a time, by faces."""
    found = set()
    for number in np.unique(label[label > 0]):
        regions, count = components_of_one(label == number)
        found |= {frozenset(np.flatnonzero(regions == k).tolist()) for k in range(1, count + 1)}
    return found


def _instances(label):
    return {frozenset(np.flatnonzero(label == k).tolist()) for k in np.unique(label[label > 0])}


@pytest.fixture
def ac34_folder(tmp_path):
    for name, depth in (("AC4", 100), ("AC3", 103)):
        image, label = _volume((depth, 12, 14), seed=depth)
        _write_h5(tmp_path / f"{name}_inputs.h5", main=image)
        _write_h5(tmp_path / f"{name}_labels.h5", main=label.astype(np.uint16) * 100)
    return tmp_path


@pytest.mark.parametrize("components", [True, False])
def test_ac34_splits_and_components(ac34_folder, components):
    splits = {
        split: list(samples) for split, samples in ac34(ac34_folder, components=components).items()
    }
    for split, (depth, start, stop) in {
        "train": (100, 0, 80),
        "val": (100, 80, 100),
        "test": (103, 0, 100),
    }.items():
        (sample,) = splits[split]
        image, label = _volume((depth, 12, 14), seed=depth)
        np.testing.assert_array_equal(sample.image, image[None, start:stop])
        crop = label[start:stop]
        assert _instances(sample.label) == (_components(crop) if components else _instances(crop))
        assert sample.attrs["voxel_size_nm"] == [30.0, 6.0, 6.0]
    assert {split: own[0].id for split, own in splits.items()} == {
        "train": "AC4_z000-079",
        "val": "AC4_z080-099",
        "test": "AC3_z000-099",
    }


def test_ac34_takes_what_a_crop_of_ac3_has(ac34_folder):
    image, label = _volume((32, 12, 14))
    _write_h5(ac34_folder / "AC3_inputs.h5", main=(image, {"resolution": [29.0, 6.0, 6.0]}))
    _write_h5(ac34_folder / "AC3_labels.h5", main=label)
    (sample,) = ac34(ac34_folder)["test"]
    np.testing.assert_array_equal(sample.image[0], image)
    assert sample.attrs["voxel_size_nm"] == [29.0, 6.0, 6.0]


def test_ac34_refuses(ac34_folder):
    image, label = _volume((100, 12, 14), seed=100)
    path = ac34_folder / "AC4_labels.h5"
    for bad, message in (
        (
            {"main": np.moveaxis(label, 0, 2)},
            r"AC4_inputs.h5: .*\(12, 14, 100\), the same axes in " r"another order",
        ),
        ({"main": label[1:]}, "AC4_inputs.h5: .* give both the same shape"),
        ({"main": label / 2}, "AC4_labels.h5: the label has type float64"),
        ({"main": label - 1}, "AC4_labels.h5: the label has negative numbers"),
        (
            {"stack": label},
            r'AC4_labels.h5: there is no dataset "main", inside is stack \(100, 12, ' r"14\)",
        ),
    ):
        _write_h5(path, **bad)
        with pytest.raises(DataError, match=message):
            list(ac34(ac34_folder)["train"])
    path.unlink()
    with pytest.raises(DataError, match=r"AC4_labels.h5: the file is missing"):
        list(ac34(ac34_folder)["val"])
    _write_h5(path, main=label[:90])
    _write_h5(ac34_folder / "AC4_inputs.h5", main=image[:90])
    with pytest.raises(
        DataError, match=r"AC4_inputs.h5: there are 90 sections, so \[80, 100\] is " r"no range"
    ):
        list(ac34(ac34_folder)["val"])


SECTIONS = {"train": [0, 20], "val": [20, 26], "test": [26, 40]}


@pytest.fixture
def cremi_folder(tmp_path):
    """A and B in the layout of the padded files: ids at (5, 7, 9) of the image, huge, and some not
    assigned."""
    for seed, name in enumerate("AB"):
        raw = np.random.default_rng(seed).integers(0, 255, (50, 30, 33)).astype(np.uint8)
        ids = _volume((40, 12, 14), seed)[1].astype(np.uint64)
        ids[ids > 0] += 2**40
        ids[ids == 2**40 + 5] = UNASSIGNED
        attrs = {"resolution": [40.0, 4.0, 4.0]}
        _write_h5(
            tmp_path / f"sample_{name}_20160501.hdf",
            volumes__raw=(raw, attrs),
            volumes__labels__neuron_ids=(ids, attrs | {"offset": [200.0, 28.0, 36.0]}),
        )
    return tmp_path


def _ids(folder, name="A"):
    return read_volume(folder / f"sample_{name}_20160501.hdf", "volumes/labels/neuron_ids")


@pytest.mark.parametrize("components", [True, False])
def test_cremi_crops_the_image_to_the_ids(cremi_folder, components):
    splits = cremi(cremi_folder, samples=["A", "B"], sections=SECTIONS, components=components)
    for split, (start, stop) in SECTIONS.items():
        both = list(splits[split])
        assert [sample.id for sample in both] == [
            f"sample_{n}_20160501_z{start:03d}-{stop - 1:03d}" for n in "AB"
        ]
        for seed, (name, sample) in enumerate(zip("AB", both, strict=True)):
            raw = np.random.default_rng(seed).integers(0, 255, (50, 30, 33)).astype(np.uint8)
            np.testing.assert_array_equal(sample.image[0], raw[5 + start : 5 + stop, 7:19, 9:23])
            ids = _ids(cremi_folder, name)[start:stop]
            np.testing.assert_array_equal(sample.ignore, ids == UNASSIGNED)
            known = np.where(ids == UNASSIGNED, 0, ids)
            assert _instances(sample.label) == (
                _components(known) if components else _instances(known)
            )
            assert sample.attrs["voxel_size_nm"] == [40.0, 4.0, 4.0]
            checked = check_sample(sample, 1, (4, 8, 8))
            assert checked.label.max() == len(_instances(sample.label))
            np.testing.assert_array_equal(checked.label > 0, (ids != UNASSIGNED) & (ids > 0))


def test_cremi_the_papers_sections():
    """Each of the 125 sections is in one split."""
    where = {split: range(*pair) for split, pair in sys.modules[cremi.__module__].SECTIONS.items()}
    assert sorted(z for own in where.values() for z in own) == list(range(125))
    assert [len(where[split]) for split in SPLITS] == [50, 25, 50]
    assert where["train"][0] == 0
    assert where["val"][-1] == 124


def test_cremi_every_second_section_and_id_zero(cremi_folder):
    options = {"samples": ["sample_A_20160501"], "file": "{}.hdf", "sections": SECTIONS}
    whole = next(cremi(cremi_folder, **options)["test"])
    half = next(cremi(cremi_folder, **options, every_section=2, ignore_zero=True)["test"])
    np.testing.assert_array_equal(half.image, whole.image[:, ::2])
    # components are those of all sections
    np.testing.assert_array_equal(half.label, whole.label[::2])
    ids = _ids(cremi_folder)[26:40:2]
    np.testing.assert_array_equal(half.ignore, (ids == UNASSIGNED) | (ids == 0))
    assert (half.label[half.ignore] == 0).all()
    assert half.attrs["voxel_size_nm"] == [80.0, 4.0, 4.0]


@pytest.mark.parametrize(("change", "message"), [
    ({"offset": [200.0, 28.0, 88.0]}, r"begin at \(5, 7, 22\) reach out of the image of \(50, 30, " r"33\); correct"),
    ({"offset": [-40.0, 28.0, 36.0]}, r"begin at \(-1, 7, 9\) reach out"),
    ({"offset": [200.0, 30.0, 36.0]}, "begin between voxels"),
    ({"resolution": [50.0, 4.0, 4.0]}, "neuron_ids: its voxels are"),
    ({"resolution": [4.0, 4.0, 40.0]}, "its voxels are"),
    ({"resolution": [4.0, 4.0]}, "its voxels are"),
])  # fmt: skip
def test_cremi_refuses_attributes(cremi_folder, change, message):
    with h5py.File(cremi_folder / "sample_A_20160501.hdf", "r+") as file:
        for key, value in change.items():
            del file["volumes/labels/neuron_ids"].attrs[key]
            file["volumes/labels/neuron_ids"].attrs[key] = value
    with pytest.raises(DataError, match=f"sample_A_20160501.hdf.*{message}") as error:
        next(cremi(cremi_folder, sections=SECTIONS)["train"])
    assert "\n" not in str(error.value)


def test_cremi_refuses_arrays(tmp_path):
    raw, ids = _volume((40, 12, 14))
    size = {"resolution": [40, 4, 4]}
    for bad, message in (
        (
            {"volumes__raw": raw, "volumes__labels__neuron_ids": ids},
            "the attribute `resolution` is None",
        ),
        (
            {"volumes__raw": (raw, size)},
            r'no dataset "volumes/labels/neuron_ids", inside is volumes/raw \(40, 12, 14\)',
        ),
        (
            {"volumes__raw": (raw, size), "volumes__labels__neuron_ids": (ids[0], size)},
            "the image has 3 axes, the ids have 2",
        ),
        (
            {
                "volumes__raw": (raw, size),
                "volumes__labels__neuron_ids": (np.moveaxis(ids, 0, -1), size),
            },
            "same axes in another order",
        ),
        ({"volumes__raw": (raw, size), "volumes__labels__neuron_ids": (ids - 1, size)}, "negative"),
    ):
        _write_h5(tmp_path / "sample_A_20160501.hdf", **bad)
        with pytest.raises(DataError, match=message):
            next(cremi(tmp_path, sections=SECTIONS)["train"])


@pytest.mark.parametrize(("options", "message"), [
    ({"sections": {"train": [0, 20], "val": [19, 26], "test": [26, 40]}}, "overlap; give each " "section to one"),
    ({"sections": {"train": [0, 20], "val": [20, 26]}}, r"there must be \[first, after the last\]"),
    ({"sections": {**SECTIONS, "val": [20]}}, r"there must be \[first, after the last\]"),
    ({"sections": {**SECTIONS, "test": [26, 41]}}, r"there are 40 sections, so \[26, 41\]"),
    ({"sections": {**SECTIONS, "test": [26, 26]}}, r"there are 40 sections, so \[26, 26\]"),
    ({"sections": SECTIONS, "every_section": 0}, "every_section is 0; choose 1"),
    ({"sections": SECTIONS, "samples": ["D"]}, r"sample_D_20160501.hdf: the file is missing"),
])  # fmt: skip
def test_cremi_refuses_options(cremi_folder, options, message):
    with pytest.raises(DataError, match=message):
        next(cremi(cremi_folder, **options)["test"])


@needs("ac3ac4")
def test_ac34_real_volumes_are_as_described():
    with h5py.File(RAW / "ac3ac4/AC4_labels.h5") as file:
        label = file["main"][()]
    assert len(np.unique(label)) - 1 == 137
    assert split_components(label).max() == 180
    (val,) = ac34(RAW / "ac3ac4")["val"]
    assert val.image.dtype == np.uint8
    assert val.attrs["voxel_size_nm"] == [30.0, 6.0, 6.0]
    np.testing.assert_array_equal(val.label > 0, label[80:100] > 0)
    (whole,) = ac34(RAW / "ac3ac4", components=False)["val"]
    # a component is of one neuron
    pairs = np.unique(whole.label.astype(np.int64) * 1000 + val.label)
    assert len(np.unique(pairs % 1000)) == len(pairs) > len(np.unique(pairs // 1000))


@needs("fib25")
def test_cremi_reads_fib25():
    name = "fib25_training_sample2_z000-179"
    sections = {"train": [0, 110], "val": [110, 140], "test": [140, 180]}
    (val,) = cremi(
        RAW / "fib25", samples=[name], file="{}.hdf", sections=sections, ignore_zero=True
    )["val"]
    ids = read_volume(RAW / f"fib25/{name}.hdf", "volumes/labels/neuron_ids")[110:140]
    np.testing.assert_array_equal(val.ignore, ids == 0)
    assert ids.max() > 65535
    assert val.image.shape == (1, 30, 250, 250)
    assert val.attrs["voxel_size_nm"] == [10.0, 10.0, 10.0]
    number = np.unique(ids[ids > 0])[7]
    assert len(np.unique(val.label[ids == number])) == components_of_one(ids == number)[1]


# --- neurites phantom ------------------------------------------------------------------------------------------------

VOLUMES = {"train": 2, "val": 1, "test": 1}
FLAWLESS = {
    "misalignment": 0.0,
    "contrast": 0.0,
    "brightness": 0.0,
    "missing": 0.0,
    "blurred": 0.0,
    "noise": 0.1,
}


def neurites_volumes(split="train", size=(8, 64, 70), volumes=VOLUMES, **options):
    return list(neurites.neurites_phantom(None, size=size, volumes=volumes, **options)[split])


def test_neurites_sample_depends_on_seed_split_and_number_only():
    few = neurites_volumes()
    for one, other in zip(
        few, neurites_volumes(volumes={"train": 5, "val": 2, "test": 2}), strict=False
    ):
        assert one.id == other.id
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.label, other.label)
    firsts = [
        *few,
        *neurites_volumes("val"),
        *neurites_volumes("test"),
        neurites_volumes(seed=1)[0],
    ]
    assert len({sample.image.tobytes() for sample in firsts}) == len(firsts)
    assert len({sample.label.tobytes() for sample in firsts}) == len(firsts)


@pytest.mark.parametrize(
    ("size", "options"),
    [((8, 64, 70), {}), ((20, 40, 40), {"anisotropy": 1.0, "crowding": 20, "radius": (3, 15)})],
)
def test_neurites_labels_are_components(size, options):
    for sample in neurites_volumes(size=size, **options):
        assert sample.image.shape == (1, *size)
        assert sample.image.dtype == np.uint8
        assert sample.label.shape == size
        count = int(sample.label.max())
        assert count >= 4
        assert _instances(sample.label) == _components(sample.label)
        assert (
            np.bincount(sample.label.ravel(), minlength=count + 1)[1:].min() >= neurites.MIN_VOLUME
        )
        assert sample.attrs["voxel_size_nm"] == [options.get("anisotropy", 5.0) * 6, 6.0, 6.0]
        check_sample(sample, 1, size)


def test_neurites_fill_a_volume():
    (sample,) = neurites_volumes("val", size=(32, 160, 160))
    assert 0.08 < (sample.label == 0).mean() < 0.25
    assert 20 < sample.label.max() < 120


def test_a_larger_volume_costs_no_more_per_voxel(monkeypatch):
    """Of the tubes of a section those alone are computed that are near."""
    near, counts = neurites._near, []

    def counted(form, owner, place):
        kept = near(form, owner, place)
        counts.append((len(kept), len(form)))
        return kept

    monkeypatch.setattr(neurites, "_near", counted)
    means = []
    for side in (160, 480):
        counts.clear()
        neurites_volumes("val", size=(1, side, side))
        means.append(np.mean(counts, 0))
    (small, few), (large, many) = means
    assert many > 2 * few
    assert large < 1.3 * small


def _line_distance(point, centre, slope):
    """Distance in space of a point (y, x) of the plane z = 0 from the line through (0, *centre)
    along (1, *slope)."""
    way = np.array([0.0, *np.subtract(point, centre)])
    along = np.array([1.0, *slope])
    return np.linalg.norm(np.cross(way, along)) / np.linalg.norm(along)


def test_forms_are_distances_from_oblique_lines():
    rng = np.random.default_rng(0)
    centre, slope, radius = (
        rng.normal(0, 20, (5, 2)),
        rng.normal(0, 2, (5, 2)),
        rng.uniform(1, 9, 5),
    )
    points = rng.normal(0, 20, (2, 7))
    values = neurites._forms(centre, slope, radius) @ neurites._powers(points)
    for k, p in np.ndindex(values.shape):
        expected = _line_distance(points[:, p], centre[k], slope[k]) ** 2 - radius[k] ** 2
        assert values[k, p] == pytest.approx(expected, rel=1e-9)


def test_neurites_tiles_leave_out_nothing_that_counts():
    """The nearest tube of each pixel, and the distance to the territory of the next, as if every
    tube were tried."""
    rng = np.random.default_rng(1)
    tubes = neurites._tubes(rng, (4, 90, 90), 5.0, 8.0, (3.0, 55.0), 0.8, 0.5, 0.5, 0.5)
    place = np.stack(np.mgrid[5:75, 7:80]).reshape(2, -1).astype(float)
    first, border, smear, _ = neurites._tile(tubes, 2, place, 0 * place)
    values = tubes.form[1, 2] @ neurites._powers(place)
    assert len(np.unique(tubes.owner)) < len(tubes.owner)  # there are branches
    np.testing.assert_array_equal(first, values.argmin(0))
    for p in range(0, place.shape[1], 37):
        order = [k for k in values[:, p].argsort() if tubes.owner[k] != tubes.owner[first[p]]]

        def gap(point, two=(order[0], first[p])):  # of the second best owner and the best
            one, other = tubes.form[1, 2][list(two)] @ neurites._powers(point[:, None])
            return (one - other).item()

        slope = [
            (gap(place[:, p] + step) - gap(place[:, p] - step)) / 0.2
            for step in np.diag([0.1, 0.1])
        ]
        assert border[p] == pytest.approx(gap(place[:, p]) / np.hypot(*slope), rel=1e-4, abs=1e-4)
    assert np.isfinite(smear).all()


def test_neurites_border_moves_as_predicted():
    """What a border moves between the faces of a section, from where it is on the faces."""
    vertical = np.array([[0.0, 0.0], [0.0, 40.0]])
    slope = np.array([[0.0, 0.6], [0.0, 0.6]])
    forms = np.stack(
        [neurites._forms(vertical + t * slope, slope, np.array([9.0, 9.0])) for t in (-2.5, 0, 2.5)]
    )
    tubes = neurites._Tubes(
        np.array([1, 2]),
        forms[:, None],
        forms[1][None],
        np.zeros((1, 2)),
        np.zeros(2),
        np.zeros((2, 2)),
    )
    x = np.arange(0, 41.0) + 0.25
    first, border, smear, _ = neurites._tile(tubes, 0, np.stack([0 * x, x]), np.zeros((2, len(x))))
    np.testing.assert_array_equal(first, x > 20)
    np.testing.assert_allclose(border, abs(x - 20), atol=1e-5)
    np.testing.assert_allclose(abs(smear), 3.0, atol=1e-5)  # 5 pixels of depth, 0.6 sideways each
    follow = np.stack([0 * x, np.full(len(x), 1.8)])  # the tissue itself moves along
    np.testing.assert_allclose(
        abs(neurites._tile(tubes, 0, np.stack([0 * x, x]), follow)[2]), 1.2, atol=1e-5
    )


def test_neurites_are_as_oblique_as_they_drift():
    """The outline in a section is that of a tube that leans as its centre moves between the
    faces."""
    tubes = neurites._tubes(
        np.random.default_rng(1), (6, 90, 90), 5.0, 8.0, (3.0, 55.0), 1.5, 0.5, 0.5, 0.5
    )
    by, bx, yy, yx, xx = np.moveaxis(tubes.form, -1, 0)[1:]
    second = np.stack([np.stack([2 * yy, yx], -1), np.stack([yx, 2 * xx], -1)], -2)
    centre = np.linalg.solve(second, -np.stack([by, bx], -1)[..., None])[..., 0]
    vy, vx = np.moveaxis((centre[2] - centre[0]) / 5.0, -1, 0)
    assert np.hypot(vy, vx).max() > 2
    for found, expected in (
        (yy, 1 - vy**2 / (1 + vy**2 + vx**2)),
        (xx, 1 - vx**2 / (1 + vy**2 + vx**2)),
    ):
        np.testing.assert_allclose(found[1], expected, atol=0.02)


def test_neurites_background_is_where_two_neurites_meet():
    """Every pixel between neurites is within half a membrane of another neurite, and none that is
    labelled is."""
    rng = np.random.default_rng(2)
    tubes = neurites._tubes(rng, (3, 120, 120), 5.0, 10.0, (3.0, 55.0), 0.8, 0.3, 0.5, 0.5)
    grid = np.stack(np.mgrid[:120, :120]).astype(float)
    _, label = neurites._section(rng, tubes, 1, (grid, 0 * grid), 6.0)
    owner = tubes.owner[
        neurites._tile(tubes, 1, grid.reshape(2, -1), 0 * grid.reshape(2, -1))[0]
    ].reshape(120, 120)
    assert ((label == 0) | (label == owner)).all()
    distance = np.empty(owner.shape)
    for number in np.unique(owner):  # to the nearest pixel of any other
        distance = np.where(owner == number, distance_transform_edt(owner == number), distance)
    assert 0.1 < (label == 0).mean() < 0.5
    assert distance[label == 0].max() <= 3.0 + 1.5
    assert distance[label > 0].min() >= 3.0 - 0.5


def _contrast(sample):
    """Mean grey value of labelled voxels less that of others, per section."""
    image, inside = sample.image[0].astype(float), sample.label > 0
    return np.array(
        [
            section[own].mean() - section[~own].mean()
            for section, own in zip(image, inside, strict=True)
        ]
    )


def test_neurites_image_and_label_move_together():
    """However far sections are shifted, membranes stay where the labels have none.

    Shifted apart they would not.
    """
    plain = {**FLAWLESS, "organelles": 0.0, "vesicles": 0.0, "drift": 0.1, "size": (10, 96, 96)}
    still, moved = (neurites_volumes("val", **plain | {"misalignment": s})[0] for s in (0.0, 8.0))
    assert (still.label != moved.label).mean() > 0.1
    assert _contrast(still).min() > 40
    assert _contrast(moved).min() > 0.85 * _contrast(still).min()
    apart = np.roll(moved.image, 8, axis=-1)
    assert _contrast(type(moved)("a", apart, moved.label)).max() < 0.5 * _contrast(moved).min()


def test_neurites_defects_do_what_they_say():
    plain = neurites_volumes(**FLAWLESS)[0]
    assert plain.image[0].mean((1, 2)).std() < 8
    (black, *_) = neurites_volumes(**FLAWLESS | {"missing": 0.5})
    lost = black.image[0].max((1, 2)) == 0
    assert 0 < lost.sum() < len(lost)
    # truth goes on where the image is black
    np.testing.assert_array_equal(black.label, plain.label)
    np.testing.assert_array_equal(black.image[0][~lost], plain.image[0][~lost])
    assert neurites_volumes(**FLAWLESS | {"brightness": 30.0})[0].image[0].mean((1, 2)).std() > 15
    sharp, soft = (
        np.abs(
            np.diff(neurites_volumes(**FLAWLESS | {"blurred": b})[0].image[0].astype(int))
        ).mean()
        for b in (0.0, 1.0)
    )
    assert soft < 0.8 * sharp
    noisy = neurites_volumes(**FLAWLESS | {"noise": 20.0})[0]
    assert 15 < (noisy.image[0].astype(float) - plain.image[0])[plain.image[0] < 200].std() < 25


def test_neurites_organelles_and_crowding():
    plain = {
        **FLAWLESS,
        "vesicles": 0.0,
        "size": (12, 96, 96),
        "volumes": {"train": 3, "val": 1, "test": 1},
    }
    with_, without = (
        [s.image[0][s.label > 0] < 90 for s in neurites_volumes(**plain, organelles=o)]
        for o in (1.0, 0.0)
    )
    assert np.concatenate(with_).mean() > 1.5 * np.concatenate(without).mean()
    few, many = (
        sum(s.label.max() for s in neurites_volumes(**plain, crowding=c)) for c in (4.0, 16.0)
    )
    assert many > 1.8 * few


def test_neurites_branch():
    """With branches, sections show more neurites in two pieces that are one elsewhere."""
    options = {
        **FLAWLESS,
        "size": (24, 96, 96),
        "drift": 0.0,
        "wobble": 0.0,
        "radius": (12.0, 12.1),
        "crowding": 10.0,
    }

    def pieces(branching):
        sections = [
            section
            for sample in neurites_volumes(**options, branching=branching)
            for section in sample.label
        ]
        return sum(
            int(connected_regions(s, connectivity=1, background=0).max()) - len(np.unique(s)) + 1
            for s in sections
        )

    assert pieces(1.0) > pieces(0.0) + 15


def test_neurites_need_every_split_and_three_sides():
    with pytest.raises(DataError, match="one number each"):
        neurites.neurites_phantom(None, volumes={"train": 3})
    with pytest.raises(DataError, match="three side lengths"):
        neurites.neurites_phantom(None, size=[256, 256])


# --- Joined ---------------------------------------------------------------------------------------------------------


def test_joined_datasets_are_all_their_images(tmp_path, squares):
    seed = iter(range(100))
    for name, dtype, counts in (("a", np.uint8, (2, 1, 1)), ("b", np.uint16, (1, 2, 1))):
        for split, count in zip(SPLITS, counts, strict=True):
            samples = []
            for i in range(count):
                image, label = squares(next(seed))
                samples.append(
                    Sample(f"s{i}", image.astype(dtype), label, attrs={"source": f"{name}/{i}"})
                )
            (tmp_path / name).mkdir(exist_ok=True)
            io.write_samples(tmp_path / name / f"{split}.h5", samples)
    found = {
        split: list(samples) for split, samples in joined(tmp_path, datasets=["b", "a"]).items()
    }
    names = {split: [sample.id for sample in samples] for split, samples in found.items()}
    assert names == {
        "train": ["b-s0", "a-s0", "a-s1"],
        "val": ["b-s0", "b-s1", "a-s0"],
        "test": ["b-s0", "a-s0"],
    }
    (original,) = io.read_samples(tmp_path / "b" / "train.h5")
    first = found["train"][0]
    assert first.image.dtype == np.uint16
    np.testing.assert_array_equal(first.image, original.image)
    np.testing.assert_array_equal(first.label, original.label)
    assert first.attrs == {"source": "b/0", "dataset": "b"}
    some = joined(tmp_path, datasets=["b", "a"], only={"val": ["a"], "test": ["b"]})
    names = {split: [sample.id for sample in samples] for split, samples in some.items()}
    assert names == {"train": ["b-s0", "a-s0", "a-s1"], "val": ["a-s0"], "test": ["b-s0"]}
    with pytest.raises(DataError, match='"c", only of split val, is none of'):
        joined(tmp_path, datasets=["b", "a"], only={"val": ["c"]})


@pytest.mark.parametrize("names", [[], ["a"], ["a", "a", "b"]])
def test_one_dataset_is_not_joined(tmp_path, names):
    with pytest.raises(DataError, match="not several datasets; name each once"):
        joined(tmp_path, datasets=names)
