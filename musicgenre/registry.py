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
      what: what an item is called in messages, such as "model".
      group: the entry point group that installed packages list their items under.
    """

    def __init__(self, what: str, group: str) -> None:
        self._what, self._group = what, group
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Adds an item and returns it.

        Raises:
          ValueError: another item has this name. The same item of a module that is imported again
            replaces the earlier one.
        """
        origins = [_origin(each) for each in (self._items.get(name, item), item)]
        if origins[0] != origins[1]:
            both = " and ".join(origins)
            raise ValueError(f"two {self._what}s are registered as {name!r}: {both}")
        self._items[name] = item
        return item

    def get(self, name: str) -> T:
        """Returns an item by name.

        Raises:
          UserError: no item has this name, or the package that lists it cannot be imported.
        """
        if name not in self._items:
            for point in importlib.metadata.entry_points(group=self._group, name=name):
                try:
                    loaded: T = point.load()
                except (ImportError, AttributeError) as error:
                    item = f"the {self._what} {name!r} of {point.value}"
                    raise UserError(f"{item} cannot be imported ({error}).") from error
                # Importing the module may have registered it already.
                self._items.setdefault(name, loaded)
        if name not in self._items:
            raise UserError(f"no {self._what} {name!r}." + did_you_mean(name, self.names()))
        return self._items[name]

    def names(self) -> list[str]:
        """Returns all names, sorted, those of entry points included."""
        points = importlib.metadata.entry_points(group=self._group)
        return sorted({*self._items, *(point.name for point in points)})

    def added_by(self, module: str) -> Iterator[str]:
        """Returns the names of the items that a module defines."""
        items = self._items.items()
        return (name for name, item in items if getattr(item, "__module__", None) == module)


def import_user_module(module: str, field: str = "config.module") -> None:
    """Imports a user's module (a dotted name) that registers networks, data sets or objectives.

    Raises:
      UserError: there is no such module; the message names the config field.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{field}={module!r}: no module {error.name!r}. Run from the folder that holds it, or "
            "put that folder on PYTHONPATH."
        ) from error


def _origin(item: object) -> str:
    module, name = getattr(item, "__module__", ""), getattr(item, "__qualname__", "")
    return f"{module}.{name}" if name else f"{type(item).__module__}.{type(item).__qualname__}"
