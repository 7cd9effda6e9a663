"""PostNAS: the search that turns a trained full-attention model into a Jet hybrid (arXiv 2508.15884, section 2)."""

from .base import from_pretrained, small_base, train_base
from .continuations import continuations
from .data import Loader, TextCorpus, Windows
from .placement import (
    PlacementOptions,
    PlacementResult,
    ScoreBook,
    export,
    search_placement,
    train_super_network,
)
from .report.placement import write_report
from .search import Found, beam_search, importance, uniform
from .super_network import SuperNetwork
from .tasks import (
    OBJECTIVES,
    Copy,
    MultipleChoice,
    Recall,
    Score,
    Task,
    TokenChoices,
    TokenTask,
    WordRecall,
    language_modelling,
    recall_of,
)
from .training import Recipe, join_ranks, ranks

__all__ = [
    "OBJECTIVES",
    "Copy",
    "Found",
    "Loader",
    "MultipleChoice",
    "PlacementOptions",
    "PlacementResult",
    "Recall",
    "Recipe",
    "Score",
    "ScoreBook",
    "SuperNetwork",
    "Task",
    "TextCorpus",
    "TokenChoices",
    "TokenTask",
    "Windows",
    "WordRecall",
    "beam_search",
    "continuations",
    "export",
    "from_pretrained",
    "importance",
    "join_ranks",
    "language_modelling",
    "ranks",
    "recall_of",
    "search_placement",
    "small_base",
    "train_base",
    "train_super_network",
    "uniform",
    "write_report",
]
