"""Restricted Boltzmann machines: contrastive divergence, and a stack of them as pretraining.

A machine has visible units v and hidden units h in {0, 1}. With binary v its energy is
E(v, h) = -a.v - b.h - v.W.h; with Gaussian v of unit variance,
E(v, h) = |v - a|^2 / 2 - b.h - v.W.h (Hinton, "A practical guide to training restricted Boltzmann
machines", 2010). A stack is trained from below: the first machine sees the normalised features,
each next one the hidden probabilities of the machine below (Hinton, Osindero, Teh 2006; for genres
Feng 2014).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from musicgenre.errors import UserError
from musicgenre.models.apply import normalise
from musicgenre.models.rbm import UnrolledRBMs
from musicgenre.store.loader import train_batches
from musicgenre.training.augment import gather_windows
from musicgenre.training.objectives import Objective, Run, register
from musicgenre.training.scoring import score_clips
from musicgenre.training.state import TrainState, create_state
from musicgenre.training.step import Metrics, StepFunction

NAME = "contrastive_divergence"


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
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    cd_steps: int = 1,
    axis_name: str | None = None,
) -> Callable[[CDState, jax.Array], tuple[CDState, Metrics]]:
    """Returns `cd_step(state, visible) -> (state, metrics)`, pure, to be jitted or pmapped.

    Args:
      optimizer: see `cd_optimizer`.
      seed: the chains' key at a step is `fold_in(key(seed), step)`.
      cd_steps: k of CD-k.
      axis_name: the device axis under pmap, where each device draws for itself.

    The step takes `visible` `[batch, visible]`; its metric is the mean `reconstruction_error`
    before the update.
    """

    def cd_step(state: CDState, visible: jax.Array) -> tuple[CDState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        gradient = cd_gradient(state.rbm, visible, key, cd_steps)
        metrics = {"reconstruction_error": reconstruction_errors(state.rbm, visible).mean()}
        if axis_name is not None:
            gradient, metrics = jax.lax.pmean((gradient, metrics), axis_name)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.rbm)
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
    optimizer: optax.GradientTransformation,
    layer: int,
    *,
    seed: int,
    cd_steps: int = 1,
    frames: int = 0,
    axis_name: str | None = None,
    gather: Callable[[Any], Any] = lambda tree: tree,
) -> StepFunction:
    """Returns `layer_step(state, batch, clips=None) -> (state, metrics)`: a `cd_step` of one machine.

    Args:
      optimizer: see `cd_optimizer`.
      layer: the machine, 0 is the lowest.
      seed: see `make_cd_step`.
      cd_steps: see `make_cd_step`.
      frames: frames of a window of resident clips.
      axis_name: see `make_cd_step`.
      gather: `Parallel.gather`.
    """
    cd_step = make_cd_step(optimizer, seed=seed, cd_steps=cd_steps, axis_name=axis_name)

    def layer_step(
        state: TrainState, batch: Any, clips: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        if clips is None:
            x = batch["x"]
        else:
            x = gather_windows(clips, batch["clip"], batch["start"], frames)
        full = dataclasses.replace(state, params=gather(state.params))
        old = CDState(state.step, machine(full, layer), state.opt_state[layer]["optimizer"])
        new, metrics = cd_step(old, visible_of(full, layer, x))
        params = state.params | {
            f"layer{layer + 1}": {"kernel": new.rbm.weights, "bias": new.rbm.hidden_bias}
        }
        own = {"visible_bias": new.rbm.visible_bias, "optimizer": new.opt_state}
        opt_state = (*state.opt_state[:layer], own, *state.opt_state[layer + 1 :])
        new_state = dataclasses.replace(state, step=new.step, params=params, opt_state=opt_state)
        return new_state, metrics

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


@register(NAME)
class ContrastiveDivergence(Objective):
    """Learns the layers of the model "rbm", one stage per layer, in float32.

    Every `config.eval_every` epochs, and at the end of a layer, a row of `metrics.jsonl` gets the
    layer's `train_` and `valid_` `free_energy` and `reconstruction_error` (of as many training
    clips as the validation split has) and `free_energy_gap`, valid minus train, which grows as the
    machine overfits.
    """

    obeys = (
        "pretrain.method", "pretrain.epochs", "pretrain.learning_rate", "pretrain.momentum",
        "pretrain.weight_decay", "pretrain.cd_steps",
    )  # fmt: skip
    ignores = ("epochs", "optimizer")
    watched = "reconstruction_error"
    remedy = "--config.pretrain.learning_rate"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        model, settings, clips = run.config.model, run.config.pretrain, run.clips
        if model.name != "rbm" or not model.layers:
            raise UserError(
                f"config.model.name={model.name!r} has no restricted Boltzmann machines to "
                "pretrain: set --config.model.name=rbm, with at least one number of units in "
                "--config.model.layers. --config.pretrain.method=simclr pretrains any network."
            )
        self._module: Any = run.module()
        self._optimizer = cd_optimizer(
            settings.learning_rate, settings.momentum, settings.weight_decay
        )
        self._clips = {"train": clips}
        if "valid" in run.store.splits:
            valid = run.store.indices("valid")
            count = min(len(clips), len(valid))
            chosen = np.linspace(0, len(clips) - 1, count).astype(int)
            self._clips = {"train": clips[chosen], "valid": valid}
        self._finished: list[dict[str, float]] = []

    @property
    def stages(self) -> int:
        """One stage per layer."""
        return len(self._module.layers)

    @property
    def stage_steps(self) -> int:
        """Steps of each layer."""
        return self.run.epoch_steps * int(self.run.config.pretrain.epochs)

    def create_state(self, resumes: bool) -> TrainState:
        """Returns fresh machines."""
        norm = self.run.norm()
        return self.run.spread.create_state(
            lambda: create_stack(
                self._module,
                self._optimizer,
                norm,
                seed=self.run.config.seed,
                frames=self.run.frames,
                bands=self.run.store.bands,
            )
        )

    def batches(self, resident: bool, resumes: bool) -> Any:
        """Returns the iterator over windows of the clips."""
        config = self.run.config
        return train_batches(
            self.run.store,
            batch_size=config.batch_size,
            steps=self.stages * self.stage_steps,
            seed=config.seed,
            crop_frames=config.data.crop_frames,
            resident=resident,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.data.workers,
        )

    def step(self, stage: int) -> StepFunction:
        """Returns the step of a layer."""
        return make_layer_step(
            self._optimizer,
            stage,
            seed=self.run.config.seed,
            cd_steps=self.run.config.pretrain.cd_steps,
            frames=self.run.frames,
            axis_name=self.run.spread.axis_name,
            gather=self.run.spread.gather,
        )

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Returns the measures of the layer that a step belongs to."""
        config, spread = self.run.config, self.run.spread
        monitor = spread.score_step(make_monitor_step(self._layer(step) - 1))
        measures: dict[str, float] = {}
        for split, clips in self._clips.items():
            values = score_clips(
                monitor,
                state,
                self.run.store,
                clips,
                batch_size=spread.round_up(config.batch_size),
                crop_frames=config.data.crop_frames,
                chunks=config.data.eval_chunks,
            )
            energy, error = values.mean(axis=0, dtype=np.float64)
            measures[f"{split}_free_energy"] = float(energy)
            measures[f"{split}_reconstruction_error"] = float(error)
        if "valid" in self._clips:
            gap = measures["valid_free_energy"] - measures["train_free_energy"]
            measures["free_energy_gap"] = gap
        if step % self.stage_steps == 0:
            self._finished = [*self._finished, measures]
        return measures

    def _layer(self, step: int) -> int:
        """Returns the layer, from 1, that was trained in a step."""
        return (step - 1) // self.stage_steps + 1

    def rows(
        self, step: int, means: dict[str, float], measures: dict[str, float]
    ) -> list[dict[str, float]]:
        """Returns a row of training metrics and one of measures."""
        train = {f"batch_{name}": value for name, value in means.items()}
        return [{"layer": self._layer(step), **row} for row in (train, measures) if row]

    def notes(self) -> dict[str, Any]:
        """Returns each finished layer's measures. No checkpoint counts as the best."""
        return {"metric": self.watched, "lower_is_better": True, "pretrained": self._finished}

    def restore(self, notes: Mapping[str, Any]) -> None:
        """Takes up the measures of finished layers."""
        self._finished = notes["pretrained"]

    def measures(self) -> tuple[dict[str, float], ...]:
        """Returns the measures at the end of each layer."""
        return tuple(self._finished)

    def summary(self, step: int) -> str:
        """Returns the reconstruction errors, for people."""
        split = "valid" if "valid" in self._clips else "train"
        errors = (
            f"layer{i} {measures[f'{split}_reconstruction_error']:.4f}"
            for i, measures in enumerate(self._finished, 1)
        )
        return (
            f"pretrained {self.stages} layers in {step} steps; reconstruction error on {split}: "
            f"{', '.join(errors)}"
        )
