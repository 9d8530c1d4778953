"""Checks and quotes the texts that genotypes are read from."""

_LONGEST = 1 << 16


def check_text(text: object) -> None:
    """Raises TypeError unless it is a str, ValueError where it is longer than any genotype."""
    if not isinstance(text, str):
        raise TypeError(f"a genotype is read from a str, got {type(text).__name__}")
    if len(text) > _LONGEST:
        raise ValueError(f"not a genotype: {len(text)} characters, at most {_LONGEST} are read")


def check_kind(genotype: object, kind: type) -> None:
    """Raises TypeError where a format is for another kind of genotype."""
    if not isinstance(genotype, kind):
        raise TypeError(
            f"genotype is a {type(genotype).__name__}; this format is for a {kind.__name__}"
        )


def quoted(text: str) -> str:
    """Returns the text as an error shows it, cut where it is long."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
