"""Decides which trial of a study evaluates which cell, through the study's own database."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import sqlalchemy as sql


class Claims:
    """Keeps the cells that are taken, each by one trial.

    Optuna's trials can be read and written, but not written on a condition: two workers that read
    before either wrote would both evaluate a cell that both had found free. Here a cell is a
    primary key, of which the database lets one insertion through, whoever makes it.

    Args:
        engine: of the database; the table is made in it where it is not there.
    """

    def __init__(self, engine: sql.Engine) -> None:
        self._engine = engine
        self._table = sql.Table(
            "fastnas_claims",
            sql.MetaData(),
            sql.Column("cell", sql.String(200), primary_key=True),
            sql.Column("trial", sql.Integer, nullable=False),
        )
        self._table.create(engine, checkfirst=True)

    def take(self, cell: str, trial: int, is_free: Callable[[int], bool]) -> bool:
        """Claims a cell for a trial; returns whether it is the trial's now.

        Args:
            is_free: whether the trial that holds the cell can lose it. Of several that take it from
                the same holder one succeeds.
        """
        key, table = _key(cell), self._table
        try:
            with self._engine.begin() as connection:
                # The key decides, not a query before it: the database lets one of two insertions
                # through.
                connection.execute(table.insert().values(cell=key, trial=trial))
            return True
        except sql.exc.IntegrityError:
            pass
        with self._engine.begin() as connection:
            holder = connection.execute(
                sql.select(table.c.trial).where(table.c.cell == key)
            ).scalar_one()
        if holder == trial:
            return True
        if not is_free(holder):
            return False
        with self._engine.begin() as connection:
            # The condition names the holder that was seen, so of two workers that take over from it
            # only one changes a row.
            mine = table.update().where(table.c.cell == key, table.c.trial == holder)
            return connection.execute(mine.values(trial=trial)).rowcount == 1


def _key(cell: str) -> str:
    """Returns the cell, or a digest of one that is longer than every database's keys may be."""
    return cell if len(cell) <= 200 else hashlib.sha256(cell.encode()).hexdigest()
