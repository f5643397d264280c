"""Making existing CoOp-family codebases fast."""

from vlfast.dropin.accelerate import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
