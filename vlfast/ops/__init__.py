"""Fused operations of prompt learning. They know nothing of CLIP and need only torch."""

from .gated_mixture import gated_mixture_loss
from .packed_runs import PackedRuns
from .perplexity import plpp_loss, plpp_terms
from .prefix_attention import prefix_attention
from .symmetric_kl import symmetric_kl_loss

__all__ = [
    "PackedRuns",
    "gated_mixture_loss",
    "plpp_loss",
    "plpp_terms",
    "prefix_attention",
    "symmetric_kl_loss",
]
