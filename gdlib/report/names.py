"""What readers call methods, metrics and the rest, and how a method looks: the same in every table
and figure.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gdlib.config import TEACHER
from gdlib.evaluate.metrics import METRICS

Titles = Mapping[str, str] | None
NONE = "none"  # the method without distillation
ARROWS = {"higher": "↑", "lower": "↓"}


class Look(NamedTuple):
    """How a method is named and drawn."""

    title: str
    colour: str
    marker: str = "o"
    line: str = "-"
    hollow: bool = False


# Colours of Okabe and Ito (told apart with every kind of colour vision). A hue is a family of
# methods; its intra and inter halves differ in lightness, marker and dashes too.
METHODS = {
    TEACHER: Look("teacher", "#000000", "D", "--"),
    NONE: Look("student", "#7a7a7a"),
    "igd": Look("IGD", "#0072B2"),
    "igd_intra": Look("IGD intra", "#56B4E9", "s", (0, (4, 1))),
    "igd_inter": Look("IGD inter", "#003B73", "^", (0, (1, 1))),
    "agd": Look("AGD", "#009E73"),
    "agd_intra": Look("AGD intra", "#6CCBA6", "s", (0, (4, 1))),
    "agd_inter": Look("AGD inter", "#00543D", "^", (0, (1, 1))),
    "grd": Look("IGD + AGD", "#D55E00"),
    "grd_intra": Look("IGD + AGD intra", "#F0A36B", "s", (0, (4, 1))),
    "grd_inter": Look("IGD + AGD inter", "#8A3C00", "^", (0, (1, 1))),
    "igd_nodes": Look("IGD nodes", "#9FB8D9", "P", (0, (4, 1))),
    "igd_edges": Look("IGD edges", "#2F6FA8", "X", (0, (4, 1))),
    "grd_details": Look("IGD + AGD, details", "#E07B39", "h", (0, (3, 1, 1, 1))),
    "grd_original": Look("IGD + AGD, original code", "#FF7F50", "X", (0, (3, 1, 1, 1))),
    "pseudo": Look("pseudo-labels", "#5B3A29", "s"),
    "grd_pseudo": Look("IGD + AGD, pseudo-labels", "#A0522D", "s"),
    "grd_online": Look("IGD + AGD, teacher online", "#FFB000", "D"),
    "grd_labelled": Look("IGD + AGD, labelled images", "#E8A87C", "o", (0, (4, 1))),
    "foreign": Look("labels of another program", "#556B2F", "^"),
    "at": Look("AT", "#CC79A7", "v"),
    "response": Look("response KD", "#E69F00", "p"),
    "soft": Look("soft labels", "#117733", "p"),
    "fitnet": Look("FitNet", "#8C6D31", ">"),
    "rkd": Look("RKD", "#7B4FA3", "h"),
    "spkd": Look("SPKD", "#B8557A", "<"),
    "cwd": Look("CWD", "#17BECF", "P"),
    "ifvd": Look("IFVD", "#9C9F00", "X"),
    "skd": Look("structured KD", "#B39DDB", "d"),
    "rekd": Look("ReKD", "#C51B7D", "8"),
    "grd_rekd": Look("IGD + AGD + ReKD", "#6B0F3C", "8"),
    "biskd": Look("BISKD", "#4B4E9F", "*"),
}
# of what is no method: segmenters (waterz and multicut are their own titles) and trivial baselines
NAMES = {
    "mutex_watershed": "mutex watershed",
    "mutex_watershed_masked": "mutex watershed in the true foreground",
    "one_segment": "one segment",
    "sections": "every section one segment",
    "image_watershed": "watershed of the image",
    "true_sections": "true sections, not linked",
}
SPARE = ("#B3A100", "#882255", "#999933", "#CC6677", "#44AA99", "#332288")


def named_teacher(method: str) -> str:
    """Return the teacher that a method names; nothing for what was learned from the first teacher.

    >>> named_teacher("grd@nestedunet"), named_teacher("grd")
    ('nestedunet', '')
    """
    return method.partition("@")[2]


def ablation_of(method: str) -> str:
    """Return the ablation that a method is a value of; nothing for other methods.

    >>> ablation_of("bank_size=8"), ablation_of("grd")
    ('bank_size', '')
    """
    name, is_value, _ = method.partition("=")
    return name if is_value else ""


def looks(methods: Iterable[str], titles: Titles = None) -> dict[str, Look]:
    """Return the look of every method.

    Unknown ones are shown by their name, in spare colours by order of appearance.

    What was learned from another teacher looks like its method, but hollow.
    """
    own: dict[str, Look] = {}
    out: dict[str, Look] = {}
    for method in dict.fromkeys(methods):
        base = method.partition("@")[0]
        if base not in METHODS and base not in own:
            k = len(own)
            own[base] = Look(base, SPARE[k % len(SPARE)], "X8>*"[k % 4], (0, (3, 1, 1, 1)))
        look = METHODS.get(base) or own[base]
        out[method] = look._replace(title=title(method, titles), hollow=bool(named_teacher(method)))
    return out


def title(name: str, titles: Titles = None) -> str:
    """Return the title of a dataset, network, method, segmenter, baseline or ablation.

    Else the name as it is.

    >>> title("agd_intra"), title("mine", {"mine": "Mine"}), title("mine", {"mine": ""})
    ('AGD intra', 'Mine', 'mine')
    >>> title("agd@nestedunet", {"nestedunet": "NestedUNet"})
    'AGD from NestedUNet'
    >>> title("bank_size=8", {"bank_size": "bank size K"})
    'bank size K = 8'
    """
    if known := (titles or {}).get(name):
        return known
    method, _, teacher = name.partition("@")
    if teacher:
        return f"{title(method, titles)} from {title(teacher, titles)}"
    if ablation := ablation_of(name):
        return f"{title(ablation, titles)} = {name.partition('=')[2]}"
    return METHODS[name].title if name in METHODS else NAMES.get(name, name)


def metric_title(key: str) -> str:
    """Return the title of a metric with the direction that is better.

    >>> metric_title("aji"), metric_title("voi")
    ('AJI ↑', 'VOI ↓')
    """
    return f"{METRICS[key].title} {ARROWS[METRICS[key].better]}"
