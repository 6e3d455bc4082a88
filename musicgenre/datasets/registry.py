"""Data sets by name. A reader registers itself; a user's own needs no edit in this package.

    from musicgenre.datasets import Clip, Dataset, register

    @register("my_music")
    def read(root, *, seed: int = 42, genre_level: int = 1) -> Dataset: ...

`--config.data.dataset=my_music` then calls it with `root` and with those fields of `config.data`
that it names (see `CONFIG_OPTIONS`). Its other options are fields of its own, set by
`--config.data.genre_level=2`. An installed package can list its reader under the entry point group
`musicgenre.datasets` instead.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from musicgenre.datasets.base import Dataset
from musicgenre.errors import UserError, did_you_mean
from musicgenre.registry import Registry

Reader = Callable[..., Dataset]
R = TypeVar("R", bound=Reader)

# Options of a reader that a config fills in: fields of `config.data`, except that `seed` is its
# split_seed and `layout` its array_layout.
_SPLIT_OPTIONS = ("protocol", "fold", "folds", "fractions", "seed", "allow_missing")
_OTHER_OPTIONS = ("task", "files", "top_k", "clips_per_style", "seconds", "frames", "layout")
CONFIG_OPTIONS = (*_SPLIT_OPTIONS, *_OTHER_OPTIONS)
# The other fields of `config.data`. They concern the store and the batches, not the reader.
_STORE_FIELDS = ("store", "stores_root", "min_seconds", "pad", "excerpt", "normalise")
_BATCH_FIELDS = ("normalise_clips", "crop_frames", "eval_chunks", "workers", "on_device")
_NAMES = ("dataset", "root", "split_seed", "array_layout")
RESERVED = (*_NAMES, *_STORE_FIELDS, *_BATCH_FIELDS)
# The default of `config.data.protocol`. It is GTZAN's: other readers use the default of their own.
DEFAULT_PROTOCOL = "fault_filtered"

_READERS: Registry[Reader] = Registry("data set", "musicgenre.datasets")
_WITHOUT_ROOT: set[Reader] = set()
_REQUIRED = inspect.Parameter.empty


def register(name: str, *, needs_root: bool = True) -> Callable[[R], R]:
    """Decorates a reader `read(root, *, <options>) -> Dataset` to make it known by `name`.

    Args:
      name: the value of `config.data.dataset` that selects it.
      needs_root: whether `config.data.root` must be set.

    Raises:
      ValueError: another reader has this name, or an option of the reader has no default or has the
        name of another field of `config.data`.
    """

    def decorate(read: R) -> R:
        _own_fields(name, read)
        _READERS.add(name, read)
        if not needs_root:
            _WITHOUT_ROOT.add(read)
        return read

    return decorate


def dataset_names() -> list[str]:
    """Returns the names of all data sets, sorted."""
    return _READERS.names()


def extra_fields(name: str) -> dict[str, Any]:
    """Returns the data set's own fields of `config.data` with their defaults.

    Raises:
      UserError: no data set has this name.
    """
    return _own_fields(name, _READERS.get(name))


def load_dataset(options: Mapping[str, Any]) -> Dataset:
    """Reads the data set that a config's `data` section describes.

    Args:
      options: `dataset` (the name), `root`, `CONFIG_OPTIONS` and the data set's own fields (see
        `musicgenre.config.dataset_options`). An option that is absent has the reader's default, as
        has `protocol` at the config's default, which only GTZAN knows.

    Raises:
      UserError: an unknown data set or field, no root where one is needed, or an error of the
        reader.
    """
    name, root = options["dataset"], options.get("root", "")
    read = _READERS.get(name)
    if not root and read not in _WITHOUT_ROOT:
        raise UserError(f"the data set {name!r} needs its folder: set --config.data.root=...")
    own = _own_fields(name, read)
    for field in options.keys() - {"dataset", "root", *CONFIG_OPTIONS, *own}:
        hint = did_you_mean(field, own)
        raise UserError(f"data.{field} is not a field of the data set {name!r}.{hint}")
    parameters = _parameters(read)
    taken = {key: options[key] for key in parameters if key in options}
    if (
        taken.get("protocol") == DEFAULT_PROTOCOL
        and parameters["protocol"].default is not _REQUIRED
    ):
        del taken["protocol"]
    found = read(root, **taken)
    if not isinstance(found, Dataset):
        returned = type(found).__name__
        raise UserError(f"the reader of {name!r} returned {returned}, not a musicgenre Dataset.")
    return found


def _parameters(read: Reader) -> dict[str, inspect.Parameter]:
    """Returns the options of a reader: all its parameters but the first, the root."""
    return dict(list(inspect.signature(read).parameters.items())[1:])


def _own_fields(name: str, read: Reader) -> dict[str, Any]:
    """Returns the options that are no fields of every config, with their defaults."""
    own = {}
    for key, parameter in _parameters(read).items():
        problem = ""
        if key in RESERVED:
            problem = f"its option {key!r} is a field of config.data with another meaning"
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            problem = f"its reader must name its options, not take **{key}"
        elif key not in CONFIG_OPTIONS and parameter.default is _REQUIRED:
            problem = f"its option {key!r} needs a default"
        if problem:
            raise ValueError(f"the data set {name!r}: {problem}")
        if key not in CONFIG_OPTIONS:
            own[key] = parameter.default
    return own
