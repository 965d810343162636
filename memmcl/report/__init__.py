"""From a results document to something a person reads: HTML, tables, terminal, Markdown, a model card.

Everything here is a pure function of `Results`; nothing reads a store, a clock or a model. Heavy packages
(matplotlib, pyarrow) are imported inside the functions that need them.
"""

from memmcl.report.html import render_html
from memmcl.report.markdown import plain_text
from memmcl.report.model_card import model_card
from memmcl.report.results import Results, parse_results
from memmcl.report.tables import markdown_table, results_table, write_tables
from memmcl.report.verdict import Advice, Verdict, advice, verdict

__all__ = [
    "Advice",
    "Results",
    "Verdict",
    "advice",
    "markdown_table",
    "model_card",
    "parse_results",
    "plain_text",
    "render_html",
    "results_table",
    "verdict",
    "write_tables",
]
