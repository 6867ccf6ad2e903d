"""What a study runs: questions of the workflow to the configuration, and which files of the package
each step depends on.

Snakemake runs again what depends on an edit because it compares two things: the part of the
configuration that a job gets, and the files that it reads, code among them. Both are said here, so
that a test can ask without Snakemake.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from gdlib import registry
from gdlib.config.catalogue import TEACHER, Config
from gdlib.config.sections import RunSpec
from gdlib.segment.parameters import is_masked

Run = tuple[str, str, str, int]  # dataset, network, method, seed


class Step(NamedTuple):
    """Where the code of a step is, and what of all that it imports does not matter for what it
    makes.
    """

    files: tuple[str, ...]
    without: tuple[str, ...] = ()


NUMBERS = ("evaluate/metrics.py", "evaluate/scores.py")
# Files are relative to the package. What judges while a network is trained is code of the steps
# that use it on test images.
STEPS = {
    "prepare": Step(("data/prepare.py",)),
    "join": Step(("train/join.py",), ("kernels/fused.py",)),
    "ask": Step(("train/ask.py",), ("kernels/fused.py",)),  # no loss is computed
    "label": Step(("train/label.py",), ("kernels/fused.py",)),
    "train": Step(("train/loop.py",), ("predict/predictor.py", "train/validator.py", *NUMBERS)),
    "predict": Step(("predict/files.py", "predict/predictor.py"), ("kernels/fused.py",)),
    "profile": Step(("predict/cost.py", "predict/files.py"), ("kernels/fused.py",)),
    "segment": Step(("segment/segmenters.py", "limits.py")),
    "evaluate": Step(("evaluate/scores.py",)),
    "baselines": Step(("evaluate/trivial.py",)),
    "report": Step(("report/**/*.py",), NUMBERS),  # names of metrics; their numbers are in files
}
BANK = "distill/bank.py"  # matters where a term compares with other images


class Plan:
    """Questions to a configuration about its selected study.

    Args:
        config: the configuration.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.study = config.selected
        datasets = self.study.datasets
        # Of the study on all its datasets, in the order of the configuration.
        self.methods = list(
            dict.fromkeys(m for dataset in datasets for m in config.methods_of(dataset))
        )
        self.volumes = [dataset for dataset in datasets if config.datasets[dataset].ndim == 3]
        self.runs: list[Run] = config.runs()
        self._specs: dict[Run, RunSpec] = {}

    # Runs

    def runs_on(self, dataset: str) -> list[Run]:
        """Return the runs of the study on a dataset."""
        return [run for run in self.runs if run[0] == dataset]

    def trained(self, runs: Iterable[Run]) -> list[Run]:
        """Return those of these runs that are trained here, and not given or made of others."""
        networks = self.config.teachers | self.config.students
        return [run for run in runs if not (networks[run[1]].weights or networks[run[1]].members)]

    def members_of(self, dataset: str, teacher: str) -> list[Run]:
        """Return the runs of the members of an ensemble."""
        return [(dataset, name, TEACHER, seed) for name, seed in self.config.members(teacher)]

    def shown_on(self, dataset: str) -> list[Run]:
        """Return the runs that stand for all in figures of images: the teacher and some methods of
        the first student.
        """
        study, config = self.study, self.config
        methods = [method for method in config.plot.panel_methods if method in study.methods]
        teacher = (dataset, config.teacher_of(dataset), TEACHER, study.teacher_seeds[0])
        students = config.students_of(dataset)[:1]
        return [
            teacher,
            *(
                (dataset, student, method, study.seeds[0])
                for student in students
                for method in methods
            ),
        ]

    def networks_of(self, dataset: str) -> list[str]:
        """Return the teachers of a dataset, with members of ensembles, and its students."""
        teachers = [run[1] for run in self.runs_on(dataset) if run[2] == TEACHER]
        return list(dict.fromkeys([*teachers, *self.config.students_of(dataset)]))

    def teacher_runs(self, dataset: str, teacher: str) -> list[Run]:
        """Return the runs of a teacher, the one that students learn from first."""
        return self.config.teacher_runs(dataset, teacher)

    # What a training depends on

    def spec_of(self, run: Run) -> RunSpec:
        """Return all that the training of a run needs to know."""
        if run not in self._specs:
            self._specs[run] = self.config.run(*run)
        return self._specs[run]

    def train_spec(self, run: Run) -> dict[str, Any]:
        """Return what a training depends on.

        The memory bank, and how a teacher is asked, only where a term needs it; unlabelled images
        only where it sees some.
        """
        spec = self.spec_of(run).model_dump(mode="json")
        if not self.unlabelled_of(run):
            del spec["recipe"]["unlabelled"]
        if not spec["terms"]:
            del spec["recipe"]["teacher"]
        if not any(term["memory"] for term in spec["terms"]):
            del spec["recipe"]["bank"]
        return spec

    def unlabelled_of(self, run: Run) -> str | None:
        """Return whose instances a run sees in unlabelled images; see `Config.unlabelled_of`."""
        return self.config.unlabelled_of(run[0], run[2])

    def labelling(self, dataset: str) -> dict[str, Any]:
        """Return how a teacher's instances in unlabelled images are found, and what it must be sure
        of: the dataset's first segmenter that does without the true foreground, its fixed
        parameters, and `sure`.
        """
        data = self.config.datasets[dataset]
        segmenter = next(one for one in data.segmenters if not is_masked(one))
        recipe = self.config.recipe(self.config.study, dataset, "student")
        return {
            "segmenter": segmenter,
            "parameters": data.segmentation.get(segmenter, {}),
            "sure": recipe.unlabelled.sure,
        }

    def parts_of(self, method: str) -> list[str]:
        """Return what its terms compare of a teacher's output: the embedding, with the foreground,
        and feature maps.
        """
        found: set[str] = set()
        for term in self.config.method(method).terms:
            own = {} if ":" in term.term else registry.TERMS.parameters(term.term)
            found |= {*((own | term.options).get("levels") or ())}
            found |= {*term.level} if isinstance(term.level, tuple) else {term.level or "embedding"}
        return sorted(found)

    # Which code it is

    def prepare_code(self, dataset: str) -> list[str]:
        """Return what reads a dataset, and the published lists of its splits."""
        source = self.config.datasets[dataset].source
        lists = (registry.PACKAGE / "data" / "splits" / source).rglob("*.txt")
        found = (path.relative_to(registry.PACKAGE).as_posix() for path in lists)
        return [*code("prepare", registry.SOURCES.file(source)), *sorted(found)]

    def train_code(self, run: Run) -> list[str]:
        """Return what trains: the loop, the network and the terms of a run, but no other network
        and no other term.
        """
        spec = self.spec_of(run)
        terms = sorted({term.term for term in spec.all_terms})
        without = () if any(term.memory for term in spec.terms) else (BANK,)
        return code(
            "train",
            registry.NETWORKS.file(spec.model),
            *map(registry.TERMS.file, terms),
            without=without,
        )

    def network_code(self, step: str, network: str) -> list[str]:
        """Return what computes the output of a network in a step."""
        members = [name for name, _ in self.config.members(network)]
        models = [self.config.network(name).model for name in (network, *members)]
        return code(step, *dict.fromkeys(map(registry.NETWORKS.file, models)))

    @property
    def plugins(self) -> set[str]:
        """Modules of networks that live elsewhere: weights may name one only if the configuration
        does.
        """
        networks = (self.config.teachers | self.config.students).values()
        return {network.model.partition(":")[0] for network in networks if ":" in network.model}

    # What readers see

    @property
    def unlabelled(self) -> dict[str, dict[str, bool]]:
        """Datasets with unlabelled images, and whether a method, or the training of a teacher, sees
        these.
        """
        return {
            dataset: {
                run[2]: bool(self.unlabelled_of(run)) for run in self.trained(self.runs_on(dataset))
            }
            for dataset in self.study.datasets
            if self.config.datasets[dataset].unlabelled
        }

    @property
    def ablations(self) -> dict[str, dict[str, Any]]:
        """What the report says of the ablations of the study: title, method that is varied, values,
        methods.
        """
        found = {name: self.config.ablations[name] for name in self.study.ablations}
        return {
            name: {
                "title": one.title or name,
                "method": one.method,
                "values": list(one.values),
                "methods": self.config.ablated(name),
            }
            for name, one in found.items()
        }

    def titles(self, *groups: Iterable[str]) -> dict[str, str]:
        """Return how readers know these datasets and networks, in an order that does not depend on
        the configuration's.
        """
        catalogue = self.config.datasets | self.config.teachers | self.config.students
        names = sorted(name for group in groups for name in group)
        return {name: catalogue[name].title for name in names if catalogue[name].title}

    def budget(self, dataset: str) -> str:
        """Say how long the networks were trained, and what the study lacks, for the caption of a
        table.
        """
        config = self.config
        teacher, student = (
            config.recipe(config.study, dataset, role) for role in ("teacher", "student")
        )
        names = [run[1] for run in self.runs_on(dataset) if run[2] == TEACHER]
        given = not self.trained((dataset, name, TEACHER, 0) for name in names)
        return (
            "training: "
            + (
                "teacher given,"
                if given
                else f"teacher {teacher.steps} steps of {teacher.batch_size} patches,"
            )
            + f" students {student.steps} of {student.batch_size}"
            + " patches" * given
            + f"; left out of the study: {', '.join(config.left_out)}" * bool(config.left_out)
        )

    def record(self) -> dict[str, Any]:
        """Return all of the configuration that this study depends on."""
        config, datasets = self.config, self.study.datasets
        networks = sorted({name for dataset in datasets for name in self.networks_of(dataset)})
        chosen = {
            "datasets": {dataset: config.datasets[dataset] for dataset in datasets},
            "networks": {name: config.network(name) for name in networks},
            "methods": {method: config.method(method) for method in self.methods},
        }
        return {
            "study": config.study,
            **self.study.model_dump(mode="json"),
            **{
                key: {name: one.model_dump(mode="json") for name, one in found.items()}
                for key, found in chosen.items()
            },
            "recipes": {
                dataset: {
                    role: config.recipe(config.study, dataset, role).model_dump(mode="json")
                    for role in ("teacher", "student")
                }
                for dataset in datasets
            },
        }


def code(step: str, *plugins: str, without: Iterable[str] = ()) -> list[str]:
    """Return the files of the package that a step depends on, with these plug-ins; relative to it.

    A plug-in that lives elsewhere is not tracked.
    """
    files, unneeded = STEPS[step]
    found = [
        path.relative_to(registry.PACKAGE).as_posix()
        for file in files
        for path in (
            sorted(registry.PACKAGE.glob(file)) if "*" in file else [registry.PACKAGE / file]
        )
    ]
    return registry.needs(*found, *filter(None, plugins), without=(*unneeded, *without))
