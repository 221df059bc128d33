"""The paper's figures: a reference, a quantized model and a text go in; figures, their data and a report come out."""

from intactkv_export.analysis import plots, report
from intactkv_export.analysis.analyze import Analysis, analyze

__all__ = ["Analysis", "analyze", "plots", "report"]
