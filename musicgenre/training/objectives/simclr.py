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
from collections.abc import Mapping
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
from musicgenre.training.objectives import Objective, register
from musicgenre.training.optimisers import learning_rate_schedule, make_optimizer
from musicgenre.training.run import Run
from musicgenre.training.state import TrainState, create_state
from musicgenre.training.step import Metrics, StepFunction, run_network

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

    Rows 2c and 2c + 1 of `z`, float `[2 clips, d]`, are the two views of a clip. `clip`, int32
    `[2 clips]`, is each row's. Other views of it do not count as another clip's, and nothing is
    compared with rows of a negative clip, which are padding.

    Returns:
      The loss of each row, float32, and whether its clip's other view is nearer than all views of
      other clips, bool; both `[2 clips]`.
    """
    rows = jnp.arange(z.shape[0])
    z = z.astype(jnp.float32)
    z = z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(axis=-1, keepdims=True), 1e-12))
    # Cosines rounded to 16 bits would be useless over a low temperature.
    similarity = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST) / temperature
    other_view = rows[None, :] == (rows ^ 1)[:, None]
    other_clip = (clip[None, :] != clip[:, None]) & (clip[None, :] >= 0)
    of_view = jnp.where(other_view, similarity, 0.0).sum(axis=1)
    compared = jnp.where(other_view | other_clip, similarity, -jnp.inf)
    losses = jax.nn.logsumexp(compared, axis=1) - of_view
    # Strictly: an embedding that is the same for every clip finds nothing.
    return losses, of_view > jnp.where(other_clip, similarity, -jnp.inf).max(axis=1)


def draw_views(
    x: jax.Array,
    clip: jax.Array | None,
    length: jax.Array,
    key: jax.Array,
    norm: Any,
    *,
    frames: int,
    augmentation: Augmentation | None = None,
) -> jax.Array:
    """Returns two random windows of `frames` frames of each clip, augmented, not normalised.

    Stored clips `x` are `[clips, frames, bands]`; `clip`, int32 `[batch]`, says which of them to
    use, and None is all. `length`, int32 `[batch]`, counts their usable frames, at least `frames`.
    `key` is the step's, and the mean of `norm` fills masks. In the result, float32 `[2 batch,
    frames, bands]`, rows 2c and 2c + 1 are views of clip c of the batch.
    """
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


@register(NAME)
class SimCLR(Objective):
    """Learns a network up to its embedding by NT-Xent, with the config's optimiser and average.

    At the end of every epoch a row of `metrics.jsonl` gets the means `train_loss` and
    `train_nearest`, and every `config.eval_every` epochs also `valid_loss` and `valid_nearest` of
    the validation clips, in batches of the same size (or of all of them, where they are fewer).
    `nearest` is the fraction of views whose nearest view is the other one of their clip.
    """

    obeys = (
        "augment",
        "dtype",
        "optimizer",
        "ema_decay",
        "pretrain.method",
        "pretrain.epochs",
        "pretrain.temperature",
        "pretrain.projection",
    )
    ignores = ("epochs",)
    refuses: ClassVar[Mapping[str, str]] = {
        "optimizer.accumulate": "each view is compared with its full batch, which cannot be split. "
        "Set it to 1, and a smaller --config.batch_size if memory does not suffice.",
        **dict.fromkeys(
            ("optimizer.layer_decay", "optimizer.transferred_rate"),
            "has no effect on pretraining: give it to musicgenre train.",
        ),
        **dict.fromkeys(
            ("augment.mixup", "augment.cutmix"),
            "makes one clip of two, which then share views: set it to 0.",
        ),
        "data.eval_chunks": "views are drawn at random from each clip: leave it at 1.",
    }
    pmap = False
    compared = ("nearest", False)

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, spread, size = run.config, run.spread, run.config.batch_size
        augmentation = Augmentation.from_config(config, run.frames)
        if augmentation is None and run.frames == run.store.layout.frames:
            raise UserError(
                "the two views of a clip would be the same: set --config.data.crop_frames below "
                f"the {run.frames} frames of a clip, or fields of --config.augment."
            )
        if not 2 <= size <= len(run.clips):
            raise UserError(
                f"config.batch_size={size}: a batch compares from 2 to all {len(run.clips)} "
                "training clips with each other."
            )
        self._optimizer = make_optimizer(config.optimizer, self.stage_steps)
        self._schedule = learning_rate_schedule(config.optimizer, self.stage_steps)
        self._module, self._projection = run.module(), Projection(config.pretrain.projection)
        self._views = functools.partial(draw_views, frames=run.frames, augmentation=augmentation)
        self._measure = jax.jit(
            self.measure,
            in_shardings=(None, None, spread.sharded, spread.replicated),
            out_shardings=spread.replicated,
        )

    def create_state(self, resumes: bool) -> TrainState:
        """Returns a fresh network and projection.

        The state's `opt_state` holds the `projection`'s parameters and the state of the `optimizer`
        of both.

        Raises:
          UserError: the network sows no embedding.
        """
        run = self.run
        settings = run.initial() | {"ema": run.config.ema_decay > 0}

        def create() -> TrainState:
            state = create_state(self._module, optax.identity(), **settings)
            apply = functools.partial(models.apply_model, self._module, state.model()["variables"])
            try:
                _, embedding = jax.eval_shape(apply, jnp.zeros((1, run.frames, run.store.bands)))
            except KeyError as error:
                raise UserError(
                    f"the model {type(self._module).__name__} has no embedding to learn: before "
                    'its head it must call self.sow("intermediates", "embedding", x).'
                ) from error
            key = jax.random.fold_in(jax.random.key(run.config.seed), _PROJECTION_KEY)
            x = jnp.zeros((1, embedding.shape[-1]))
            projection = jax.jit(self._projection.init)(key, x)["params"]
            optimized = self._optimizer.init({"network": state.params, "projection": projection})
            own = {"projection": projection, "optimizer": optimized}
            return dataclasses.replace(state, opt_state=own)

        return run.spread.create_state(create)

    def batches(self, resident: bool, resumes: bool) -> Any:
        """Returns the iterator over complete clips, whose windows the step draws."""
        frames = self.run.store.layout.frames
        return self.run.batches(self.stage_steps, resident, window_frames=frames, named=True)

    def step(self, stage: int) -> StepFunction:
        """Returns the step, with the metrics `loss` and `nearest`.

        Its batch has `x` `[batch, frames, bands]` (unless all `clips` are given) and int32 `clip`,
        the index among the training clips, and `length`, see `draw_views`, both `[batch]`.
        """
        config, gather = self.run.config, self.run.spread.gather

        def simclr_step(
            state: TrainState, batch: Any, clips: jax.Array | None = None
        ) -> tuple[TrainState, Metrics]:
            # The key of the views and of dropout.
            key = jax.random.fold_in(jax.random.key(config.seed), state.step)
            stored, chosen = (batch["x"], None) if clips is None else (clips, batch["clip"])
            x = self._views(stored, chosen, batch["length"], key, state.norm)

            def loss_function(params: Any) -> tuple[jax.Array, Any]:
                network, projection = gather((params["network"], params["projection"]))
                _, collections, sown = run_network(
                    self._module, network, state.collections, state.norm, x, key
                )
                embedding = sown["embedding"][0].astype(jnp.float32)
                losses, nearest = self._compared(projection, embedding, batch["clip"])
                metrics = {"loss": losses.mean(), "nearest": nearest.mean()}
                return metrics["loss"], (collections, metrics)

            before = {"network": state.params, "projection": state.opt_state["projection"]}
            grads, (collections, metrics) = jax.grad(loss_function, has_aux=True)(before)
            optimized = state.opt_state["optimizer"]
            updates, optimized = self._optimizer.update(grads, optimized, before)
            after: Any = optax.apply_updates(before, updates)
            opt_state = {"projection": after["projection"], "optimizer": optimized}
            new = state.following(after["network"], opt_state, collections, config.ema_decay)
            return new, metrics

        return simclr_step

    def measure(self, model: Any, projection: Any, batch: Any, number: jax.Array) -> jax.Array:
        """Returns each clip's mean loss and fraction of nearest views, `[batch, 2]`.

        The views depend on the seed and the batch's `number` alone, so they are the same at every
        evaluation. `model` is from `TrainState.model`; the batch is that of `step`.
        """
        key = jax.random.fold_in(jax.random.key(self.run.config.seed), _MEASURE_KEY)
        key = jax.random.fold_in(key, number)
        x = self._views(batch["x"], None, batch["length"], key, model["norm"])
        x = normalise(x, model["norm"])
        _, embedding = models.apply_model(self._module, model["variables"], x)
        losses, nearest = self._compared(projection, embedding, batch["clip"])
        return jnp.stack([losses, nearest], axis=-1).reshape(-1, 2, 2).mean(axis=1)

    def _compared(
        self, projection: Any, embedding: jax.Array, clip: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        z: Any = self._projection.apply({"params": projection}, embedding)
        return nt_xent(z, jnp.repeat(clip, 2), self.run.config.pretrain.temperature)

    def logs(self, step: int) -> bool:
        """Returns whether an epoch ends after a step."""
        return step % self.run.epoch_steps == 0

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Returns the measures of the validation clips, each counted once."""
        store, spread = self.run.store, self.run.spread
        if "valid" not in store.splits:
            return {}
        clips = store.indices("valid")
        size = min(self.run.config.batch_size, len(clips))
        filled = spread.round_up(size)
        values = []
        for number, first in enumerate(range(0, len(clips), size)):
            # The first clips fill the last batch, so that every view has as many to compare with.
            index = np.full(filled, -1, np.int32)
            index[:size] = np.arange(first, first + size) % len(clips)
            index = np.split(index, jax.process_count())[jax.process_index()]
            lengths = np.maximum(store.lengths[clips[index]], self.run.frames).astype(np.int32)
            batch = {"x": store.gather(clips[index]), "clip": index, "length": lengths}
            batch, projection = spread.place_batch(batch), state.opt_state["projection"]
            measured = self._measure(state.model(), projection, batch, jnp.int32(number))
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
        """Returns the measures of an epoch, for people."""
        epoch, epochs = step // self.run.epoch_steps, self.run.config.pretrain.epochs
        return f"epoch {epoch} of {epochs}: {self._shown()}"

    def measures(self) -> tuple[dict[str, float], ...]:
        """Returns the measures of the last epoch."""
        return (self.progress,)

    def summary(self, step: int) -> str:
        """Returns the measures of the last epoch, for people."""
        return f"pretrained in {step} steps; {self._shown()}"

    def _shown(self) -> str:
        shown = "{} loss {loss:.3f}, other view nearest {nearest:.1%} (chance {chance:.1%})"
        columns: dict[str, dict[str, float]] = {}
        for name, value in self.progress.items():
            split, _, measure = name.partition("_")
            columns.setdefault(split, {})[measure] = value
        return "; ".join(shown.format(split, **measures) for split, measures in columns.items())
