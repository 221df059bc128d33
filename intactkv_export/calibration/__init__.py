"""Calibration: a reference, a quantized model and a prefix go in; a prefix trained for that model comes out."""

from intactkv_export.calibration.calibrate import PHASES, Calibrated, calibrate

__all__ = ["PHASES", "Calibrated", "calibrate"]
