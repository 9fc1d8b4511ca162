"""Data sets: one file each, and the resolver. `--data DIR`, then the hub cache, the hub, the project's own stand-in."""

from decodathlon.harness.datasets.base import Split, Text, check_folder, find, splits
from decodathlon.harness.registry import registry

registry.load_package("decodathlon.harness.datasets")

__all__ = ["Split", "Text", "check_folder", "find", "splits"]
