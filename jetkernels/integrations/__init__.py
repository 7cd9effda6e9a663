"""jetkernels under the models of other libraries: transformers and flash-linear-attention.

Neither is imported before one of these functions is called.
"""

from jetkernels.integrations._flash_linear_attention import register_fla_backend
from jetkernels.integrations._patch import Patch
from jetkernels.integrations._transformers import patch_transformers

__all__ = ["Patch", "patch_transformers", "register_fla_backend"]
