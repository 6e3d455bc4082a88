"""Several models as one: the mean of what they say of the same clips."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from musicgenre.errors import UserError
from musicgenre.evaluation.report import Evaluation


def ensemble(evaluations: Sequence[Evaluation], names: Sequence[str]) -> Evaluation:
    """Returns the evaluation of the arithmetic mean of several models' probabilities (or outputs), in which all weigh the same.

    Fields of their configurations that differ become lists with the value of each. The audit is the first that has found
    something, if any has.

    Args:
      evaluations: of the same clips and labels.
      names: of the models, `[models]`.

    Raises:
      UserError: no evaluations, or the clips, their truth or the labels differ.
    """
    if not evaluations or len(evaluations) != len(names):
        raise UserError(
            f"an ensemble needs evaluations, each with a name, not {len(evaluations)} with {len(names)} names."
        )
    first, *others = evaluations
    for name, other in zip(names[1:], others, strict=True):
        if list(other.clip_ids) != list(first.clip_ids) or not np.array_equal(
            other.targets, first.targets
        ):
            raise UserError(
                f"{names[0]} and {name} were not evaluated on the same clips, so they are not of one experiment."
            )
        if tuple(other.label_names) != tuple(first.label_names):
            raise UserError(
                f"the labels of {names[0]} and {name} differ, so their scores have no mean."
            )
    windows = [
        np.asarray(one.scores)[:, None] if one.windows is None else one.windows
        for one in evaluations
    ]
    if len({part.shape for part in windows}) > 1:
        windows = [np.asarray(one.scores)[:, None] for one in evaluations]
    audits = [one.audit for one in evaluations if one.audit is not None]
    what = "outputs" if first.task == "regression" else "probabilities"
    checkpoint = dict(first.checkpoint)
    for key in checkpoint:
        found = dict.fromkeys(str(one.checkpoint.get(key)) for one in evaluations)
        checkpoint[key] = checkpoint[key] if len(found) == 1 else ", ".join(found)
    return dataclasses.replace(
        first,
        title=f"Ensemble of {len(evaluations)} models on {first.dataset}",
        scores=np.mean([one.scores for one in evaluations], axis=0),
        windows=np.concatenate(windows, axis=1),
        curves=(),
        config={"models": list(names), **_together([one.config for one in evaluations])},
        audit=next((audit for audit in audits if not audit.clean), audits[0] if audits else None),
        synthetic=any(one.synthetic for one in evaluations),
        checkpoint=checkpoint,
        notes=[
            f"Mean of the {what} (arithmetic, all weigh the same) of {len(evaluations)} models: {', '.join(names)}.",
            *dict.fromkeys(note for one in evaluations for note in one.notes),
        ],
    )


def _together(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the fields of all configs; where they differ, the list of their values."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [config.get(key) for config in configs]
        mappings = [value for value in values if isinstance(value, Mapping)]
        if len(mappings) == len(values):
            found[key] = _together(mappings)
        else:
            found[key] = values[0] if all(value == values[0] for value in values) else values
    return found
