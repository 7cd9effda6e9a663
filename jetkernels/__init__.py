"""JetBlock for PyTorch: dynamic causal convolution and the gated delta rule, as ``torch.ops.jet.*`` and functions."""

from jetkernels import _machine

_machine.spin_shortly_in_programs()  # before torch, which the next line imports

from jetkernels import ops  # noqa: E402
from jetkernels._version import __version__  # noqa: E402
from jetkernels.ops import *  # noqa: E402, F403

__all__ = [*ops.__all__, "__version__"]
