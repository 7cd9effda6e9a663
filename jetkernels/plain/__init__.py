"""The ops and their backward ops in plain PyTorch, for calls that no other code of the library takes.

Those are CUDA tensors that no kernel takes, and every call under ``JETKERNELS_BACKEND=plain``. Imports torch only,
reads no device memory on the host (everything can be captured in a CUDA graph) and computes in fp32, or fp64 for fp64
inputs. Arguments are trusted: the bindings check them before they come here. What the ops mean and where they come from
stands in `jetkernels.ops`.
"""
