"""The report: one self-contained HTML page, its figures as PNG, and family.json, from the outputs of the stages.

Each topic (topic.py) is a file that reads the output of some stages and makes sections of the page. A new topic needs a file and
an entry in TOPICS.
"""

from flextron_mcore.report import compare, data, evaluation, exports, family, routing, sensitivity, sorting, training
from flextron_mcore.report.page import build_report

TOPICS = (  # in the order of a run
    *(data.TOPIC, data.IMPORTED, sorting.TOPIC, training.TOPIC, routing.TOPIC),
    *(evaluation.TOPIC, family.TOPIC, compare.TOPIC, sensitivity.TOPIC, exports.TOPIC),
)

__all__ = ["TOPICS", "build_report"]
