"""A model on more than one device: tensor parallel, fully sharded, sequences longer than one device.

`tensor_parallel_` gives each rank some heads of every token mixer and a part of every MLP; `fully_shard_` is FSDP2 with
the gates of the JetBlocks in fp32; `context_parallel_` gives each rank a part of every sequence. All stand on
torch.distributed, with a `DeviceMesh` or a process group that the caller makes.
"""

from .context import ContextParallel as ContextParallel
from .context import context_parallel_ as context_parallel_
from .context import split_sequence as split_sequence
from .gathering import gathered as gathered
from .gradients import clip_grad_norm_ as clip_grad_norm_
from .sharded import fully_shard_ as fully_shard_
from .tensor import HeadParallel as HeadParallel
from .tensor import config_of_rank as config_of_rank
from .tensor import tensor_parallel_ as tensor_parallel_
from .tensor import tensor_parallel_plan as tensor_parallel_plan
