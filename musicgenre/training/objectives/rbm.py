"""Restricted Boltzmann machines: contrastive divergence, and a stack of them as pretraining.

A machine has visible units v and hidden units h in {0, 1}. With binary v its energy is
E(v, h) = -a.v - b.h - v.W.h; with Gaussian v of unit variance,
E(v, h) = |v - a|^2 / 2 - b.h - v.W.h (Hinton, "A practical guide to training restricted Boltzmann
machines", 2010). A stack is trained from below: the first machine sees the normalised features,
each next one the hidden probabilities of the machine below (Hinton, Osindero, Teh 2006; for genres
Feng 2014).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from musicgenre.errors import UserError
from musicgenre.models.apply import normalise
from musicgenre.training.augment import gather_windows
from musicgenre.training.objectives import Objective, register
from musicgenre.training.optimisers import kernels
from musicgenre.training.run import Run
from musicgenre.training.state import TrainState, create_state
from musicgenre.training.step import Metrics, StepFunction

NAME = "contrastive_divergence"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RBM:
    """The parameters of one machine; a pytree, so gradients have the same form.

    W is float32 `[visible, hidden]`, and a and b have the length of either axis. `gaussian` visible
    units have unit variance; else they are binary.
    """

    weights: jax.Array
    visible_bias: jax.Array
    hidden_bias: jax.Array
    gaussian: bool = dataclasses.field(default=False, metadata={"static": True})


def init_rbm(key: jax.Array, visible: int, hidden: int, *, gaussian: bool = False) -> RBM:
    """Returns a machine with weights from N(0, 0.01^2) and zero biases, as Hinton advises."""
    weights = 0.01 * jax.random.normal(key, (visible, hidden))
    return RBM(weights, jnp.zeros(visible), jnp.zeros(hidden), gaussian)


def hidden_probabilities(rbm: RBM, visible: jax.Array) -> jax.Array:
    """Returns p(h = 1 | v), `[batch, hidden]`, of `visible` `[batch, visible]`."""
    return jax.nn.sigmoid(rbm.hidden_bias + visible @ rbm.weights)


def visible_means(rbm: RBM, hidden: jax.Array) -> jax.Array:
    """Returns E(v | h), `[batch, visible]`, of `hidden` `[batch, hidden]`."""
    means = rbm.visible_bias + hidden @ rbm.weights.T
    return means if rbm.gaussian else jax.nn.sigmoid(means)


def free_energy(rbm: RBM, visible: jax.Array) -> jax.Array:
    """Returns F(v) = -log sum over h of exp(-E(v, h)), `[batch]`, of v `[batch, visible]`."""
    if rbm.gaussian:
        alone = 0.5 * jnp.square(visible - rbm.visible_bias).sum(axis=-1)
    else:
        alone = -visible @ rbm.visible_bias
    return alone - jax.nn.softplus(rbm.hidden_bias + visible @ rbm.weights).sum(axis=-1)


def gibbs_step(rbm: RBM, visible: jax.Array, key: jax.Array) -> jax.Array:
    """Samples h given v, then v given h; returns the new v `[batch, visible]`."""
    hidden_key, visible_key = jax.random.split(key)
    hidden = jax.random.bernoulli(hidden_key, hidden_probabilities(rbm, visible))
    means = visible_means(rbm, hidden.astype(jnp.float32))
    if rbm.gaussian:
        return means + jax.random.normal(visible_key, means.shape)
    return jax.random.bernoulli(visible_key, means).astype(jnp.float32)


def cd_gradient(rbm: RBM, visible: jax.Array, key: jax.Array, steps: int) -> RBM:
    """Returns the CD-k estimate of the gradient of the mean negative log-likelihood of `visible`.

    It is the gradient of the free energy at the data `[batch, visible]` minus that at the ends of
    k-step Gibbs chains from the data (Hinton 2002); step i of the k `steps` uses `fold_in(key, i)`.
    Hidden units enter by their probabilities; only the chain is noisy.
    """
    fantasy = jax.lax.fori_loop(
        0, steps, lambda i, v: gibbs_step(rbm, v, jax.random.fold_in(key, i)), visible
    )
    return jax.grad(
        lambda params: free_energy(params, visible).mean() - free_energy(params, fantasy).mean()
    )(rbm)


def reconstruction_errors(rbm: RBM, visible: jax.Array) -> jax.Array:
    """Returns the mean squared error, `[batch]`, of E(v | p(h | v)) as v; nothing is sampled."""
    reconstruction = visible_means(rbm, hidden_probabilities(rbm, visible))
    return jnp.square(visible - reconstruction).mean(axis=-1)


def cd_optimizer(
    learning_rate: float, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Returns gradient descent with momentum; weight decay leaves the biases alone."""
    decay = optax.add_decayed_weights(weight_decay, kernels)
    return optax.chain(decay, optax.sgd(learning_rate, momentum))


def cd_update(
    rbm: RBM,
    opt_state: Any,
    visible: jax.Array,
    key: jax.Array,
    optimizer: optax.GradientTransformation,
    *,
    steps: int = 1,
    axis_name: str | None = None,
) -> tuple[RBM, Any, Metrics]:
    """Returns a machine and its optimiser's state after one step of CD-k (k is `steps`).

    Under pmap, along `axis_name`, each device draws its own chains from the `key`. The metric is
    the mean `reconstruction_error` before the update.
    """
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    gradient = cd_gradient(rbm, visible, key, steps)
    metrics = {"reconstruction_error": reconstruction_errors(rbm, visible).mean()}
    if axis_name is not None:
        gradient, metrics = jax.lax.pmean((gradient, metrics), axis_name)
    updates, opt_state = optimizer.update(gradient, opt_state, rbm)
    return optax.apply_updates(rbm, updates), opt_state, metrics


def machine(state: TrainState, layer: int) -> RBM:
    """Returns machine `layer`, from 0, of a stack: the network's `layer<N>`, N from 1."""
    dense, bias = state.params[f"layer{layer + 1}"], state.opt_state[layer]["visible_bias"]
    return RBM(dense["kernel"], bias, dense["bias"], gaussian=layer == 0)


def visible_of(state: TrainState, layer: int, x: jax.Array) -> jax.Array:
    """Returns the input `[batch, visible]` of machine `layer` for `x` `[batch, frames, bands]`."""
    visible = normalise(x, state.norm).reshape(x.shape[0], -1)
    for below in range(layer):
        visible = hidden_probabilities(machine(state, below), visible)
    return visible


def monitor(layer: int, state: TrainState, x: jax.Array) -> jax.Array:
    """Returns free energy and reconstruction error `[batch, 2]` of machine `layer`."""
    visible, rbm = visible_of(state, layer, x), machine(state, layer)
    return jnp.stack([free_energy(rbm, visible), reconstruction_errors(rbm, visible)], axis=-1)


@register(NAME)
class ContrastiveDivergence(Objective):
    """Learns the layers of the model "rbm", one stage per layer, in float32.

    Every `config.eval_every` epochs, and at the end of a layer, a row of `metrics.jsonl` gets the
    layer's `train_` and `valid_` `free_energy` and `reconstruction_error` (of as many training
    clips as the validation split has) and `free_energy_gap`, valid minus train, which grows as the
    machine overfits.
    """

    obeys = (
        "pretrain.method",
        "pretrain.epochs",
        "pretrain.learning_rate",
        "pretrain.momentum",
        "pretrain.weight_decay",
        "pretrain.cd_steps",
    )
    ignores = ("epochs", "optimizer")
    watched = "reconstruction_error"
    compared = ("reconstruction_error", True)
    remedy = "--config.pretrain.learning_rate"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        model, settings, clips = run.config.model, run.config.pretrain, run.clips
        if model.name != "rbm" or not model.layers:
            raise UserError(
                f"config.model.name={model.name!r} has no restricted Boltzmann machines to "
                "pretrain: set --config.model.name=rbm, with at least one number of units in "
                "--config.model.layers, or --config.pretrain.method=simclr."
            )
        self._module: Any = run.module()
        rates = (settings.learning_rate, settings.momentum, settings.weight_decay)
        self._optimizer = cd_optimizer(*rates)
        self._clips = {"train": clips}
        if "valid" in run.store.splits:
            valid = run.store.indices("valid")
            chosen = np.linspace(0, len(clips) - 1, min(len(clips), len(valid))).astype(int)
            self._clips = {"train": clips[chosen], "valid": valid}
        self.stages = len(self._module.layers)
        self._monitors = [
            run.spread.score_step(functools.partial(monitor, layer)) for layer in range(self.stages)
        ]
        self.progress = []

    def create_state(self, resumes: bool) -> TrainState:
        """Returns fresh machines, as layers of the network that they unroll into.

        The state's `opt_state` holds each machine's `visible_bias`, which the network lacks, and
        `optimizer`.
        """
        settings, optimizer = self.run.initial(), self._optimizer

        def create() -> TrainState:
            state = create_state(self._module, optax.identity(), ema=False, **settings)
            key = jax.random.fold_in(jax.random.key(settings["seed"]), 0x4B1D)
            params, rest = dict(state.params), []
            for layer in range(self.stages):
                name = f"layer{layer + 1}"
                shape, own = params[name]["kernel"].shape, jax.random.fold_in(key, layer)
                rbm = init_rbm(own, *shape, gaussian=layer == 0)
                params[name] = {"kernel": rbm.weights, "bias": rbm.hidden_bias}
                rest.append({"visible_bias": rbm.visible_bias, "optimizer": optimizer.init(rbm)})
            return dataclasses.replace(state, params=params, opt_state=tuple(rest))

        return self.run.spread.create_state(create)

    def batches(self, resident: bool, resumes: bool) -> Any:
        """Returns the iterator over windows of the clips."""
        return self.run.batches(self.stages * self.stage_steps, resident)

    def step(self, stage: int) -> StepFunction:
        """Returns the step of a layer; the chains' key at a step is `fold_in(key(seed), step)`."""
        config, spread, name = self.run.config, self.run.spread, f"layer{stage + 1}"

        def layer_step(
            state: TrainState, batch: Any, clips: jax.Array | None = None
        ) -> tuple[TrainState, Metrics]:
            if clips is None:
                x = batch["x"]
            else:
                x = gather_windows(clips, batch["clip"], batch["start"], self.run.frames)
            full = dataclasses.replace(state, params=spread.gather(state.params))
            rbm, optimized, metrics = cd_update(
                machine(full, stage),
                state.opt_state[stage]["optimizer"],
                visible_of(full, stage, x),
                jax.random.fold_in(jax.random.key(config.seed), state.step),
                self._optimizer,
                steps=config.pretrain.cd_steps,
                axis_name=spread.axis_name,
            )
            params = state.params | {name: {"kernel": rbm.weights, "bias": rbm.hidden_bias}}
            opt_state = list(state.opt_state)
            opt_state[stage] = {"visible_bias": rbm.visible_bias, "optimizer": optimized}
            return state.following(params, tuple(opt_state), state.collections), metrics

        return layer_step

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Returns the measures of the layer that a step belongs to."""
        score = self._monitors[(step - 1) // self.stage_steps]
        measures: dict[str, float] = {}
        for split, clips in self._clips.items():
            energy, error = self.run.scores(score, state, clips).mean(axis=0, dtype=np.float64)
            measures[f"{split}_free_energy"] = float(energy)
            measures[f"{split}_reconstruction_error"] = float(error)
        if "valid" in self._clips:
            valid, train = measures["valid_free_energy"], measures["train_free_energy"]
            measures["free_energy_gap"] = valid - train
        if step % self.stage_steps == 0:
            self.progress = [*self.progress, measures]
        return measures

    def rows(
        self, step: int, means: dict[str, float], measures: dict[str, float]
    ) -> list[dict[str, float]]:
        """Returns a row of training metrics and one of measures."""
        train = {f"batch_{name}": value for name, value in means.items()}
        layer = (step - 1) // self.stage_steps + 1
        return [{"layer": layer, **row} for row in (train, measures) if row]

    def summary(self, step: int) -> str:
        """Returns the reconstruction errors, for people."""
        split = "valid" if "valid" in self._clips else "train"
        errors = ", ".join(
            f"layer{i} {measures[f'{split}_reconstruction_error']:.4f}"
            for i, measures in enumerate(self.progress, 1)
        )
        layers = f"pretrained {self.stages} layers in {step} steps"
        return f"{layers}; reconstruction error on {split}: {errors}"
