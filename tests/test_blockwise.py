"""A volume in blocks against the same volume in one piece: exact where the affinities are, within a
tolerance where not."""

import json
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from conftest import OFFSETS

from gdlib import io
from gdlib.cli.main import main
from gdlib.evaluate.metrics import evaluate
from gdlib.segment import segmenters
from gdlib.volumes import jobs, stitch
from gdlib.volumes.grid import Grid, options

ROOT = Path(__file__).parents[1]
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
TOLERANCE = {"arand": 0.02, "voi": 0.1}  # of blocks to one piece, where affinities are noisy


def neurites(shape, count=14, seed=0):
    """Processes that run through the volume side by side, along z, with a wall between them: label
    ([Z,] Y, X)."""
    rng = np.random.default_rng(seed)
    depth, plane = (shape[0], shape[1:]) if len(shape) == 3 else (1, shape)
    place = rng.uniform(0, 1, (count, 2)) * plane
    label = np.zeros((depth, *plane), np.uint32)
    y, x = np.indices(plane)
    for z in range(depth):
        place += rng.normal(0, 0.7, place.shape)
        distance = np.hypot(y - place[:, :1, None], x - place[:, 1:, None])
        first, second = np.sort(distance, 0)[:2]
        label[z] = np.where(second - first > 1.5, distance.argmin(0) + 1, 0)
    return segmentation_of(label.reshape(shape))


def segmentation_of(label):
    """Split what is not connected."""
    from gdlib.data.files import split_components

    return split_components(label)


def affinities(label, offsets, noise=0.0, seed=0):
    """Return affinity (K, ...) and foreground uint8 of a label.

    Pixels beyond the border are like none.
    """
    rng = np.random.default_rng(seed)
    out = np.zeros((len(offsets), *label.shape), np.float32)
    for k, offset in enumerate(offsets):
        here = tuple(
            slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, label.shape, strict=True)
        )
        there = tuple(
            slice(max(0, o), n - max(0, -o)) for o, n in zip(offset, label.shape, strict=True)
        )
        out[k][here] = (label[here] == label[there]) & (label[here] > 0)
    out += rng.normal(0, noise, out.shape) if noise else 0
    return (np.clip(out, 0, 1) * 255).round().astype(np.uint8), ((label > 0) * 255).astype(np.uint8)


def run_blocks(folder, label_affinity, foreground, grid, segmenter, **parameters):
    """Do all steps after the prediction, whose files are written here, and return the joined
    label."""
    offsets = OFFSETS[foreground.ndim]
    folder.mkdir(exist_ok=True)
    image = folder / "image.h5"
    with h5py.File(image, "w") as file:
        file.create_dataset("volumes/raw", data=foreground).attrs["resolution"] = [40.0, 4.0, 4.0][
            -foreground.ndim :
        ]
    plan = {
        "image": f"{image}:volumes/raw",
        "shape": grid.shape,
        "block": grid.block,
        "segmenter": segmenter,
    }
    plan = json.loads(json.dumps({**plan, "offsets": offsets}))
    settings = {
        "overlap": list(grid.overlap),
        "parameters": segmenters.defaults(segmenter, foreground.ndim) | parameters,
    }
    for name in grid.names:
        core = grid.core(name)
        with io.create_h5(
            folder / f"predictions/{name}.h5", made_for=jobs._fingerprint(plan)
        ) as file:
            io.put(file, "affinity", label_affinity[(slice(None), *core)])
            io.put(file, "foreground", foreground[core])
    for name in reversed(grid.names):  # the order of jobs does not matter
        jobs.segment(plan, name, folder / "predictions", folder / f"segments/{name}.h5", settings)
    for name in grid.names:
        jobs.match(plan, name, folder / "segments", folder / f"matches/{name}.h5", grid.overlap)
    minimum = settings["parameters"]["min_size"]
    count = jobs.number(
        plan, folder / "segments", folder / "matches", folder / "numbers.h5", minimum
    )
    for name in grid.names:
        jobs.relabel(
            plan,
            name,
            folder / "segments",
            folder / "numbers.h5",
            folder / f"labels/{name}.h5",
            grid.overlap,
        )
    jobs.join(plan, folder / "labels", folder / "labels.h5", settings)
    with io.open_h5(folder / "labels.h5") as file:
        label = file["volumes/raw"][()]
        assert file["volumes/raw"].attrs["resolution"][-1] == 4.0
    tiles = jobs.tiles(plan, folder / "labels", (64, 32))
    tifffile.imwrite(folder / "labels.tif", tiles, shape=grid.shape, dtype=np.uint32, tile=(64, 32))
    assert np.array_equal(tifffile.imread(folder / "labels.tif"), label)
    assert label.dtype == np.uint32
    assert np.array_equal(np.unique(label[label > 0]), np.arange(1, count + 1))
    return label


def assert_same(label, other):
    """Two labels are the same but for the numbers of their objects."""
    assert label.shape == other.shape
    pairs = np.unique(np.stack([label.ravel(), other.ravel()]), axis=1)
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    assert np.array_equal(label == 0, other == 0)


@pytest.mark.parametrize(
    ("shape", "block", "counts"),
    [
        ((100, 448, 448), (32, 128, 256), (4, 4, 2)),
        ((20, 70, 81), (8, 24, 24), (3, 3, 4)),
        ((1, 70, 81), (8, 32, 32), (1, 3, 3)),
        ((700, 300), (256, 256), (3, 2)),
        ((5, 5), (4096, 4096), (1, 1)),
    ],
)
def test_blocks_cover_every_pixel_once(shape, block, counts):
    grid = Grid(shape, block, (3,) * len(shape))
    seen = np.zeros(shape, np.uint8)
    for name in grid.names:
        core, around = grid.core(name), grid.around(name)
        seen[core] += 1
        # Chunks of the result belong to one block each.
        assert all(s.start % c == 0 for s, c in zip(core, grid.chunk, strict=True))
        inside = np.zeros(shape, bool)
        inside[around] = True
        reached = {other for other in grid.names if inside[grid.core(other)].any()}
        assert set(grid.touching(name)) == reached
        for axis, other in grid.following(name).items():
            assert grid.core(other)[axis].start == core[axis].stop
            assert other in reached
    assert (seen == 1).all()
    assert len(grid.names) == np.prod(counts)
    assert grid.names[-1] == "-".join(str(n - 1) for n in counts)
    assert all(side <= limit for side, limit in zip(grid.sides, block, strict=True))


def test_a_block_reaches_over_its_own_pixels_by_the_overlap_and_not_over_the_volume():
    grid = Grid((20, 70, 70), (16, 24, 24), (1, 2, 3))
    assert grid.core("0-1-2") == (slice(0, 16), slice(24, 48), slice(48, 70))
    assert grid.around("0-1-2") == (slice(0, 17), slice(22, 50), slice(45, 70))


@pytest.mark.parametrize("name", ["9-0-0", "0-0", "a", "0-0-0-0", ""])
def test_a_block_that_is_not_there(name):
    with pytest.raises(ValueError, match="the last one is 1-2-2"):
        Grid((20, 70, 70), (16, 24, 24), (1, 1, 1)).core(name)


def test_pieces_that_are_the_same():
    a, b = np.zeros((2, 12, 30), np.uint32)
    # One object of the first block is two of the second: it is joined beyond the place where both
    # look.
    a[1:4] = a[6:9] = 7
    b[1:4], b[6:8] = 1, 2
    assert stitch.same(a, b, 1, 15).tolist() == [[7, 1, 3], [7, 2, 2]]
    # Neither is half of the other.
    a[1:9], b[1:9] = 7, 0
    b[7:12] = 1
    assert stitch.same(a, b, 1, 15).tolist() == []
    # What does not cross the face is nobody's concern.
    b[1:9] = 1
    assert stitch.same(a, b, 1, 15).tolist() == [[7, 1, 8]]
    a[:, 15:] = 0
    assert stitch.same(a, b, 1, 15).tolist() == []
    assert stitch.same(np.zeros_like(a), b, 1, 15).shape == (0, 3)


def test_contacts():
    label = np.array([[1, 1, 0, 3], [2, 2, 2, 3], [2, 0, 5, 5]], np.uint32)
    assert stitch.contacts(label).tolist() == [[1, 2, 2], [2, 3, 1], [2, 5, 1], [3, 5, 1]]
    assert stitch.contacts(np.stack([label, label + 5]))[:, 2].sum() > 12
    assert stitch.contacts(label * 0).shape == (0, 3)


def test_one_block_that_joins_two_objects_is_outvoted():
    # Segments 1 and 2 touch in one block, 4 and 5 in the next, and 3 is both of them in the block
    # between.
    attracted = np.array([[1, 3, 9], [2, 3, 4], [3, 4, 9], [3, 5, 4], [6, 7, 1]])
    repelled = np.array([[1, 2, 20], [4, 5, 20]])
    group = np.array([0, 1, 1, 1, 1, 1, 2, 2])
    divided = stitch.divided(group, attracted, repelled)
    assert divided[1] == divided[3] == divided[4]
    assert len(np.unique(divided)) == 5
    assert divided[6] == divided[7]
    assert stitch.divided(group, attracted, np.empty((0, 3), np.int64)) is group


@pytest.mark.parametrize("segmenter", ["mutex_watershed", "waterz", "multicut"])
@pytest.mark.parametrize(
    ("shape", "block", "overlap"),
    [
        ((20, 70, 81), (8, 32, 32), (2, 8, 8)),
        ((1, 90, 101), (8, 32, 32), (2, 8, 8)),
        ((90, 101), (32, 32), (8, 8)),
    ],
    ids=["3D", "one section", "2D"],
)
def test_exact_affinities_give_the_result_of_one_piece(segmenter, shape, block, overlap, tmp_path):
    if segmenter == "waterz":
        pytest.importorskip("waterz")
    truth = neurites(shape)
    affinity, foreground = affinities(truth, OFFSETS[len(shape)])
    parameters = {"foreground_threshold": 0.5, "min_fragment": 0, "min_size": 30}
    parameters |= {"stride": 1} if segmenter == "mutex_watershed" else {}
    one = segmenters.segment(affinity, foreground, OFFSETS[len(shape)], segmenter, **parameters)
    grid = Grid(shape, block, overlap)
    label = run_blocks(tmp_path, affinity, foreground, grid, segmenter, **parameters)
    assert_same(label, one)
    objects = [len(np.unique(label[grid.core(name)])) for name in grid.names]
    assert sum(objects) > 2 * label.max()  # they are in several blocks each


def test_objects_through_four_blocks_and_round_a_corner(tmp_path):
    truth = np.zeros((64, 64), np.uint32)
    truth[28:36, 28:36] = 1  # a corner of four blocks
    # out of a block, round, and back to its face
    truth[4:8, 4:60], truth[4:20, 56:60], truth[16:20, 36:60] = 2, 2, 2
    truth[44:60, 4:60], truth[48:56, 8:56] = 3, 0  # a ring
    truth[50:54, 10:54] = 4  # inside of the ring
    truth[4:8, 4:8] = 0  # an end
    affinity, foreground = affinities(truth, OFFSETS[2])
    grid = Grid(truth.shape, (32, 32), (6, 6))
    assert {name for name in grid.names if (truth[grid.core(name)] == 1).any()} == set(grid.names)
    label = run_blocks(tmp_path, affinity, foreground, grid, "mutex_watershed", min_fragment=0)
    assert_same(label, truth)


def test_empty_blocks_and_small_objects(tmp_path):
    truth = np.zeros((64, 96), np.uint32)
    truth[10:20, 28:36], truth[30:34, 31:33] = 1, 2  # each of two blocks, or four
    affinity, foreground = affinities(truth, OFFSETS[2])
    grid = Grid(truth.shape, (32, 32), (4, 4))
    label = run_blocks(
        tmp_path / "all", affinity, foreground, grid, "mutex_watershed", min_fragment=0, min_size=8
    )
    assert_same(label, truth)
    # Half of it is smaller than that, it is not.
    label = run_blocks(
        tmp_path / "large",
        affinity,
        foreground,
        grid,
        "mutex_watershed",
        min_fragment=0,
        min_size=9,
    )
    assert_same(label, np.where(truth == 1, 1, 0))
    nothing = run_blocks(tmp_path / "none", affinity * 0, foreground * 0, grid, "multicut")
    assert not nothing.any()


def test_fragments_cut_by_a_block_are_not_taken_for_small(tmp_path):
    truth = np.zeros((40, 64), np.uint32)
    # of the last one, 32 to 40 is another block's
    truth[8:20, :], truth[20:30, :40], truth[20:30, 40:] = 1, 2, 3
    affinity, foreground = affinities(truth, OFFSETS[2])
    grid = Grid(truth.shape, (64, 32), (1, 12))
    parameters = {"min_fragment": 100, "min_size": 0}
    one = segmenters.segment(affinity, foreground, OFFSETS[2], "mutex_watershed", **parameters)
    assert one.max() == 3
    assert_same(
        run_blocks(tmp_path / "a", affinity, foreground, grid, "mutex_watershed", **parameters), one
    )
    truth[22:26, 10:14] = 4  # this one is small, and goes to what is around it
    affinity, foreground = affinities(truth, OFFSETS[2])
    one = segmenters.segment(affinity, foreground, OFFSETS[2], "mutex_watershed", **parameters)
    assert one.max() == 3
    assert_same(
        run_blocks(tmp_path / "b", affinity, foreground, grid, "mutex_watershed", **parameters), one
    )


@pytest.mark.parametrize("segmenter", ["mutex_watershed", "waterz", "multicut"])
def test_noisy_affinities_stay_within_the_tolerance(segmenter, tmp_path):
    if segmenter == "waterz":
        pytest.importorskip("waterz")
    truth = neurites((24, 96, 96), count=20)
    affinity, foreground = affinities(truth, OFFSETS[3], noise=0.25)
    parameters = {"foreground_threshold": 0.5, "min_fragment": 50, "min_size": 20}
    one = segmenters.segment(affinity, foreground, OFFSETS[3], segmenter, **parameters)
    grid = Grid(truth.shape, (12, 48, 48), (4, 12, 12))
    label = run_blocks(tmp_path, affinity, foreground, grid, segmenter, **parameters)
    scores, ours, theirs = evaluate(one, label), evaluate(truth, label), evaluate(truth, one)
    for metric, limit in TOLERANCE.items():
        assert scores[metric] < limit
        assert abs(ours[metric] - theirs[metric]) < limit


def test_what_was_made_for_other_settings_is_an_error(tmp_path):
    truth = neurites((64, 64))
    affinity, foreground = affinities(truth, OFFSETS[2])
    grid = Grid(truth.shape, (32, 32), (8, 8))
    run_blocks(tmp_path, affinity, foreground, grid, "mutex_watershed")
    with io.open_h5(tmp_path / "labels.h5") as file:
        plan = {key: json.loads(file.attrs[key]) for key in ("shape", "block", "offsets")}
        plan |= {key: file.attrs[key] for key in ("image", "segmenter")}
    settings = {
        "overlap": [8, 8],
        "parameters": segmenters.defaults("mutex_watershed", 2) | {"min_size": 7},
    }
    other = tmp_path / "segments" / "0-0.h5"
    jobs.segment(plan, "0-0", tmp_path / "predictions", other, settings)
    for step in (
        lambda: jobs.match(plan, "0-0", tmp_path / "segments", tmp_path / "m.h5", [8, 8]),
        lambda: jobs.number(
            plan, tmp_path / "segments", tmp_path / "matches", tmp_path / "n.h5", 0
        ),
        lambda: jobs.relabel(
            plan, "0-0", tmp_path / "segments", tmp_path / "numbers.h5", tmp_path / "l.h5", [8, 8]
        ),
        lambda: jobs.segment(
            plan | {"offsets": plan["offsets"][:2]},
            "0-0",
            tmp_path / "predictions",
            tmp_path / "s.h5",
            settings,
        ),
    ):
        with pytest.raises(
            io.DataError, match=r"\.h5: it was made for another plan or with other " r"settings"
        ):
            step()
    assert not [path for path in tmp_path.iterdir() if path.stem in "mnls"]  # nothing half-written


@pytest.fixture(scope="module")
def volume(tmp_path_factory, squares):
    """Return an HDF5 file with an image of squares, `image:main`."""
    path = tmp_path_factory.mktemp("volume") / "image.h5"
    image, _ = squares(3, shape=(100, 90))
    with h5py.File(path, "w") as file:
        file["main"] = image[0]
    return path


def config_of(volume, teacher, out, **more):
    return {
        "input": f"{volume}:main",
        "model": str(teacher),
        "out": str(out),
        "block": "40x90",
        "overlap": "16",
        **more,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imput": "a"}, 'there is no option "imput".*input'),
        ({"out": ""}, "out is missing"),
        ({"input": "nowhere.h5:main"}, "nowhere.h5: the file is missing"),
        ({"input": "stack.tif"}, "stack.tif: blocks can be read from HDF5 and OME-Zarr alone"),
        ({"block": "64x32x32"}, "block: 64x32x32 is not one side, or 2"),
        ({"block": "64xa"}, "block: 64xa is not one side"),
        ({"overlap": 0}, "overlap: 0 is not one side"),
        ({"segmenter": "mutexx"}, 'there is no segmenter "mutexx"'),
        ({"segmenter": "mutex_watershed_masked"}, "needs the foreground of a ground truth"),
        ({"parameters": {"min_sise": 3}}, 'no parameter "min_sise".*min_size'),
        (
            {"parameters": {"min_size": "many"}},
            "min_size of mutex_watershed must be a whole number of at least 0 .got .many",
        ),
    ],
)
def test_a_mistake_in_the_options_is_one_sentence(change, message, volume, teacher):
    with pytest.raises(ValueError, match=message) as error:
        options(config_of(volume, teacher, "out") | change)
    assert "\n" not in str(error.value)


def test_options_are_completed(volume, teacher):
    chosen = options(
        {"input": str(volume), "model": teacher, "out": "out", "parameters": {"min_size": 3}}
    )
    tuned = io.read_header(teacher)["segmentation"]["mutex_watershed"]
    assert chosen["parameters"] == tuned | {"min_size": 3}
    assert chosen["grid"].names == ["0-0"]


def test_the_grid_of_an_image_has_no_axes_of_one_pixel(volume, teacher, tmp_path):
    with h5py.File(volume) as image, h5py.File(tmp_path / "more.h5", "w") as file:
        file["main"] = image["main"][()].reshape(1, 100, 1, 90)
    assert options(config_of(tmp_path / "more.h5", teacher, "out"))["grid"].shape == (100, 90)


def test_predictions_of_blocks_are_those_of_the_image(volume, teacher, tmp_path, monkeypatch):
    import torch

    from gdlib.predict.predictor import Predictor

    monkeypatch.setattr("gdlib.devices.choose_precision", lambda name, device: torch.float32)
    plan_file, weights = tmp_path / "plan.json", ["--weights", str(teacher)]
    step = ["step", "plan-volume", "--image", f"{volume}:main", *weights, "--segmenter"]
    assert main([*step, "mutex_watershed", "--block", "[64,32]", "--out", str(plan_file)]) == 0
    plan = json.loads(plan_file.read_text())
    grid = Grid(tuple(plan["shape"]), tuple(plan["block"]), (16, 16))
    with h5py.File(volume) as file:
        whole = Predictor.load(teacher)(file["main"][()][None])
    for name in grid.names:
        out = tmp_path / f"{name}.h5"
        block = [
            "step",
            "predict-block",
            "--plan",
            str(plan_file),
            "--name",
            name,
            *weights,
            "--out",
            str(out),
        ]
        assert main([*block, "--device", "cpu"]) == 0
        with io.open_h5(out) as file:
            for key, expected in (("affinity", whole.affinity), ("foreground", whole.foreground)):
                expected = expected[(..., *grid.core(name))]
                # Sums over an image of another size may round differently: at most a step of 1 /
                # 255.
                assert np.abs(file[key][()].astype(int) - expected).max() <= 1
    # What only nearest neighbours are asked of is predicted for them alone.
    assert main([*step, "multicut", "--block", "[64,32]", "--out", str(plan_file)]) == 0
    assert len(json.loads(plan_file.read_text())["offsets"]) == 2


def test_a_plan_for_other_files(volume, teacher, tmp_path, capsys):
    plan_file, out = tmp_path / "plan.json", str(tmp_path / "out.h5")
    moved = tmp_path / "image.h5"
    moved.write_bytes(volume.read_bytes())
    weights = ["--weights", str(teacher)]
    step = [
        "step",
        "plan-volume",
        "--image",
        str(moved),
        *weights,
        "--segmenter",
        "multicut",
        "--block",
        "[64,32]",
    ]
    assert main([*step, "--out", str(plan_file)]) == 0
    block = [
        "step",
        "predict-block",
        "--plan",
        str(plan_file),
        "--name",
        "0-0",
        *weights,
        "--out",
        out,
    ]
    os.utime(moved, (1, 1))
    assert main(block) == 1
    assert "the file has changed since the plan was made" in capsys.readouterr().err
    plan_file.write_text(json.dumps(json.loads(plan_file.read_text()) | {"weights_sha256": "0"}))
    assert main(block) == 1
    assert "these are not the weights of the plan" in capsys.readouterr().err
    plan_file.write_text("{")
    assert main(block) == 1
    assert "not a readable plan" in capsys.readouterr().err
    assert not Path(out).exists()
