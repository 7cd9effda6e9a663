"""Tensor parallel: each rank computes some heads of every token mixer and some columns of every MLP.

The output of each is the sum of the ranks' parts: one all-reduce in the forward pass, one in the backward pass. The
stream between them, embeddings, norms and head are the same on every rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.types import Device

from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM
from jetkernels.model.attention import Attention
from jetkernels.model.decoder_layer import MLP
from jetkernels.model.mixers import JetMixer
from jetkernels.model.token_mixer import State
from jetkernels.modules import JetBlock, JetBlockConfig
from jetkernels.modules.joined import FusedProjections

from .collectives import sum_gradients, sum_over_ranks
from .divided import Divided, refuse_divided

ROWS, COLUMNS, WHOLE = Shard(0), Shard(1), Replicate()
# What each rank has of the parameters of a layer. Row d*W+w of a JetBlock's w2 belongs to channel d, so that the rows
# of a head lie together.
_ATTENTION: dict[str, Placement] = {
    **{f"{name}_proj.{what}": ROWS for name in "qkv" for what in ("weight", "bias")},
    "o_proj.weight": COLUMNS,
    "q_norm.weight": WHOLE,
    "k_norm.weight": WHOLE,
}
_JET_BLOCK: dict[str, Placement] = {
    **{f"{name}_proj.weight": ROWS for name in "qkvgab"},
    "A_log": ROWS,
    "dt_bias": ROWS,
    "dynamic_conv1d.kernel_generator.w1.weight": WHOLE,
    "dynamic_conv1d.kernel_generator.w2.weight": ROWS,
    "dynamic_conv1d.kernel_generator.w2.bias": ROWS,
    "o_norm.weight": WHOLE,
    "o_proj.weight": COLUMNS,
}
_MLP: dict[str, Placement] = {"gate_proj.weight": ROWS, "up_proj.weight": ROWS, "down_proj.weight": COLUMNS}
PLACEMENTS: dict[type[nn.Module], Mapping[str, Placement]] = {JetBlock: _JET_BLOCK, Attention: _ATTENTION, MLP: _MLP}


def jet_of_rank(jet: JetBlockConfig, ranks: int) -> JetBlockConfig:
    """The sizes with the heads of one of `ranks` ranks; what the generator's reduction says of its width is not so."""
    reduction = max(1, jet.dconv_generator_reduction // ranks)
    return dataclasses.replace(jet, num_heads=jet.num_heads // ranks, dconv_generator_reduction=reduction)


def config_of_rank(config: JetNemotronConfig, ranks: int) -> JetNemotronConfig:
    """The config with the heads and the width that one of `ranks` ranks has.

    Raises:
        ValueError: something cannot be divided by the number of ranks.
    """
    changed: dict[str, Any] = {"intermediate_size": config.intermediate_size}
    if {"attn", "swa"} & {*config.layer_types}:
        heads = ("num_attention_heads", "num_key_value_heads")
        changed |= {name: getattr(config, name) for name in heads}
    jet = config.jet if "jet" in config.layer_types else None
    divided = changed if jet is None else changed | {"jet.num_heads": jet.num_heads}
    for name, size in divided.items():
        if size % ranks:
            raise ValueError(f"tensor parallel: {name} must be a multiple of the {ranks} ranks, got {size}")
    changed = {name: size // ranks for name, size in changed.items()} | {"head_dim": config.head_size}
    if jet is not None:
        own = {"jet": jet_of_rank(jet, ranks).to_dict()}
        changed["efficient_attention_config"] = dict(config.efficient_attention_config) | own
    return dataclasses.replace(config, **changed)


class _Share(Divided):
    """Comes in front of the class of a layer whose parameters are distributed.

    The layer computes with this rank's tensors as with its own, and the ranks' outputs are summed.
    """

    _group: dist.ProcessGroup
    _placements: Mapping[str, Placement]
    _is_computing = False

    @contextmanager
    def _local(self) -> Iterator[None]:
        """In this block the layer's parameters are this rank's tensors."""
        held: list[tuple[dict[str, Any], str, Any]] = []
        for path, placement in self._placements.items():
            owner, _, name = path.rpartition(".")
            parameters: dict[str, Any] = self.get_submodule(owner)._parameters
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                held.append((parameters, name, parameter))
                local = parameter.to_local()
                parameters[name] = sum_gradients(local, self._group) if placement == WHOLE else local
        self._is_computing = True
        try:
            yield
        finally:
            self._is_computing = False
            for parameters, name, parameter in held:
                parameters[name] = parameter

    def _summed(self, compute: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        if self._is_computing:  # `forward` of one token is `step`
            return compute(x, *args, **options)
        with self._local():
            y = compute(sum_gradients(x, self._group), *args, **options)
        return sum_over_ranks(y, self._group)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """See the layer's class."""
        return self._summed(super().forward, x, *args, **options)


class _ShareOfMixer(_Share):
    """`_Share` of a token mixer, which has a state of its heads and a step."""

    def initial_state(
        self, config: JetNemotronConfig, batch_size: int, max_length: int, *, device: Device = None, dtype: Any = None
    ) -> State:
        """See `TokenMixer.initial_state`: of this rank's heads."""
        own = config_of_rank(config, self._group.size())
        kind: Any = super()
        return kind.initial_state(own, batch_size, max_length, device=device, dtype=dtype)

    def step(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """See `TokenMixer.step`."""
        kind: Any = super()
        return self._summed(kind.step, x, *args, **options)


def _checked_kind(module: nn.Module) -> type[nn.Module]:
    """The key of PLACEMENTS that a module is of; ValueError where it holds anything else."""
    kind = next((kind for kind in PLACEMENTS if isinstance(module, kind)), None)
    name = type(module).__name__
    if kind is None:
        names = ", ".join(cls.__name__ for cls in PLACEMENTS)
        raise ValueError(f"HeadParallel: the module must be one of {names}, got {name}")
    held = [path for path, _ in (*module.named_parameters(), *module.named_buffers())]
    if other := [path for path in held if path not in PLACEMENTS[kind]]:
        raise ValueError(f"HeadParallel: a {name} must have no adapter, nor be quantised, got {', '.join(other)} in it")
    return kind


class HeadParallel(ParallelStyle):
    """How `parallelize_module` divides a token mixer (by heads) or an MLP (by columns) of this library.

    The layer's parameters become DTensors; states, keys and values are of this rank's heads, plain tensors.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        refuse_divided("HeadParallel", module)
        kind = _checked_kind(module)
        if device_mesh.ndim != 1:
            raise ValueError(f"HeadParallel: device_mesh must have one dimension, got {device_mesh.ndim}")
        placements = PLACEMENTS[kind]
        own_parameters = dict(module.named_parameters())
        for path, parameter in own_parameters.items():
            owner = module.get_submodule(path.rpartition(".")[0])
            tensor = distribute_tensor(parameter.detach(), device_mesh, [placements[path]], src_data_rank=None)
            distributed = nn.Parameter(tensor, parameter.requires_grad)
            distributed.__dict__.update(parameter.__dict__)
            owner.register_parameter(path.rpartition(".")[2], distributed)
        own: type[_Share] = _Share if kind is MLP else _ShareOfMixer
        name = f"TensorParallel{type(module).__name__}"
        inner: Any = type(module)
        known = {"draft_type": inner.draft_type} if kind is not MLP else {}
        module.__class__ = type(name, (own, inner), {"__module__": __name__, **known})
        share: Any = module
        share._group = device_mesh.get_group()
        share._placements = {path: placements[path] for path in own_parameters}
        if isinstance(module, JetBlock):
            module.config = jet_of_rank(module.config, device_mesh.size())
        if isinstance(module, FusedProjections):
            with torch.no_grad(), share._local():
                module.fuse()
        return module


def tensor_parallel_plan(model: JetNemotronForCausalLM) -> dict[str, ParallelStyle]:
    """What `torch.distributed.tensor.parallel.parallelize_module` takes: heads and MLPs divided, the rest whole."""
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if isinstance(module, (JetMixer, Attention, MLP)):
            plan[name] = HeadParallel()
    return plan


def tensor_parallel_(model: JetNemotronForCausalLM, mesh: DeviceMesh) -> JetNemotronForCausalLM:
    """Divides a model over the ranks of a mesh, in place; every rank has the whole of it before.

    Calls, caches, `generate` and drafts are as before, with the same arguments on every rank.

    Args:
        model: not quantised; the same on every rank.
        mesh: of one dimension; its ranks divide the heads of every layer (key heads too) and the width of the MLPs.

    Returns: the model.

    Raises:
        ValueError: something cannot be divided by the number of ranks, a layer holds more than its own parameters, or
            the model is divided already; nothing has changed.
    """
    refuse_divided("tensor parallel", model)
    config_of_rank(model.config, mesh.size())
    for name in tensor_parallel_plan(model):
        _checked_kind(model.get_submodule(name))
    parallelize_module(model, mesh, tensor_parallel_plan(model))
    return model
