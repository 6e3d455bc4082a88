"""Contrastive learning without labels: two views of a clip are to be told from the views of all other clips of the batch.

Sources: T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A simple framework for contrastive learning of visual representations"
(SimCLR), 2020, arXiv:2002.05709; for music J. Spijkervet, J. A. Burgoyne, "Contrastive learning of musical representations"
(CLMR), 2021, arXiv:2103.09410. A view here is a random crop of `data.crop_frames` frames that undergoes the config's `augment`:

    clip -> two crops, each augmented for itself -> normalisation -> network -> embedding -> projection -> NT-Xent

The projection is thrown away afterwards, and the network's head is never trained. This has nothing to do with contrastive
divergence, the rule of restricted Boltzmann machines (`musicgenre.training.objectives.rbm`).
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from ml_collections import ConfigDict

from musicgenre import models
from musicgenre.config import base_config, check_config, store_path
from musicgenre.errors import UserError
from musicgenre.models.apply import normalise
from musicgenre.runs.checkpoints import Checkpoints
from musicgenre.runs.notes import run_notes
from musicgenre.runs.workdir import Interrupted, catch_signals, check_store, claim_workdir
from musicgenre.store.loader import normalisation, train_batches
from musicgenre.store.store import Store
from musicgenre.training.augment import Augmentation, gather_windows
from musicgenre.training.fit import MOST_STEPS_IN_FLIGHT, resident_clips
from musicgenre.training.optimisers import learning_rate_schedule, make_optimizer
from musicgenre.training.parallel import Parallel
from musicgenre.training.state import TrainState, create_state
from musicgenre.training.step import Metrics, StepFunction
from musicgenre.training.telemetry import Telemetry

# What keys are folded with, apart from the step's other draws: of the crops, of the projection, of the measured clips' views.
_CROP_KEY, _PROJECTION_KEY, _MEASURE_KEY = 0xC409, 0x960E, 0x3EA5
# Fields of `pretrain` that only contrastive divergence takes.
_NOT_OURS = ("learning_rate", "momentum", "weight_decay", "cd_steps")


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
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(
                lambda old, new: ema_decay * old + (1.0 - ema_decay) * new, ema, after["network"]
            )
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=after["network"],
            collections=collections,
            opt_state={"projection": after["projection"], "optimizer": opt_state},
            ema=ema,
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


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """How pretraining ended: its last step, and the measures of its last epoch (see `pretrain`)."""

    workdir: Path
    step: int
    measures: dict[str, float]

    def line(self) -> str:
        """One line for people."""
        return (
            f"{self.workdir}: pretrained in {self.step} steps; {_shown(self.measures)}. "
            f"To fine-tune: experiments/train.py --config.init_from={self.workdir}"
        )


def pretrain(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    devices: list[Any] | None = None,
) -> PretrainResult:
    """Learns a network up to its embedding without labels, or goes on with it: the same call resumes, bit for bit.

    The workdir has the form of `musicgenre.training.fit.train`'s; its checkpoint holds the network with a head that is
    only initialised, for `config.init_from` of a training. The optimiser, its schedule and the average of the parameters are
    those of the sections that training has; the whole clips are read, in this process, and cropped on the device.

    At the end of every epoch a row of `metrics.jsonl` gets `train_loss` and `train_nearest`, the mean of its steps, and every
    `config.eval_every` epochs also `valid_loss` and `valid_nearest`, of the validation clips in batches of the same size (all
    of them at once where they are fewer) with the network as it is used after training. `nearest` is the share of views whose
    nearest of the batch is the other one of their clip.

    Args:
      config: from `musicgenre.config.base_config`; the section `pretrain` holds this function's own settings.
      workdir: the run's folder; gets `config.json`, `train_clips.json`, `metrics.jsonl` and `checkpoints/`.
      progress: draw a progress bar.
      say: is given one line for each epoch.
      devices: devices to use; all if None.

    Returns:
      How it ended.

    Raises:
      UserError: the config or the store cannot be used, the two views of a clip would be the same, the workdir holds another
        run, or the loss became NaN or infinite.
      Interrupted: SIGINT or SIGTERM came; everything up to it is saved.
    """
    workdir = Path(workdir)
    check_config(config)
    config = config.copy_and_resolve_references()
    config.model = ConfigDict(models.resolve(config.model.to_dict()))
    store = Store.open(store_path(config))
    check_store(config, store)
    frames = config.data.crop_frames or store.layout.frames
    augmentation = Augmentation.from_config(config, frames)
    train_clips = store.indices("train")
    _check_fields(config, store, augmentation, len(train_clips))
    module = models.build(
        config.model.to_dict(),
        num_classes=len(store.label_names),
        frames=frames,
        bands=store.bands,
        kind=store.features.kind,
        dtype=config.dtype,
    )
    # The mark keeps `train` with the same config out of this folder, whose checkpoints it could not go on from.
    claim_workdir(workdir, ConfigDict({**config.to_dict(), "stage": "pretrain"}), store)

    settings = config.pretrain
    spread = Parallel.create("jit", devices)
    spread.check_batch_size(config.batch_size)
    epoch_steps = math.ceil(len(train_clips) / config.batch_size)
    total_steps = epoch_steps * settings.epochs
    optimizer = make_optimizer(config.optimizer, total_steps)
    schedule = learning_rate_schedule(config.optimizer, total_steps)
    how: dict[str, Any] = {
        "seed": config.seed,
        "frames": frames,
        "temperature": settings.temperature,
        "projection": settings.projection,
        "augmentation": augmentation,
    }
    clips = resident_clips(spread, store, train_clips, config.data.on_device)
    simclr_step = spread.train_step(
        make_simclr_step(module, optimizer, ema_decay=config.ema_decay, **how),
        resident=clips is not None,
    )
    measure_step = jax.jit(
        make_measure_step(module, **how),
        in_shardings=(spread.replicated, spread.replicated, spread.sharded, spread.replicated),
        out_shardings=spread.replicated,
    )
    state = spread.place_state(
        create_learner(
            module,
            optimizer,
            normalisation(store, config.data.normalise, clips=config.data.normalise_clips),
            seed=config.seed,
            frames=frames,
            bands=store.bands,
            projection=settings.projection,
            ema=config.ema_decay > 0,
        )
    )
    # Which clips a step takes and how much of each can be used; the crops are drawn on the device.
    iterator = train_batches(
        store,
        batch_size=config.batch_size,
        steps=total_steps,
        seed=config.seed,
        crop_frames=config.data.crop_frames,
        window_frames=store.layout.frames,
        resident=True,
    )

    def next_batch() -> dict[str, Any]:
        drawn = next(iterator)
        batch = {"clip": drawn["clip"], "length": drawn["length"]}
        if clips is None:
            batch["x"] = store.gather(train_clips[drawn["clip"]])
        return spread.place_batch(batch)

    checkpoints = Checkpoints(workdir / "checkpoints")
    step, measures = 0, dict[str, float]()
    # Sums over the steps of the epoch so far, which a stop in the middle of it must not lose.
    sums = {"loss": 0.0, "nearest": 0.0, "steps": 0}
    if restored := checkpoints.restore_latest(state, iterator):
        state, step = restored.value, restored.step
        measures, sums = restored.meta["pretrained"], restored.meta["epoch"]
        logging.info("going on from step %d of %d", step, total_steps)
    telemetry = Telemetry(
        workdir, step, total_steps, progress and step < total_steps, name="pretrain"
    )
    # What is learnt is not what is wanted in the end, so no checkpoint counts as the best.
    notes = run_notes(config, store) | {
        "metric": "nearest",
        "lower_is_better": False,
        "measure": None,
    }
    pending: list[tuple[int, Metrics]] = []

    def settle() -> None:
        """Waits for the steps in flight and stops at a loss that is not a number."""
        for number, metrics in pending:
            values = {name: float(value) for name, value in metrics.items()}
            if not math.isfinite(values["loss"]):
                raise UserError(
                    f"{workdir}: the loss became {values['loss']} at step {number}. The checkpoints before it are whole. Try a "
                    "smaller --config.optimizer.learning_rate, or --config.optimizer.clip_norm=1, in another --workdir."
                )
            for name, value in values.items():
                sums[name] += value
            sums["steps"] += 1
        pending.clear()

    def save() -> None:
        checkpoints.save(state, iterator, notes | {"pretrained": measures, "epoch": sums}, None)

    with contextlib.closing(telemetry), contextlib.closing(checkpoints), catch_signals() as signals:
        while step < total_steps:
            state, metrics = simclr_step(state, next_batch(), *(() if clips is None else (clips,)))
            step += 1
            saved = False
            pending.append((step, metrics))
            epoch_ends = step % epoch_steps == 0
            if len(pending) >= MOST_STEPS_IN_FLIGHT or step % config.log_every == 0 or epoch_ends:
                settle()
                means = {
                    f"train_{name}": sums[name] / sums["steps"] for name in ("loss", "nearest")
                }
                telemetry.progress(step, **means)
            if epoch_ends:
                epoch = step // epoch_steps
                evaluates = epoch % config.eval_every == 0 or step == total_steps
                measures = means | {"train_chance": 1 / (2 * config.batch_size - 1)}
                if evaluates and "valid" in store.splits:
                    measures |= _valid_measures(measure_step, state, store, spread, config)
                sums = {"loss": 0.0, "nearest": 0.0, "steps": 0}
                telemetry.write(
                    step, epoch=epoch, **measures, learning_rate=float(schedule(step - 1))
                )
                if say is not None:
                    say(f"epoch {epoch} of {settings.epochs}: {_shown(measures)}")
                if evaluates:
                    save()
                    saved = True
            if (number := signals.received(step)) is not None:
                if not saved:
                    settle()
                    save()
                checkpoints.wait()
                raise Interrupted(number, step)
        checkpoints.wait()
    return PretrainResult(workdir, step, measures)


def _check_fields(
    config: ConfigDict, store: Store, augmentation: Augmentation | None, clips: int
) -> None:
    """Raises UserError for fields that this kind of pretraining cannot follow, or that leave it nothing to learn."""
    defaults = base_config().pretrain
    for name in _NOT_OURS:
        if config.pretrain[name] != defaults[name]:
            raise UserError(
                f"config.pretrain.{name} is for contrastive divergence and has no effect here: set the fields of "
                "--config.optimizer instead."
            )
    of_training = {
        "init_from": config.init_from != "",
        "distill.teachers": len(config.distill.teachers) > 0,
        "optimizer.layer_decay": config.optimizer.layer_decay != 1,
    }
    for name, there in of_training.items():
        if there:
            raise UserError(
                f"config.{name} has no effect on pretraining: give it to experiments/train.py."
            )
    if config.optimizer.accumulate > 1:
        raise UserError(
            f"config.optimizer.accumulate={config.optimizer.accumulate}: each view is compared with all of its batch, which "
            "cannot be cut into parts here. Set it to 1, and a smaller --config.batch_size if memory does not suffice."
        )
    for name in ("mixup", "cutmix"):
        if config.augment[name]:
            raise UserError(
                f"config.augment.{name} makes one clip of two, which then have views in common: set it to 0 for pretraining."
            )
    if augmentation is None and config.data.crop_frames in (0, store.layout.frames):
        raise UserError(
            "the two views of a clip would be the same: set --config.data.crop_frames below the "
            f"{store.layout.frames} frames of a clip, or fields of --config.augment."
        )
    if config.batch_size < 2:
        raise UserError(
            "config.batch_size=1 leaves no other clip to tell a view from: it must be at least 2."
        )
    if config.batch_size > clips:
        raise UserError(
            f"config.batch_size={config.batch_size} is more than the {clips} training clips, whose views are to be told apart."
        )


def _valid_measures(
    measure_step: Callable[..., jax.Array],
    state: TrainState,
    store: Store,
    spread: Parallel,
    config: ConfigDict,
) -> dict[str, float]:
    """Returns the validation clips' `valid_loss`, `valid_nearest` and `valid_chance`, each clip counted once."""
    clips = store.indices("valid")
    size = min(config.batch_size, len(clips))
    filled = spread.round_up(size)
    values = []
    for number, first in enumerate(range(0, len(clips), size)):
        # The last batch is filled up with the first clips, so that every view is compared with equally many.
        places = np.arange(first, first + size) % len(clips)
        chosen = clips[np.pad(places, (0, filled - size))]
        lengths = np.maximum(store.lengths[chosen], config.data.crop_frames or store.layout.frames)
        batch = {
            "x": store.gather(chosen),
            "clip": np.pad(places, (0, filled - size), constant_values=-1).astype(np.int32),
            "length": lengths.astype(np.int32),
        }
        measured = measure_step(
            state.model(),
            state.opt_state["projection"],
            spread.place_batch(batch),
            jnp.int32(number),
        )
        values.append(np.asarray(measured)[: min(size, len(clips) - first)])
    loss, nearest = np.concatenate(values).mean(axis=0, dtype=np.float64)
    return {
        "valid_loss": float(loss),
        "valid_nearest": float(nearest),
        "valid_chance": 1 / (2 * size - 1),
    }


def _shown(measures: dict[str, float]) -> str:
    """Returns the measures of an epoch for people."""
    parts = []
    for split in ("train", "valid"):
        if f"{split}_loss" in measures:
            loss, nearest, chance = (
                measures[f"{split}_{name}"] for name in ("loss", "nearest", "chance")
            )
            parts.append(
                f"{split} loss {loss:.3f}, other view nearest {nearest:.1%} (chance {chance:.1%})"
            )
    return "; ".join(parts)
