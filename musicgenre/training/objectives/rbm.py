"""Restricted Boltzmann machines: contrastive divergence as a pure step, and a stack of them as a network's pretraining.

A machine has visible units v and hidden units h in {0, 1}. With binary v its energy is
E(v, h) = -a.v - b.h - v.W.h; with Gaussian v of unit variance, E(v, h) = |v - a|^2 / 2 - b.h - v.W.h (Hinton, "A practical
guide to training restricted Boltzmann machines", 2010). A stack is learnt from below: the first machine sees the normalised
features, each next one the hidden probabilities of the machines below (Hinton, Osindero, Teh 2006; for genres Feng 2014).
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from musicgenre.models.rbm import UnrolledRBMs
from musicgenre.runs.checkpoints import Checkpoints
from musicgenre.runs.notes import run_notes
from musicgenre.runs.workdir import Interrupted, catch_signals, check_store, claim_workdir
from musicgenre.store.loader import normalisation, train_batches
from musicgenre.store.store import Store
from musicgenre.training.augment import Augmentation
from musicgenre.training.fit import MOST_STEPS_IN_FLIGHT
from musicgenre.training.parallel import Parallel
from musicgenre.training.scoring import score_clips
from musicgenre.training.state import TrainState, create_state
from musicgenre.training.step import Metrics, StepFunction
from musicgenre.training.telemetry import Telemetry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RBM:
    """The parameters of one machine; a pytree, so gradients have the same form.

    Attributes:
      weights: W, float32 `[visible, hidden]`.
      visible_bias: a, `[visible]`.
      hidden_bias: b, `[hidden]`.
      gaussian: the visible units are Gaussian with unit variance; else they are binary, or probabilities of ones.
    """

    weights: jax.Array
    visible_bias: jax.Array
    hidden_bias: jax.Array
    gaussian: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CDState:
    """What a step of contrastive divergence changes; a pytree.

    Attributes:
      step: steps done, int32 scalar.
      rbm: the machine.
      opt_state: the optimiser's state.
    """

    step: jax.Array
    rbm: RBM
    opt_state: Any


def init_rbm(key: jax.Array, visible: int, hidden: int, *, gaussian: bool = False) -> RBM:
    """Returns a machine with weights from a normal distribution of deviation 0.01 and zero biases, as Hinton advises."""
    weights = 0.01 * jax.random.normal(key, (visible, hidden))
    return RBM(weights, jnp.zeros(visible), jnp.zeros(hidden), gaussian)


def hidden_probabilities(rbm: RBM, visible: jax.Array) -> jax.Array:
    """Returns p(h = 1 | v), `[batch, hidden]`, of `visible` `[batch, visible]`."""
    return jax.nn.sigmoid(rbm.hidden_bias + visible @ rbm.weights)


def visible_means(rbm: RBM, hidden: jax.Array) -> jax.Array:
    """Returns E(v | h), `[batch, visible]`, of `hidden` `[batch, hidden]`: probabilities where v is binary."""
    means = rbm.visible_bias + hidden @ rbm.weights.T
    return means if rbm.gaussian else jax.nn.sigmoid(means)


def free_energy(rbm: RBM, visible: jax.Array) -> jax.Array:
    """Returns F(v) = -log sum over h of exp(-E(v, h)), `[batch]`, of `visible` `[batch, visible]`; p(v) is exp(-F(v)) / Z."""
    if rbm.gaussian:
        alone = 0.5 * jnp.square(visible - rbm.visible_bias).sum(axis=-1)
    else:
        alone = -visible @ rbm.visible_bias
    return alone - jax.nn.softplus(rbm.hidden_bias + visible @ rbm.weights).sum(axis=-1)


def gibbs_step(rbm: RBM, visible: jax.Array, key: jax.Array) -> jax.Array:
    """Samples h given v, then v given h; returns the new v `[batch, visible]`."""
    hidden_key, visible_key = jax.random.split(key)
    hidden = jax.random.bernoulli(hidden_key, hidden_probabilities(rbm, visible)).astype(
        jnp.float32
    )
    means = visible_means(rbm, hidden)
    if rbm.gaussian:
        return means + jax.random.normal(visible_key, means.shape)
    return jax.random.bernoulli(visible_key, means).astype(jnp.float32)


def cd_gradient(rbm: RBM, visible: jax.Array, key: jax.Array, steps: int) -> RBM:
    """Returns the CD-k estimate of the gradient of the mean negative log-likelihood, to be descended.

    The gradient is that of the free energy at the data minus that at the ends of k-step Gibbs chains that start from the
    data (Hinton 2002). Hidden units enter both with their probabilities, so only the chain itself is noisy.

    Args:
      rbm: the machine.
      visible: data, float32 `[batch, visible]`.
      key: random key; Gibbs step i takes `fold_in(key, i)`.
      steps: k.
    """
    fantasy = jax.lax.fori_loop(
        0, steps, lambda i, v: gibbs_step(rbm, v, jax.random.fold_in(key, i)), visible
    )
    return jax.grad(
        lambda params: free_energy(params, visible).mean() - free_energy(params, fantasy).mean()
    )(rbm)


def reconstruction_errors(rbm: RBM, visible: jax.Array) -> jax.Array:
    """Returns the mean squared difference, `[batch]`, of v `[batch, visible]` and E(v | p(h | v)); nothing is sampled."""
    return jnp.square(visible - visible_means(rbm, hidden_probabilities(rbm, visible))).mean(
        axis=-1
    )


def cd_optimizer(
    learning_rate: float, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Returns gradient descent with momentum; weight decay leaves the biases alone."""

    def weights_only(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        optax.add_decayed_weights(weight_decay, weights_only), optax.sgd(learning_rate, momentum)
    )


def make_cd_step(
    optimizer: optax.GradientTransformation, *, seed: int, cd_steps: int = 1
) -> Callable[[CDState, jax.Array], tuple[CDState, Metrics]]:
    """Returns `cd_step(state, visible) -> (state, metrics)`, pure, to be jitted.

    Args:
      optimizer: see `cd_optimizer`.
      seed: the chains' key at a step is `fold_in(key(seed), step)`.
      cd_steps: k of CD-k.

    The step takes `visible` `[batch, visible]`; its metric is the mean `reconstruction_error` before the update.
    """

    def cd_step(state: CDState, visible: jax.Array) -> tuple[CDState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradient = cd_gradient(state.rbm, visible, key, cd_steps)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.rbm)
        metrics = {"reconstruction_error": reconstruction_errors(state.rbm, visible).mean()}
        return CDState(state.step + 1, optax.apply_updates(state.rbm, updates), opt_state), metrics

    return cd_step


def machine(state: TrainState, layer: int) -> RBM:
    """Returns machine `layer` (0 is the lowest) of a stack: its weights are the network's `layer<N>`, N from 1."""
    dense = state.params[f"layer{layer + 1}"]
    return RBM(
        dense["kernel"], state.opt_state[layer]["visible_bias"], dense["bias"], gaussian=layer == 0
    )


def visible_of(state: TrainState, layer: int, x: jax.Array) -> jax.Array:
    """Returns what machine `layer` sees of stored features `x` `[batch, frames, bands]`: `[batch, visible]`, float32."""
    visible = normalise(x, state.norm).reshape(x.shape[0], -1)
    for below in range(layer):
        visible = hidden_probabilities(machine(state, below), visible)
    return visible


def make_layer_step(
    optimizer: optax.GradientTransformation, layer: int, *, seed: int, cd_steps: int = 1
) -> StepFunction:
    """Returns `layer_step(state, batch) -> (state, metrics)`, a `cd_step` of one machine of a stack; see `make_cd_step`."""
    cd_step = make_cd_step(optimizer, seed=seed, cd_steps=cd_steps)

    def layer_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        old = CDState(state.step, machine(state, layer), state.opt_state[layer]["optimizer"])
        new, metrics = cd_step(old, visible_of(state, layer, batch["x"]))
        params = state.params | {
            f"layer{layer + 1}": {"kernel": new.rbm.weights, "bias": new.rbm.hidden_bias}
        }
        own = {"visible_bias": new.rbm.visible_bias, "optimizer": new.opt_state}
        opt_state = (*state.opt_state[:layer], own, *state.opt_state[layer + 1 :])
        return dataclasses.replace(
            state, step=new.step, params=params, opt_state=opt_state
        ), metrics

    return layer_step


def make_monitor_step(layer: int) -> Callable[[TrainState, jax.Array], jax.Array]:
    """Returns `monitor_step(state, x) -> [batch, 2]`: free energy and reconstruction error at one machine of a stack."""

    def monitor_step(state: TrainState, x: jax.Array) -> jax.Array:
        visible = visible_of(state, layer, x)
        rbm = machine(state, layer)
        return jnp.stack([free_energy(rbm, visible), reconstruction_errors(rbm, visible)], axis=-1)

    return monitor_step


def create_stack(
    module: UnrolledRBMs,
    optimizer: optax.GradientTransformation,
    norm: dict[str, Any],
    *,
    seed: int,
    frames: int,
    bands: int,
) -> TrainState:
    """Initialises the machines of a stack as the layers of the network that they unroll into, from the seed.

    Args:
      module: the network.
      optimizer: of each machine.
      norm: `mean` and `std`, broadcastable to `[frames, bands]`.
      seed: of the weights, the head's too.
      frames: frames of the input.
      bands: bands of the input.

    Returns:
      A state whose `opt_state` holds, for each machine, `visible_bias` (which the network does not have) and `optimizer`.
    """
    state = create_state(
        module, optax.identity(), norm, seed=seed, frames=frames, bands=bands, ema=False
    )
    key = jax.random.fold_in(jax.random.key(seed), 0x4B1D)
    params, rest = dict(state.params), []
    for layer in range(len(module.layers)):
        name = f"layer{layer + 1}"
        rbm = init_rbm(
            jax.random.fold_in(key, layer), *params[name]["kernel"].shape, gaussian=layer == 0
        )
        params[name] = {"kernel": rbm.weights, "bias": rbm.hidden_bias}
        rest.append({"visible_bias": rbm.visible_bias, "optimizer": optimizer.init(rbm)})
    return dataclasses.replace(state, params=params, opt_state=tuple(rest))


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """How pretraining ended: its last step and, for each machine, the measures at its end (see `pretrain`)."""

    workdir: Path
    step: int
    layers: tuple[dict[str, float], ...]

    def line(self) -> str:
        """One line for people."""
        split = "valid" if "valid_reconstruction_error" in self.layers[0] else "train"
        errors = (
            f"layer{i} {measures[f'{split}_reconstruction_error']:.4f}"
            for i, measures in enumerate(self.layers, 1)
        )
        return (
            f"{self.workdir}: pretrained {len(self.layers)} layers in {self.step} steps; reconstruction error on {split}: "
            f"{', '.join(errors)}. To fine-tune: experiments/train.py --config.init_from={self.workdir}"
        )


def pretrain(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    progress: bool = True,
    devices: list[Any] | None = None,
) -> PretrainResult:
    """Learns the layers of the model "rbm" without labels, or goes on with it: the same call resumes, bit for bit.

    The workdir has the form of `musicgenre.training.fit.train`'s; its checkpoint holds the network with a head that is
    only initialised. Everything is computed in float32. At the end of every `config.eval_every` epochs, and of every layer,
    a row of `metrics.jsonl` gets the layer's `train_` and `valid_` `free_energy` and `reconstruction_error` (the training
    clips being as many as those of the validation split) and `free_energy_gap`, valid minus train: it grows when the machine
    learns the training clips by heart.

    Args:
      config: from `musicgenre.config.base_config`; the section `pretrain` holds this function's own settings.
      workdir: the run's folder; gets `config.json`, `train_clips.json`, `metrics.jsonl` and `checkpoints/`.
      progress: draw a progress bar.
      devices: devices to use; all if None.

    Returns:
      How it ended.

    Raises:
      UserError: the config or the store cannot be used, the model has no machines, the workdir holds another run, or the
        reconstruction error became NaN or infinite.
      Interrupted: SIGINT or SIGTERM came; everything up to it is saved.
    """
    workdir = Path(workdir)
    check_config(config)
    config = config.copy_and_resolve_references()
    config.model = ConfigDict(models.resolve(config.model.to_dict()))
    if config.model.name != "rbm" or not config.model.layers:
        raise UserError(
            f"config.model.name={config.model.name!r} has no restricted Boltzmann machines to pretrain: set "
            "--config.model.name=rbm, with at least one number of units in --config.model.layers. Any network is pretrained by "
            "--config.pretrain.method=simclr."
        )
    store = Store.open(store_path(config))
    check_store(config, store)
    frames = config.data.crop_frames or store.layout.frames
    module = models.build(
        config.model.to_dict(),
        num_classes=len(store.label_names),
        frames=frames,
        bands=store.bands,
        kind=store.features.kind,
        dtype=config.dtype,
    )
    if config.init_from:
        raise UserError(
            "config.init_from has no effect on pretraining: give it to experiments/train.py."
        )
    if config.distill.teachers:
        raise UserError(
            "config.distill has no effect on pretraining: give it to experiments/train.py."
        )
    if Augmentation.from_config(config, frames) is not None:
        raise UserError("config.augment has no effect on pretraining: leave it off.")
    defaults = base_config().pretrain
    for name in ("temperature", "projection"):
        if config.pretrain[name] != defaults[name]:
            raise UserError(
                f"config.pretrain.{name} is for --config.pretrain.method=simclr and has no effect here: leave it."
            )
    # The mark keeps `train` with the same config out of this folder, whose checkpoints it could not go on from.
    claim_workdir(workdir, ConfigDict({**config.to_dict(), "stage": "pretrain"}), store)

    settings = config.pretrain
    spread = Parallel.create("jit", devices)
    spread.check_batch_size(config.batch_size)
    train_clips = store.indices("train")
    monitored = {"train": train_clips}
    if "valid" in store.splits:
        valid_clips = store.indices("valid")
        chosen = np.linspace(
            0, len(train_clips) - 1, min(len(train_clips), len(valid_clips))
        ).astype(int)
        monitored = {"train": train_clips[chosen], "valid": valid_clips}
    epoch_steps = math.ceil(len(train_clips) / config.batch_size)
    layer_steps = epoch_steps * settings.epochs
    total_steps = layer_steps * len(module.layers)
    optimizer = cd_optimizer(settings.learning_rate, settings.momentum, settings.weight_decay)
    state = spread.place_state(
        create_stack(
            module,
            optimizer,
            normalisation(store, config.data.normalise, clips=config.data.normalise_clips),
            seed=config.seed,
            frames=frames,
            bands=store.bands,
        )
    )
    iterator = train_batches(
        store,
        batch_size=config.batch_size,
        steps=total_steps,
        seed=config.seed,
        crop_frames=config.data.crop_frames,
        workers=config.data.workers,
    )
    checkpoints = Checkpoints(workdir / "checkpoints")
    step, finished = 0, list[dict[str, float]]()
    if restored := checkpoints.restore_latest(state, iterator):
        state, step, finished = restored.value, restored.step, restored.meta["pretrained"]
        logging.info("going on from step %d of %d", step, total_steps)
    telemetry = Telemetry(
        workdir, step, total_steps, progress and step < total_steps, name="pretrain"
    )
    # No measure compares checkpoints of different layers, so there is no best one.
    notes = run_notes(config, store) | {
        "metric": "reconstruction_error",
        "lower_is_better": True,
        "measure": None,
    }

    def evaluate(monitor: Callable[..., np.ndarray]) -> dict[str, float]:
        measures: dict[str, float] = {}
        for split, clips in monitored.items():
            values = score_clips(
                monitor,
                state,
                store,
                clips,
                batch_size=spread.round_up(config.batch_size),
                crop_frames=config.data.crop_frames,
                chunks=config.data.eval_chunks,
            )
            energy, error = values.mean(axis=0, dtype=np.float64)
            measures |= {
                f"{split}_free_energy": float(energy),
                f"{split}_reconstruction_error": float(error),
            }
        if "valid" in monitored:
            measures["free_energy_gap"] = (
                measures["valid_free_energy"] - measures["train_free_energy"]
            )
        return measures

    pending: list[tuple[int, Metrics]] = []
    seen: list[float] = []

    def settle() -> None:
        """Waits for the steps in flight and stops at an error that is not a number."""
        for number, metrics in pending:
            error = float(metrics["reconstruction_error"])
            if not math.isfinite(error):
                raise UserError(
                    f"{workdir}: the reconstruction error became {error} at step {number}. The checkpoints before it are whole. "
                    "Try a smaller --config.pretrain.learning_rate in another --workdir."
                )
            seen.append(error)
        pending.clear()

    def save() -> None:
        checkpoints.save(state, iterator, notes | {"pretrained": finished}, None)

    with contextlib.closing(telemetry), contextlib.closing(checkpoints), catch_signals() as signals:
        while step < total_steps:
            layer = step // layer_steps
            layer_step = spread.train_step(
                make_layer_step(optimizer, layer, seed=config.seed, cd_steps=settings.cd_steps)
            )
            monitor = spread.score_step(make_monitor_step(layer))
            while step < (layer + 1) * layer_steps:
                state, metrics = layer_step(state, spread.place_batch(next(iterator)))
                step += 1
                saved = False
                pending.append((step, metrics))
                if len(pending) >= MOST_STEPS_IN_FLIGHT:
                    settle()
                layer_ends = step % layer_steps == 0
                if step % config.log_every == 0 or layer_ends:
                    settle()
                    telemetry.write(
                        step, layer=layer + 1, batch_reconstruction_error=float(np.mean(seen))
                    )
                    telemetry.progress(step, layer=layer + 1, reconstruction_error=seen[-1])
                    seen.clear()
                if step % (epoch_steps * config.eval_every) == 0 or layer_ends:
                    settle()
                    measures = evaluate(monitor)
                    telemetry.write(step, layer=layer + 1, **measures)
                    if layer_ends:
                        finished = [*finished, measures]
                    save()
                    saved = True
                if (number := signals.received(step)) is not None:
                    if not saved:
                        settle()
                        save()
                    checkpoints.wait()
                    raise Interrupted(number, step)
        checkpoints.wait()
    return PretrainResult(workdir, step, tuple(finished))
