"""Says what a study is told."""

from __future__ import annotations

from dataclasses import dataclass

from fastnas.blackbox import BLACK_BOX, BlackBox, get_black_box
from fastnas.search.config import SOME, TABLE_REPORT, built
from fastnas.search.fields import ConfigError, FolderConfig, option
from fastnas.spaces.distribution import LENGTH

__all__ = ["StudyConfig"]


BOUNDS = {
    name: bounds for method in BLACK_BOX.values() for name, bounds in method.all_bounds().items()
}
"""What each option of the methods may be."""


@dataclass(frozen=True)
class StudyConfig(FolderConfig):
    """Holds the settings of a black-box search; None stands for the method's default."""

    method: str = option("anasod-bo", f"black-box: {', '.join(BLACK_BOX)}")
    evaluator: str = option(
        "",
        "table:FILE, of NAS-Bench-201; supernet:FOLDER of a search; train:FILE, settings of train",
    )
    length: int | None = option(None, "train: operations of a cell (as the space has them)", LENGTH)
    space: str | None = option(None, "train: space of the cells (S0)")
    table_column: str | None = option(None, "what the search sees (c10_valid_12ep)")
    table_report: str | None = option(None, "what is reported of its best cell (c10_test_200ep)")
    budget: int = option(100, "evaluations, of all workers together", SOME)
    study: str | None = option(None, "URL of the study's database (default: a file in --out)")
    concentration: float | None = option(
        None, "anasod: of the Dirichlet prior (1)", BOUNDS["concentration"]
    )
    initial: int | None = option(
        None, "bo: random points before the first fit (10)", BOUNDS["initial"]
    )
    arch_rate: float | None = option(
        None, "reinforce: step of the logits (0.1; anasod: 0.05)", BOUNDS["arch_rate"]
    )
    population: int | None = option(None, "evolution: cells alive (10)", BOUNDS["population"])
    sample: int | None = option(
        None, "evolution: of which the best has a child (3)", BOUNDS["sample"]
    )

    def strategy(self) -> BlackBox:
        """Makes the method; ConfigError where an option is another method's or wrong."""
        return built(get_black_box, self, STUDY_OPTIONS)

    def validate(self) -> None:
        super().validate()
        self.strategy()
        kind, _, where = self.evaluator.partition(":")
        if kind not in EVALUATORS or not where:
            raise ConfigError(
                f"evaluator is {self.evaluator!r}; table:FILE, supernet:FOLDER or train:FILE is"
                " needed"
            )
        for other, names in EVALUATORS.items():
            for name in names:
                if other != kind and getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} is {getattr(self, name)!r}, which evaluator {kind} does not take"
                    )

    def resolved(self, name: str) -> str:
        """Returns a column of the table."""
        value = getattr(self, name)
        return TABLE_COLUMNS[name] if value is None else value


EVALUATORS: dict[str, tuple[str, ...]] = {
    "table": ("table_column", "table_report"),
    "supernet": (),
    "train": ("space", "length"),
}
"""What each takes."""
TABLE_COLUMNS = {"table_column": "c10_valid_12ep", "table_report": TABLE_REPORT}
STUDY_OPTIONS = tuple(
    dict.fromkeys(name for method in BLACK_BOX.values() for name in method.options)
)
