"""What clips there are, with labels, groups and splits."""

from collections.abc import Mapping
from typing import Any

from musicgenre.datasets.arrays import load_arrays
from musicgenre.datasets.base import Clip, Dataset, Skipped
from musicgenre.datasets.csv_file import load_csv
from musicgenre.datasets.folder import load_folder
from musicgenre.datasets.gtzan import load_gtzan
from musicgenre.datasets.msd import load_msd
from musicgenre.datasets.mtat import load_mtat
from musicgenre.datasets.synthetic import load_synthetic
from musicgenre.errors import UserError, did_you_mean

__all__ = ["Clip", "Dataset", "Skipped", "load_dataset"]

DATASETS = ("gtzan", "mtat", "msd", "folder", "csv", "arrays", "synthetic")


def load_dataset(options: Mapping[str, Any]) -> Dataset:
    """Reads the data set that a config's `data` section describes (see `musicgenre.config.dataset_options`).

    Raises:
      UserError: an unknown data set, no root where one is needed, or what its reader finds wrong.
    """
    name, root = options["dataset"], options["root"]
    if name not in DATASETS:
        raise UserError(f"data.dataset: no data set {name!r}." + did_you_mean(name, DATASETS))
    if not root and name != "arrays":
        raise UserError(f"the data set {name!r} needs its place: set --config.data.root=...")
    seed, fractions = options["seed"], options["fractions"]
    if name == "gtzan":
        return load_gtzan(
            root,
            options["protocol"],
            fold=options["fold"],
            folds=options["folds"],
            seed=seed,
            allow_missing=options["allow_missing"],
        )
    if name == "mtat":
        return load_mtat(
            root,
            options["protocol"],
            top_k=options["top_k"],
            seed=seed,
            fractions=fractions,
            allow_missing=options["allow_missing"],
        )
    if name == "msd":
        return load_msd(
            root,
            top_k=options["top_k"],
            seed=seed,
            fractions=fractions,
            allow_missing=options["allow_missing"],
        )
    if name == "folder":
        return load_folder(root, seed=seed, fractions=fractions)
    if name == "csv":
        return load_csv(
            root,
            task=options["task"],
            seed=seed,
            fractions=fractions,
            allow_missing=options["allow_missing"],
        )
    if name == "arrays":
        protocol = options["protocol"]
        return load_arrays(
            root,
            options["files"],
            options["layout"],
            # The config's default is GTZAN's own; arrays are split as their files then.
            "files" if protocol == "fault_filtered" else protocol,
            fold=options["fold"],
            folds=options["folds"],
            seed=seed,
            frames=options["frames"],
        )
    return load_synthetic(
        root, seed=seed, clips_per_style=options["clips_per_style"], seconds=options["seconds"]
    )
