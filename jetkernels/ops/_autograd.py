"""The autograd contract of the ops, as Python functions for the dispatch keys Autograd and ADInplaceOrView.

Whatever has no derivative raises: no op returns zeros or None in its place. An op in place raises at the call, before
it writes, because a gradient that flows through what is overwritten is lost for good; a second derivative raises when
it is asked for.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import _C, Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

Implementation = Callable[..., Any]  # (keyset, *args of the op) -> the op's results
_BELOW_AUTOGRAD = _C._after_autograd_keyset
_BELOW_VERSIONS = _C._after_ADInplaceOrView_keyset


def overload(name: str) -> torch._ops.OpOverload:
    """``torch.ops.jet.<name>.default``."""
    return getattr(torch.ops.jet, name).default


def is_tensor(argument: torch._C.Argument) -> bool:
    """Whether the schema says ``Tensor`` or ``Tensor?``."""
    return str(argument.type) in ("Tensor", "Optional[Tensor]")


def _listed(results: Any) -> tuple:
    """The results of an op as a tuple, also of an op with one result."""
    return results if isinstance(results, tuple) else (results,)


def _tensors(name: str, args: Sequence) -> Iterator[tuple[str, Tensor]]:
    arguments = overload(name)._schema.arguments
    return ((a.name, t) for a, t in zip(arguments, args) if isinstance(t, Tensor))


def _refuse_tangents(name: str, args: Sequence, instead: str) -> None:
    for argument, t in _tensors(name, args):
        if forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"{name}: {argument} has a tangent, and this op is not differentiable in forward mode; {instead}"
            )


def _implementation(name: str, backward: Callable, setup_context: Callable, forward_mode: str) -> Implementation:
    """``setup_context(ctx, inputs, output)`` and ``backward(ctx, *grads)`` as in :class:`torch.autograd.Function`."""
    redispatch = overload(name)._handle.redispatch_boxed

    # of one level: under the transforms of torch.func the dispatcher comes here level by level
    class Function(_SingleLevelFunction):
        @staticmethod
        def forward(keyset: Any, *args: Any) -> Any:
            # torch turns gradients off in here; a transform of torch.func around this level needs them
            with torch.enable_grad(), _C._AutoDispatchBelowAutograd():
                return redispatch(keyset & _BELOW_AUTOGRAD, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            setup_context(ctx, inputs[1:], output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple:
            return None, *backward(ctx, *grads)

    Function.__name__ = Function.__qualname__ = name
    apply = getattr(Function, "apply")  # noqa: B009 - torch's metaclass makes it, no type says so

    def implementation(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args, forward_mode)
        if _C.is_grad_enabled() and _C._any_requires_grad(*args):
            if not _C._are_functorch_transforms_active():
                return apply(keyset, *args)
            with enable_single_level_autograd_function():
                return apply(keyset, *args)
        return redispatch(keyset & _BELOW_AUTOGRAD, *args)

    return implementation


def differentiable(name: str) -> Implementation:
    """Autograd of an op by its backward op, as their two schemas say.

    ::

        <name>(<arguments>) -> (<outputs>)
        <name>_backward(grad_<output> of each output, <arguments>) -> (d<argument> of each differentiable argument)

    A ``grad_<output>`` that may not be None gets zeros where no gradient flows. An argument without a ``d<argument>``,
    or that was None, gets None.
    """
    forward, backward_op = overload(name)._schema, overload(name + "_backward")
    grad_arguments = backward_op._schema.arguments[: len(forward.returns)]
    needed = [str(grad.type) == "Tensor" for grad in grad_arguments]
    saved = [is_tensor(argument) for argument in forward.arguments]
    place = {result.name: i for i, result in enumerate(backward_op._schema.returns)}
    gradient_of = [place.get(f"d{argument.name}") for argument in forward.arguments]

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*(x for x, is_saved in zip(inputs, saved) if is_saved))
        ctx.constants = [x for x, is_saved in zip(inputs, saved) if not is_saved]
        ctx.outputs = [(out.shape, out.dtype) for out in _listed(output)]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        kept = ctx.saved_tensors  # read once: under torch.utils.checkpoint a second reading is an error
        tensors, constants = iter(kept), iter(ctx.constants)
        args = [next(tensors if is_saved else constants) for is_saved in saved]
        like = next(x for x in kept if x is not None)
        incoming = [
            like.new_zeros(shape, dtype=dtype) if grad is None and is_needed else grad
            for grad, is_needed, (shape, dtype) in zip(grads, needed, ctx.outputs)
        ]
        gradients = _listed(backward_op(*incoming, *args))
        return tuple(None if x is None or i is None else gradients[i] for x, i in zip(args, gradient_of))

    return _implementation(name, backward, setup_context, "use reverse mode (backward, torch.func.vjp)")


def not_twice(name: str) -> Implementation:
    """For ``<name>_backward``: its outputs may be computed with ``create_graph``, but not differentiated."""
    instead = "for second derivatives write it with operations of torch"

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"{name}: not differentiable twice; {instead}")

    return _implementation(name + "_backward", backward, lambda ctx, inputs, output: None, instead)


def not_differentiable(name: str, instead: str) -> Implementation:
    """The implementation for Autograd of an op that writes nothing."""
    redispatch = overload(name)._handle.redispatch_boxed

    def implementation(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args, f"use {instead}")
        if _C.is_grad_enabled() and _C._any_requires_grad(*args):
            argument = next(argument for argument, t in _tensors(name, args) if t.requires_grad)
            raise RuntimeError(
                f"{name}: {argument} requires a gradient, and this op is not differentiable; "
                f"call it under torch.no_grad(), or use {instead}"
            )
        return redispatch(keyset & _BELOW_AUTOGRAD, *args)

    return implementation


def in_place(name: str, instead: str) -> tuple[Implementation, Implementation]:
    """The implementations for Autograd, and for ADInplaceOrView alone.

    Inference mode leaves the second on for tensors from outside of it.
    """
    op = overload(name)
    redispatch = op._handle.redispatch_boxed
    written = tuple(i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
    pick = operator.itemgetter(*written) if len(written) > 1 else lambda args: (args[written[0]],)
    use = f"use {instead}"

    def bump_versions(keyset: Any, *args: Any) -> Any:
        out = redispatch(keyset & _BELOW_VERSIONS, *args)
        _C._increment_version(pick(args))
        return out

    def implementation(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args, use)
        if _C.is_grad_enabled() and _C._any_requires_grad(*args):
            argument = next(argument for argument, t in _tensors(name, args) if t.requires_grad)
            raise RuntimeError(
                f"{name}: {argument} requires a gradient, and this op is not differentiable (it writes in place); "
                f"call it under torch.no_grad(), or {use}"
            )
        return bump_versions(keyset, *args)

    return implementation, bump_versions
