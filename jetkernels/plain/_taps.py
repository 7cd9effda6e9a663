"""The inputs that a causal convolution reads: every sequence's left context and its tokens in one table of rows."""

import torch

# tokens per tile, at most: a tap of a tile is [tile, D], however large T is
TILE = 1024


class TapRows:
    """The table [N*(W-1) + B*T, D]: for each sequence its W-1 rows of left context, then its tokens.

    row [B*T] is where a token stands; tap w of it reads row - (W-1) + w, which is its own sequence's.
    """

    def __init__(self, x, conv_state, cu_seqlens, width):
        self.shape, self.dtype, self.context = x.shape, x.dtype, width - 1
        batch, tokens, channels = x.shape
        token = torch.arange(batch * tokens, device=x.device)
        self.covered = None
        if cu_seqlens is None:
            self.sequences = batch
            cu = torch.arange(batch + 1, device=x.device) * tokens
            seq = token // max(tokens, 1)
        else:
            self.sequences = cu_seqlens.shape[0] - 1
            cu = cu_seqlens.to(torch.int64)
            seq = torch.searchsorted(cu.contiguous(), token, right=True) - 1
            self.covered = ((seq >= 0) & (seq < self.sequences)).unsqueeze(-1)
            seq = seq.clamp(0, max(self.sequences - 1, 0))
        self.count = self.sequences * self.context + batch * tokens
        # a table without sequences has no context rows, so its tokens (all of them uncovered) need the clamp
        self.row = (token + (seq + 1) * self.context).clamp(max=max(self.count - 1, 0))
        step = torch.arange(self.context, device=x.device)
        before = torch.arange(self.sequences, device=x.device) * self.context
        self.first_rows = ((cu[:-1] + before)[:, None] + step).clamp(0, max(self.count - 1, 0)).flatten()
        self.last_rows = ((cu[1:] + before)[:, None] + step).clamp(0, max(self.count - 1, 0)).flatten()
        self.table = x.new_zeros(self.count, channels)
        self.table.index_copy_(0, self.row, x.reshape(-1, channels))
        if conv_state is not None:
            self.table.index_copy_(0, self.first_rows, conv_state.transpose(1, 2).reshape(-1, channels))

    def tiles(self):
        """Slices of the B*T tokens."""
        tokens = self.row.shape[0]
        return [slice(begin, min(begin + TILE, tokens)) for begin in range(0, tokens, TILE)]

    def read(self, tile, tap, dtype):
        """The inputs [tile,D] that tap `tap` of the tile's tokens meets."""
        return self.table.index_select(0, self.tap_rows(tile, tap)).to(dtype)

    def tap_rows(self, tile, tap):
        """The rows of those inputs in the table."""
        return (self.row[tile] - self.context + tap).clamp(min=0)

    def final_state(self):
        """The last W-1 inputs of each sequence [N,D,W-1], oldest first."""
        return self._state(self.table, self.last_rows)

    def _state(self, table, rows):
        state = table.index_select(0, rows).view(self.sequences, self.context, self.shape[2])
        return state.transpose(1, 2).to(self.dtype, copy=True).contiguous()

    def covered_only(self, y, tile):
        """`y` [tile,D] with zeros for tokens outside every sequence."""
        return y if self.covered is None else torch.where(self.covered[tile], y, 0)

    def split_gradient(self, grad_table):
        """The gradient of the table as gradients of x [B,T,D] and conv_state [N,D,W-1]."""
        dx = grad_table.index_select(0, self.row).view(self.shape).to(self.dtype)
        return dx, self._state(grad_table, self.first_rows)


def silu_backward(grad, x):
    """Gradient of silu(x) times `grad`."""
    gate = torch.sigmoid(x)
    return grad * gate * (1 + x * (1 - gate))
