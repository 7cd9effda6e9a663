"""JetBlock for PyTorch: dynamic causal convolution and the gated delta rule, as ``torch.ops.jet.*`` and functions."""

from jetkernels import _machine, _startup

# Before torch, which the next line imports.
_machine.prepare_programs()
if _machine.program() == "jetkernels":
    _startup.fail_with_a_sentence()

from jetkernels import ops  # noqa: E402 - after the lines above
from jetkernels._version import __version__  # noqa: E402
from jetkernels.ops import *  # noqa: E402, F403 - the names of ops.__all__

__all__ = [*ops.__all__, "__version__"]
