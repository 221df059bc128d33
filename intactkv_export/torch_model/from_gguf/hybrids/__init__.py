"""Families with recurrent layers beside attention, or within it: a file for each kind of recurrence."""

from intactkv_export.torch_model.from_gguf.hybrids import convolutions, delta_nets, mamba

FAMILIES = convolutions.FAMILIES | delta_nets.FAMILIES | mamba.FAMILIES
WITH_EXPERTS = convolutions.WITH_EXPERTS | delta_nets.WITH_EXPERTS | mamba.WITH_EXPERTS

__all__ = ["FAMILIES", "WITH_EXPERTS"]
