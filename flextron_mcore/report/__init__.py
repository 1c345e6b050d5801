"""The report: one self-contained HTML page, its figures as PNG, and family.json, from the outputs of the stages.

A file for each topic reads stages and makes sections of the page (topic.py). A new topic is a file and an entry in TOPICS.
"""

from flextron_mcore.report import compare, data, evaluation, exports, family, routing, sensitivity, sorting, training
from flextron_mcore.report.page import build_report

TOPICS = (  # in the order of a run
    *(data.TOPIC, data.IMPORTED, sorting.TOPIC, training.TOPIC, routing.TOPIC),
    *(evaluation.TOPIC, family.TOPIC, compare.TOPIC, sensitivity.TOPIC, exports.TOPIC),
)

__all__ = ["TOPICS", "build_report"]
