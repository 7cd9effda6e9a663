"""The ops of jetkernels as Python functions; importing this package registers ``torch.ops.jet.*``."""

from jetkernels.ops.add_rms_norm import add_rms_norm
from jetkernels.ops.apply_dynamic_conv import apply_dynamic_conv
from jetkernels.ops.attention_step import attention_step_
from jetkernels.ops.backend import Backend, backend_of
from jetkernels.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from jetkernels.ops.delta_gates import delta_gates
from jetkernels.ops.dynamic_conv import dynamic_conv
from jetkernels.ops.dynamic_conv_step import dynamic_conv_step_
from jetkernels.ops.gated_rms_norm import gated_rms_norm
from jetkernels.ops.jet_block_step import jet_block_step_
from jetkernels.ops.linear import linear
from jetkernels.ops.linear_int4 import linear_int4
from jetkernels.ops.linear_int8 import linear_int8
from jetkernels.ops.prefill_gated_delta_rule import prefill_gated_delta_rule_
from jetkernels.ops.recurrent_gated_delta_rule import fused_recurrent_gated_delta_rule, recurrent_gated_delta_rule_
from jetkernels.ops.recurrent_gated_delta_rule_commit import recurrent_gated_delta_rule_commit_
from jetkernels.ops.recurrent_gated_delta_rule_verify import recurrent_gated_delta_rule_verify
from jetkernels.ops.rms_norm import rms_norm
from jetkernels.ops.swiglu import swiglu

__all__ = [
    "Backend",
    "add_rms_norm",
    "apply_dynamic_conv",
    "attention_step_",
    "backend_of",
    "chunk_gated_delta_rule",
    "delta_gates",
    "dynamic_conv",
    "dynamic_conv_step_",
    "fused_recurrent_gated_delta_rule",
    "gated_rms_norm",
    "jet_block_step_",
    "linear",
    "linear_int4",
    "linear_int8",
    "prefill_gated_delta_rule_",
    "recurrent_gated_delta_rule_",
    "recurrent_gated_delta_rule_commit_",
    "recurrent_gated_delta_rule_verify",
    "rms_norm",
    "swiglu",
]
