"""Icons drawn by many hands as image classification: a vision-language benchmark that pip installs.

Glyphs come from the icon fonts of installed packages (``pip install "vlfast[demo]"``) and are
rendered at first use; nothing of them ships with vlfast. Brand logos are left out.
"""

from vlfast.data.glyphs.rendering import IMAGE_SIZE, NUM_UNIFORMS, render
from vlfast.data.glyphs.themes import THEMES, GlyphImages, load_theme

__all__ = ["IMAGE_SIZE", "NUM_UNIFORMS", "THEMES", "GlyphImages", "load_theme", "render"]
