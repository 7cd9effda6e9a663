"""What is right: the ops, JetBlock and the hybrid model in plain PyTorch. Imports torch only.

Everything computes in ``dtype`` (fp64 unless asked otherwise), is differentiable with torch autograd and never writes
to an argument: where an op updates a state pool in place, its definition here returns the new pool.

Symbols: B batch, T tokens, N sequences, P pool rows, H value heads, Hk query/key heads, K and V head dims, D channels,
R generator width, W taps.
"""
