"""Random values for new parameters."""

import torch

# Above this many elements a uniform distribution of the same standard deviation replaces the normal one: a CPU draws
# it three times faster, which is what decides how long a randomly initialised model of billions of parameters takes.
LARGE = 1 << 20


@torch.no_grad()
def init_weight_(tensor: torch.Tensor, std: float) -> torch.Tensor:
    """Fills `tensor` in place, in its own dtype, with independent zero-mean values of standard deviation `std`."""
    if not tensor.is_floating_point():
        raise ValueError(f"init_weight_: tensor must be floating, got {tensor.dtype} (a quantised layer is not drawn)")
    if tensor.is_meta:
        # There is nothing to fill, and the first random number there would import torch's Python references: seconds.
        return tensor
    if tensor.numel() > LARGE:
        bound = std * 3.0**0.5
        return tensor.uniform_(-bound, bound)
    return tensor.normal_(0.0, std)
