"""Evaluation: a reference and quantized models go in; how far each is from it comes out, as figures and tables."""

from intactkv_export.evaluation import metrics, modes, multiple_choice, tables
from intactkv_export.evaluation.depths import DECODE_BATCH, Way
from intactkv_export.evaluation.evaluate import evaluate
from intactkv_export.evaluation.metrics import Estimate, Figures, difference, summary
from intactkv_export.evaluation.modes import MODES, REFERENCE
from intactkv_export.evaluation.texts import SELF, Texts

__all__ = [
    "DECODE_BATCH", "MODES", "REFERENCE", "SELF", "Estimate", "Figures", "Texts", "Way", "difference",
    "evaluate", "metrics", "modes",
    "multiple_choice", "summary", "tables",
]  # fmt: skip
