"""Named things that a user's own package can add to: networks, data sets, objectives.

A name comes from a decorator in a module that has been imported, or from an entry point of an
installed package, which is imported when its name is asked for.
"""

import importlib
import importlib.metadata
from collections.abc import Iterator
from typing import Generic, TypeVar

from musicgenre.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Items by name.

    Args:
      kind: what an item is called in messages, such as "model".
      group: the entry point group that installed packages list their items under.
    """

    def __init__(self, kind: str, group: str) -> None:
        self._kind = kind
        self._group = group
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Adds an item and returns it.

        Raises:
          ValueError: another item has this name. The same one, from a module imported again, replaces
            the earlier one.
        """
        there = self._items.get(name)
        if there is not None and _origin(there) != _origin(item):
            raise ValueError(
                f"two {self._kind}s are registered as {name!r}: {_origin(there)} and {_origin(item)}"
            )
        self._items[name] = item
        return item

    def get(self, name: str) -> T:
        """Returns an item by name.

        Raises:
          UserError: no item has this name; the message names the nearest one. Or the package that
            lists it cannot be imported.
        """
        if name not in self._items:
            for point in importlib.metadata.entry_points(group=self._group, name=name):
                try:
                    loaded: T = point.load()
                except (ImportError, AttributeError) as error:
                    raise UserError(
                        f"the {self._kind} {name!r} of {point.value} cannot be imported ({error})."
                    ) from error
                # Importing the module may have registered it already.
                self._items.setdefault(name, loaded)
        if name not in self._items:
            raise UserError(f"no {self._kind} {name!r}." + did_you_mean(name, self.names()))
        return self._items[name]

    def names(self) -> list[str]:
        """Returns all names, sorted, those of entry points included."""
        points = importlib.metadata.entry_points(group=self._group)
        return sorted({*self._items, *(point.name for point in points)})

    def added_by(self, module: str) -> Iterator[str]:
        """Yields the names of the items that a module defines."""
        for name, item in self._items.items():
            if getattr(item, "__module__", None) == module:
                yield name


def import_user_module(module: str, field: str = "config.module") -> None:
    """Imports a module that registers a user's own networks, data sets or objectives.

    Args:
      module: its dotted name.
      field: the config field that names it, for messages.

    Raises:
      UserError: there is no such module.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{field}={module!r}: no module {error.name!r}. Run from the folder that holds it, or put "
            "that folder on PYTHONPATH."
        ) from error


def _origin(item: object) -> str:
    module, name = getattr(item, "__module__", ""), getattr(item, "__qualname__", "")
    return f"{module}.{name}" if name else f"{type(item).__module__}.{type(item).__qualname__}"
