"""A call with a cache that does not come to its end: the cache says so, until it is reset."""

import copy
import pickle

import pytest
import torch
from support.model_cases import small_model, tokens
from torch.utils.checkpoint import checkpoint

UNFINISHED = r"an earlier call on this cache did not finish: reset\(\) it or make a new one"


def interrupt(module: torch.nn.Module, error: type[BaseException]):
    def stop(*_):
        raise error

    return module.register_forward_hook(stop)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["model.layers.0", "model.layers.2.mlp", "model.norm", "lm_head"])
@pytest.mark.parametrize("new", [1, 3])
@torch.no_grad()
def test_an_interrupted_call_is_not_passed_over(error, where, new):
    model, ids = small_model(tie_word_embeddings=False), tokens(2, 9)
    cache, fresh = model.new_cache(2, 9), model.new_cache(2, 9)
    model(ids[:, :5], cache=cache)
    hook = interrupt(model.get_submodule(where), error)
    with pytest.raises(error):
        model(ids[:, 5 : 5 + new], cache=cache)
    hook.remove()
    for same in (cache, copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert same.lengths == [5, 5]
        for _ in range(2):
            with pytest.raises(RuntimeError, match=UNFINISHED):
                model(ids[:, 5 : 5 + new], cache=same)
    cache.reset()
    for part in ids.split(5, 1):
        assert torch.equal(model(part, cache=cache).logits, model(part, cache=fresh).logits)


@torch.no_grad()
def test_a_refused_call_changes_nothing():
    model, ids = small_model(), tokens(2, 9)
    cache, fresh = model.new_cache(2, 9), model.new_cache(2, 9)
    model(ids[:, :5], cache=cache), model(ids[:, :5], cache=fresh)
    for wrong in (ids + 100, ids, ids[:1, :1], ids[:, :1].float()):
        with pytest.raises(ValueError):
            model(wrong, cache=cache)
    hook = interrupt(model.model.embed_tokens, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 5:], cache=cache)
    hook.remove()
    assert torch.equal(model(ids[:, 5:], cache=cache).logits, model(ids[:, 5:], cache=fresh).logits)


def test_a_call_that_must_not_be_repeated_leaves_the_cache_usable():
    model, ids = small_model(), tokens(2, 9)
    cache, fresh = model.new_cache(2, 9), model.new_cache(2, 9)
    scale = torch.ones((), requires_grad=True)
    y = checkpoint(lambda scale: (model(ids[:, :5], cache=cache).logits * scale).exp(), scale, use_reentrant=False)
    with pytest.raises(RuntimeError, match="cannot be repeated in a backward pass"):
        y.sum().backward()
    model(ids[:, :5], cache=fresh)
    assert torch.equal(model(ids[:, 5:], cache=cache).logits, model(ids[:, 5:], cache=fresh).logits)


@torch.no_grad()
def test_generation_after_an_interrupted_one():
    model, ids = small_model(), tokens(2, 5)
    need = model.generate(ids, max_new_tokens=4)
    hook = interrupt(model.model.layers[2], KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=4)
    hook.remove()
    assert torch.equal(model.generate(ids, max_new_tokens=4), need)
