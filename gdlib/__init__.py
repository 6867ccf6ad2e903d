"""Graph relation distillation for biomedical instance segmentation.

`gdlib.load` gives a trained network that segments arrays; see `gdlib.trained`.
"""

from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: `import gdlib` shall cost nothing."""
    if name in ("load", "Model"):
        from gdlib import trained

        return getattr(trained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
