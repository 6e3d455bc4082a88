r"""The same store as prepare.py's, made by the workers of an Apache Beam runner. Run it again to go on.

python experiments/prepare_beam.py --config=configs/gtzan_conv1d.py --config.data.root=/shared/gtzan \
  --config.data.store=/shared/stores/gtzan -- --runner=FlinkRunner --flink_master=host:8081 --parallelism=32

Beam's own flags follow after --, as --name=value. Without any: --direct_num_workers=2
--direct_running_mode=multi_processing, two processes on this machine. All workers must see the sound files and the
store under the same paths and have the same packages installed; object stores (gs://, s3://) are not supported unless
mounted as folders. See docs/scaling_prepare.md. Needs pip install 'musicgenre[scale]'.
"""

from absl import flags

from musicgenre import config
from musicgenre.cli import app
from musicgenre.datasets import load_dataset
from musicgenre.store.beam import prepare_store_beam

_PROGRESS = flags.DEFINE_bool("progress", True, "Draw a progress bar.")
_VERIFY = flags.DEFINE_bool(
    "verify", True, "Compare the shards that are there with their checksums, not only their sizes."
)


def main(beam_flags: list[str]) -> None:
    """Prepares the store and prints what is in it and what was skipped."""
    settings = app.get_config()
    dataset = load_dataset(config.dataset_options(settings))
    for note in dataset.notes:
        print(note, flush=True)
    summary = prepare_store_beam(
        dataset,
        config.feature_spec(settings),
        config.clip_layout(settings),
        config.store_path(settings),
        beam_flags,
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
    app.run(main, takes_files=True)
