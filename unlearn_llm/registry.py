"""Names to objects, with an answer that helps when a name is unknown."""

import difflib
import importlib
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from unlearn_llm.errors import UserError

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Say which known name is nearest, or nothing: " Did you mean 'simnpo'?"."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


class Registry(Generic[T]):
    """A dict of one kind of thing ("forget loss", "metric").

    `registry["name"]` gives what was registered under the name; `registry["package.module:attr"]`
    imports it from outside the package.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register an entry. A taken name is an error, so that nothing is replaced silently."""
        if name in self._entries:
            taken = self._entries[name]
            where = getattr(taken, "__module__", "?")
            raise ValueError(f"The {self.kind} {name!r} exists already (in {where}).")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        if name in self._entries:
            return self._entries[name]
        if ":" in name:
            return self._import(name)
        raise UserError(
            f"Unknown {self.kind} {name!r}.{did_you_mean(name, self._entries)} "
            f"Known: {', '.join(sorted(self._entries))}. Or give 'package.module:name'."
        )

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def _import(self, name: str) -> T:
        module_name, _, attribute = name.partition(":")
        try:
            found: T = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"Cannot load the {self.kind} {name!r}: {error}.") from error
        return found
