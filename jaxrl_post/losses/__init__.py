"""Per-token losses of policy gradients, distillation and imitation, as pure functions.

Every loss returns one number per token, unreduced and unmasked; `reduce` turns them
into a `Reduction`. Old, sampler, reference and teacher arguments carry no gradient.
"""

from jaxrl_post.losses import presets as presets
from jaxrl_post.losses.distillation import append_tail as append_tail
from jaxrl_post.losses.distillation import divergence as divergence
from jaxrl_post.losses.distillation import importance_clip as importance_clip
from jaxrl_post.losses.distillation import renormalize as renormalize
from jaxrl_post.losses.distillation import (
    sampled_token_distillation as sampled_token_distillation,
)
from jaxrl_post.losses.distillation import self_distillation as self_distillation
from jaxrl_post.losses.imitation import (
    negative_log_likelihood as negative_log_likelihood,
)
from jaxrl_post.losses.imitation import shaped_imitation as shaped_imitation
from jaxrl_post.losses.masking import mask_inputs as mask_inputs
from jaxrl_post.losses.policy_gradient import (
    clipped_importance_policy_gradient as clipped_importance_policy_gradient,
)
from jaxrl_post.losses.policy_gradient import (
    clipped_policy_gradient as clipped_policy_gradient,
)
from jaxrl_post.losses.policy_gradient import (
    sequence_policy_gradient as sequence_policy_gradient,
)
from jaxrl_post.losses.policy_gradient import (
    truncated_importance_weights as truncated_importance_weights,
)
from jaxrl_post.losses.regularization import entropy as entropy
from jaxrl_post.losses.regularization import reference_kl as reference_kl
from jaxrl_post.reduction import Reduction as Reduction
from jaxrl_post.reduction import reduce as reduce
from jaxrl_post.reduction import token_weights as token_weights

__all__ = (
    "Reduction",
    "append_tail",
    "clipped_importance_policy_gradient",
    "clipped_policy_gradient",
    "divergence",
    "entropy",
    "importance_clip",
    "mask_inputs",
    "negative_log_likelihood",
    "presets",
    "reduce",
    "reference_kl",
    "renormalize",
    "sampled_token_distillation",
    "self_distillation",
    "sequence_policy_gradient",
    "shaped_imitation",
    "token_weights",
    "truncated_importance_weights",
)
