r"""Prepare the same store with the workers of an Apache Beam runner; resumes.

musicgenre prepare_beam --config=gtzan_conv1d --config.data.root=/shared/gtzan \
  --config.data.store=/shared/stores/gtzan -- --runner=FlinkRunner --flink_master=host:8081 \
  --parallelism=32

All workers must see the sound files and the store under the same paths and have the same packages
installed. Object stores (gs://, s3://) must be mounted as folders. See docs/scaling_prepare.md.
Needs: pip install 'musicgenre[scale]'.
"""

from absl import flags

from musicgenre.cli import app

FLAGS = flags.FlagValues()
ARGUMENTS = (
    "Beam's own flags follow after --, as --name=value. The default is two processes on this "
    "machine: --direct_num_workers=2 --direct_running_mode=multi_processing"
)
app.define_config(FLAGS)
flags.DEFINE_bool("progress", True, "Draw a progress bar.", FLAGS)
flags.DEFINE_bool("verify", True, "Compare shards with their checksums, not only sizes.", FLAGS)


def main(beam_flags: list[str]) -> None:
    """Prepares the store and prints its contents and what was skipped."""
    from musicgenre.experiments.prepare import prepare
    from musicgenre.store.beam import prepare_store_beam

    options = {"progress": FLAGS.progress, "verify": FLAGS.verify}
    prepare(FLAGS, prepare_store_beam, beam_flags, **options)


if __name__ == "__main__":
    app.run(__name__)
