"""Meshes, and how parameters and batches are laid out on them."""

from jaxrl_post.sharding.mesh import AXES as AXES
from jaxrl_post.sharding.mesh import BATCH_AXES as BATCH_AXES
from jaxrl_post.sharding.mesh import VOCAB_AXIS as VOCAB_AXIS
from jaxrl_post.sharding.mesh import auto_axes as auto_axes
from jaxrl_post.sharding.mesh import make_mesh as make_mesh
from jaxrl_post.sharding.rules import RULES as RULES
from jaxrl_post.sharding.rules import batch_sharding as batch_sharding
from jaxrl_post.sharding.rules import batch_shards as batch_shards
from jaxrl_post.sharding.rules import param_shardings as param_shardings
from jaxrl_post.sharding.rules import shard as shard
from jaxrl_post.sharding.rules import shard_batch as shard_batch
