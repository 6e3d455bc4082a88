"""SimCLR: contrastive learning from two views of each clip, without labels.

A view is a random window of `data.crop_frames` frames that undergoes the config's `augment`:

    clip -> two windows, each augmented -> normalisation -> network -> embedding -> projection
    -> NT-Xent

The projection is dropped afterwards, and the network's head is never trained.

Sources: T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A simple framework for contrastive learning
of visual representations" (SimCLR), 2020, arXiv:2002.05709; for music J. Spijkervet, J. A. Burgoyne,
"Contrastive learning of musical representations" (CLMR), 2021, arXiv:2103.09410.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from musicgenre import models
from musicgenre.errors import UserError
from musicgenre.models.apply import normalise
from musicgenre.store.loader import train_batches
from musicgenre.training.augment import Augmentation, gather_windows
from musicgenre.training.objectives import Objective, Run, register
from musicgenre.training.optimisers import learning_rate_schedule, make_optimizer
from musicgenre.training.state import TrainState, average, create_state
from musicgenre.training.step import Metrics, StepFunction

NAME = "simclr"
# Folded into a step's key for the windows, and into the run's for the projection and the views of
# measured clips.
_CROP_KEY, _PROJECTION_KEY, _MEASURE_KEY = 0xC409, 0x960E, 0x3EA5


class Projection(nn.Module):
    """Two dense layers with a ReLU between them, the first as wide as its input (Chen et al. 2020, section 4.2).

    Attributes:
      features: outputs.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `[batch, features]` of embeddings `[batch, d]`, both float32."""
        return nn.Dense(self.features, name="dense2")(
            nn.relu(nn.Dense(x.shape[-1], name="dense1")(x))
        )


def nt_xent(z: jax.Array, clip: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Normalised, temperature-scaled cross entropy of views: each is to be nearer to its clip's other view than to all else.

    With s the cosines of the rows over the temperature, row i with the other view j has the loss
    -s_ij + log sum over k != i of exp(s_ik). Where all rows are alike, this is log(2 clips - 1).

    Args:
      z: float `[2 clips, d]`, of which rows 2c and 2c + 1 are the two views of one clip.
      clip: int32 `[2 clips]`, which clip a row is of. Should one come twice in a batch, its other pair is not counted as
        another clip; and rows below 0 only fill up: nothing is compared with them.
      temperature: what the cosines are divided by.

    Returns:
      The loss of each row, float32 `[2 clips]`, and whether its clip's other view is its nearest of all, bool `[2 clips]`.
    """
    rows = jnp.arange(z.shape[0])
    z = z.astype(jnp.float32)
    z = z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(axis=-1, keepdims=True), 1e-12))
    # Cosines rounded to 16 bits would be worth nothing over a low temperature.
    similarity = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST) / temperature
    other_view = rows[None, :] == (rows ^ 1)[:, None]
    other_clip = (clip[None, :] != clip[:, None]) & (clip[None, :] >= 0)
    of_view = jnp.where(other_view, similarity, 0.0).sum(axis=1)
    losses = (
        jax.nn.logsumexp(jnp.where(other_view | other_clip, similarity, -jnp.inf), axis=1) - of_view
    )
    # Alone in front: an embedding that is the same for every clip finds nothing.
    return losses, of_view > jnp.where(other_clip, similarity, -jnp.inf).max(axis=1)


def make_views(
    frames: int, augmentation: Augmentation | None
) -> Callable[[jax.Array, jax.Array | None, jax.Array, jax.Array, Any], jax.Array]:
    """Returns `views(x, clip, length, key, norm) -> [2 batch, frames, bands]`: two random crops of each clip, augmented.

    Its arguments: `x`, clips as they are in the store `[clips, frames of the store, bands]`; `clip`, int32 `[batch]`, which of
    them, or None for all; `length`, int32 `[batch]`, how many of their frames can be used, at least `frames`; the step's key;
    and the input's normalisation, with whose mean masks are filled. Rows 2c and 2c + 1 of the result, which is not normalised
    yet, are views of the batch's clip c.

    Args:
      frames: frames of a crop.
      augmentation: what each crop undergoes; nothing if None.
    """

    def views(
        x: jax.Array, clip: jax.Array | None, length: jax.Array, key: jax.Array, norm: Any
    ) -> jax.Array:
        length = jnp.repeat(length, 2)
        # A key for each row, as the augmentation has: the crops do not depend on the number of devices.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(key, _CROP_KEY), jnp.arange(length.shape[0])
        )
        start = jax.vmap(lambda key, room: jax.random.randint(key, (), 0, room + 1))(
            keys, length - frames
        )
        stretches = augmentation is not None and augmentation.time_stretch > 0
        # Time stretch cuts the crop out itself: a fast one takes more frames of the clip.
        if clip is not None:
            x = (
                x[jnp.repeat(clip, 2)]
                if stretches
                else gather_windows(x, jnp.repeat(clip, 2), start, frames)
            )
        else:
            # Along the frames alone, so that no clip leaves its device.
            x = jnp.repeat(x, 2, axis=0)
            if not stretches and frames < x.shape[1]:
                x = jnp.take_along_axis(
                    x, (start[:, None] + jnp.arange(frames))[:, :, None], axis=1
                )
        if augmentation is None:
            return x.astype(jnp.float32)
        result: jax.Array = augmentation(
            {"x": x} | ({"offset": start, "length": length} if stretches else {}), key, norm
        )["x"]
        return result

    return views


def create_learner(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    norm: dict[str, Any],
    *,
    seed: int,
    frames: int,
    bands: int,
    projection: int,
    ema: bool,
) -> TrainState:
    """Initialises a network and the projection over its embedding from the seed.

    Args:
      module: the Linen module.
      optimizer: of both.
      norm: `mean` and `std`, broadcastable to `[frames, bands]`.
      seed: of the parameters.
      frames: frames of the input.
      bands: bands of the input.
      projection: outputs of the projection.
      ema: keep a moving average of the network's parameters.

    Returns:
      A state of the network, whose `opt_state` holds what the network does not have: `projection`, parameters, and `optimizer`.

    Raises:
      UserError: the network sows no embedding.
    """
    state = create_state(
        module, optax.identity(), norm, seed=seed, frames=frames, bands=bands, ema=ema
    )
    variables = {"params": state.params, **state.collections}
    try:
        _, embedding = jax.eval_shape(
            lambda variables, x: models.apply_model(module, variables, x),
            variables,
            jnp.zeros((1, frames, bands)),
        )
    except KeyError as error:
        raise UserError(
            f"the model {type(module).__name__} has no embedding to learn: before its head it must do "
            'self.sow("intermediates", "embedding", x).'
        ) from error
    key = jax.random.fold_in(jax.random.key(seed), _PROJECTION_KEY)
    params = jax.jit(Projection(projection).init)(key, jnp.zeros((1, embedding.shape[-1])))[
        "params"
    ]
    opt_state = {
        "projection": params,
        "optimizer": optimizer.init({"network": state.params, "projection": params}),
    }
    return dataclasses.replace(state, opt_state=opt_state)


def make_simclr_step(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    frames: int,
    temperature: float,
    projection: int,
    augmentation: Augmentation | None,
    ema_decay: float = 0.0,
    gather: Callable[[Any], Any] = lambda tree: tree,
) -> StepFunction:
    """Returns `simclr_step(state, batch, clips=None) -> (state, metrics)`, pure, to be jitted.

    Args:
      module: the Linen module.
      optimizer: of the network and the projection.
      seed: the key of a step's views and of dropout is derived from `fold_in(key(seed), step)`.
      frames: frames of a view.
      temperature: see `nt_xent`.
      projection: outputs of the projection.
      augmentation: see `make_views`.
      ema_decay: of the moving average of the network's parameters; 0 when there is none.

    The step takes `x` `[batch, frames of the store, bands]`, or with resident `clips` all of them instead, `clip` int32
    `[batch]`, the place among the training clips, and `length` int32 `[batch]`, see `make_views`. Its metrics are scalars:
    `loss`, and `nearest`, the share of views whose nearest of the batch is their clip's other one.
    """
    views = make_views(frames, augmentation)

    def loss_function(
        params: Any, state: TrainState, batch: Any, x: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        params = gather(params)
        _, updated = module.apply(
            {"params": params["network"], **state.collections},
            normalise(x, state.norm),
            train=True,
            rngs={"dropout": key},
            mutable=[*state.collections, "intermediates"],
        )
        embedding = updated["intermediates"]["embedding"][0].astype(jnp.float32)
        z = Projection(projection).apply({"params": params["projection"]}, embedding)
        losses, nearest = nt_xent(z, jnp.repeat(batch["clip"], 2), temperature)
        metrics = {"loss": losses.mean(), "nearest": nearest.mean()}
        return metrics["loss"], ({name: updated[name] for name in state.collections}, metrics)

    def simclr_step(
        state: TrainState, batch: Any, clips: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        whole, chosen = (batch["x"], None) if clips is None else (clips, batch["clip"])
        x = views(whole, chosen, batch["length"], key, state.norm)
        before = {"network": state.params, "projection": state.opt_state["projection"]}
        grads, (collections, metrics) = jax.grad(loss_function, has_aux=True)(
            before, state, batch, x, key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state["optimizer"], before)
        after: Any = optax.apply_updates(before, updates)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=after["network"],
            collections=collections,
            opt_state={"projection": after["projection"], "optimizer": opt_state},
            ema=average(state.ema, after["network"], ema_decay),
        )
        return new, metrics

    return simclr_step


def make_measure_step(
    module: nn.Module,
    *,
    seed: int,
    frames: int,
    temperature: float,
    projection: int,
    augmentation: Augmentation | None,
) -> Callable[[Any, Any, Any, jax.Array], jax.Array]:
    """Returns `measure_step(model, projection, batch, number) -> [batch, 2]`: a clip's mean loss and share of nearest views.

    The network is used as after training. The views are drawn from the seed and the batch's number alone, so those of one batch
    stay the same from one measurement to the next. See `make_simclr_step` for the arguments.
    """
    views = make_views(frames, augmentation)

    def measure_step(model: Any, head: Any, batch: Any, number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _MEASURE_KEY), number)
        x = views(batch["x"], None, batch["length"], key, model["norm"])
        _, embedding = models.apply_model(module, model["variables"], normalise(x, model["norm"]))
        z = Projection(projection).apply({"params": head}, embedding)
        losses, nearest = nt_xent(z, jnp.repeat(batch["clip"], 2), temperature)
        return jnp.stack([losses, nearest], axis=-1).reshape(-1, 2, 2).mean(axis=1)

    return measure_step


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
    refuses: Mapping[str, str] = {
        "optimizer.accumulate": "each view is compared with its full batch, which cannot be split. "
        "Set it to 1, and a smaller --config.batch_size if memory does not suffice.",
        "optimizer.layer_decay": "has no effect on pretraining: give it to musicgenre train.",
        "optimizer.transferred_rate": "has no effect on pretraining: give it to "
        "musicgenre train.",
        "augment.mixup": "makes one clip of two, which then share views: set it to 0.",
        "augment.cutmix": "makes one clip of two, which then share views: set it to 0.",
        "data.eval_chunks": "views are drawn at random from each clip: leave it at 1, and give it "
        "to musicgenre train.",
    }
    pmap = False

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
        self._module = run.module()
        self._optimizer = make_optimizer(config.optimizer, self.stage_steps)
        self._schedule = learning_rate_schedule(config.optimizer, self.stage_steps)
        self._settings: dict[str, Any] = {
            "seed": config.seed,
            "frames": run.frames,
            "temperature": config.pretrain.temperature,
            "projection": config.pretrain.projection,
            "augmentation": augmentation,
        }
        self._measure = jax.jit(
            make_measure_step(self._module, **self._settings),
            in_shardings=(None, None, run.spread.sharded, run.spread.replicated),
            out_shardings=run.spread.replicated,
        )
        self._measures: dict[str, float] = {}

    @property
    def stage_steps(self) -> int:
        """Steps of the run."""
        return self.run.epoch_steps * int(self.run.config.pretrain.epochs)

    def create_state(self, resumes: bool) -> TrainState:
        """Returns a fresh network and projection."""
        config, norm = self.run.config, self.run.norm()
        return self.run.spread.create_state(
            lambda: create_learner(
                self._module,
                self._optimizer,
                norm,
                seed=config.seed,
                frames=self.run.frames,
                bands=self.run.store.bands,
                projection=config.pretrain.projection,
                ema=config.ema_decay > 0,
            )
        )

    def batches(self, resident: bool, resumes: bool) -> Any:
        """Returns the iterator over full clips, whose windows the step draws."""
        config, store = self.run.config, self.run.store
        return train_batches(
            store,
            batch_size=config.batch_size,
            steps=self.stage_steps,
            seed=config.seed,
            crop_frames=config.data.crop_frames,
            window_frames=store.layout.frames,
            resident=resident,
            named=True,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.data.workers,
        )

    def step(self, stage: int) -> StepFunction:
        """Returns the step."""
        return make_simclr_step(
            self._module,
            self._optimizer,
            ema_decay=self.run.config.ema_decay,
            gather=self.run.spread.gather,
            **self._settings,
        )

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
        chance = 1 / (2 * self.run.config.batch_size - 1)
        train = {f"train_{name}": value for name, value in {**means, "chance": chance}.items()}
        self._measures = train | {f"valid_{name}": value for name, value in measures.items()}
        rate = float(self._schedule(step - 1))
        epoch = step // self.run.epoch_steps
        return [{"epoch": epoch, **self._measures, "learning_rate": rate}]

    def epoch_line(self, step: int) -> str:
        """Returns the measures of an epoch."""
        epoch, epochs = step // self.run.epoch_steps, self.run.config.pretrain.epochs
        return f"epoch {epoch} of {epochs}: {self._shown()}"

    def notes(self) -> dict[str, Any]:
        """Returns the measures of the last epoch. No checkpoint counts as the best."""
        return {"metric": "nearest", "lower_is_better": False, "pretrained": self._measures}

    def restore(self, notes: Mapping[str, Any]) -> None:
        """Takes up the measures of the last epoch."""
        self._measures = notes["pretrained"]

    def measures(self) -> tuple[dict[str, float], ...]:
        """Returns the measures of the last epoch."""
        return (self._measures,)

    def summary(self, step: int) -> str:
        """Returns the measures of the last epoch, for people."""
        return f"pretrained in {step} steps; {self._shown()}"

    def _shown(self) -> str:
        measures = self._measures
        return "; ".join(
            f"{split} loss {measures[f'{split}_loss']:.3f}, "
            f"other view nearest {measures[f'{split}_nearest']:.1%} "
            f"(chance {measures[f'{split}_chance']:.1%})"
            for split in ("train", "valid")
            if f"{split}_loss" in measures
        )
