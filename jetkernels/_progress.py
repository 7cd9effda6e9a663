"""Progress bars, drawn where there is a terminal to draw on and tqdm to draw with: a bar is no reason to fail."""

from collections.abc import Iterable


def progress(items: Iterable | None = None, *, disable: bool = False, **options):
    """A tqdm bar around `items`, or one to be updated by hand. Without tqdm or a terminal on standard error, the same
    without a picture.

    disable: draw nothing, on a terminal either.  options: those of tqdm.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _NoBar(items)
    return tqdm(items, disable=disable or None, **{"leave": False} | options)  # None: tqdm looks for a terminal


class _NoBar:
    """Stands for a bar where there is none."""

    def __init__(self, items: Iterable | None):
        self.items = items

    def __iter__(self):
        return iter(self.items)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def update(self, n: float = 1) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass
