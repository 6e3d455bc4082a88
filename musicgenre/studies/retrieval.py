"""Precision@k of a trained model's embeddings on a split of a store, as numbers and as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from musicgenre.errors import UserError
from musicgenre.evaluation.intervals import bootstrap_mean
from musicgenre.evaluation.render import markdown_table
from musicgenre.evaluation.retrieval import precision_at_k
from musicgenre.inference.windows import no_embedding
from musicgenre.models import apply_model
from musicgenre.models.apply import normalise
from musicgenre.runs.model import TrainedModel
from musicgenre.store.store import Store
from musicgenre.training.parallel import Parallel
from musicgenre.training.scoring import score_clips


def neighbour_report(
    model: TrainedModel, store: Store, split: str, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, Any]:
    """Measures the fraction of clips' nearest others of their class, with and without their artist.

    Args:
      model: a trained model.
      store: a store made with the model's front end and clip length, with one label per clip.
      split: "train", "valid" or "test".
      ks: numbers of neighbours.

    Returns:
      Plain values: `dataset`, `protocol`, `split`, `n`, `label_names`, `group_name`,
      `without_group` (clips with an unknown group), `d`, and `measures`: for each k, and if groups
      are known for each k again without the own group, `filtered`, the result of
      `musicgenre.evaluation.retrieval.precision_at_k` (`per_class` in the order of `label_names`),
      and `interval` (95 %, of `precision`, bootstrap by group).

    Raises:
      UserError: the store does not fit the model or has no single labels, the split is empty or has
        too few clips, or the network has no embedding.
    """
    if store.task != "single_label":
        raise UserError(f"{store.path}: precision by class needs one label per clip.")
    embeddings = clip_embeddings(model, store, split)
    indices = store.indices(split)
    labels = store.targets(indices)
    groups = [store.groups[i] for i in indices]
    unknown = groups.count(None)
    measures = []
    for filtered in (False, True) if unknown < len(groups) else (False,):
        for k in ks:
            found = precision_at_k(embeddings, labels, k, groups if filtered else None)
            by_query = found.pop("by_query")
            asked = np.flatnonzero(~np.isnan(by_query))
            interval = bootstrap_mean(by_query[asked], [groups[i] for i in asked])
            found |= {"filtered": filtered, "interval": interval and list(interval)}
            measures.append(found)
    return {
        "dataset": store.dataset["name"],
        "protocol": store.dataset["protocol"],
        "split": split,
        "n": len(indices),
        "label_names": list(store.label_names),
        "group_name": store.group_name,
        "without_group": unknown,
        "d": embeddings.shape[1],
        "measures": measures,
    }


def neighbour_table(report: Mapping[str, Any]) -> str:
    """Returns `neighbour_report`'s result as two Markdown tables: over all clips, and by class."""

    def percent(value: float | None, best: float | None = 1.0) -> str:
        return "-" if value is None or not best else f"{100 * value:.1f} %"

    measures, group = report["measures"], report["group_name"]
    among = [f"of other {group}s" if row["filtered"] else "all others" for row in measures]
    rows = []
    for row, others in zip(measures, among, strict=True):
        interval = " - ".join(f"{100 * limit:.1f}" for limit in row["interval"] or ()) or "-"
        means = (percent(row[name]) for name in ("macro_precision", "chance", "ceiling"))
        rows.append([row["k"], others, percent(row["precision"]), interval, *means])
    columns = ["k", "among", "precision@k", "95 % interval", "macro", "chance", "best possible"]
    heads = [f"@{row['k']}, {others}" for row, others in zip(measures, among, strict=True)]
    # Some classes have no other clip of another group: there is nothing to find.
    classes = [
        [label, measures[0]["per_class"]["n"][number]]
        + [
            percent(row["per_class"]["precision"][number], row["per_class"]["ceiling"][number])
            for row in measures
        ]
        for number, label in enumerate(report["label_names"])
        if number < len(measures[0]["per_class"]["n"])
    ]
    by_class = markdown_table(["class", "clips", *heads], classes)
    return f"{markdown_table(columns, rows)}\n\n{by_class}"


def clip_embeddings(model: TrainedModel, store: Store, split: str) -> np.ndarray:
    """Returns the embeddings of a split's clips, float64 `[n, d]`: means over the clips' windows.

    Raises:
      UserError: see `neighbour_report`.
    """
    if store.features != model.features or store.layout.frames != model.layout.frames:
        sides = [f"{one.features.describe()}, {one.layout.frames} frames" for one in (store, model)]
        remedy = "Prepare the clips with the model's front end."
        raise UserError(f"{store.path}: {sides[0]}; the model: {sides[1]}. {remedy}")

    def embed(saved: Any, x: jax.Array) -> jax.Array:
        return apply_model(model.module, saved["variables"], normalise(x, saved["norm"]))[1]

    spread = Parallel.create()
    try:
        return score_clips(
            spread.score_step(embed),
            spread.place_state(model.model),
            store,
            store.indices(split),
            batch_size=spread.round_up(int(model.config.batch_size)),
            crop_frames=int(model.config.data.crop_frames),
            chunks=int(model.config.data.eval_chunks),
        )
    except KeyError as error:  # a user's network that sows no embedding
        raise UserError(no_embedding(model)) from error
