"""Raw data: what is there, what may be fetched, and one message about all that is missing, before anything runs. No rules."""

RAW = os.path.normpath(CFG.raw_folders[0])
# What gdlib/data/download.py says of the files that it fetched.
RECORD = ".download.json"


def parts(dataset):
    """The datasets that are joined to this one, which are prepared first."""
    data = CFG.datasets[dataset]
    return list(data.options.get("datasets", ())) if data.source == "joined" else []


def is_there(dataset):
    """Are there raw data, or prepared ones, which are used as they are?"""
    try:
        return bool(CFG.raw_folder(dataset)) or CFG.datasets[dataset].folder is None
    except ConfigError:
        return os.path.exists(f"{DATA}/test.h5".format(dataset=dataset))


def advice(lacking):
    """How to get the data of these datasets, a line for each, and how to go on with the rest of the study."""
    there = [
        dataset
        for dataset in STUDY.datasets
        if not set(parts(dataset) or [dataset]).intersection(lacking)
    ]
    can_come = [dataset for dataset in lacking if CFG.datasets[dataset].download]
    start = f"--config study={CFG.study}"
    lines = [
        f'config: study "{CFG.study}" has no data of {", ".join(lacking)} in {" or ".join(CFG.raw_folders)}:'
    ]
    lines += [f"  {dataset}: {CFG.how_to_get(dataset)}" for dataset in lacking]
    if can_come:
        names = [name for name in STUDY.datasets if name in there + can_come]
        only = f" only={','.join(names)}" * (
            CFG.left_out != [] or len(names) < len(STUDY.datasets)
        )
        lines.append(
            f"To download {', '.join(can_come)} first: {start} download=true{only}"
        )
    if there:
        come = " download=true" * any(dataset in MISSING for dataset in there)
        lines.append(f"To go on with the rest: {start}{come} only={','.join(there)}")
    return "\n".join(lines)


NEEDED = dict.fromkeys(
    name for dataset in STUDY.datasets for name in parts(dataset) or [dataset]
)
MISSING = [dataset for dataset in NEEDED if not is_there(dataset)]
FETCHED = {
    CFG.datasets[dataset].folder: dataset
    for dataset in MISSING
    if CFG.download and CFG.datasets[dataset].download
}
LACKING = [name for name in MISSING if CFG.datasets[name].folder not in FETCHED]
# Snakemake knows only later whether it plans or runs.
PLANNING = any(
    re.fullmatch("--dry-?run|-[a-zA-Z]*n[a-zA-Z]*", word) for word in sys.argv
)
if LACKING and not PLANNING:
    sys.exit(advice(LACKING))
if LACKING:
    print(f"{advice(LACKING)}\nPlanned as if all were there.", file=sys.stderr)


def unwritable(*folders):
    """The first of these folders, or of those in which they will be made, that is closed to us."""
    for folder in map(os.path.abspath, folders):
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            return os.path.relpath(folder)


READING = PLANNING or any(word.startswith(("--report", "--lint")) for word in sys.argv)
if not READING and (closed := unwritable(".snakemake", LOGS, RESULTS)):
    sys.exit(
        f"{closed}: this folder cannot be written; make it writable, or start with --directory and another one"
    )
if CFG.left_out:
    print(f"Left out of study {CFG.study}: {', '.join(CFG.left_out)}", file=sys.stderr)


def raw_root(dataset):
    """Where the raw files of a dataset are, or will be."""
    if parts(dataset):
        return os.path.dirname(DATA)
    to_come = CFG.datasets[dataset].folder in FETCHED or dataset in LACKING
    return CFG.new_folder(dataset) if to_come else CFG.raw_folder(dataset)


def raw_files(wildcards):
    """The record of what was downloaded, which stands for all of it, or else everything below the raw folder.

    Hidden files are left out, file browsers leave them there.
    """
    if names := parts(wildcards.dataset):
        splits = ("train", "val", "test")
        return [
            f"{DATA}/{split}.h5".format(dataset=name)
            for name in names
            for split in splits
        ]
    if wildcards.dataset in LACKING:
        return []
    try:
        root = raw_root(wildcards.dataset)
    except ConfigError as error:
        return str(error)  # no such file: the prepared ones are used as they are
    if root is None:
        return []
    if CFG.datasets[wildcards.dataset].folder in FETCHED or (root / RECORD).exists():
        return str(root / RECORD)
    # `rglob` does not look into links, as which the folders of images may be there.
    places = [root, *(path for path in root.iterdir() if path.is_symlink())]
    files = (file for place in places for file in place.rglob("[!.]*"))
    return sorted(str(path) for path in files if path.is_file())
