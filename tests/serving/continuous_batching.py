"""A small engine: requests arrive, are read in pieces, decoded in ragged batches, preempted, cancelled, drafted for.

JetBlocks run on pools through `jetkernels.serving`; attention layers keep a cache for each request, as an engine's own
attention would. Tokens are the most likely ones.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jetkernels.model import JetNemotronForCausalLM
from jetkernels.model.layout import TokenLayout
from jetkernels.modules import JetBlock
from jetkernels.serving import (
    RaggedBatch,
    commit_,
    forward_,
    new_draft_pools,
    new_pools,
    rows_of,
    verify_,
)


@dataclass(eq=False)
class Request:
    """Attributes:
    prompt: its tokens.
    new: tokens that it wants.
    output: those that it has.
    read: tokens of prompt and output that the layers have read.
    row: of the pools, None while it waits.
    """

    prompt: list[int]
    new: int
    output: list[int] = field(default_factory=list)
    read: int = 0
    row: int | None = None
    caches: list = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def done(self) -> bool:
        return len(self.output) >= self.new


class Engine:
    """Args:
    model: in evaluation mode.
    rows: of the pools; row 0 belongs to nobody.
    chunk: tokens of a prompt that are read in a step, at most.
    drafts: tokens that are proposed in a step.
    """

    def __init__(self, model: JetNemotronForCausalLM, rows: int, chunk: int, drafts: int, seed: int):
        self.model, self.chunk, self.drafts, self.draw = model, chunk, drafts, random.Random(seed)
        self.free = list(range(1, rows))
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        jets = {
            i: layer.self_attn for i, layer in enumerate(model.model.layers) if isinstance(layer.self_attn, JetBlock)
        }
        options = {"dtype": model.dtype}
        self.pools = {i: new_pools(jet.config, rows, **options) for i, jet in jets.items()}
        self.draft_pools = {i: new_draft_pools(jet.config, rows, drafts + 1, **options) for i, jet in jets.items()}
        for pool in self.tensors():
            pool.fill_(torch.nan)  # a row is read by its owner alone, and not before it was written

    def tensors(self) -> list[Tensor]:
        every = [*self.pools.values(), *self.draft_pools.values()]
        return [tensor for pools in every for tensor in pools]

    def admit(self) -> None:
        while self.free and self.waiting:
            request = self.waiting.pop(0)
            request.row = self.free.pop(self.draw.randrange(len(self.free)))
            request.read, request.caches = 0, []
            self.running.append(request)

    def leave(self, request: Request) -> None:
        """Gives back its row; what was read is lost."""
        self.running.remove(request)
        assert request.row is not None
        self.free.append(request.row)
        request.row, request.caches = None, []

    def preempt(self, request: Request) -> None:
        self.leave(request)
        self.waiting.insert(0, request)

    @torch.no_grad()
    def layers(self, spans: list[tuple[Request, int]], padding: int, drafting: bool) -> Tensor:
        """Reads `count` tokens of each request; those of one token and a state come first.

        Returns the final hidden states [total, C], in the order of `spans`.

        padding: sequences of one token that the engine fills a batch up with, on row 0, behind those that decode.
        """
        model = self.model.model
        decodes = [pair for pair in spans if pair[1] == 1 and pair[0].read] if not drafting else []
        ordered = decodes + [(None, 1)] * (padding if decodes else 0) + [s for s in spans if s not in decodes]
        ids = [r.tokens[r.read : r.read + n] if r is not None else [0] for r, n in ordered]
        counts = [n for _, n in ordered]
        rows = rows_of(torch.tensor([r.row if r is not None else 0 for r, _ in ordered]))
        starts = torch.tensor([0, *counts]).cumsum(0)
        has = torch.tensor([r is not None and r.read > 0 for r, _ in ordered])
        batch = RaggedBatch(len(decodes) + (padding if decodes else 0), starts, rows, has)
        h = model.embed_tokens(torch.tensor([i for row in ids for i in row]))
        for i, layer in enumerate(model.layers):
            x = layer.input_layernorm(h)
            if i in self.pools and drafting:
                # As many of each.
                y = verify_(
                    layer.self_attn, x.view(len(ordered), -1, x.shape[1]), self.pools[i], self.draft_pools[i], rows
                )
                y = y.flatten(0, 1)
            elif i in self.pools:
                y = forward_(layer.self_attn, x, self.pools[i], batch)
            else:
                y = torch.cat([self.attend(i, r, part) for (r, _), part in zip(ordered, x.split(counts))])
            h = h + torch.nan_to_num(y) if None in [r for r, _ in ordered] else h + y
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        h = model.norm(h)
        parts = {id(r): part for (r, _), part in zip(ordered, h.split(counts)) if r is not None}
        return torch.cat([parts[id(r)] for r, _ in spans])

    def attend(self, i: int, request: Request | None, x: Tensor) -> Tensor:
        if request is None:
            return torch.zeros_like(x)
        mixer = self.model.model.layers[i].self_attn
        kept = dict(request.caches)
        if i not in kept:
            kept[i] = mixer.initial_state(self.model.config, 1, 512, dtype=self.model.dtype)
            request.caches.append((i, kept[i]))
        past = [request.read]
        layout = TokenLayout.dense(1, len(x), past, torch.tensor(past), x.device)
        return mixer(x[None], layout=layout, rotary=self.model.model._rotary(layout.positions), state=kept[i])[0]

    def step(self) -> None:
        """One step of all that run."""
        self.admit()
        spans = []
        for request in self.running:
            left = len(request.tokens) - request.read
            spans.append((request, min(left, 1 if request.read and left == 1 else self.draw.randint(1, self.chunk))))
        if not spans:
            return
        h = self.layers(spans, self.draw.choice([0, 0, 1, 3]), drafting=False)
        for (request, count), part in zip(spans, h.split([n for _, n in spans])):
            request.read += count
            if request.read == len(request.tokens):
                request.output.append(int(self.model.head(part[-1]).argmax()))
        self.finish()

    def finish(self) -> None:
        for request in [r for r in self.running if r.done]:
            self.leave(request)

    def draft_step(self, propose) -> None:
        """Verifies proposed tokens of some requests that decode, and commits what was right.

        propose: request, number -> tokens.
        """
        ready = [r for r in self.running if r.read and r.read == len(r.tokens) - 1 and not r.caches]
        if not ready:
            return
        before = {id(r): list(r.output) for r in ready}
        for r in ready:
            r.output += propose(r, self.drafts)
        spans = [(r, self.drafts + 1) for r in ready]
        h = self.layers(spans, 0, drafting=True)
        accepted = []
        for r, part in zip(ready, h.split(self.drafts + 1)):
            best = self.model.head(part).argmax(-1).tolist()
            kept = before[id(r)]
            proposed = r.output[len(kept) :]
            right = 0
            while right < self.drafts and proposed[right] == best[right]:
                right += 1
            r.output = (kept + proposed[:right] + [best[right]])[: r.new]
            right = min(right, len(r.output) - len(kept) - 1)
            accepted.append(right + 1)
            r.read += right + 1
        rows = torch.tensor([r.row for r in ready])
        for i, pools in self.pools.items():
            commit_(pools, self.draft_pools[i], rows, torch.tensor(accepted))
        self.finish()
