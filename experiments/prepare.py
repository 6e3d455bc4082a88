r"""Turns the clips of a data set into a spectrogram store. Run it again to go on, or to add new files.

python experiments/prepare.py --config=configs/gtzan_conv1d.py --config.data.root=/data/gtzan
"""

from absl import flags

from musicgenre import config
from musicgenre.cli import app
from musicgenre.datasets import load_dataset
from musicgenre.store.prepare import prepare_store

_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0 is one for each core.", lower_bound=0)
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw a progress bar.")
_VERIFY = flags.DEFINE_bool(
    "verify", True, "Compare the shards that are there with their checksums, not only their sizes."
)


def main() -> None:
    """Prepares the store and prints what is in it and what was skipped."""
    settings = app.get_config()
    dataset = load_dataset(config.dataset_options(settings))
    for note in dataset.notes:
        print(note, flush=True)
    summary = prepare_store(
        dataset,
        config.feature_spec(settings),
        config.clip_layout(settings),
        config.store_path(settings),
        workers=_WORKERS.value,
        min_seconds=settings.data.min_seconds,
        array_layout=settings.data.array_layout,
        progress=_PROGRESS.value,
        verify=_VERIFY.value,
    )
    if dataset.synthetic:
        print(
            "SYNTHETIC: this data set is made-up audio; numbers on it say nothing about real music."
        )
    print("\n".join(summary.lines()))


if __name__ == "__main__":
    app.define_config_flag()
    app.run(main)
