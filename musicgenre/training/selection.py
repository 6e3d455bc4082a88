"""Model selection: the best validation measure so far, and when patience runs out."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class Selection:
    """Follows the measure that the best checkpoint is selected by; "loss" is better when lower."""

    metric: str
    patience: int  # evaluations without a better one until the run stops early; 0 never stops it
    since: int = 0  # evaluations since the last better one
    last: float | None = None
    best: float | None = None
    best_step: int | None = None

    @property
    def lower_is_better(self) -> bool:
        """Whether the best measure is the lowest."""
        return self.metric == "loss"

    @property
    def exhausted(self) -> bool:
        """True once `patience` evaluations in a row were no better than the best before them."""
        return 0 < self.patience <= self.since

    def update(self, step: int, value: float) -> None:
        """Takes the measure of an evaluation. Of equal ones the later counts as the best."""
        self.last = value
        sign = -1 if self.lower_is_better else 1
        gain = 1.0 if self.best is None else sign * (value - self.best)
        self.since = 0 if gain > 0 else self.since + 1
        if gain >= 0:  # as the checkpoints' policy does
            self.best, self.best_step = value, step

    def dump(self) -> dict[str, Any]:
        """Returns JSON values for the notes of a checkpoint."""
        saved = {name: vars(self)[name] for name in ("since", "last", "best", "best_step")}
        return {"metric": self.metric, "lower_is_better": self.lower_is_better, "selection": saved}

    def load(self, notes: dict[str, Any]) -> None:
        """Restores what `dump` returned."""
        vars(self).update(notes["selection"])
