"""How an op becomes ``torch.ops.jet.<op>``: schema, fake kernel, autograd (``_autograd``), autocast and the plain path
for CUDA.

The implementations that run are C++ (``bindings/<op>.cpp``, for CPU and CUDA tensors). Where no kernel of this library
serves a tensor (``bindings/backend.h``), they call ``jet_plain::<op>``, which this file registers from
``jetkernels.plain``.
"""

import re
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jetkernels import _library
from jetkernels.ops import _autograd
from jetkernels.ops._checks import Checks

_jet = torch.library.Library("jet", "FRAGMENT")
_plain = torch.library.Library("jet_plain", "FRAGMENT")
defined: list[str] = []  # every op, backward ops included
_announced: set[tuple[str, int]] = set()
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def define(name: str, schema: str, *, fake: Callable, plain: Callable) -> None:
    """Define ``jet::<name>`` with ``schema`` ("(Tensor q, ...) -> Tensor"), its fake kernel and its plain path.

    ``fake(checks, *args)`` refuses what the binding refuses, as far as a fake tensor shows it, and returns empty
    outputs.
    """
    _jet.define(name + schema, tags=_TAGS)
    defined.append(name)
    arguments, arrow, results = schema.partition(") ->")
    torch.library.register_fake(f"jet::{name}", lambda *args: fake(Checks(name), *args), lib=_jet)

    def announced_plain(*args):
        *arguments, reason = args
        if (name, reason) not in _announced:
            _announced.add((name, reason))
            warnings.warn(
                f"jetkernels: {name} runs as plain PyTorch: {_library.plain_reason_text(reason)}", stacklevel=2
            )
        return plain(*arguments)

    _plain.define(f"{name}{arguments}, int reason{arrow}{results}", tags=_TAGS)
    _plain.impl(name, announced_plain, "CompositeExplicitAutograd")


def differentiate(name: str, *, backward: Callable, setup_context: Callable) -> None:
    """Attach autograd to ``jet::<name>``; ``jet::<name>_backward`` raises where it would be differentiated."""
    _jet.impl(name, _autograd.differentiable(name, backward, setup_context), "Autograd", with_keyset=True)
    _jet.impl(name + "_backward", _autograd.not_twice(name), "Autograd", with_keyset=True)


def in_place(name: str, *, instead: str) -> None:
    """``jet::<name>`` bumps the versions of what it writes and refuses inputs that require gradients; ``instead`` has
    them.
    """
    kernel, bump = _autograd.in_place(name, instead)
    _jet.impl(name, kernel, "Autograd", with_keyset=True)
    _jet.impl(name, bump, "ADInplaceOrView", with_keyset=True)


def autocast(name: str, *, low_precision: Sequence[int], fp32: Sequence[int] = (), dtype_of: int | None = None) -> None:
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


# ---- what the Python functions share

_ARGUMENTS = {"l2norm_qk": "use_qk_l2norm_in_kernel", "silu": "activation"}  # op -> function, where they differ
_TYPES = {"Tensor": "a Tensor", "Optional[Tensor]": "a Tensor or None", "float": "a number", "bool": "True or False"}


def default_scale(q: Tensor) -> float:
    """``K ** -0.5``; any number for a ``q`` without a K, which the op will refuse."""
    try:
        return q.shape[-1] ** -0.5
    except (AttributeError, IndexError, TypeError, ZeroDivisionError):
        return 1.0


def refusal(error: RuntimeError, function: str) -> Exception:
    """What the user reads when ``function`` was called: the op's sentence under the function's name."""
    message = str(error)
    wrong_type = re.match(
        r"jet::\w+\(\) Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'", message
    )
    if wrong_type:
        needs, argument, got = wrong_type.groups()
        return TypeError(
            f"{function}: {_ARGUMENTS.get(argument, argument)} must be {_TYPES.get(needs, needs)}, got {got}"
        )
    op, colon, sentence = message.partition(": ")
    return type(error)(f"{function}: {sentence}") if colon and op in defined and op != function else error
