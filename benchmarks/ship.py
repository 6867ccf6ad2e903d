"""Make a built-in network of a finished training: its weights, and in their header what people
want to know of it.

    python -m benchmarks.ship worms RUN DATA
    python -m benchmarks.ship neurons_plain RUN DATA
    python -m benchmarks.ship neurons_distilled RUN DATA --teacher "neurons_plain, seen in 8 ways" W

RUN is the folder of a run of `study=models`, DATA that of its prepared dataset. What is added to
the header: `purpose`; `data`, where the images are from; `test`, the mean score over test images;
`teacher`, where there was one: who it was, and the checksum of its file.
"""

import argparse
import csv
import json
from pathlib import Path

from gdlib import io
from gdlib.data.scale import known_sizes
from gdlib.segment.parameters import main_segmenter
from gdlib.trained import FOLDER

PURPOSES = {
    "nuclei": "cell nuclei in fluorescence images, bright on dark",
    "nuclei_fast": "cell nuclei in fluorescence images, bright on dark, in half the time",
    "worms": "C. elegans in bright field",
    "neurons": "neurons in volumes of serial-section electron microscopy",
    "neurons_distilled": "neurons in volumes of serial-section electron microscopy",
    "neurons_plain": "neurons in volumes of serial-section electron microscopy",
}
METRICS = {
    2: ("aji", "dice", "f1_50", "pq"),
    3: ("voi_split", "voi_merge", "voi", "arand"),
}


def provenance(data: Path) -> str:
    """Return where the images of a prepared dataset are from; of a joined one, of all its parts."""
    with io.open_h5(data / "train.h5") as file:
        parts = json.loads(file.attrs["options"]).get("datasets", [])
        text = str(file.attrs["provenance"])
    return " ".join(provenance(data.parent / part) for part in parts) or text


def scores(table: Path, ndim: int) -> dict[str, float]:
    """Return the means over the images of a table of metrics."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    values = {
        name: [float(row["value"]) for row in rows if row["metric"] == name]
        for name in METRICS[ndim]
    }
    counts = {len(column) for column in values.values()}
    if len(counts) != 1:
        raise ValueError(f"{table}: not every image has every metric")
    return {"images": counts.pop()} | {
        name: round(sum(column) / len(column), 4) for name, column in values.items()
    }


def main() -> None:
    """Read the arguments and write the file."""
    parser = argparse.ArgumentParser(description="make a built-in network of a training")
    parser.add_argument("name", choices=PURPOSES)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--teacher", nargs=2, metavar=("WHO", "WEIGHTS"))
    arguments = parser.parse_args()
    state, header = io.load_weights(arguments.run / "weights.safetensors")
    ndim = len(header["offsets"][0])
    header |= {"purpose": PURPOSES[arguments.name], "data": provenance(arguments.data)}
    header |= known_sizes(arguments.data / "train.h5")  # which older trainings did not write
    if arguments.teacher:
        who, weights = arguments.teacher
        header["teacher"] = {"who": who, "sha256": io.sha256(weights)}
    table = arguments.run / main_segmenter(header) / "metrics.csv"
    if table.exists():
        header["test"] = scores(table, ndim)
    FOLDER.mkdir(exist_ok=True)
    io.save_weights(FOLDER / f"{arguments.name}.safetensors", state, header)


if __name__ == "__main__":
    main()
