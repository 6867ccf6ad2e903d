"""Data sets without sense: what is refused, what is warned of, what is done about it, and that good
data pass in silence."""

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from scipy.ndimage import binary_erosion

from gdlib import io
from gdlib.data import sense
from gdlib.data.prepare import check_sample, prepare
from gdlib.io import Sample
from gdlib.io.failures import DataError
from gdlib.registry import SOURCES

ROOT = Path(__file__).parents[1]
RAW = Path(os.environ.get("GDLIB_RAW", ROOT.parent / "shared" / "data"))
SIZE, NAMES = (48, 56), [f"a{i}" for i in range(9)]
SPLITS = {"train": NAMES[:5], "val": NAMES[5:7], "test": NAMES[7:]}


@pytest.fixture
def raw(tmp_path, squares):
    """Nine good images of 16 squares each, on split lists."""
    for seed, name in enumerate(NAMES):
        image, label = squares(seed, SIZE)
        write(tmp_path / "raw", name, image[0], label.astype(np.uint16))
    for split, names in SPLITS.items():
        (tmp_path / "raw" / f"{split}.txt").write_text("\n".join(names))
    return tmp_path / "raw"


def write(raw, name, image=None, label=None):
    for folder, array in (("images", image), ("labels", label)):
        if array is not None:
            (raw / folder).mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(raw / folder / f"{name}.tif", array)


def read(raw, name, folder="labels"):
    return tifffile.imread(raw / folder / f"{name}.tif")


def run(raw, min_size=(16, 16), **options):
    outputs = {split: raw.parent / "out" / f"{split}.h5" for split in SPLITS}
    return outputs, prepare("folder", options, raw, outputs, min_size, 1)


def each(function, names=NAMES):
    """Return what replaces the labels of these images by `function(label)`."""

    def spoil(raw):
        for name in names:
            write(raw, name, label=function(read(raw, name)))

    return spoil


def outlines(label):
    inside = np.zeros(label.shape, bool)
    for number in range(1, label.max() + 1):
        inside |= binary_erosion(label == number)
    return np.where(inside, 0, label).astype(label.dtype)


def copy_image(raw, of, to):
    write(raw, to, image=read(raw, of, "images"))


def shuffle(raw):
    labels = [read(raw, name) for name in NAMES]
    for name, label in zip(NAMES, labels[1:] + labels[:1], strict=True):
        write(raw, name, label=label)


def noise(label):
    return np.random.default_rng(label.sum()).integers(0, 200, SIZE).astype(np.uint16)


def specks(label):
    return np.where(label % 2, np.arange(1, label.size + 1).reshape(SIZE), 0).astype(np.uint16)


def swap(raw):
    (raw / "images").rename(raw / "x")
    (raw / "labels").rename(raw / "images")
    (raw / "x").rename(raw / "labels")


MASKS = [
    "images/a0.tif, images/a1.tif, images/a2.tif and 6 more",
    "look like masks",
    "`label_regions: true`",
]
REFUSED = {
    "all labels empty": (each(np.zeros_like), ['split "train" has no object', "a0.tif", "and 2 more", "correct"]),
    "labels of a split empty": (each(np.zeros_like, NAMES[7:]), ['"test" has no object', "images/a7.tif, " "images/a8.tif"]),
    "masks of 0 and 255": (each(lambda label: np.uint8(255) * (label > 0)), [*MASKS, "144 separate regions"]),
    "masks of 0 and 1": (each(lambda label: (label > 0).astype(np.uint8)), MASKS),
    "masks of few objects": (each(lambda label: np.isin(label, (1, 8)).astype(np.uint8)), [*MASKS, "18 separate"]),
    "classes": (each(lambda label: (label > 0) + (label > 6).astype(np.uint8)), ["look like classes", "18 numbers in 9"]),
    "image and label swapped": (swap, ["look like images", "images/a0.tif", "exchanged"]),
    "labels of noise": (each(noise), ["look like images", "saved as JPEG"]),
    "one image constant": (
        lambda r: write(r, "a6", image=np.full(SIZE, 9, np.uint16)),
        ["images/a6.tif", "all pixels of the image are 9", "16 objects", "export"],
    ),
    "one image in two splits": (
        lambda r: copy_image(r, "a3", "a8"),
        ["images/a3.tif in split train", "images/a8.tif in split test", "the same image", "take one of " "them out"],
    ),
    "one image in three splits": (
        lambda r: [copy_image(r, "a3", name) for name in ("a4", "a6")],
        ["images/a3.tif in split train", "images/a6.tif in split val"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_one_sentence_and_no_file(raw, name):
    spoil, said = REFUSED[name]
    spoil(raw)
    with pytest.raises(DataError) as error:
        run(raw)
    message = str(error.value)
    assert all(part in message for part in said), message
    assert "\n" not in message
    assert not list(raw.parent.glob("out/*"))
    assert not list(raw.parent.glob("out/.*"))


def test_good_data_pass_in_silence(raw, capsys):
    outputs, summary = run(raw)
    assert capsys.readouterr().err == ""
    assert "warnings" not in summary["val"]
    assert "warnings" not in io.read_attrs(outputs["val"])


ODD = {
    "one mask among labels": (
        each(lambda label: np.uint8(255) * (label > 0), ["a4"]),
        ["images/a4.tif: numbers of the label make up several separate regions", "`label_regions: true`"],
    ),
    "one object each": (each(lambda label: (label == 5).astype(np.uint8)), ["and 6 more: each", "one object only"]),
    "inverted masks": (each(lambda label: (label == 0).astype(np.uint8)), ["one object only; " "if they " "are masks"]),
    "background is a number": (each(lambda label: label + 1), ["one object lies around all others", "set it to 0"]),
    "numbers that ran over": (
        each(lambda label: np.where(label, 1, np.arange(1, 2689, dtype=np.uint16).reshape(SIZE) // 10 % 255 + 1)),
        ["as many numbers as the type of the label can hold", "more bits"],
    ),
    "specks": (each(specks), ["most objects have 3 pixels or fewer", "resampled"]),
    "outlines": (each(outlines), ["surround more pixels than they have", "fill them"]),
    "most labels of a split empty": (each(np.zeros_like, NAMES[:3]), ["more than half", "split train", "complete"]),
    "an image twice in a split": (lambda r: copy_image(r, "a0", "a3"), ["images/a0.tif, " "images/a3.tif: " "this is one"]),
    "a label twice": (
        lambda r: write(r, "a3", label=read(r, "a8")),
        ["images/a3.tif, images/a8.tif: the labels are equal", "images/a3.tif: the image does " "not differ"],
    ),
    "labels as images": (
        lambda r: [write(r, name, image=read(r, name) * 3) for name in NAMES],
        ["and 6 more: the image is its label, drawn", "put the recorded image there"],
    ),
    "a thresholded image": (
        lambda r: write(r, "a2", image=(read(r, "a2", "images") > 140).astype(np.uint8)),
        ["images/a2.tif: the image has only two grey values"],
    ),
    "a flat image": (
        lambda r: write(r, "a2", np.full(SIZE, 3, np.uint8), np.zeros(SIZE, np.uint8)),
        ["images/a2.tif: all pixels of the image are equal"],
    ),
    "labels of other images": (shuffle, ["the image does not differ where the objects", "another image"]),
    "mirrored labels": (each(lambda label: label[::-1]), ["shifted, turned or mirrored"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_is_probably_not_meant_is_told(raw, name, capsys):
    spoil, said = ODD[name]
    spoil(raw)
    outputs, summary = run(raw)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") for line in lines)
    assert all(any(part in line for line in lines) for part in said), lines
    told = [line.removeprefix("warning: ") for line in lines]
    assert all(
        summary[split]["warnings"] == io.read_attrs(path)["warnings"] == told
        for split, path in outputs.items()
    )


def test_regions_of_masks_become_objects(raw, capsys):
    labels = {name: read(raw, name) for name in NAMES}
    for spoil in (lambda label: np.uint8(255) * (label > 0), lambda label: label > 0):
        each(spoil)(raw)
        outputs, summary = run(raw, label_regions=True)
        assert capsys.readouterr().err == ""
        for path in outputs.values():
            for sample in io.read_samples(path):
                pairs = np.unique(
                    np.stack([labels[sample.id].ravel(), sample.label.ravel()]), axis=1
                )
                assert pairs.shape[1] == 17  # 16 squares and the background, one to one
        assert sum(one["instances"] for one in summary.values()) == 144
        write(raw, "a0", label=labels["a0"])  # the second mask is made of labels
        for name in NAMES:
            write(raw, name, label=labels[name])


def test_who_says_that_labels_are_right_is_believed(raw, capsys):
    each(lambda label: (label > 0).astype(np.uint8))(raw)
    _, summary = run(raw, label_regions=False)
    assert sum(one["instances"] for one in summary.values()) == 9
    assert capsys.readouterr().err == ""


def test_a_mask_of_one_bit_names_the_option(raw):
    each(lambda label: label > 0)(raw)
    with pytest.raises(
        DataError, match=r"type bool, a mask; store it as integers.*`label_regions: " r"true`"
    ):
        run(raw)


def test_other_sources_are_warned_of_masks(tmp_path, monkeypatch, capsys, squares):
    (tmp_path / "masks.py").write_text(
        "import numpy as np\nfrom gdlib.io import Sample\n"
        "def read(root):\n"
        "    rng = np.random.default_rng(0)\n"
        "    label = np.kron(np.eye(6, dtype=np.uint8), np.ones((4, 4), np.uint8)) * "
        "np.uint8(rng.random((24, 24)) > 0)\n"
        "    label[3::4] = 0\n"
        "    one = lambda name: iter([Sample(name, rng.random((1, 24, 24)), label)])\n"
        "    return {split: one(split) for split in ('train', 'val', 'test')}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    prepare(
        "masks:read", {}, None, {split: tmp_path / f"{split}.h5" for split in SPLITS}, (16, 16), 1
    )
    assert (
        "make up several separate regions each; give each object a number of its own"
        in capsys.readouterr().err
    )


REAL = {
    "bbbc039": {},
    "celegans": {},
    "celegans, the last worm": {"overlap": "last"},
    "dsb2018": {},
    "ac34": {},
    "ac34, whole neurons": {"components": False},
    "fib25": {},
    "fib25, whole neurons": {"components": False},
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_pass_in_silence_and_their_labels_fit_no_other_way(name, catalogue):
    about = catalogue["datasets"][name.partition(",")[0]]
    folder = RAW / about["folder"]
    if not folder.is_dir():
        pytest.skip(f"no raw data in {about['folder']}; set GDLIB_RAW to their folder")
    samples = SOURCES.get(about["source"])(folder, **about.get("options", {}) | REAL[name])
    least = (8,) * len(about["patch"])
    found = [check_sample(sample, 1, least) for sample in islice(samples["val"], 8)]
    seen = [sense.look(sample, "val") for sample in found]
    sense.check_splits(seen)
    sense.check_numbers(seen, "")
    assert sense.warnings(seen, "mend") == []
    turned = [
        sense._fits(sample.image, np.ascontiguousarray(sample.label[..., ::-1, ::-1]))
        for sample in found
    ]
    assert sum(turned) <= len(turned) / 2


def test_the_catalogue_says_what_regions_are():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert "| `folder` | `label_regions` | true or false | – |" in page
    assert yaml.safe_load("label_regions: true") == {"label_regions": True}


def test_an_image_fits_its_label_only_where_it_lies(squares):
    """Shifted by more than the objects are wide, mirrored and transposed labels do not fit.

    Right ones do, darker or brighter.
    """
    for seed in range(8):
        image, label = squares(seed, (48, 48))
        for one in (image, 255 - image, np.concatenate([image, image // 3])):
            assert sense._fits(one, label)
    image, label = squares(0, (48, 48))
    wrong = [label.T, label[::-1], label[:, ::-1], np.roll(label, (20, 17), (0, 1))]
    assert sum(sense._fits(image, np.ascontiguousarray(one)) for one in wrong) <= 1
    assert sense._fits(image, np.zeros_like(label)) is None
    assert sense._fits(image[:, :9, :9], label[:9, :9]) is None


def test_enclosed_background_is_counted_by_section():
    section = np.zeros((7, 9), np.uint32)
    section[1:6, 2:7] = 1
    section[2:5, 3:6] = 0
    volume = np.stack([section, section * 0, section])
    image = np.random.default_rng(0).random((1, *volume.shape))
    assert sense.look(Sample("a", image, volume), "train").enclosed == 18
    unknown = (volume == 0) & (np.arange(9) > 4)
    assert sense.look(Sample("a", image, volume, ignore=unknown), "train").enclosed == 12
