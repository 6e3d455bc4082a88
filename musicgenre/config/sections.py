"""Every field of an experiment: its default, meaning and range.

The defaults are the report's front end, network and recipe (sections 3 and 4).
"""

import dataclasses
from typing import Any

from musicgenre.config.fields import Section, setting


@dataclasses.dataclass(frozen=True)
class Files(Section):
    """Array files, one per split."""

    prefix = "data.files."

    train: str = setting("", "File of the training clips, relative to data.root.")
    valid: str = setting("", "File of the validation clips.")
    test: str = setting("", "File of the test clips.")


@dataclasses.dataclass(frozen=True)
class Data(Section):
    """Which clips, how they are stored, and how training reads them."""

    prefix = "data."

    dataset: str = setting(
        "gtzan",
        "gtzan, mtat, msd, folder, csv, arrays, synthetic or your own, whose fields follow here.",
    )
    root: str = setting("", "Folder or file of the data set.")
    store: str = setting("", "Folder of its spectrogram store; '' derives one below stores_root.")
    stores_root: str = setting("stores", "Folder of the derived stores.")
    protocol: str = setting(
        "fault_filtered",
        "The split. gtzan: fault_filtered, artist_folds, random, stratified_kfold; mtat: clean, "
        "all, report, grouped; arrays: files, artist_kfold, random_kfold, segment_leaked.",
    )
    top_k: int = setting(50, "mtat and msd: the most frequent tags become labels.", least=1)
    fold: int = setting(0, "Which fold is held out, from 0.")
    folds: int = setting(10, "Number of folds.")
    split_seed: int = setting(42, "Seed of random splits.", least=0)
    fractions: tuple[float, ...] = setting(
        (0.7, 0.15, 0.15), "Train, valid and test of folder, csv, msd, and mtat's grouped split."
    )
    allow_missing: bool = setting(False, "Skip clips that a list names but that are not on disk.")
    task: str = setting("", "csv: single_label, multi_label or regression; '' is inferred.")
    files: Files = dataclasses.field(default_factory=Files)
    array_layout: str = setting("mel_time", "Axes of arrays.", choices=("mel_time", "time_mel"))
    clips_per_style: int = setting(24, "synthetic: clips per style.")
    seconds: float = setting(6.0, "synthetic: length of a clip in seconds.", above=0)
    min_seconds: float = setting(1.0, "Shorter sound files are skipped.", least=0)
    frames: int = setting(647, "Frames per clip in the store.", least=0)
    pad: str = setting("repeat", "What fills a shorter clip: repeat, silence or zero.")
    excerpt: str = setting("start", "What is kept of a longer one: start, middle or spread.")
    normalise: str = setting(
        "position",
        "Scope of the training split's mean and standard deviation.",
        choices=("position", "band", "global", "none"),
    )
    normalise_clips: int = setting(0, "Training clips for these statistics; 0 takes all.", least=0)
    crop_frames: int = setting(0, "Frames of a random training window; 0 is the clip.", least=0)
    eval_chunks: int = setting(1, "Windows per clip whose scores are averaged.", least=1)
    workers: int = setting(0, "Grain worker processes. 0 is fastest for a memory map.", least=0)
    on_device: str = setting(
        "auto",
        "Keep all training clips on the devices; auto where they fit. The result is the same.",
        choices=("auto", "always", "never"),
    )


@dataclasses.dataclass(frozen=True)
class Augment(Section):
    """Applied to training batches on the device before normalisation, in this order. 0 is off."""

    prefix = "augment."

    time_stretch: float = setting(0.0, "Rates from 1 / (1 + this) to 1 + this.", least=0, most=1)
    time_shuffle: int = setting(0, "Segments of the clip that are permuted.", least=0)
    pitch_shift: float = setting(0.0, "Largest shift up or down, in bands.", least=0)
    gain: float = setting(0.0, "Largest change of level, dB.", least=0)
    eq: float = setting(0.0, "Largest gain of a random curve over the bands, dB.", least=0)
    eq_points: int = setting(4, "Points of that curve; 2 are a tilt.", least=2)
    noise: float = setting(0.0, "Largest standard deviation of noise on each cell, dB.", least=0)
    mixup: float = setting(0.0, "Alpha of the mixing weights' beta (Zhang 2018).", least=0)
    cutmix: float = setting(0.0, "Alpha of the remaining frames' beta (Yun 2019).", least=0)
    mix_share: float = setting(1.0, "Probability that a clip is mixed.", above=0, most=1)
    time_masks: int = setting(0, "SpecAugment: masks over frames.", least=0)
    time_mask_share: float = setting(0.1, "Widest mask, fraction of frames.", above=0, most=1)
    band_masks: int = setting(0, "SpecAugment: masks over bands.", least=0)
    band_mask_share: float = setting(0.1, "Widest mask, fraction of bands.", above=0, most=1)
    low_pass: float = setting(0.0, "Largest fraction of top bands removed.", least=0, most=1)
    high_pass: float = setting(0.0, "Largest fraction of bottom bands removed.", least=0, most=1)
    pass_share: float = setting(1.0, "Probability of each of these two.", above=0, most=1)
    probability: float = setting(1.0, "Probability of the others but mixing.", above=0, most=1)


@dataclasses.dataclass(frozen=True)
class Model(Section):
    """The network. Its own fields follow the name: --config.model.batch_norm=True."""

    prefix = "model."

    name: str = setting("conv1d", "A registered network: `musicgenre config --networks`.")
    module: str = setting("", "A Python module of yours that registers a network.")


@dataclasses.dataclass(frozen=True)
class Pretrain(Section):
    """Learning without labels, by `musicgenre pretrain`."""

    prefix = "pretrain."

    method: str = setting(
        "",
        "contrastive_divergence (stacked restricted Boltzmann machines), simclr, or an objective "
        "of your own; '' is the first for the network rbm, the second for all others.",
    )
    epochs: int = setting(20, "Epochs; of contrastive divergence, per layer.", least=1)
    learning_rate: float = setting(0.01, "Contrastive divergence: learning rate.", above=0)
    momentum: float = setting(0.5, "Contrastive divergence: momentum.", least=0, below=1)
    weight_decay: float = setting(2e-4, "Contrastive divergence: weight decay.", least=0)
    cd_steps: int = setting(1, "Contrastive divergence: Gibbs steps k of CD-k.", least=1)
    temperature: float = setting(0.5, "simclr: temperature of the cosine similarities.", above=0)
    projection: int = setting(128, "simclr: outputs of the projection head.", least=1)


@dataclasses.dataclass(frozen=True)
class Optimizer(Section):
    """Optax's optimisers and schedules."""

    prefix = "optimizer."

    name: str = setting("adam", "Optimiser.", choices=("sgd", "momentum", "adam", "adamw", "lamb"))
    learning_rate: float = setting(1e-3, "Peak learning rate.", above=0)
    momentum: float = setting(0.9, "momentum: coefficient.", least=0, below=1)
    b1: float = setting(0.9, "adam, adamw, lamb: decay of the first moment.", least=0, below=1)
    b2: float = setting(0.999, "adam, adamw, lamb: decay of the second.", least=0, below=1)
    eps: float = setting(1e-8, "adam, adamw, lamb: added to the denominator.", above=0)
    weight_decay: float = setting(0.0, "adamw and lamb; on kernels only.", least=0)
    schedule: str = setting(
        "keras",
        "Learning rate over the steps; keras is rate / (1 + decay_rate * step).",
        choices=("constant", "cosine", "exponential", "keras"),
    )
    decay_rate: float = setting(0.01, "See schedule; exponential: factor per decay_steps.", least=0)
    decay_steps: int = setting(1000, "exponential: steps per factor.", least=1)
    warmup_steps: int = setting(0, "Steps of linear warm-up.", least=0)
    clip_norm: float = setting(0.0, "Largest global norm of the gradient; 0 is off.", least=0)
    transferred_rate: float = setting(
        1.0, "Factor of the rate for layers from init_from; 0 freezes them.", least=0, most=1
    )
    layer_decay: float = setting(
        1.0, "Factor of the rate from one layer to the one before it.", least=1e-6, most=1
    )
    accumulate: int = setting(1, "Parts of a batch whose gradients are accumulated.", least=1)


@dataclasses.dataclass(frozen=True)
class Loss(Section):
    """The supervised loss."""

    prefix = "loss."

    name: str = setting(
        "",
        "cross_entropy (softmax, or sigmoid for tags) or mse; '' follows from the task.",
        choices=("", "cross_entropy", "mse"),
    )
    label_smoothing: float = setting(0.0, "Fraction spread over all classes.", least=0, below=1)
    class_weights: str = setting("none", "Class weights.", choices=("none", "balanced"))


@dataclasses.dataclass(frozen=True)
class Distill(Section):
    """Distillation: teacher predictions replace a fraction of the label target (Hinton 2015)."""

    prefix = "distill."

    teachers: tuple[str, ...] = setting(
        (), "Workdirs, bundles or packaged models of the same labels and front end; () is off."
    )
    weight: float = setting(0.5, "Weight of the teachers in the target.", least=0, most=1)
    temperature: float = setting(1.0, "Divides the teachers' logits.", above=0)


@dataclasses.dataclass(frozen=True)
class Experiment(Section):
    """The top-level fields."""

    seed: int = setting(0, "Seed of parameters, clip order, windows and dropout.", least=0)
    module: str = setting("", "Your module that registers networks, data sets or objectives.")
    init_from: str = setting("", "Saved model whose layers, except the head, the run starts from.")
    batch_size: int = setting(32, "Clips per step, over all devices.", least=1)
    epochs: int = setting(100, "Passes over the training split.", least=1)
    dtype: str = setting("float32", "Computation type.", choices=("float32", "bfloat16"))
    ema_decay: float = setting(
        0.0, "Decay of the evaluated average of the parameters; 0 is off.", least=0, below=1
    )
    steps_per_call: int = setting(1, "Steps per compiled call, for small networks.", least=1)
    eval_every: int = setting(1, "Epochs between evaluations and checkpoints.", least=1)
    log_every: int = setting(10, "Steps between log rows.", least=1)
    select_metric: str = setting(
        "",
        "Validation metric that marks the best checkpoint; '' follows from the task.",
        choices=("", "accuracy", "loss", "macro_f1", "macro_roc_auc", "macro_pr_auc", "r2"),
    )
    patience: int = setting(
        0, "Evaluations without improvement that stop training; 0 is off.", least=0
    )


SECTIONS: dict[str, type[Section]] = {
    "data": Data,
    "augment": Augment,
    "model": Model,
    "pretrain": Pretrain,
    "optimizer": Optimizer,
    "loss": Loss,
    "distill": Distill,
}


def defaults() -> dict[str, Any]:
    """Returns the defaults of every field but the front end's, as nested mappings."""
    nested = {name: dataclasses.asdict(section()) for name, section in SECTIONS.items()}
    return dataclasses.asdict(Experiment()) | nested
