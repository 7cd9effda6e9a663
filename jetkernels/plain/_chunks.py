"""Tokens [B,T,...] in chunks [M,B,C,...] and back, without reading device memory on the host.

Padded batch: M = ceil(T / C), the B rows side by side. Packed (cu_seqlens, B = 1): every chunk belongs to one
sequence; M is the largest number of chunks that T tokens in N sequences can need, and those not needed hold no token.
"""

import torch

CHUNK = 64


class PaddedChunks:
    """Chunks of B rows of T tokens; each row is one sequence."""

    packed = False

    def __init__(self, batch, tokens):
        self.batch, self.tokens = batch, tokens
        self.sequences = batch
        self.count = -(-tokens // CHUNK)

    def split(self, x):
        """[B,T,...] -> [M,B,C,...]; zeros after the last token."""
        padded = self.count * CHUNK
        if padded != self.tokens:
            tail = x.new_zeros(self.batch, padded - self.tokens, *x.shape[2:])
            x = torch.cat([x, tail], dim=1)
        return x.unflatten(1, (self.count, CHUNK)).transpose(0, 1)

    def join(self, x, dtype):
        """[M,B,C,...] -> contiguous [B,T,...] in `dtype`."""
        out = torch.empty(self.batch, self.count, CHUNK, *x.shape[3:], dtype=dtype, device=x.device)
        out.copy_(x.transpose(0, 1))
        return out.flatten(1, 2)[:, : self.tokens].contiguous()


class PackedChunks:
    """Chunks of the N sequences that cu_seqlens [N+1] cuts out of T tokens; empty sequences have none.

    seq [M] is the sequence of each chunk, first and last [M] mark the chunks where a sequence starts and ends;
    start_row and end_row [M] are that sequence there and N (a row to throw away) elsewhere.
    """

    packed = True

    def __init__(self, cu_seqlens, tokens):
        cu = cu_seqlens.to(torch.int64)
        n = cu.shape[0] - 1
        self.batch, self.tokens, self.sequences = 1, tokens, n
        # sum of ceil(length / C), at its largest; a chunk holds at least one token
        self.count = min(tokens, (tokens + n * (CHUNK - 1)) // CHUNK) if n else 0
        if self.count == 0:
            return
        chunks = (cu[1:] - cu[:-1] + CHUNK - 1) // CHUNK
        offsets = torch.cat([cu.new_zeros(1), chunks.clamp(min=0).cumsum(0)])
        self._place_chunks(cu, offsets)
        self._place_tokens(cu, offsets)

    def _place_chunks(self, cu, offsets):
        index = torch.arange(self.count, device=cu.device)
        seq = torch.searchsorted(offsets, index, right=True) - 1
        used = seq < self.sequences
        self.seq = seq.clamp(0, self.sequences - 1)
        begin = offsets[self.seq]
        self.first = used & (index == begin)
        self.last = used & (index == offsets[self.seq + 1] - 1)
        self.start_row = torch.where(self.first, self.seq, self.sequences)
        self.end_row = torch.where(self.last, self.seq, self.sequences)
        token = (cu[self.seq] + (index - begin) * CHUNK)[:, None] + torch.arange(CHUNK, device=cu.device)
        self.filled = used[:, None] & (token < cu[self.seq + 1][:, None])
        self.token = token.clamp(0, self.tokens - 1)

    def _place_tokens(self, cu, offsets):
        index = torch.arange(self.tokens, device=cu.device)
        seq = torch.searchsorted(cu.contiguous(), index, right=True) - 1
        self.covered = (seq >= 0) & (seq < self.sequences)
        seq = seq.clamp(0, self.sequences - 1)
        slot = offsets[seq] * CHUNK + index - cu[seq]
        self.slot = slot.clamp(0, self.count * CHUNK - 1)

    def split(self, x):
        """[1,T,...] -> [M,1,C,...]; zeros where a chunk holds no token."""
        chunks = x[0].index_select(0, self.token.flatten()).unflatten(0, self.token.shape)
        filled = self.filled.view(self.filled.shape + (1,) * (x.dim() - 2))
        return torch.where(filled, chunks, 0).unsqueeze(1)

    def join(self, x, dtype):
        """[M,1,C,...] -> contiguous [1,T,...] in `dtype`; zeros for tokens outside every sequence."""
        rows = torch.empty(self.count, CHUNK, *x.shape[3:], dtype=dtype, device=x.device).copy_(x.squeeze(1))
        tokens = rows.flatten(0, 1).index_select(0, self.slot)
        covered = self.covered.view(-1, *(1,) * (tokens.dim() - 1))
        return torch.where(covered, tokens, 0).unsqueeze(0)


def chunk_layout(batch, tokens, cu_seqlens):
    """The chunks of [B,T,...] tensors, padded or packed."""
    if cu_seqlens is None:
        return PaddedChunks(batch, tokens)
    return PackedChunks(cu_seqlens, tokens)
