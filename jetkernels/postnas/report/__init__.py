"""Reports of a search: what the stages found, as Markdown tables, plots and JSON.

`tables` and `plots` are what all reports are made of; each other file writes the report of one stage, and `overview`
that over all of them. A report reads what a stage returned; it trains and decides nothing.
"""

from .plots import curve, heat_map, pair_chart, quality_against_speed
from .tables import markdown_table, provenance, write_text

__all__ = [
    "curve",
    "heat_map",
    "markdown_table",
    "pair_chart",
    "provenance",
    "quality_against_speed",
    "write_text",
]
