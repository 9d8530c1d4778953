"""Evaluates cells as paths of a trained supernet: weights are shared, nothing is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fastnas import reference
from fastnas.evaluators.base import Evaluation, EvaluationError, EvaluatorOptions
from fastnas.nn import Paths
from fastnas.search.build import Answers
from fastnas.search.diverged import DivergedError
from fastnas.search.opened import NoSearchError, open_search
from fastnas.search.searcher import Searcher
from fastnas.spaces import AnyGenotype
from fastnas.spaces.distribution import slots_of
from fastnas.spaces.slots import SlotLayout
from fastnas.strategies.derivation import path_of
from fastnas.text_file import file_path

AT_ONCE = 4
"""Cells in one pass of the network, which shares its stem and the calls."""


class SupernetEvaluator:
    """Runs each cell as a path of the supernet, on images of the logits.

    Batch norms take the statistics of the batch: the running ones are those of all that was
    trained.

    Args:
        searcher: of a search that was run.

    Raises:
        ValueError: its space offers other candidates on other edges.
    """

    def __init__(self, searcher: Searcher) -> None:
        self.searcher = searcher
        self.settings: dict[str, Any] = {}
        self.layout: SlotLayout = slots_of(searcher.space)
        # It is a copy, because the batches of an evaluation move running statistics.
        self.network = copy.deepcopy(searcher.network).train()
        # Noise and drop-path belong to the training; a cell is judged without them.
        self.network.set_noise_amplitude(0.0)
        for module in self.network.modules():
            if isinstance(module, reference.MixedOp):
                module.skip_drop_path = 0.0

    @classmethod
    def of_run(cls, folder: Path | str) -> SupernetEvaluator:
        """Reads the supernet from the folder of a search.

        Raises:
            EvaluationError: it holds none, or one whose space has other candidates on other edges;
                others as `Searcher` and its checkpoints.
        """
        folder = file_path(folder)
        try:
            searcher = open_search(folder)
        except NoSearchError as error:
            raise EvaluationError(str(error)) from error
        try:
            return cls(searcher)
        except ValueError as error:
            raise EvaluationError(f"{folder}: {error}") from error

    @torch.no_grad()
    def evaluate(self, cells: Sequence[AnyGenotype], seeds: Sequence[int]) -> list[Evaluation]:
        """Runs several cells in a pass; nothing is random but what `seeds` drew the cells with."""
        found: list[Evaluation] = []
        for first in range(0, len(cells), AT_ONCE):
            found += self._together(cells[first : first + AT_ONCE])
        return found

    def _together(self, cells: Sequence[AnyGenotype]) -> list[Evaluation]:
        start, searcher = perf_counter(), self.searcher
        labels, device = searcher.pipeline.images.train_labels, searcher.device
        try:
            paths = [path_of(cell, searcher.space) for cell in cells]
        except ValueError as error:
            raise EvaluationError(str(error)) from error
        weights = {}
        for cell_type in searcher.space.cell_types:
            choice = torch.stack([path[cell_type] for path in paths]).to(device)
            # An operation on a path has weight 1, as it has in a network of that cell alone.
            weights[cell_type] = Paths(choice, torch.ones_like(choice, dtype=torch.float32))
        answers = Answers(device)
        with searcher.on_backend(), searcher.precision.autocast():
            for index, batch in searcher.plain(searcher.evaluation_index):
                answers.add(self.network(batch, weights), labels[index])
        if not answers.finite:
            raise DivergedError(
                "a logit of the supernet's paths is not finite; searching with a lower lr than"
                f" {searcher.config.resolved('lr')} may help"
            )
        images = len(searcher.evaluation_index)
        accuracies = (answers.right / images).tolist()
        seconds = (perf_counter() - start) / len(cells)
        return [Evaluation(accuracy, seconds=seconds) for accuracy in accuracies]

    def reported(self, cell: AnyGenotype) -> None:
        return None


class SupernetOptions(EvaluatorOptions):
    """Opens the supernet that a search has left."""

    name = "supernet"
    place = "FOLDER of a search"

    def open(self, place: str) -> SupernetEvaluator:
        return SupernetEvaluator.of_run(place)
