"""The report: one self-contained HTML page, its figures as PNG, and family.json, from the outputs of the stages.

One file a topic reads its stages and makes its sections (topic.py says how); a new topic is a file and an entry here.
"""

from flextron_mcore.report import compare, data, evaluation, exports, family, routing, sensitivity, sorting, training
from flextron_mcore.report.page import build_report

# The page goes from the results back to what made them.
RESULTS = (evaluation.TOPIC, family.TOPIC, compare.TOPIC, sensitivity.TOPIC, routing.TOPIC)
MAKING = (training.TOPIC, sorting.TOPIC, data.TOPIC, exports.TOPIC, data.IMPORTED)
TOPICS = (*RESULTS, *MAKING)

__all__ = ["MAKING", "RESULTS", "TOPICS", "build_report"]
