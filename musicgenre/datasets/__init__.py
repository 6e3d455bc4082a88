"""Data sets: which clips there are, with their labels, groups and splits."""

# Importing a reader's module registers it.
from musicgenre.datasets import arrays, csv_file, folder, gtzan, msd, mtat, synthetic
from musicgenre.datasets.base import Clip, Dataset, Skipped
from musicgenre.datasets.registry import dataset_names, extra_fields, load_dataset, register

__all__ = [
    "Clip",
    "Dataset",
    "Skipped",
    "arrays",
    "csv_file",
    "dataset_names",
    "extra_fields",
    "folder",
    "gtzan",
    "load_dataset",
    "msd",
    "mtat",
    "register",
    "synthetic",
]
