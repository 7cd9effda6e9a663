"""JetBlock for PyTorch: dynamic causal convolution and the gated delta rule, as ``torch.ops.jet.*`` and functions."""

from jetkernels import _machine, _startup

# Before torch, which the next line imports.
_machine.spin_shortly_in_programs()
if _machine.program() == "jetkernels":
    _startup.fail_with_a_sentence()

from jetkernels import ops
from jetkernels._version import __version__
from jetkernels.ops import *

__all__ = [*ops.__all__, "__version__"]
