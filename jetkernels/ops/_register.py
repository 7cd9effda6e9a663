"""How an op becomes ``torch.ops.jet.<op>``: schema, fake implementation, autograd, autocast and the plain path.

The implementations that run are C++ (``bindings/<op>.cpp``, for CPU and CUDA tensors). Where no code of this library
serves a call (``bindings/backend.h``), they call ``jet_plain::<op>``, which this file registers from
``jetkernels.plain``; of some ops flash-linear-attention serves it (``_flash_linear_attention``).

The schema is the one place that lists an op's arguments: the backward op's schema, autograd (``_autograd``), and the
arguments of a fake implementation follow from it.
"""

import functools
import re
import threading
import warnings
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jetkernels import _library
from jetkernels.ops import _autograd, _flash_linear_attention
from jetkernels.ops._checks import Checks

_jet = torch.library.Library("jet", "FRAGMENT")
_plain = torch.library.Library("jet_plain", "FRAGMENT")
defined: list[str] = []  # every op, backward ops included
_announced: set[tuple[str, str]] = set()
_behind_a_binding = threading.local()  # the exception of a plain path, of which its binding tells that there was one
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def define(name: str, schema: str, *, fake: Callable, plain: Callable) -> None:
    """Define ``jet::<name>``.

    Args:
        name: of the op.
        schema: its arguments and results: ``"(Tensor q, ...) -> Tensor"``.
        fake: ``fake(checks, a)`` refuses what the binding refuses, as far as a fake tensor shows it, and returns empty
            results; ``a`` has the arguments under their names in the schema.
        plain: ``plain(*arguments)``, the op in operations of PyTorch.
    """
    _jet.define(name + schema, tags=_TAGS)
    defined.append(name)
    names = [a.name for a in _autograd.overload(name)._schema.arguments]
    Arguments = namedtuple("Arguments", names)  # type: ignore[misc]  # its fields are known when the op is defined
    torch.library.register_fake(f"jet::{name}", lambda *args: fake(Checks(name), Arguments(*args)), lib=_jet)

    def announced_plain(*args: Any) -> Any:
        *arguments, code = args
        reason = _library.plain_reason_text(code)
        function, text = _flash_linear_attention.offer(name, arguments, reason)
        said = f"on {text}: {reason}" if function else f"as plain PyTorch: {reason}{text and '; '}{text}"
        try:
            if (name, said) not in _announced:
                warnings.warn(f"jetkernels: {name} runs {said}", stacklevel=2)
                _announced.add((name, said))
            return (function or plain)(*arguments)
        except Exception as error:
            _behind_a_binding.error = error
            raise

    arguments, arrow, results = schema.partition(") ->")
    _plain.define(f"{name}{arguments}, int reason{arrow}{results}", tags=_TAGS)
    _plain.impl(name, announced_plain, "CompositeExplicitAutograd")


def define_backward(name: str, *, constant: Sequence[str], fake: Callable, plain: Callable) -> None:
    """Define ``jet::<name>_backward`` and attach autograd to both ops.

    The backward op takes ``grad_<output>`` of every output, of which those after the first may be None, and then the
    arguments of ``jet::<name>``. It returns ``d<argument>`` of every tensor that is not ``constant``; also of one that
    was None. It raises where it would be differentiated.

    Args:
        name: of the op that :func:`define` has defined.
        constant: tensors without a gradient.
        fake: as for :func:`define`.
        plain: as for :func:`define`.
    """
    schema = _autograd.overload(name)._schema
    arguments = str(schema).partition("(")[2].partition(") ->")[0]
    grads = [f"Tensor{'?' if i else ''} grad_{output.name}" for i, output in enumerate(schema.returns)]
    if unknown := set(constant) - {a.name for a in schema.arguments}:
        raise ValueError(f"{name}: constant names no argument: {', '.join(sorted(unknown))}")
    differentiable = [a.name for a in schema.arguments if _autograd.is_tensor(a) and a.name not in constant]
    results = ", ".join(f"Tensor d{argument}" for argument in differentiable)
    define(f"{name}_backward", f"({', '.join(grads)}, {arguments}) -> ({results})", fake=fake, plain=plain)
    _jet.impl(name, _autograd.differentiable(name), "Autograd", with_keyset=True)
    _jet.impl(name + "_backward", _autograd.not_twice(name), "Autograd", with_keyset=True)


def not_differentiable(name: str, *, instead: str) -> None:
    """``jet::<name>`` refuses inputs that require gradients. ``instead`` names what has gradients."""
    _jet.impl(name, _autograd.not_differentiable(name, instead), "Autograd", with_keyset=True)


def in_place(name: str, *, instead: str) -> None:
    """``jet::<name>`` bumps the versions of what it writes and refuses inputs that require gradients.

    ``instead`` names what has gradients.
    """
    autograd, versions = _autograd.in_place(name, instead)
    _jet.impl(name, autograd, "Autograd", with_keyset=True)
    _jet.impl(name, versions, "ADInplaceOrView", with_keyset=True)


def autocast(
    name: str,
    *,
    low_precision: Sequence[str] = (),
    fp32: Sequence[str] = (),
    widest: Sequence[str] = (),
    dtype_of: str | None = None,
) -> None:
    """What autocast does to the arguments of ``jet::<name>``.

    float64 arguments stay as they are, as everywhere in PyTorch's autocast.

    Args:
        name: of the op.
        low_precision: the arguments that are cast to autocast's dtype.
        fp32: those that are cast to float32.
        widest: those that are cast to the dtype that all of theirs promote to.
        dtype_of: an argument that is written in place and therefore decides the dtype instead of autocast.
    """
    op = _autograd.overload(name)
    names = [a.name for a in op._schema.arguments]
    low_places, fp32_places, widest_places = (
        [names.index(a) for a in arguments] for arguments in (low_precision, fp32, widest)
    )
    written = None if dtype_of is None else names.index(dtype_of)

    def make(device_type: str, key: torch._C.DispatchKey) -> Callable:
        def implementation(*args: Any) -> Any:
            low = torch.get_autocast_dtype(device_type) if written is None else args[written].dtype
            cast = list(args)
            for places, dtype in ((low_places, low), (fp32_places, torch.float32)):
                for i in places:
                    if isinstance(cast[i], Tensor) and cast[i].is_floating_point() and cast[i].dtype != torch.float64:
                        cast[i] = cast[i].to(dtype)
            tensors = [cast[i] for i in widest_places if isinstance(cast[i], Tensor) and cast[i].is_floating_point()]
            if len({t.dtype for t in tensors}) > 1 and len(tensors) == len(widest_places):
                dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
                for i in widest_places:
                    cast[i] = cast[i].to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(*cast)

        return implementation

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


def use_silu(function: str, activation: str | None) -> bool:
    """The ops' ``silu`` flag for the ``activation`` argument of the Python functions."""
    if activation is None:
        return False
    if isinstance(activation, str) and activation in ("silu", "swish"):
        return True
    raise ValueError(f"{function}: activation must be 'silu', 'swish' or None, got {activation!r}")


def refusal(error: Exception, function: str) -> Exception:
    """What the user reads when ``function`` was called: the op's sentence under the function's name."""
    message = str(error)
    if message.startswith("torch_call_dispatcher"):
        behind, _behind_a_binding.error = getattr(_behind_a_binding, "error", None), None
        return behind or error
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
