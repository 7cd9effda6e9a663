"""How an op becomes ``torch.ops.jet.<op>``: schema, fake kernel, autograd, autocast and the plain path for CUDA.

The implementations that run are C++ (``bindings/<op>.cpp``, for CPU and CUDA tensors). Where no kernel of this library
serves a tensor (``bindings/backend.h``), they call ``jet_plain::<op>``, which this file registers from ``jetkernels.plain``.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jetkernels import _library

_jet = torch.library.Library("jet", "FRAGMENT")
_plain = torch.library.Library("jet_plain", "FRAGMENT")
defined: list[str] = []  # every op, backward ops included
_announced: set[tuple[str, int]] = set()
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def define(name: str, schema: str, *, fake: Callable, plain: Callable) -> None:
    """Define ``jet::<name>`` with ``schema`` ("(Tensor q, ...) -> Tensor"), its fake kernel and its plain path."""
    _jet.define(name + schema, tags=_TAGS)
    defined.append(name)
    arguments, arrow, results = schema.partition(") ->")
    names = [argument.split()[-1] for argument in arguments.split(",")]

    def checked_fake(*args):
        # The bindings check everything, but fake tensors never reach them: a mix of devices is caught here.
        tensors = [(n, t) for n, t in zip(names, args) if isinstance(t, Tensor)]
        for n, t in tensors[1:]:
            if t.device != tensors[0][1].device:
                raise RuntimeError(f"{name}: {n} must be on {tensors[0][1].device} like {tensors[0][0]}, got {t.device}")
        return fake(*args)

    torch.library.register_fake(f"jet::{name}", checked_fake, lib=_jet)

    def announced_plain(*args):
        *arguments, reason = args
        if (name, reason) not in _announced:
            _announced.add((name, reason))
            warnings.warn(f"jetkernels: {name} runs as plain PyTorch: {_library.plain_reason_text(reason)}", stacklevel=2)
        return plain(*arguments)

    _plain.define(f"{name}{arguments}, int reason{arrow}{results}", tags=_TAGS)
    _plain.impl(name, announced_plain, "CompositeExplicitAutograd")


def differentiate(name: str, *, backward: Callable, setup_context: Callable) -> None:
    """Attach autograd to ``jet::<name>``."""
    torch.library.register_autograd(f"jet::{name}", backward, setup_context=setup_context, lib=_jet)


def autocast(
    name: str, *, low_precision: Sequence[int], fp32: Sequence[int] = (), dtype_of: int | None = None
) -> None:
    """Under autocast cast the arguments at the positions ``low_precision`` to autocast's dtype, ``fp32`` to fp32.

    ``dtype_of`` names an argument that is written in place and therefore decides the dtype instead of autocast.
    float64 arguments stay as they are, as everywhere in PyTorch's autocast.
    """
    op = getattr(torch.ops.jet, name).default

    def make(device_type: str, key: torch._C.DispatchKey):
        def kernel(*args):
            low = torch.get_autocast_dtype(device_type) if dtype_of is None else args[dtype_of].dtype
            cast = list(args)
            for positions, dtype in ((low_precision, low), (fp32, torch.float32)):
                for i in positions:
                    if isinstance(cast[i], Tensor) and cast[i].is_floating_point() and cast[i].dtype != torch.float64:
                        cast[i] = cast[i].to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(*cast)

        return kernel

    _jet.impl(name, make("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
    _jet.impl(name, make("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")
