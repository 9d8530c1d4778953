"""What gradient and black-box methods share: a name, a source, and options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class Method:
    """A search method with its options as attributes.

    Raises:
        ValueError: an option that it does not take.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    """Paper and arXiv number."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Options of the method and their defaults: fields of its config that others reject."""

    def __init__(self, **options: Any) -> None:
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            allowed = ", ".join(sorted(self.options)) or "none"
            raise ValueError(
                f"{', '.join(unknown)} given, which method {self.name} does not take; its options:"
                f" {allowed}"
            )
        for option, default in self.options.items():
            setattr(self, option, options.get(option, default))
