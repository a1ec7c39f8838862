"""A run folder's results as one self-contained page. The report draws what is in results.json and computes nothing new."""

from demur.report.compare import compare
from demur.report.html import render
from demur.report.pivot import Line, number, pivot

__all__ = ["Line", "compare", "number", "pivot", "render"]
