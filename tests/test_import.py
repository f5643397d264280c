"""`from vlfast import plpp_loss` is light, and every public name is there."""

import subprocess
import sys

import pytest

import vlfast

HEAVY = ("open_clip", "torchvision", "matplotlib", "accelerate", "jsonargparse", "rich", "triton")


def test_losses_import_nothing_heavy_beyond_torch():
    """What torch itself imports does not count."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "from vlfast import gated_mixture_loss, plpp_loss, symmetric_kl_loss\n"
        f"print(sorted(m for m in {HEAVY} if m in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", vlfast.__all__)
def test_public_names_exist(name):
    assert getattr(vlfast, name) is not None
    assert name in dir(vlfast)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'plp_loss'"):
        _ = vlfast.plp_loss
