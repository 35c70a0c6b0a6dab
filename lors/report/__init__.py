"""report.html: what a run, or several side by side, came to, as one page that needs nothing else."""

from __future__ import annotations

from lors.report.page import report_page, write_report
from lors.report.run import Run, load_run

__all__ = ["Run", "load_run", "report_page", "write_report"]
