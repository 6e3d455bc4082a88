"""SimCLR: contrastive learning from two views of each clip, without labels.

A view is a random window of `data.crop_frames` frames that undergoes the config's `augment`:

    clip -> two windows, each augmented -> normalisation -> network -> embedding -> projection
    -> NT-Xent

The projection is dropped afterwards, and the network's head is never trained.

Sources: T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A simple framework for contrastive learning
of visual representations" (SimCLR), 2020, arXiv:2002.05709; for music J. Spijkervet, J. A.
Burgoyne, "Contrastive learning of musical representations" (CLMR), 2021, arXiv:2103.09410.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from musicgenre import models
from musicgenre.errors import UserError
from musicgenre.models.apply import normalise
from musicgenre.training.augment import Augmentation, gather_windows
from musicgenre.training.objectives import Objective, Run, register
from musicgenre.training.optimisers import learning_rate_schedule, make_optimizer
from musicgenre.training.state import TrainState, create_state, moved_average
from musicgenre.training.step import Metrics, StepFunction

NAME = "simclr"
# Folded into a step's key for the windows, and into the run's for the projection and the views of
# measured clips.
_WINDOW_KEY, _PROJECTION_KEY, _MEASURE_KEY = 0xC409, 0x960E, 0x3EA5


class Projection(nn.Module):
    """Two dense layers with a ReLU between them (Chen et al. 2020, section 4.2)."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `[batch, features]` of embeddings `[batch, d]`, both float32."""
        x = nn.relu(nn.Dense(x.shape[-1], name="dense1")(x))
        return nn.Dense(self.features, name="dense2")(x)


def nt_xent(z: jax.Array, clip: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Normalised, temperature-scaled cross entropy of each view against its clip's other view.

    With s the cosines of the rows over the temperature, row i with the other view j has the loss
    -s_ij + log sum over k != i of exp(s_ik). Where all rows are equal, this is log(2 clips - 1).

    Args:
      z: float `[2 clips, d]`; rows 2c and 2c + 1 are the two views of a clip.
      clip: int32 `[2 clips]`, each row's clip. Another pair of the same clip does not count as
        another clip. Rows with a negative clip are padding, and nothing is compared with them.
      temperature: divides the cosines.

    Returns:
      The loss of each row, float32 `[2 clips]`, and whether its clip's other view is nearer than
      all views of other clips, bool `[2 clips]`.
    """
    rows = jnp.arange(z.shape[0])
    z = z.astype(jnp.float32)
    z = z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(axis=-1, keepdims=True), 1e-12))
    # Cosines rounded to 16 bits would be useless over a low temperature.
    similarity = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST) / temperature
    other_view = rows[None, :] == (rows ^ 1)[:, None]
    other_clip = (clip[None, :] != clip[:, None]) & (clip[None, :] >= 0)
    of_view = jnp.where(other_view, similarity, 0.0).sum(axis=1)
    losses = (
        jax.nn.logsumexp(jnp.where(other_view | other_clip, similarity, -jnp.inf), axis=1) - of_view
    )
    # Strictly: an embedding that is the same for every clip finds nothing.
    return losses, of_view > jnp.where(other_clip, similarity, -jnp.inf).max(axis=1)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Pure functions of views: what is learnt from, the step and the measurement.

    Attributes:
      module: the Linen module.
      seed: the key of a step's views and of dropout is `fold_in(key(seed), step)`.
      frames: frames of a view.
      temperature: see `nt_xent`.
      projection: outputs of the projection.
      augmentation: of each view; None leaves the windows as they are.
    """

    module: nn.Module
    seed: int
    frames: int
    temperature: float = 0.5
    projection: int = 128
    augmentation: Augmentation | None = None

    def views(
        self, x: jax.Array, clip: jax.Array | None, length: jax.Array, key: jax.Array, norm: Any
    ) -> jax.Array:
        """Returns two random windows of each clip, augmented, not normalised.

        Args:
          x: stored clips `[clips, frames, bands]`.
          clip: which of them to use, int32 `[batch]`; None is all.
          length: their usable frames, at least `frames`, int32 `[batch]`.
          key: the step's.
          norm: its mean fills masks.

        Returns:
          float32 `[2 batch, frames, bands]`; rows 2c and 2c + 1 are views of clip c of the batch.
        """
        frames, augmentation = self.frames, self.augmentation
        length = jnp.repeat(length, 2)
        # One key per row, so the windows do not depend on the number of devices.
        rows, key_of_windows = jnp.arange(length.shape[0]), jax.random.fold_in(key, _WINDOW_KEY)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key_of_windows, rows)
        start = jax.vmap(lambda key, room: jax.random.randint(key, (), 0, room + 1))(
            keys, length - frames
        )
        stretches = augmentation is not None and augmentation.time_stretch > 0
        # Time stretch takes the window itself: a fast one needs more frames of the clip.
        if clip is not None:
            clip = jnp.repeat(clip, 2)
            x = x[clip] if stretches else gather_windows(x, clip, start, frames)
        else:
            x = jnp.repeat(x, 2, axis=0)
            if not stretches and frames < x.shape[1]:
                # Along the frames alone, so no clip leaves its device.
                index = (start[:, None] + jnp.arange(frames))[:, :, None]
                x = jnp.take_along_axis(x, index, axis=1)
        if augmentation is None:
            return x.astype(jnp.float32)
        batch = {"x": x} | ({"offset": start, "length": length} if stretches else {})
        result: jax.Array = augmentation(batch, key, norm)["x"]
        return result

    def create_state(
        self, optimizer: optax.GradientTransformation, norm: Any, *, bands: int, ema: bool
    ) -> TrainState:
        """Initialises the network and its projection, see `musicgenre.training.state.create_state`.

        Returns:
          The network's state. Its `opt_state` holds the `projection`'s parameters and the state of
          the `optimizer` of both.

        Raises:
          UserError: the network sows no embedding.
        """
        shape = {"frames": self.frames, "bands": bands}
        state = create_state(self.module, optax.identity(), norm, seed=self.seed, ema=ema, **shape)
        variables = {"params": state.params, **state.collections}
        apply = functools.partial(models.apply_model, self.module)
        try:
            _, embedding = jax.eval_shape(apply, variables, jnp.zeros((1, self.frames, bands)))
        except KeyError as error:
            raise UserError(
                f"the model {type(self.module).__name__} has no embedding to learn: before its "
                'head it must call self.sow("intermediates", "embedding", x).'
            ) from error
        key = jax.random.fold_in(jax.random.key(self.seed), _PROJECTION_KEY)
        x = jnp.zeros((1, embedding.shape[-1]))
        projection = jax.jit(Projection(self.projection).init)(key, x)["params"]
        optimized = optimizer.init({"network": state.params, "projection": projection})
        return dataclasses.replace(
            state, opt_state={"projection": projection, "optimizer": optimized}
        )

    def step(
        self,
        optimizer: optax.GradientTransformation,
        ema_decay: float = 0.0,
        gather: Callable[[Any], Any] = lambda tree: tree,
    ) -> StepFunction:
        """Returns `simclr_step(state, batch, clips=None) -> (state, metrics)`, to be jitted.

        The batch has `x` `[batch, frames, bands]` (unless all `clips` are given), `clip` int32
        `[batch]`, the index among the training clips, and `length` int32 `[batch]`, see `views`.
        The metrics are `loss` and `nearest`, the fraction of views whose nearest view is the other
        one of their clip.

        Args:
          optimizer: of the network and the projection.
          ema_decay: of the network's moving average; 0 when there is none.
          gather: `Parallel.gather`.
        """

        def loss_function(
            params: Any, state: TrainState, batch: Any, x: jax.Array, key: jax.Array
        ) -> tuple[jax.Array, Any]:
            params = gather(params)
            _, updated = self.module.apply(
                {"params": params["network"], **state.collections},
                normalise(x, state.norm),
                train=True,
                rngs={"dropout": key},
                mutable=[*state.collections, "intermediates"],
            )
            embedding = updated["intermediates"]["embedding"][0].astype(jnp.float32)
            losses, nearest = self._compared(params["projection"], embedding, batch["clip"])
            metrics = {"loss": losses.mean(), "nearest": nearest.mean()}
            return metrics["loss"], ({name: updated[name] for name in state.collections}, metrics)

        def simclr_step(
            state: TrainState, batch: Any, clips: jax.Array | None = None
        ) -> tuple[TrainState, Metrics]:
            key = jax.random.fold_in(jax.random.key(self.seed), state.step)
            stored, chosen = (batch["x"], None) if clips is None else (clips, batch["clip"])
            x = self.views(stored, chosen, batch["length"], key, state.norm)
            before = {"network": state.params, "projection": state.opt_state["projection"]}
            gradient = jax.grad(loss_function, has_aux=True)
            grads, (collections, metrics) = gradient(before, state, batch, x, key)
            updates, opt_state = optimizer.update(grads, state.opt_state["optimizer"], before)
            after: Any = optax.apply_updates(before, updates)
            new = dataclasses.replace(
                state,
                step=state.step + 1,
                params=after["network"],
                collections=collections,
                opt_state={"projection": after["projection"], "optimizer": opt_state},
                ema=moved_average(state.ema, after["network"], ema_decay),
            )
            return new, metrics

        return simclr_step

    def measure(self, model: Any, projection: Any, batch: Any, number: jax.Array) -> jax.Array:
        """Returns each clip's mean loss and fraction of nearest views, `[batch, 2]`.

        The views depend on the seed and the batch's `number` alone, so they are the same at every
        evaluation. `model` is from `TrainState.model`; the batch is that of `step`.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), _MEASURE_KEY)
        key = jax.random.fold_in(key, number)
        x = self.views(batch["x"], None, batch["length"], key, model["norm"])
        x = normalise(x, model["norm"])
        _, embedding = models.apply_model(self.module, model["variables"], x)
        losses, nearest = self._compared(projection, embedding, batch["clip"])
        return jnp.stack([losses, nearest], axis=-1).reshape(-1, 2, 2).mean(axis=1)

    def _compared(
        self, projection: Any, embedding: jax.Array, clip: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        z: Any = Projection(self.projection).apply({"params": projection}, embedding)
        return nt_xent(z, jnp.repeat(clip, 2), self.temperature)


@register(NAME)
class SimCLR(Objective):
    """Learns a network up to its embedding by NT-Xent, with the config's optimiser and average.

    At the end of every epoch a row of `metrics.jsonl` gets the means `train_loss` and
    `train_nearest`, and every `config.eval_every` epochs also `valid_loss` and `valid_nearest` of
    the validation clips, in batches of the same size (or of all of them, where they are fewer).
    `nearest` is the fraction of views whose nearest view is the other one of their clip.
    """

    obeys = (
        "augment", "dtype", "optimizer", "ema_decay", "pretrain.method", "pretrain.epochs",
        "pretrain.temperature", "pretrain.projection",
    )  # fmt: skip
    ignores = ("epochs",)
    refuses: ClassVar[Mapping[str, str]] = {
        "optimizer.accumulate": "each view is compared with its full batch, which cannot be split. "
        "Set it to 1, and a smaller --config.batch_size if memory does not suffice.",
        "optimizer.layer_decay": "has no effect on pretraining: give it to musicgenre train.",
        "optimizer.transferred_rate": "has no effect on pretraining: give it to musicgenre train.",
        "augment.mixup": "makes one clip of two, which then share views: set it to 0.",
        "augment.cutmix": "makes one clip of two, which then share views: set it to 0.",
        "data.eval_chunks": "views are drawn at random from each clip: leave it at 1, and give it "
        "to musicgenre train.",
    }
    pmap = False
    compared = ("nearest", False)

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, store = run.config, run.store
        augmentation = Augmentation.from_config(config, run.frames)
        if augmentation is None and run.frames == store.layout.frames:
            raise UserError(
                "the two views of a clip would be the same: set --config.data.crop_frames below "
                f"the {run.frames} frames of a clip, or fields of --config.augment."
            )
        if config.batch_size < 2:
            raise UserError(
                "config.batch_size=1 leaves no other clip to compare with: set 2 or more."
            )
        if config.batch_size > len(run.clips):
            raise UserError(
                f"config.batch_size={config.batch_size} is more than the {len(run.clips)} training "
                "clips that a batch compares."
            )
        self._optimizer = make_optimizer(config.optimizer, self.stage_steps)
        self._schedule = learning_rate_schedule(config.optimizer, self.stage_steps)
        settings = config.pretrain
        self._contrast = Contrast(
            run.module(),
            config.seed,
            run.frames,
            settings.temperature,
            settings.projection,
            augmentation,
        )
        spread = run.spread
        self._measure = jax.jit(
            self._contrast.measure,
            in_shardings=(None, None, spread.sharded, spread.replicated),
            out_shardings=spread.replicated,
        )
        self.progress = {}

    @property
    def stage_steps(self) -> int:
        """Steps of the run."""
        return self.run.epoch_steps * int(self.run.config.pretrain.epochs)

    def create_state(self, resumes: bool) -> TrainState:
        """Returns a fresh network and projection."""
        initial, ema = self.run.initial(), self.run.config.ema_decay > 0
        norm, bands = initial["norm"], initial["bands"]
        return self.run.spread.create_state(
            lambda: self._contrast.create_state(self._optimizer, norm, bands=bands, ema=ema)
        )

    def batches(self, resident: bool, resumes: bool) -> Any:
        """Returns the iterator over full clips, whose windows the step draws."""
        frames = self.run.store.layout.frames
        return self.run.batches(self.stage_steps, resident, window_frames=frames, named=True)

    def step(self, stage: int) -> StepFunction:
        """Returns the step."""
        decay, gather = self.run.config.ema_decay, self.run.spread.gather
        return self._contrast.step(self._optimizer, decay, gather)

    def logs(self, step: int) -> bool:
        """Returns whether an epoch ends after a step."""
        return step % self.run.epoch_steps == 0

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Returns the measures of the validation clips, each counted once."""
        config, store, spread = self.run.config, self.run.store, self.run.spread
        if "valid" not in store.splits:
            return {}
        clips = store.indices("valid")
        size = min(config.batch_size, len(clips))
        filled = spread.round_up(size)
        rows = filled // jax.process_count()
        mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
        values = []
        for number, first in enumerate(range(0, len(clips), size)):
            # The first clips fill the last batch, so that every view has as many to compare with.
            index = np.arange(first, first + size) % len(clips)
            chosen = clips[np.pad(index, (0, filled - size))][mine]
            index = np.pad(index, (0, filled - size), constant_values=-1)[mine]
            batch = {
                "x": store.gather(chosen),
                "clip": index.astype(np.int32),
                "length": np.maximum(store.lengths[chosen], self.run.frames).astype(np.int32),
            }
            measured = self._measure(
                state.model(),
                state.opt_state["projection"],
                spread.place_batch(batch),
                jnp.int32(number),
            )
            values.append(np.asarray(measured)[: min(size, len(clips) - first)])
        loss, nearest = np.concatenate(values).mean(axis=0, dtype=np.float64)
        return {"loss": float(loss), "nearest": float(nearest), "chance": 1 / (2 * size - 1)}

    def rows(
        self, step: int, means: dict[str, float], measures: dict[str, float]
    ) -> list[dict[str, float]]:
        """Returns the row of an epoch."""
        means = {**means, "chance": 1 / (2 * self.run.config.batch_size - 1)}
        self.progress = {f"train_{name}": value for name, value in means.items()}
        self.progress |= {f"valid_{name}": value for name, value in measures.items()}
        rate = float(self._schedule(step - 1))
        return [{"epoch": step // self.run.epoch_steps, **self.progress, "learning_rate": rate}]

    def epoch_line(self, step: int) -> str:
        """Returns the measures of an epoch."""
        epoch, epochs = step // self.run.epoch_steps, self.run.config.pretrain.epochs
        return f"epoch {epoch} of {epochs}: {self._shown()}"

    def measures(self) -> tuple[dict[str, float], ...]:
        """Returns the measures of the last epoch."""
        return (self.progress,)

    def summary(self, step: int) -> str:
        """Returns the measures of the last epoch, for people."""
        return f"pretrained in {step} steps; {self._shown()}"

    def _shown(self) -> str:
        measures = self.progress
        return "; ".join(
            f"{split} loss {measures[f'{split}_loss']:.3f}, "
            f"other view nearest {measures[f'{split}_nearest']:.1%} "
            f"(chance {measures[f'{split}_chance']:.1%})"
            for split in ("train", "valid")
            if f"{split}_loss" in measures
        )
