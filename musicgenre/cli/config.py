"""Print every config field with its default, meaning and allowed values.

musicgenre config                             # all fields
musicgenre config --config=gtzan_modulation   # a config's values; * marks changes
musicgenre config --networks                  # the registered networks, their fields and inputs
"""

from absl import flags

from musicgenre.cli import app

FLAGS = flags.FlagValues()
app.define_config(FLAGS)
flags.DEFINE_bool("networks", False, "List the registered networks instead.", FLAGS)


def main() -> None:
    """Prints the fields."""
    from musicgenre.config import reference

    if FLAGS.networks:
        lines = reference.network_listing()
    else:
        values = app.get_config(FLAGS).to_dict() if FLAGS["config"].value is not None else None
        lines = reference.listing(values)
    print("\n".join(lines))
