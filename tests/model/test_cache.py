"""A cache gives its content to a larger one."""

import pytest
import torch
from support.model_cases import WINDOW, small_model, tokens

MODEL = small_model(dtype=torch.float64).eval()
IDS = tokens(3, WINDOW + 4)
FP64 = {"rtol": 0, "atol": 1e-12}


@torch.no_grad()
def filled(max_length: int, lengths=(9, 9, 9)):
    """A cache of the first tokens of each row."""
    cache = MODEL.new_cache(3, max_length)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    MODEL(IDS[:, : max(lengths)], mask, cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(3, 3, 3), (9, 9, 9), (3, 9, 6)], ids=str)
@pytest.mark.parametrize("spare", [0, 1, 7])
def test_a_larger_cache_goes_on(lengths, spare):
    """Shorter than a window, and longer."""
    small = filled(max(lengths) + spare, lengths)
    larger = MODEL.new_cache(3, 30)
    larger.copy_from(small)
    assert larger.lengths == list(lengths) == larger.lengths_device.tolist()
    got = MODEL(IDS, cache=larger).logits
    for n, length in enumerate(lengths):
        text = torch.cat([IDS[n, :length], IDS[n]])
        torch.testing.assert_close(got[n], MODEL(text[None]).logits[0, length:], **FP64)


@torch.no_grad()
def test_waiting_drafts_are_not_copied():
    cache = filled(20)
    MODEL.verify(IDS[:, :2], cache)
    with pytest.raises(RuntimeError, match="draft tokens of each sequence have been verified"):
        MODEL.new_cache(3, 30).copy_from(cache)


def test_a_smaller_cache_is_refused():
    with pytest.raises(ValueError, match="a cache of 3 sequences of 8 tokens cannot hold one of 3 of 9"):
        MODEL.new_cache(3, 8).copy_from(MODEL.new_cache(3, 9))
    with pytest.raises(ValueError, match="a cache of 2 sequences of 9 tokens cannot hold one of 3 of 9"):
        MODEL.new_cache(2, 9).copy_from(MODEL.new_cache(3, 9))
