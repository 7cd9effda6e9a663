"""The ops of jetkernels as Python functions; importing this package registers ``torch.ops.jet.*``."""

from jetkernels.ops.apply_dynamic_conv import apply_dynamic_conv
from jetkernels.ops.backend import Backend, backend_of
from jetkernels.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from jetkernels.ops.dynamic_conv import dynamic_conv
from jetkernels.ops.dynamic_conv_step import dynamic_conv_step_
from jetkernels.ops.recurrent_gated_delta_rule import fused_recurrent_gated_delta_rule, recurrent_gated_delta_rule_
from jetkernels.ops.recurrent_gated_delta_rule_commit import recurrent_gated_delta_rule_commit_
from jetkernels.ops.recurrent_gated_delta_rule_verify import recurrent_gated_delta_rule_verify

__all__ = [
    "Backend",
    "apply_dynamic_conv",
    "backend_of",
    "chunk_gated_delta_rule",
    "dynamic_conv",
    "dynamic_conv_step_",
    "fused_recurrent_gated_delta_rule",
    "recurrent_gated_delta_rule_",
    "recurrent_gated_delta_rule_commit_",
    "recurrent_gated_delta_rule_verify",
]
