"""What a kernel of a PTX text is refused with: at its launch, whatever its arguments."""

import pytest

import hoppersim


def refusal(module: "hoppersim.Module | str", name: str | None = None) -> "hoppersim.Fault":
    """The Fault of launching a kernel, by default the only one, with zeros."""
    module = hoppersim.Module(module) if isinstance(module, str) else module
    if name is None:
        (name,) = module.kernels
    zeros = [bytes(size) for _, _, size in module._module.parameters(name)]
    with pytest.raises(hoppersim.Fault) as caught:
        module.launch(name, 1, 32, zeros)
    assert f"kernel {name}, line " in str(caught.value)
    return caught.value
