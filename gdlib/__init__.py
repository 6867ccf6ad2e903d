"""Graph relation distillation for biomedical instance segmentation."""

__version__ = "0.1.0"
