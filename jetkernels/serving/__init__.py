"""What an engine that schedules requests calls: JetBlocks on pools of states, whose rows belong to requests.

An engine gives the tokens of a step as one row, the sequences one behind the other, and names the rows of the pools.
`forward_` decodes some of them and reads the prompts of others; `verify_` and `commit_` are for draft tokens.
"""

from .batch import RaggedBatch as RaggedBatch
from .batch import rows_of as rows_of
from .jet_block import DraftPools as DraftPools
from .jet_block import commit_ as commit_
from .jet_block import forward_ as forward_
from .jet_block import new_draft_pools as new_draft_pools
from .jet_block import new_pools as new_pools
from .jet_block import verify_ as verify_
from .jet_block import verify_with_states_ as verify_with_states_
from .shares import JetBlockOfRank as JetBlockOfRank
