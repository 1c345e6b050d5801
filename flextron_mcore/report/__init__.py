"""The report: one self-contained HTML page, its figures as PNG, and family.json, from the outputs of the stages."""

from flextron_mcore.report.page import build_report

__all__ = ["build_report"]
