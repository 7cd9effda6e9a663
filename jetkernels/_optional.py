"""Packages that only some parts of the library use."""

import importlib
from typing import Any


def optional(name: str, extra: str, what: str) -> Any:
    """Imports a package that is an extra.

    Args:
        name: of the package, or of a module in it.
        extra: of jetkernels, that installs it.
        what: needs it.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says what needs it and how to get it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"{what} needs the package {error.name}, which is not installed: pip install 'jetkernels[{extra}]'",
            name=error.name,
        ) from None
