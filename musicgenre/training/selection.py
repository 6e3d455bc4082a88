"""Model selection: the best validation measure so far, and when patience runs out."""

from typing import Any


class Selection:
    """Follows the measure that the best checkpoint is selected by.

    Args:
      metric: its name; "loss" is better when lower.
      patience: evaluations without a better one until the run stops early; 0 never stops it.
    """

    def __init__(self, metric: str, patience: int) -> None:
        self._metric = metric
        self._patience = patience
        self.lower_is_better = metric == "loss"
        self._since = 0
        self.last: float | None = None
        self.best: float | None = None
        self.best_step: int | None = None

    @property
    def exhausted(self) -> bool:
        """True once `patience` evaluations in a row were no better than the best before them."""
        return 0 < self._patience <= self._since

    def update(self, step: int, value: float) -> None:
        """Takes the measure of an evaluation. Of equal ones the later counts as the best."""
        self.last = value
        sign = -1 if self.lower_is_better else 1
        gain = 1.0 if self.best is None else sign * (value - self.best)
        self._since = 0 if gain > 0 else self._since + 1
        if gain >= 0:  # as the checkpoints' policy does
            self.best, self.best_step = value, step

    def dump(self) -> dict[str, Any]:
        """Returns JSON values for the notes of a checkpoint."""
        names = {"since": self._since, "last": self.last}
        names |= {"best": self.best, "best_step": self.best_step}
        return {"metric": self._metric, "lower_is_better": self.lower_is_better, "selection": names}

    def load(self, notes: dict[str, Any]) -> None:
        """Takes up what `dump` returned."""
        saved = notes["selection"]
        self._since, self.last = saved["since"], saved["last"]
        self.best, self.best_step = saved["best"], saved["best_step"]
