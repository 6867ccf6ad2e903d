"""A picture to try the panel on."""

from typing import Any


def nuclei() -> list[tuple[Any, dict[str, Any], str]]:
    """Return an image of synthetic nuclei (CC0), made when it is asked for, as a layer."""
    from gdlib.data.sources.nuclei_phantom import nuclei_phantom

    splits = nuclei_phantom(None, size=(384, 512), images={"train": 0, "val": 0, "test": 1}, seed=7)
    (sample,) = splits["test"]
    return [(sample.image[0], {"name": "synthetic nuclei"}, "image")]
