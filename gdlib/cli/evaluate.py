"""`gdlib evaluate`: segmentations beside their ground truth."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gdlib import io
from gdlib.evaluate.metrics import METRICS
from gdlib.evaluate.scores import COUNTS
from gdlib.io import failures, outputs
from gdlib.limits import place


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib evaluate` to the command line."""
    evaluate = commands.add_parser(
        "evaluate",
        help="compare segmentations with the ground truth",
        description="Compare label images with ground truth of the same file name; every metric "
        "for every image, as CSV. The means are over the images with objects; those "
        "without have a row of means of their own, for all that their metrics tell is "
        "whether anything was found. If an image cannot be compared, its row is "
        "empty, there are no means, and the exit status is 1. " + _metric_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument(
        "labels",
        help="ground truth: a PNG or TIFF file, volume.h5:name/of/dataset, image.zarr:labels/NAME, "
        "or a folder of files",
    )
    evaluate.add_argument("segmentations", help="the same for what is to be judged")
    evaluate.add_argument(
        "--out", type=place, metavar="CSV", help="where to write (default: the screen)"
    )
    evaluate.add_argument("--overwrite", action="store_true", help=outputs.HELP)
    evaluate.set_defaults(function=_evaluate)


def _metric_help() -> str:
    lines = [f"  {key:13} {m.definition} ({m.better} is better)" for key, m in METRICS.items()]
    counts = [f"  {key:13} {definition}" for key, (definition, _) in COUNTS.items()]
    return "\n\nmetrics:\n" + "\n".join(lines) + "\n\ncounts:\n" + "\n".join(counts)


@contextlib.contextmanager
def _open_label(path: Path | str) -> Iterator[Any]:
    from gdlib.data.files import open_volume, read_label
    from gdlib.data.omezarr import open_zarr, split_zarr_path

    if not io.is_hdf5(path) and split_zarr_path(path):
        image = open_zarr(path)
        yield image if image.dtype.kind != "f" and "C" not in image.letters else read_label(path)
    elif io.is_hdf5(path):
        with open_volume(path) as volume:
            # that may be whole numbers
            yield volume if volume.dtype.kind != "f" else read_label(path)
    else:
        yield read_label(path)


def _evaluate(arguments: argparse.Namespace) -> None:
    from gdlib.data.files import find_files, is_folder, spelt
    from gdlib.data.omezarr import split_zarr_path

    def files(path: str) -> dict[str, Path | str]:
        if is_folder(path):
            return find_files(Path(path))
        if not io.is_hdf5(path) and (split := split_zarr_path(path)):
            return {split[0].stem: path}
        io.check_file(file := io.split_h5_path(path)[0])
        return {file.stem: path}

    labels, segmentations = files(arguments.labels), files(arguments.segmentations)
    if not any(map(is_folder, (arguments.labels, arguments.segmentations))):
        segmentations = dict(zip(labels, segmentations.values(), strict=True))
    if not labels.keys() & segmentations.keys():
        raise io.DataError(
            f"no name of {arguments.labels} ({next(iter(labels))}, ...) is one of "
            f"{arguments.segmentations} ({next(iter(segmentations))}, ...); give the images of "
            "both the same names"
        )
    if arguments.out:
        inputs = [io.split_h5_path(path)[0] for path in (*labels.values(), *segmentations.values())]
        out = outputs.Output(arguments.out, outputs.has_columns("sample", *METRICS))
        outputs.check([out], inputs, overwrite=arguments.overwrite)
    rows, failed = [], failures.Failures()
    odd: list[Path | str] = []  # what looks like an image
    for name, path in labels.items():
        rows.append({"sample": name})
        with failed.noted():
            if name not in segmentations:
                place = f"{arguments.segmentations}{spelt(name, segmentations)}"
                raise io.DataError(
                    f'{path}: there is no segmentation called "{name}" in {place}; add it'
                )
            rows[-1] |= _scores(path, segmentations[name], odd)
    keys = list(max(rows, key=len))
    table = [[row.get(key, "") for key in keys] for row in rows]
    if not failed.errors:  # the mean of some is not that of all
        for name, has_objects in (("mean of images without objects", False), ("mean", True)):
            if part := [row for row in rows if (row["objects"] > 0) == has_objects]:
                table.append(
                    [name, *(sum(row[key] for row in part) / len(part) for key in keys[1:])]
                )
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        print(
            f"warning: {odd[0]}{more}: this looks like an image and not like labels, its numbers "
            "lie about in specks of a few pixels; see whether you gave the labels first and the "
            "segmentations after them, and no images",
            file=sys.stderr,
        )
    what = "images could not be compared"
    if len(failed.errors) < len(rows):
        _write_table(arguments.out, keys, table)
        what += ": their scores are left empty, and there are no means"
    failed.tell(len(rows), what)


def _scores(path: Path | str, other: Path | str, odd: list[Path | str]) -> dict[str, float]:
    """Compare two files; those that look like images are added to `odd`."""
    from gdlib.data.axes import without_single_axes
    from gdlib.data.sense import is_like_an_image
    from gdlib.evaluate.scores import of_image

    with _open_label(path) as label, _open_label(other) as segmentation:
        if label.shape != segmentation.shape:
            label, segmentation = without_single_axes(label), without_single_axes(segmentation)
        try:
            scores = of_image(label, segmentation)
            both = ((path, label), (other, segmentation))
            odd += [name for name, array in both if is_like_an_image(array)]
            return scores
        except io.DataError:  # which names the one that cannot be read
            raise
        except ValueError as error:
            raise io.DataError(f"{path} and {other}: {error}") from None


def _write_table(out: Path | None, keys: list[str], table: list[list[Any]]) -> None:
    import csv

    if out:
        io.write_rows(out, keys, table)
    else:
        writer = csv.writer(sys.stdout)
        writer.writerow(keys)
        writer.writerows(
            [[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in table]
        )
