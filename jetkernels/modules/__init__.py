"""Layers with parameters, named as in the published Jet-Nemotron checkpoints."""

from .dynamic_conv import DynamicShortConvolution, KernelGenerator
from .jet_block import JetBlock
from .jet_block_config import JetBlockConfig
from .jet_block_state import JetBlockDraft, JetBlockState
from .norm import GatedRMSNorm, RMSNorm
from .quantized import Quantized, QuantizedLinear, quantize_
from .weight_decay import parameter_groups

__all__ = [
    "DynamicShortConvolution",
    "GatedRMSNorm",
    "JetBlock",
    "JetBlockConfig",
    "JetBlockDraft",
    "JetBlockState",
    "KernelGenerator",
    "Quantized",
    "QuantizedLinear",
    "RMSNorm",
    "parameter_groups",
    "quantize_",
]
