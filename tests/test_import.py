"""`from vlfast import plpp_loss` is light, every public name is there, imports point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vlfast

HEAVY = ("open_clip", "torchvision", "matplotlib", "accelerate", "jsonargparse", "rich", "triton")

PACKAGE = Path(vlfast.__file__).parent

# Imports point one way: from a room to those before it. clip and data stand beside each other.
ROOMS = (
    {"errors", "version", "_extension"},
    {"ops", "restricted_pickle"},
    {"clip", "data"},
    {"prompts"},
    {"objectives"},
    {"trainers"},
    {"evaluation"},
    {"parts"},
    {"training"},
    {"run"},
    {"features", "interpret", "cost", "demo", "doctor", "checkpoints", "protocols", "dropin"},
    {"report"},
    {"cli"},
    {"__main__"},
)


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


def test_imports_point_one_way():
    ranks = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlfast"):
                names = [node.module]
                if node.module == "vlfast":
                    names = [f"vlfast.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("vlfast.")]
            else:
                continue
            for name in names:
                other = name.split(".")[1]
                if other != room and ranks.get(other, 0) >= ranks[room]:
                    wrong.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert not wrong
