"""JetBlock for PyTorch: dynamic causal convolution and the gated delta rule, as ``torch.ops.jet.*`` and functions."""

from jetkernels import ops
from jetkernels._version import __version__
from jetkernels.ops import *  # noqa: F403

__all__ = [*ops.__all__, "__version__"]
