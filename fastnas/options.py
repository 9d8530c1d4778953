"""Holds options to what they may be: dataclass fields with a help text, bounds or choices.

The settings of a run, the options of a method and those of an evaluator are such fields, declared
by the class that reads them. The command line, files and Python fill them alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args, get_type_hints

from fastnas.bounds import Bounds
from fastnas.checks import check_choice, short


def option(
    default: Any,
    text: str,
    bounds: Bounds | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """Returns a dataclass field with its help text and, as its type asks, bounds or choices."""
    metadata = {"help": text, "bounds": bounds, "choices": choices}
    return field(default=default, metadata=metadata)


def options_of(kind: type) -> dict[str, Field[Any]]:
    """Returns the options of a dataclass by their names."""
    return {f.name: f for f in fields(kind) if "help" in f.metadata}


# get_type_hints evaluates annotations as text, which a help page would do for every method.
_TYPES: dict[type, dict[str, tuple[type, ...]]] = {}


def types_of(kind: type) -> dict[str, tuple[type, ...]]:
    """Returns, for each option of a dataclass, the types that its values have."""
    if kind not in _TYPES:
        hints = get_type_hints(kind)
        _TYPES[kind] = {name: get_args(hints[name]) or (hints[name],) for name in options_of(kind)}
    return _TYPES[kind]


def check_options(instance: Any) -> None:
    """Refuses values that an option cannot have.

    Raises:
        TypeError: a text or a flag is of another type.
        ValueError: a number is none or out of its bounds, or a text is no choice.
    """
    types = types_of(type(instance))
    for name, f in options_of(type(instance)).items():
        value, bounds, choices = (
            getattr(instance, name),
            f.metadata["bounds"],
            f.metadata["choices"],
        )
        if value is None and type(None) in types[name]:
            continue
        if bounds is not None:
            bounds.check(name, value)
        elif type(value) not in types[name]:
            needed = "true or false" if bool in types[name] else "text"
            raise TypeError(f"{name} is {short(value)}; {needed} is needed")
        elif choices is not None:
            check_choice(name, value, choices)
        elif isinstance(value, str) and "\0" in value:
            raise ValueError(f"{name} is {short(value)}; a NUL is in no name or text")


class Optioned:
    """Stands for what a run chooses by its name and what has options: a method, or an evaluator.

    Subclasses become dataclasses as they are defined, so their fields (`option`) are their options
    and `__post_init__` is the place for what else they set up. A subclass with a `name` of its own
    enters the table of its family; nothing else needs to know of it.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    """Names the family in messages."""
    table: ClassVar[dict[str, type[Any]]]
    """Holds the family by name."""

    if TYPE_CHECKING:

        def __init__(self, **options: Any) -> None: ...

    def __init_subclass__(cls) -> None:
        # With `eq` two methods of equal options would be equal, and none could be a key.
        dataclass(eq=False)(cls)
        # A base of several methods has no name of its own, and enters no table.
        if "name" in vars(cls):
            cls.table[cls.name] = cls

    def __post_init__(self) -> None:
        check_options(self)


Made = TypeVar("Made", bound=Optioned)


def make(family: type[Made], name: str, options: Mapping[str, Any]) -> Made:
    """Builds the member of a family that has that name.

    Raises:
        TypeError, ValueError: there is none, naming those that there are; it has no such option,
            naming its own; or an option cannot have that value.
    """
    check_choice(family.what, name, sorted(family.table))
    kind: type[Made] = family.table[name]
    own = options_of(kind)
    foreign = [option for option in options if option not in own]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)} given, which {family.what} {name} does not take; its options:"
            f" {', '.join(own) or 'none'}"
        )
    return kind(**options)
