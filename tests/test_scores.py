"""Scores of several images together, against counts and shares by hand: images without objects
neither hide nor outweigh."""

import itertools

import numpy as np
import pytest

from gdlib.evaluate import metrics, scores


def image(*spans, length=100):
    """Make a map (1, length) of objects from (start, stop)."""
    out = np.zeros((1, length), np.uint16)
    for k, (start, stop) in enumerate(spans, start=1):
        out[0, start:stop] = k
    return out


TRUE = image((0, 10), (20, 30), (40, 50))
EMPTY = image()
RIGHT, NEAR = scores.of_image(TRUE, TRUE), scores.of_image(TRUE, image((0, 10), (20, 30), (40, 45)))
CLEAN = scores.of_image(EMPTY, EMPTY)


@pytest.mark.parametrize(
    ("label", "found", "ignore", "counts"),
    [
        (TRUE, TRUE, None, (3, 30, 0, 0, 100)),
        (TRUE, EMPTY, None, (3, 30, 0, 0, 100)),
        (TRUE, image((5, 15), (60, 62), (70, 71)), None, (3, 30, 2, 8, 100)),
        (EMPTY, image((5, 15), (60, 62)), None, (0, 0, 2, 12, 100)),
        (EMPTY, EMPTY, None, (0, 0, 0, 0, 100)),
        # all objects are ignored
        (TRUE, image((5, 15), (60, 62)), image((0, 50)) > 0, (0, 0, 1, 2, 50)),
    ],
)
def test_counts_by_hand(label, found, ignore, counts):
    one = scores.of_image(label, found, ignore)
    assert tuple(one[key] for key in scores.COUNTS) == counts
    assert {key: one[key] for key in metrics.METRICS} == metrics.evaluate(label, found, ignore)


def test_means_are_over_images_with_objects():
    alone = scores.mean([RIGHT, NEAR])
    assert alone.keys() == metrics.METRICS.keys()
    for key in metrics.METRICS:
        assert alone[key] == pytest.approx((RIGHT[key] + NEAR[key]) / 2)
        assert scores.worth(alone, key) == alone[key]
    filled = scores.of_image(EMPTY, image((0, 10), (20, 95)))
    together = scores.mean([CLEAN, RIGHT, filled, NEAR])
    assert {key: together[key] for key in alone} == alone, "whatever was found in the others"
    assert (together["empty_images"], together["false_objects"], together["false_pixels"]) == (
        2,
        1,
        42.5,
    )
    # Of 3 objects and 30 pixels on average: 2 / 5 of the objects, 85 / 115 of the pixels, in one of
    # four images.
    assert together["false_share"] == pytest.approx(85 / 115 / 4)
    specks = scores.of_image(EMPTY, image(*((k, k + 1) for k in range(0, 12, 2))))
    assert scores.mean([RIGHT, specks])["false_share"] == pytest.approx(6 / 9 / 2), "many and small"


def test_only_images_without_objects_measure_nothing():
    with pytest.raises(ValueError, match="none of the images has an object"):
        scores.mean([CLEAN, CLEAN])


@pytest.mark.parametrize("metric", metrics.METRICS)
def test_what_is_found_where_nothing_is_counts_but_never_more_than_a_lost_image(metric):
    rows = [NEAR] * 9
    found = [image((0, n)) for n in (0, 1, 5, 20, 60, 100)] + [
        image(*((k, k + 1) for k in range(0, 100, 2)))
    ]
    values = [
        scores.worth(scores.mean([*rows, scores.of_image(EMPTY, one)]), metric) for one in found
    ]
    clean, *others = values
    assert clean == pytest.approx(NEAR[metric]), "nothing found costs nothing"
    lost = NEAR[metric] * (0.9 if metrics.METRICS[metric].better == "higher" else 1.1)
    for value in others if NEAR[metric] else ():  # of an error of 0 there is no part
        assert metrics.is_better(metric, clean, value)
        assert metrics.is_better(metric, value, lost)
    for better, worse in itertools.pairwise(others):
        assert not metrics.is_better(metric, worse, better)


def test_words_on_images_without_objects():
    assert scores.in_empty(scores.mean([RIGHT])) == ""
    both = scores.mean([RIGHT, CLEAN, scores.of_image(EMPTY, image((0, 10), (20, 95)))])
    assert scores.in_empty(both) == "; in 2 images without objects (means): 1 objects, 42.5 pixels"
