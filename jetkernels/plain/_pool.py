"""Rows of a state pool [P,...]: taken out and written back without reading the indices on the host."""

import torch


class PoolRows:
    """The rows that a call addresses: row n for sequence n, or state_indices [N], where a negative index is no row.

    An index that is too large is no row either: where nobody may look at it, it must not corrupt.
    """

    def __init__(self, pool, state_indices, sequences):
        self.pool, self.sequences = pool, sequences
        self.indexed = state_indices is not None
        if self.indexed:
            index = state_indices.to(torch.int64)
            self.valid = (index >= 0) & (index < pool.shape[0])
            self.index = torch.where(self.valid, index, 0)

    def _valid_as(self, x):
        return self.valid.view(-1, *(1,) * (x.dim() - 1))

    def take(self):
        """The addressed rows [N,...], a copy; any row stands in where there is none."""
        if self.indexed:
            return self.pool.index_select(0, self.index)
        return self.pool[: self.sequences].clone()

    def put(self, old, new):
        """Write `new` [N,...] to the addressed rows; `old` is what `take` returned. No other row changes by a bit.

        Every sequence writes, so the ones without a row repeat the write of one that has a row, bit for bit: then
        index_copy_ may write in any order. If none has a row, all of them write row 0 back as it was.
        """
        if not self.indexed:
            self.pool[: self.sequences].copy_(new)
            return
        new = torch.where(self._valid_as(new), new.to(self.pool.dtype), old)
        writer = torch.arange(self.sequences, device=new.device)
        writer = torch.where(self.valid, writer, self.valid.to(torch.int32).argmax())
        self.pool.index_copy_(0, self.index.index_select(0, writer), new.index_select(0, writer))

    def mask(self, y):
        """`y` [N,...] with zeros in the rows of sequences without a row."""
        return torch.where(self._valid_as(y), y, 0) if self.indexed else y
