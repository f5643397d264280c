"""Icon fonts of installed packages: which glyphs there are, what people named them, their masks.

The packages are located and their files read; they are never imported (qtawesome would need Qt).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlfast.errors import VlfastError

MASK_SIZE = 48
_DRAWN_SIZE = 44
_MASK_FORMAT = 1


@dataclass(frozen=True)
class Font:
    """One font file of a family and what the endings of its glyph names mean.

    ``font`` and ``names`` are globs below the package folder. ``endings`` maps a name's ending to
    a style; ``style`` is the style of names without one. ``prefix`` is dropped from names.
    """

    family: str
    distribution: str
    package: str
    font: str
    names: str
    style: str
    endings: tuple[tuple[str, str], ...] = ()
    prefix: str = ""


@dataclass(frozen=True)
class Glyph:
    """One glyph. ``drawing`` is its name without family prefix and style ending: glyphs of a
    family with the same drawing show the same thing in other weights. ``words`` is the drawing
    in human words, ``concept`` their sorted set."""

    font: Font
    name: str
    codepoint: int
    style: str
    drawing: str
    words: tuple[str, ...]

    @property
    def family(self) -> str:
        return self.font.family

    @property
    def concept(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.words)))

    @property
    def key(self) -> str:
        """A name that is unique and the same on every machine."""
        return f"{self.family}/{Path(self.font.names).stem.rstrip('*-')}/{self.name}"


def _qtawesome(family: str, stem: str, style: str, *endings: tuple[str, str]) -> Font:
    version = "[0-9]*"
    return Font(
        family,
        "qtawesome",
        "qtawesome",
        f"fonts/{stem}-{version}.ttf",
        f"fonts/{stem}-charmap-{version}.json",
        style,
        endings,
    )


_OUTLINE = ("-outline", "outline")
UNSEEN_FONTS: tuple[Font, ...] = (
    _qtawesome(
        "phosphor",
        "phosphor",
        "outline",
        ("-thin", "thin"),
        ("-light", "light"),
        ("-bold", "bold"),
        ("-fill", "filled"),
    ),
    _qtawesome("remix", "remixicon", "outline", ("-line", "outline"), ("-fill", "filled")),
    _qtawesome("fontawesome", "fontawesome6-solid-webfont", "filled"),
    _qtawesome("fontawesome", "fontawesome6-regular-webfont", "outline"),
    Font(
        "bootstrap",
        "tkinter-icons-bs",
        "tkinter_icons_bs",
        "assets/bootstrap.ttf",
        "assets/glyphmap.json",
        "outline",
        (("-fill", "filled"),),
    ),
    Font(
        "lucide",
        "tkinter-icons-lucide",
        "tkinter_icons_lucide",
        "fonts/lucide.ttf",
        "glyphmap.json",
        "outline",
        prefix="icon-",
    ),
)


def _fluent(style: str, file: str, ending: str) -> Font:
    return Font(
        "fluent",
        "tkinter-icons-fluent",
        "tkinter_icons_fluent",
        f"fonts/FluentSystemIcons-{file}.ttf",
        f"glyphmap-{ending}.json",
        style,
        ((f"-{ending}", style),),
        prefix="ic-fluent-",
    )


def _google_material(style: str, file: str, names: str) -> Font:
    return Font(
        "google-material",
        "tkinter-icons-gmi",
        "tkinter_icons_gmi",
        f"fonts/{file}",
        f"glyphmap-{names}.json",
        style,
    )


PRETRAINING_FONTS: tuple[Font, ...] = (
    _qtawesome("material-design", "materialdesignicons6-webfont", "filled", _OUTLINE),
    _qtawesome("codicon", "codicon", "outline"),
    _qtawesome("elusive", "elusiveicons-webfont", "filled"),
    _fluent("outline", "Regular", "regular"),
    _fluent("filled", "Filled", "filled"),
    _fluent("light", "Light", "light"),
    _google_material("filled", "MaterialIcons-Regular.ttf", "baseline"),
    _google_material("outline", "MaterialIconsOutlined-Regular.otf", "outlined"),
    _google_material("filled", "MaterialIconsRound-Regular.otf", "round"),
    _google_material("filled", "MaterialIconsSharp-Regular.otf", "sharp"),
    Font(
        "ionicons",
        "tkinter-icons-ion",
        "tkinter_icons_ion",
        "fonts/ionicons.ttf",
        "glyphmap.json",
        "filled",
        (_OUTLINE, ("-sharp", "filled")),
    ),
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DROPPED_WORDS = _words("simple variant alt lg ios md android ion icon o")
# Fluent, Google and Material Design file things under a category: weather-sunny, local-hospital.
_CATEGORIES = _words("weather local vehicle food animal directions device wb outlined")
_BRAND_WORDS = _words(
    "logo social google microsoft apple adobe amazon aws facebook alipay wechat bing ie android "
    "office outlook onenote onedrive sharepoint xbox nintendo netflix evernote wikipedia visa "
    "taobao qq baidu zhihu douban dingding gatsby netease mastercard bluetooth ubuntu tux "
    "freebsd hangouts skype teams yammer cortana azure powershell python typescript javascript "
    "anthropic claude openai nvidia perplexity"
)
# Names of brands that are everyday words too.
_NOT_BRANDS = _words(
    "line usb hive mix glide fly rev medium octopus unity swift less pix shoelace threads mint "
    "square box bots signal safari stack ideal empire rebel superpowers optin resolving"
)


def _package_folder(font: Font) -> Path:
    try:
        spec = importlib.util.find_spec(font.package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        extra = "demo" if font in UNSEEN_FONTS else "pretrain"
        raise VlfastError(
            f"the icon font {font.family} is not installed (package {font.distribution}): "
            f'pip install "vlfast[{extra}]"'
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _file(font: Font, pattern: str) -> Path:
    found = sorted(_package_folder(font).glob(pattern))
    if not found:
        raise VlfastError(
            f"{font.distribution} {installed_version(font)} has no file {pattern}: expected the "
            f'version that pip install "vlfast[demo]" gives'
        )
    return found[-1]


def installed_version(font: Font) -> str:
    """The version of the package that holds this font, or "unknown"."""
    try:
        return importlib.metadata.version(font.distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _read_names(font: Font) -> dict[str, int]:
    with open(_file(font, font.names), encoding="utf-8") as file:
        names = json.load(file)
    return {name: int(v, 16) if isinstance(v, str) else int(v) for name, v in names.items()}


@lru_cache(maxsize=1)
def _brands() -> frozenset[str]:
    brands = _qtawesome("brands", "fontawesome6-brands-webfont", "filled")
    return frozenset(_read_names(brands)) - _NOT_BRANDS


def _is_brand(drawing: str, words: tuple[str, ...]) -> bool:
    if not _BRAND_WORDS.isdisjoint(words):
        return True
    parts = drawing.split("-")
    return any("-".join(parts[:n]) in _brands() for n in range(1, len(parts) + 1))


def _split_style(font: Font, name: str) -> tuple[str, str]:
    base = name.lower().replace("_", "-").removeprefix(font.prefix)
    for ending, style in font.endings:
        if base.endswith(ending):
            return base.removesuffix(ending), style
    return base, font.style


def human_words(drawing: str) -> tuple[str, ...]:
    """``shopping-cart-2`` as ("shopping", "cart"): without digits, categories such as "weather",
    and words that only tell variants apart."""
    words = [re.sub(r"\d+$", "", word) for word in drawing.split("-")]
    words = [word for word in words if word and word not in _DROPPED_WORDS]
    return tuple(words[1:] if len(words) > 1 and words[0] in _CATEGORIES else words)


@lru_cache(maxsize=4)
def read_glyphs(fonts: tuple[Font, ...]) -> tuple[Glyph, ...]:
    """Every glyph of these fonts once (several names of a glyph: the first in their order), without
    brand logos and names that hold no word. Raises VlfastError if a package is missing,
    saying what to install."""
    glyphs: list[Glyph] = []
    for font in fonts:
        seen: set[int] = set()
        drawn: set[tuple[str, str]] = set()
        # Shorter first: of a drawing in several sizes, as Fluent has them, one is enough.
        for name, codepoint in sorted(_read_names(font).items(), key=lambda e: (len(e[0]), e[0])):
            drawing, style = _split_style(font, name)
            if font.family == "fluent":
                drawing = re.sub(r"-\d+$", "", drawing)
            words = human_words(drawing)
            if (
                codepoint in seen
                or (drawing, style) in drawn
                or (words != ("x",) and not any(len(word) > 1 for word in words))
                or _is_brand(drawing, words)
            ):
                continue
            seen.add(codepoint)
            drawn.add((drawing, style))
            glyphs.append(Glyph(font, name, codepoint, style, drawing, words))
    return tuple(glyphs)


def draw_mask(typeface: ImageFont.FreeTypeFont, codepoint: int) -> np.ndarray:
    """Coverage of a glyph, uint8 [48, 48], its longer side 44 pixels, centred."""
    canvas = Image.new("L", (4 * MASK_SIZE, 4 * MASK_SIZE))
    ImageDraw.Draw(canvas).text((MASK_SIZE, MASK_SIZE), chr(codepoint), fill=255, font=typeface)
    mask = np.zeros((MASK_SIZE, MASK_SIZE), dtype=np.uint8)
    box = canvas.getbbox()
    if box is None:
        return mask
    width, height = box[2] - box[0], box[3] - box[1]
    scale = _DRAWN_SIZE / max(width, height)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    drawn = canvas.resize((width, height), Image.Resampling.LANCZOS, box)
    top, left = (MASK_SIZE - height) // 2, (MASK_SIZE - width) // 2
    mask[top : top + height, left : left + width] = np.asarray(drawn)
    return mask


def _draw_masks(glyphs: Sequence[Glyph]) -> np.ndarray:
    typefaces: dict[Font, ImageFont.FreeTypeFont] = {}
    masks = np.empty((len(glyphs), MASK_SIZE, MASK_SIZE), dtype=np.uint8)
    for row, glyph in enumerate(glyphs):
        if glyph.font not in typefaces:
            path = str(_file(glyph.font, glyph.font.font))
            typefaces[glyph.font] = ImageFont.truetype(path, 2 * MASK_SIZE)
        masks[row] = draw_mask(typefaces[glyph.font], glyph.codepoint)
    return masks


def default_cache_dir() -> Path:
    """$VLFAST_CACHE, or ~/.cache/vlfast."""
    return Path(os.environ.get("VLFAST_CACHE") or Path.home() / ".cache" / "vlfast")


def _read_cached(path: Path, count: int) -> np.ndarray | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            masks = stored["masks"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if masks.shape != (count, MASK_SIZE, MASK_SIZE) or masks.dtype != np.uint8:
        return None
    return masks


def load_masks(
    glyphs: Sequence[Glyph], name: str, cache_dir: str | Path | None = None
) -> np.ndarray:
    """Masks of these glyphs, uint8 [N, 48, 48], drawn at first use and then read from the cache.

    The file's name holds a hash of the glyphs, the versions of their packages and the format, so
    other fonts never meet an old cache; one that can't be read is drawn again.
    """
    versions = sorted((f.distribution, installed_version(f)) for f in {g.font for g in glyphs})
    content = json.dumps([_MASK_FORMAT, versions, [[g.key, g.codepoint] for g in glyphs]])
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    path = folder / "glyphs" / f"{name}-{digest}.npz"
    masks = _read_cached(path, len(glyphs))
    if masks is not None:
        return masks
    masks = _draw_masks(glyphs)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, masks=masks)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return masks
