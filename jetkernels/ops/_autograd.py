"""The autograd contract of the ops, as kernels for the dispatch keys Autograd and ADInplaceOrView.

Whatever has no derivative raises: no op returns zeros or None in its place. An op in place raises at the call, before
it writes, because a gradient that flows through what is overwritten is lost for good; a second derivative raises when
it is asked for.
"""

import operator
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import _C, Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

Kernel = Callable  # (keyset, *args of the op) -> the op's results
_BELOW_AUTOGRAD = _C._after_autograd_keyset
_BELOW_VERSIONS = _C._after_ADInplaceOrView_keyset


def _overload(name: str):
    return getattr(torch.ops.jet, name).default


def _tensors(name: str, args: Sequence) -> Iterator[tuple[str, Tensor]]:
    arguments = _overload(name)._schema.arguments
    return ((a.name, t) for a, t in zip(arguments, args) if isinstance(t, Tensor))


def _refuse_tangents(name: str, args: Sequence, instead: str) -> None:
    for argument, t in _tensors(name, args):
        if forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"{name}: {argument} has a tangent, and this op is not differentiable in forward mode; {instead}"
            )


def _kernel(name: str, backward: Callable, setup_context: Callable, forward_mode: str) -> Kernel:
    redispatch = _overload(name)._handle.redispatch_boxed

    # of one level, as a kernel is called level by level under the transforms of torch.func
    class Function(_SingleLevelFunction):
        @staticmethod
        def forward(keyset, *args):
            # torch turns gradients off in here; a transform of torch.func around this level needs them
            with torch.enable_grad(), _C._AutoDispatchBelowAutograd():
                return redispatch(keyset & _BELOW_AUTOGRAD, *args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup_context(ctx, inputs[1:], output)

        @staticmethod
        def backward(ctx, *grads):
            return None, *backward(ctx, *grads)

    Function.__name__ = Function.__qualname__ = name

    def kernel(keyset, *args):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args, forward_mode)
        if _C.is_grad_enabled() and _C._any_requires_grad(*args):
            if not _C._are_functorch_transforms_active():
                return Function.apply(keyset, *args)
            with enable_single_level_autograd_function():
                return Function.apply(keyset, *args)
        return redispatch(keyset & _BELOW_AUTOGRAD, *args)

    return kernel


def differentiable(name: str, backward: Callable, setup_context: Callable) -> Kernel:
    """``setup_context(ctx, inputs, output)`` and ``backward(ctx, *grads)`` as in :class:`torch.autograd.Function`."""
    return _kernel(name, backward, setup_context, "use reverse mode (backward, torch.func.vjp)")


def not_twice(name: str) -> Kernel:
    """For ``<name>_backward``: its outputs may be computed with ``create_graph``, but not differentiated."""
    instead = "for second derivatives write it with operations of torch"

    def backward(ctx, *grads):
        raise RuntimeError(f"{name}: not differentiable twice; {instead}")

    return _kernel(name + "_backward", backward, lambda ctx, inputs, output: None, instead)


def in_place(name: str, instead: str) -> tuple[Kernel, Kernel]:
    """The kernels for Autograd, and for ADInplaceOrView alone, which inference mode leaves on for tensors from outside
    of it.
    """
    op = _overload(name)
    redispatch = op._handle.redispatch_boxed
    written = tuple(i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
    pick = operator.itemgetter(*written) if len(written) > 1 else lambda args: (args[written[0]],)
    use = f"use {instead}"

    def bump(keyset, *args):
        out = redispatch(keyset & _BELOW_VERSIONS, *args)
        _C._increment_version(pick(args))
        return out

    def kernel(keyset, *args):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args, use)
        if _C.is_grad_enabled() and _C._any_requires_grad(*args):
            argument = next(argument for argument, t in _tensors(name, args) if t.requires_grad)
            raise RuntimeError(
                f"{name}: {argument} requires a gradient, and this op is not differentiable (it writes in place); "
                f"call it under torch.no_grad(), or {use}"
            )
        out = redispatch(keyset & _BELOW_VERSIONS, *args)
        _C._increment_version(pick(args))
        return out

    return kernel, bump
