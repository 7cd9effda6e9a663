"""Packages that only some parts of the library use."""

import importlib


def optional(name: str, extra: str, what: str):
    """Imports the package `name`; where it is missing, a ModuleNotFoundError says what needs it and how to install
    it.
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
