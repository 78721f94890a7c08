"""Text from a policy: prompts to token arrays, sampling, and back to strings."""

from jaxrl_post.generation.choice import Choice, choose_tokens
from jaxrl_post.generation.conversation import Conversation
from jaxrl_post.generation.prompting import (
    EncodedPrompts,
    bucket,
    decode_responses,
    encode_prompts,
    pad_contexts,
    quote_special_tokens,
    stop_token_ids,
    tokenize_prompts,
)
from jaxrl_post.generation.rollouts import Rollouts
from jaxrl_post.generation.sampler import Sampler

__all__ = [
    "Choice",
    "Conversation",
    "EncodedPrompts",
    "Rollouts",
    "Sampler",
    "bucket",
    "choose_tokens",
    "decode_responses",
    "encode_prompts",
    "pad_contexts",
    "quote_special_tokens",
    "stop_token_ids",
    "tokenize_prompts",
]
