"""A JetBlock with the heads of one rank, for engines that divide a model themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.types import Device

from jetkernels.modules import JetBlock, JetBlockConfig
from jetkernels.parallel.tensor import PLACEMENTS, jet_of_rank

Loader = Callable[[nn.Parameter, Tensor], None]


class JetBlockOfRank(JetBlock):
    """Some heads of a JetBlock; the outputs of all ranks add up to that of the layer.

    Its parameters have the published names. Each has a `weight_loader`, which takes the whole tensor of a checkpoint
    and keeps this rank's part, as vLLM and SGLang want it.

    Args:
        hidden_size: C.
        config: sizes of the whole layer.
        rank: of this part.
        ranks: parts; they divide H.
        device: of the parameters.
        dtype: of the parameters; A_log and dt_bias are fp32 at least.

    Raises:
        ValueError: H cannot be divided.
    """

    def __init__(
        self,
        hidden_size: int,
        config: JetBlockConfig,
        rank: int = 0,
        ranks: int = 1,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        if config.num_heads % ranks:
            raise ValueError(f"JetBlock: num_heads must be a multiple of the {ranks} ranks, got {config.num_heads}")
        super().__init__(hidden_size, jet_of_rank(config, ranks), device=device, dtype=dtype)
        generator, R = self.dynamic_conv1d.kernel_generator, config.value_dim // config.dconv_generator_reduction
        if generator.w1.out_features != R:
            outputs = generator.w2.out_features
            generator.w1 = nn.Linear(hidden_size, R, bias=False, device=device, dtype=dtype)
            generator.w2 = nn.Linear(R, outputs, device=device, dtype=dtype)
            self.fuse()
        for name, parameter in self.named_parameters():
            parameter.weight_loader = _loader(name, rank, ranks)  # type: ignore[attr-defined]


def _loader(name: str, rank: int, ranks: int) -> Loader:
    placement = PLACEMENTS[JetBlock][name]

    @torch.no_grad()
    def load(parameter: nn.Parameter, whole: Tensor) -> None:
        part = whole
        if isinstance(placement, Shard):
            part = whole.tensor_split(ranks, placement.dim)[rank]
        else:
            assert isinstance(placement, Replicate)
        if part.shape != parameter.shape:
            raise ValueError(
                f"{name} must be {list(parameter.shape)} on each of {ranks} ranks, got {list(part.shape)} of "
                f"{list(whole.shape)}"
            )
        parameter.copy_(part)

    return load
