"""The texts that hard prompts put class names into: one a dataset, or a pool of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlfast.errors import VlfastError

# [CoOp] trainers/zsclip.py:13-29. KDPL's teacher has the same ones.
TEMPLATES = {
    "imagenet": "a photo of a {}.",
    "caltech101": "a photo of a {}.",
    "oxfordpets": "a photo of a {}, a type of pet.",
    "stanfordcars": "a photo of a {}.",
    "oxfordflowers": "a photo of a {}, a type of flower.",
    "food101": "a photo of {}, a type of food.",
    "fgvcaircraft": "a photo of a {}, a type of aircraft.",
    "sun397": "a photo of a {}.",
    "describabletextures": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a person doing {}.",
    "imagenetv2": "a photo of a {}.",
    "imagenetsketch": "a photo of a {}.",
    "imageneta": "a photo of a {}.",
    "imagenetr": "a photo of a {}.",
}

# Where a method has a template of its own: [Kg] trainers/kgcoop.py:37-54, trainers/prograd.py.
_OF_KGCOOP = {"describabletextures": "a photo of a {}, a type of texture."}
_OF_PROGRAD = {
    "oxfordpets": "a type of pet, a photo of a {}.",
    "oxfordflowers": "a type of flower, a photo of a {}.",
    "fgvcaircraft": "a type of aircraft, a photo of a {}.",
    "describabletextures": "a texture of {}.",
    "food101": "a type of food, a photo of {}.",
}

# MoPD's pools ([MoPD] trainers/mopd_templates.py) cross three nouns, NOUN, with the dataset's own
# form and three that put the name behind a verb.
_NOUNS = ("a photo", "a picture", "an image")
_VERBS = ("classified as", "categorized as", "labeled as")
_MOPD_FORMS = {
    "oxfordpets": ("NOUN of a {}, a type of pet.", "NOUN of a pet"),
    "oxfordflowers": ("NOUN of a {}, a type of flower.", "NOUN of a flower"),
    "fgvcaircraft": ("NOUN of a {}, a type of aircraft.", "NOUN of a aircraft"),
    "describabletextures": ("NOUN of {}, a type of texture.", "NOUN of a texture"),
    "food101": ("NOUN of {}, a type of food.", "NOUN of food"),
    "ucf101": ("NOUN of a person doing {}.", "NOUN of a person doing"),
    "eurosat": ("NOUN of {}.", "NOUN"),
}
_SATELLITE_NOUNS = tuple(f"a centered satellite {n}" for n in ("photo", "picture", "image"))

# The bundled models know few words, no verb of MoPD's among them.
_GLYPH_NOUNS = ("an icon", "a picture", "a drawing")
_GLYPH_FORMS = ("NOUN of a {}.", "NOUN of the {}.", "NOUN of one {}.", "this is NOUN of a {}.")

# 36: how it looks crossed with what it is.
_LOOKS = ("a", "a small", "a large", "a dark", "a blurry", "a clean")
_KINDS = ("photo", "picture", "drawing", "sketch", "painting", "sign")
VARIED = tuple(f"{look} {kind} of a {{}}." for kind in _KINDS for look in _LOOKS)

# 12 that say nothing of the picture, to test how well a gate leaves them out.
NOISY = (
    "the train to {} leaves at noon.",
    "nobody in the kitchen had heard of a {}.",
    "seven songs about the colour of a {}.",
    "it rained on the {} for a week.",
    "my neighbour sold a {} by telephone.",
    "the second chapter forgets the {}.",
    "a {} can not be divided by three.",
    "she whistled while the {} was asleep.",
    "please return the {} to the library.",
    "an argument about the price of a {}.",
    "the {} lost the match in extra time.",
    "behind the curtain a {} counts to ten.",
)

# The 60 whose mean is PromptSRC's fixed text feature ([SRC] trainers/imagenet_templates.py, a
# selection of CLIP's): the noun phrase that stands around the name.
_A_AND_THE = (
    "a bad photo of",
    "a low resolution photo of",
    "a rendering of",
    "a cropped photo of",
    "a bright photo of",
    "a close-up photo of",
    "a painting of",
    "a pixelated photo of",
    "a sculpture of",
    "a blurry photo of",
    "a photo of",
    "a doodle of",
    "a sketch of",
    "a rendition of",
)
_A = (
    "graffiti of a {}.",
    "a tattoo of a {}.",
    "a drawing of a {}.",
    "art of a {}.",
    "a photo of a hard to see {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a photo of a large {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a jpeg corrupted photo of a {}.",
    "a {} in a video game.",
    "a plastic {}.",
    "a origami {}.",
    "a embroidered {}.",
    "a cartoon {}.",
)
_THE = (
    "a dark photo of the {}.",
    "a good photo of the {}.",
    "a black and white photo of the {}.",
    "a photo of the hard to see {}.",
    "a photo of the cool {}.",
    "a photo of the dirty {}.",
    "a photo of the clean {}.",
    "the embroidered {}.",
    "the plastic {}.",
    "the origami {}.",
    "the toy {}.",
    "the {} in a video game.",
    "itap of the {}.",
)
_OTHER = ("a photo of many {}.", "a photo of my {}.", "a photo of one {}.")
IMAGENET_60 = (
    *(f"{phrase} {article} {{}}." for phrase in _A_AND_THE for article in ("a", "the")),
    *_A,
    *_THE,
    *_OTHER,
)

POOLS = ("dataset", "varied", "noisy", "imagenet")


def dataset_key(dataset: str) -> str:
    """A dataset's name as the tables of methods have it: "oxfordpets" for "OxfordPets" and
    "oxford_pets"."""
    key = "".join(sign for sign in dataset.lower() if sign.isalnum())
    return "describabletextures" if key == "dtd" else key


def own_template(dataset: str, default: str) -> str:
    """The dataset's template for zero-shot CLIP; ``default`` where there is none."""
    return TEMPLATES.get(dataset_key(dataset), default)


def kgcoop_template(dataset: str, default: str) -> str:
    """What KgCoOp's frozen class features have; ``default`` for what it was not tried on."""
    return _OF_KGCOOP.get(dataset_key(dataset), own_template(dataset, default))


def prograd_template(dataset: str, default: str) -> str:
    """What ProGrad's zero-shot CLIP has, and its context starts from."""
    return _OF_PROGRAD.get(dataset_key(dataset), own_template(dataset, default))


def template_pool(pool: str, dataset: str, template: str) -> tuple[str, ...]:
    """The templates of a pool by its name, or of a file.

    "dataset": MoPD's 12 for its datasets, 12 made in their way for others, from ``template``, the
    dataset's own, which comes first. "varied": 36 of different looks and kinds. "noisy": 12 that
    have nothing to do with images. "imagenet": PromptSRC's 60. Anything else is the path of a file,
    see ``read_templates``.
    """
    if pool == "dataset":
        return _dataset_pool(dataset, template)
    named = {"varied": VARIED, "noisy": NOISY, "imagenet": IMAGENET_60}
    return named[pool] if pool in named else read_templates(pool)


def read_templates(path: str | Path) -> tuple[str, ...]:
    """A file with one template a line, each with one ``{}``; blank lines are left out.

    Raises FileNotFoundError for a missing file, VlfastError for a line that is no template, naming
    it, and for a file without any.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"templates: there is no file {path}, and no pool of that name: {', '.join(POOLS)}"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise VlfastError(f"templates: {path} is not UTF-8 ({error})") from error
    templates = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        check_template(line.strip(), f"templates: line {number} of {path}")
        templates.append(line.strip())
    if not templates:
        raise VlfastError(f"templates: {path} holds no template")
    return tuple(templates)


def check_template(template: str, what: str) -> None:
    """Raise VlfastError unless it has one ``{}`` and no other brace."""
    if template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
        raise VlfastError(f"{what}: expected exactly one {{}}, got {template!r}")


def _dataset_pool(dataset: str, template: str) -> tuple[str, ...]:
    key = dataset_key(dataset)
    if dataset.startswith("glyphs/"):
        crossed = _cross(_GLYPH_FORMS, _GLYPH_NOUNS)
        return tuple(dict.fromkeys((template, *crossed)))[: len(crossed)]
    nouns = _SATELLITE_NOUNS if key == "eurosat" else _NOUNS
    if key in _MOPD_FORMS:
        own, stem = _MOPD_FORMS[key]
        return _cross((own, *(f"{stem}, {verb} {{}}." for verb in _VERBS)), nouns)
    verbs = _cross([f"NOUN, {verb} {{}}." for verb in _VERBS], nouns)
    noun = next((n for n in _NOUNS if n in template), None)
    form = "NOUN of a {}." if noun is None else template.replace(noun, "NOUN", 1)
    # The dataset's own words first, also where they are not one of the nouns'.
    of_nouns = _cross([form], [noun, *(n for n in _NOUNS if n != noun)] if noun else _NOUNS[1:])
    return (*(of_nouns if noun else (template, *of_nouns)), *verbs)


def _cross(forms: Sequence[str], nouns: Sequence[str]) -> tuple[str, ...]:
    return tuple(form.replace("NOUN", noun) for form in forms for noun in nouns)
