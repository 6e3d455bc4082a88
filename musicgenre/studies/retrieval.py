"""Nearest neighbours by embedding on a split of a store: precision@k of a trained model, as numbers and as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from musicgenre.errors import UserError
from musicgenre.evaluation.intervals import bootstrap_mean
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
    """Measures how many of each clip's nearest others in a split are of its class, with and without those of its own artist.

    Args:
      model: a trained model.
      store: a store made with the model's front end and clip length, with one label a clip.
      split: "train", "valid" or "test".
      ks: numbers of neighbours.

    Returns:
      Plain values: `dataset`, `protocol`, `split`, `n`, `label_names`, `group_name`, `without_group` (clips whose group is not
      known), `d`, and `measures`, for each k, and again with the group left out where groups are known: `filtered`, what
      `musicgenre.evaluation.retrieval.precision_at_k` gives (`per_class` in the order of `label_names`), and `interval` (95 %, of
      `precision`, bootstrap by group).

    Raises:
      UserError: the store does not fit the model or has no single labels, the split is empty or has too few clips, or the network
        gives no embedding.
    """
    if store.task != "single_label":
        raise UserError(
            f"{store.path}: its task is {store.task}; precision by class needs one label a clip."
        )
    embeddings = clip_embeddings(model, store, split)
    indices = store.indices(split)
    labels = store.targets(indices)
    groups = [store.groups[i] for i in indices]
    known = [group for group in groups if group is not None]
    measures = []
    for filtered in (False, True) if known else (False,):
        for k in ks:
            found = precision_at_k(embeddings, labels, k, groups if filtered else None)
            by_query = found.pop("by_query")
            asked = np.flatnonzero(~np.isnan(by_query))
            interval = bootstrap_mean(by_query[asked], [groups[i] for i in asked])
            measures.append(
                {
                    "filtered": filtered,
                    **found,
                    "interval": None if interval is None else list(interval),
                }
            )
    return {
        "dataset": store.dataset["name"],
        "protocol": store.dataset["protocol"],
        "split": split,
        "n": len(indices),
        "label_names": list(store.label_names),
        "group_name": store.group_name,
        "without_group": len(groups) - len(known),
        "d": embeddings.shape[1],
        "measures": measures,
    }


def neighbour_table(report: Mapping[str, Any]) -> str:
    """Returns `neighbour_report`'s result as two Markdown tables: over all clips, and by class."""

    def percent(value: float | None, best: float | None = 1.0) -> str:
        return "-" if value is None or not best else f"{100 * value:.1f} %"

    measures = report["measures"]
    others = [
        f"of other {report['group_name']}s" if row["filtered"] else "all others" for row in measures
    ]
    lines = [
        "| k | among | precision@k | 95 % interval | macro | chance | best possible |",
        "| --- " * 7 + "|",
    ]
    for row, among in zip(measures, others, strict=True):
        interval = " - ".join(f"{100 * limit:.1f}" for limit in row["interval"] or ()) or "-"
        values = (percent(row[name]) for name in ("macro_precision", "chance", "ceiling"))
        lines.append(
            f"| {row['k']} | {among} | {percent(row['precision'])} | {interval} | {' | '.join(values)} |"
        )
    heads = [f"@{row['k']}, {among}" for row, among in zip(measures, others, strict=True)]
    lines += ["", f"| class | clips | {' | '.join(heads)} |", "| --- " * (2 + len(heads)) + "|"]
    for number in range(len(measures[0]["per_class"]["n"])):
        # No clip of some classes has another of its class and of another group: there is nothing to find.
        cells = [
            percent(row["per_class"]["precision"][number], row["per_class"]["ceiling"][number])
            for row in measures
        ]
        lines.append(
            f"| {report['label_names'][number]} | {measures[0]['per_class']['n'][number]} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def clip_embeddings(model: TrainedModel, store: Store, split: str) -> np.ndarray:
    """Returns the embedding of each clip of a split, its mean over the clip's chunks, float64 `[n, d]` in the store's order.

    Raises:
      UserError: see `neighbour_report`.
    """
    if store.features != model.features or store.layout.frames != model.layout.frames:
        raise UserError(
            f"{store.path}: made with {store.features.describe()} and {store.layout.frames} frames per clip, the model with "
            f"{model.features.describe()} and {model.layout.frames}. Prepare the clips with the model's front end."
        )

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
    except KeyError as error:  # a network of the user's own that sows none
        raise UserError(no_embedding(model)) from error
