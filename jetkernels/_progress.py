"""Progress bars, drawn where there is a terminal to draw on and tqdm to draw with: a bar is no reason to fail."""

from collections.abc import Iterable, Iterator
from typing import Any


def progress(items: Iterable[Any] | None = None, *, disable: bool = False, **options: Any) -> Any:
    """A tqdm bar around `items`, or one to be updated by hand.

    Without tqdm or a terminal on standard error, the same without a picture.

    Args:
        items: what is iterated; None: nothing.
        disable: draw nothing, on a terminal either.
        options: those of tqdm.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _NoBar(items or ())
    return tqdm(items, disable=disable or None, **{"leave": False} | options)  # None: tqdm looks for a terminal


class _NoBar:
    """Stands for a bar where there is none."""

    def __init__(self, items: Iterable[Any]):
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, n: float = 1) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass
