"""What gradient and black-box methods share: a name, a source, and options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args, get_type_hints

from fastnas.bounds import Bounds
from fastnas.checks import check_type


class Method:
    """A search method with its options as attributes.

    Raises:
        TypeError: a text or a flag of another type than the class annotates.
        ValueError: an option that it does not take, or a number out of its bounds.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    """Paper and arXiv number."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Options of the method and their defaults: fields of its config that others reject."""

    bounds: ClassVar[Mapping[str, Bounds]] = {}
    """Bounds of the options that are numbers, each declared by the class that reads the option."""

    @classmethod
    def all_bounds(cls) -> dict[str, Bounds]:
        """Option to its bounds, those of the classes that it descends from included."""
        declared = [vars(kind).get("bounds", {}) for kind in reversed(cls.__mro__)]
        return {name: bounds for own in declared for name, bounds in own.items()}

    def __init__(self, **options: Any) -> None:
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            allowed = ", ".join(sorted(self.options)) or "none"
            raise ValueError(
                f"{', '.join(unknown)} given, which method {self.name} does not take; its options:"
                f" {allowed}"
            )
        bounds, hints = self.all_bounds(), get_type_hints(type(self))
        for option, default in self.options.items():
            value = options.get(option, default)
            if option in bounds and (value is not None or default is not None):
                bounds[option].check(option, value)
            if option not in bounds:
                check_type(option, value, *(get_args(hints[option]) or (hints[option],)))
            setattr(self, option, value)
