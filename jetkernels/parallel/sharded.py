"""Fully sharded data parallel (FSDP2) of models whose gates are wider than their other parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import Shard

from jetkernels.model import JetNemotronForCausalLM
from jetkernels.modules import JetBlock
from jetkernels.modules.jet_block import GATE_PARAMETERS


def fully_shard_(
    model: JetNemotronForCausalLM,
    mesh: DeviceMesh | None = None,
    *,
    mp_policy: MixedPrecisionPolicy = MixedPrecisionPolicy(),  # frozen
    **options: Any,
) -> JetNemotronForCausalLM:
    """`torch.distributed.fsdp.fully_shard` of each layer and of the model, in place.

    FSDP wants one dtype among the parameters that it gathers at once, and A_log and dt_bias are fp32 in a model of any
    dtype: they are gathered and reduced by themselves, over the same ranks, and stay fp32 in the computation whatever
    `mp_policy` says. Rotary angles stay fp32 too. Parameters and optimiser see DTensors, as with `fully_shard`.

    Args:
        model: of one device, the same on every rank. Not quantised.
        mesh: of one dimension, or of two: replicated over the first, sharded over the second. None: all ranks.
        mp_policy: of all parameters but the gates.
        options: others of `fully_shard`: reshard_after_forward, offload_policy.

    Returns: the model.

    Raises:
        ValueError: the mesh has another number of dimensions.
    """
    if mesh is None:
        mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    if mesh.ndim not in (1, 2):
        raise ValueError(f"fully_shard_: mesh must have one or two dimensions, got {mesh.ndim}")
    gates = {id(getattr(m, name)) for m in model.modules() if isinstance(m, JetBlock) for name in GATE_PARAMETERS}
    placement = _gates_apart(gates, mesh) if gates else None
    # What a layer is given is cast where it is made; its rotary angles are not to be.
    inner = replace(mp_policy, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=inner, shard_placement_fn=placement, **options)
        _keep_gates_wide(cast(FSDPModule, layer), mp_policy)
    fully_shard(model, mesh=mesh, mp_policy=mp_policy, **options)
    return model


def _gates_apart(gates: set[int], mesh: DeviceMesh) -> Callable[[nn.Parameter], ShardPlacementResult | None]:
    """Names process groups of their own for the gates: FSDP gathers the parameters of each group at once."""
    # The same ranks of the same root mesh, so that what is tensor parallel may stand on another part of that.
    own, root = copy.copy(mesh), mesh._get_root_mesh()
    ranks = [dist.get_process_group_ranks(mesh.get_group(dim)) for dim in range(mesh.ndim)]
    groups = [dist.new_group(each, use_local_synchronization=True) for each in ranks]
    own._dim_group_names = [group.group_name for group in groups]
    root._pg_registry |= {group.group_name: group for group in groups}
    info = FSDPMeshInfo(own, shard_mesh_dim=0)
    if mesh.ndim == 2:
        info = HSDPMeshInfo(own, shard_mesh_dim=1, replicate_mesh_dim=0)
    return lambda parameter: ShardPlacementResult(Shard(0), info) if id(parameter) in gates else None


def _keep_gates_wide(layer: FSDPModule, mp_policy: MixedPrecisionPolicy) -> None:
    """The group of the gates is computed with and reduced as it is stored."""
    for group in layer._get_fsdp_state()._fsdp_param_groups:
        if {parameter._module_info.param_name for parameter in group.fsdp_params} == {*GATE_PARAMETERS}:
            group.mp_policy = replace(mp_policy, param_dtype=None, reduce_dtype=None)
