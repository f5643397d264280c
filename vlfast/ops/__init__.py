"""Fused operations of prompt learning. They know nothing of CLIP and need only torch."""

from .gated_mixture import gated_mixture_loss
from .perplexity import plpp_loss, plpp_terms
from .symmetric_kl import symmetric_kl_loss

__all__ = ["gated_mixture_loss", "plpp_loss", "plpp_terms", "symmetric_kl_loss"]
