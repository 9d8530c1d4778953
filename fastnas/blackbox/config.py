"""Says what a study is told."""

from __future__ import annotations

from dataclasses import dataclass

from fastnas.blackbox import BLACK_BOX, BlackBox
from fastnas.evaluators import EVALUATORS, Evaluator
from fastnas.evaluators.base import EvaluatorOptions
from fastnas.options import option
from fastnas.search.config import SOME
from fastnas.search.fields import ConfigError, FolderConfig

__all__ = ["StudyConfig"]


@dataclass(frozen=True)
class StudyConfig(FolderConfig):
    """Holds the settings of a black-box search."""

    families = (BlackBox, EvaluatorOptions)

    method: str = option("anasod-bo", f"black-box: {', '.join(sorted(BLACK_BOX))}")
    evaluator: str = option(
        "", "; ".join(f"{name}:{kind.place}" for name, kind in sorted(EVALUATORS.items()))
    )
    budget: int = option(100, "evaluations, of all workers together", SOME)
    study: str | None = option(None, "URL of the study's database (default: a file in --out)")

    def strategy(self) -> BlackBox:
        """Builds the method; ConfigError where an option is another method's, or wrong."""
        return self.made(BlackBox, self.method, {})

    def opened(self) -> Evaluator:
        """Opens the evaluator; raises what is wrong with it."""
        options, place = self._evaluator()
        return options.open(place)

    def _evaluator(self) -> tuple[EvaluatorOptions, str]:
        """Returns the options of the evaluator, and its place."""
        kind, _, place = self.evaluator.partition(":")
        if kind not in EVALUATORS or not place:
            *others, last = [f"{n}:{k.place.split()[0]}" for n, k in sorted(EVALUATORS.items())]
            raise ConfigError(
                f"evaluator is {self.evaluator!r}; {', '.join(others)} or {last} is needed"
            )
        return self.made(EvaluatorOptions, kind, {}), place

    def validate(self) -> None:
        super().validate()
        self.strategy()
        self._evaluator()
