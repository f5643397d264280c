"""Making existing CoOp-family codebases fast."""

from vlfast.dropin.accelerate import Report, accelerate, restore
from vlfast.dropin.perplexity import perplexity

__all__ = ["Report", "accelerate", "perplexity", "restore"]
