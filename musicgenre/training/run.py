"""A run: its config, store, folder and devices, and what follows from them."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from musicgenre import models
from musicgenre.store.loader import normalisation, train_batches
from musicgenre.store.store import Store
from musicgenre.training.parallel import Parallel
from musicgenre.training.scoring import score_clips


@dataclasses.dataclass(frozen=True)
class Run:
    """What an objective works on: a checked config with resolved model fields, store, devices."""

    config: ConfigDict
    store: Store
    workdir: Path
    spread: Parallel

    @property
    def frames(self) -> int:
        """Frames of the network's input."""
        return int(self.config.data.crop_frames or self.store.layout.frames)

    @property
    def clips(self) -> np.ndarray:
        """The training clips, indices into the store."""
        return self.store.indices("train")

    @property
    def epoch_steps(self) -> int:
        """Steps per epoch."""
        return math.ceil(len(self.clips) / self.config.batch_size)

    def module(self) -> nn.Module:
        """Builds the network."""
        store, fields = self.store, self.config.model.to_dict()
        shape = {"num_classes": len(store.label_names), "frames": self.frames, "bands": store.bands}
        return models.build(fields, kind=store.features.kind, dtype=self.config.dtype, **shape)

    def batches(self, steps: int, resident: bool, **options: Any) -> Any:
        """Returns `musicgenre.store.loader.train_batches` for this process."""
        return train_batches(
            self.store,
            batch_size=self.config.batch_size,
            steps=steps,
            seed=self.config.seed,
            crop_frames=self.config.data.crop_frames,
            resident=resident,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self.config.data.workers,
            **options,
        )

    def initial(self) -> dict[str, Any]:
        """Returns the arguments of `create_state` that all objectives share."""
        data, store = self.config.data, self.store
        norm = normalisation(store, data.normalise, clips=data.normalise_clips)
        shape = {"frames": self.frames, "bands": store.bands}
        return {"norm": norm, "seed": self.config.seed, **shape}

    def scores(
        self, step: Callable[..., Any], model: Any, clips: np.ndarray, config: Any = None
    ) -> np.ndarray:
        """Returns a compiled step's mean outputs for each clip, as evaluation does: `[n, outputs]`.

        The windows are those of the run's config, or of another model's.
        """
        config = config or self.config
        size, data = self.spread.round_up(int(config.batch_size)), config.data
        window = {"crop_frames": int(data.crop_frames), "chunks": int(data.eval_chunks)}
        return score_clips(step, model, self.store, clips, batch_size=size, **window)
