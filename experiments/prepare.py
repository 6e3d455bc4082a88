r"""Turn the clips of a data set into a spectrogram store; resumes, and adds new files.

musicgenre prepare --config=gtzan_conv1d --config.data.root=/data/gtzan
"""

from collections.abc import Callable
from typing import Any

from absl import flags

from musicgenre.cli import app

FLAGS = flags.FlagValues()
app.define_config(FLAGS)
flags.DEFINE_integer("workers", 0, "Processes; 0 is one per core.", 0, flag_values=FLAGS)
flags.DEFINE_bool("progress", True, "Draw a progress bar.", FLAGS)
flags.DEFINE_bool("verify", True, "Compare shards with their checksums, not only sizes.", FLAGS)


def main() -> None:
    """Prepares the store and prints its contents and what was skipped."""
    from musicgenre.store.prepare import prepare_store

    options = {"progress": FLAGS.progress, "verify": FLAGS.verify}
    prepare(FLAGS, prepare_store, workers=FLAGS.workers, **options)


def prepare(
    flag_values: flags.FlagValues, write: Callable[..., Any], *extra: Any, **options: Any
) -> None:
    """Writes the store of the config in `flag_values` with `write`, and prints a summary."""
    from musicgenre import config
    from musicgenre.datasets import load_dataset

    settings = app.get_config(flag_values)
    dataset = load_dataset(config.dataset_options(settings))
    for note in dataset.notes:
        print(note, flush=True)
    summary = write(
        dataset,
        config.feature_spec(settings),
        config.clip_layout(settings),
        config.store_path(settings),
        *extra,
        min_seconds=settings.data.min_seconds,
        array_layout=settings.data.array_layout,
        **options,
    )
    if dataset.synthetic:
        print("SYNTHETIC: numbers on synthetic audio say nothing about real music.")
    print("\n".join(summary.lines()))


if __name__ == "__main__":
    app.run(__name__)
