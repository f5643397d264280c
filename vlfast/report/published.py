"""Numbers that papers and their authors' repositories print, each with its source.

Means over three seeds. Nothing here is computed: where a published harmonic mean is not that of its
base and new, it stands as it was printed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vlfast.data.coop.layouts import ELEVEN, IMAGENET_DOMAINS

B16, B32, L14, H14, RN50 = "ViT-B/16", "ViT-B/32", "ViT-L/14", "ViT-H/14", "RN50"

MAPLE = "muzairkhattak/multimodal-prompt-learning README.md"
PROMPTSRC = "muzairkhattak/PromptSRC README.md"
PROMPTKD = "zhengli97/PromptKD images/exp_results.png (PromptKD, arXiv 2403.02781)"
PROMPTKD_CROSS = "zhengli97/PromptKD images/exp_results2.png"
PROMPTKD_TABLE = "PromptKD, arXiv 2403.02781, table {}"
KGCOOP = "htyao89/KgCoOp readme.md"
MOPD = "MoPD, arXiv 2412.19087"
KDPL_SLIDES = "KDPL (arXiv 2407.03056), the authors' slides, page 5"
KDPL_POSTER = "KDPL (arXiv 2407.03056), the authors' poster"

# What a value is of: (base, new, harmonic mean) of base-to-new, (accuracy,) elsewhere; None where
# it was not printed.
Values = tuple[float | None, ...]


@dataclass(frozen=True)
class Published:
    """One method's numbers in one table.

    method: as runs of it are named here (``vlfast.run.method_name``). backbone: None where it was
    not printed. variant: what tells it from others of the same method. values: by dataset.
    average: of the eleven, the ten targets or the four domains. about: what else a reader must
    know.
    """

    protocol: str
    method: str
    backbone: str | None
    source: str
    values: Mapping[str, Values]
    average: Values | None = None
    variant: str = ""
    about: str = ""

    @property
    def shots(self) -> str:
        """Images a class that it learned from."""
        return {"zeroshot": "none", "promptkd": "all"}.get(self.method, "16")


def published_for(protocol: str, method: str, model: str) -> list[Published]:
    """What was published of a method: with the model's backbone if there is any, else with
    ViT-B/16, else with what there is, which may be of a backbone that was not printed."""
    found = [p for p in PUBLISHED if p.protocol == protocol and p.method == method]
    for backbone in (backbone_of(model), B16):
        same = [p for p in found if p.backbone == backbone and backbone is not None]
        if same:
            return same
    return found


def backbone_of(model: str) -> str | None:
    """ "ViT-B/16" for open_clip's "ViT-B-16" and "ViT-B-16-quickgelu"; None for other models."""
    name = re.sub(r"-quickgelu$", "", model.partition(" ")[0])
    known = {"ViT-B-16": B16, "ViT-B-32": B32, "ViT-L-14": L14, "ViT-H-14": H14, "RN50": RN50}
    return known.get(name)


_TRANSDUCTIVE = "learned from unlabelled images of each target"

# Base, new and harmonic mean on each of the eleven.
_BASE_TO_NEW = {
    "imagenet": """72.43/68.14/70.22 76.47/67.88/71.92 75.98/70.43/73.10
        76.66/70.54/73.47 77.60/70.73/74.01 80.83/74.66/77.62""",
    "caltech101": """96.84/94.00/95.40 98.00/89.81/93.73 97.96/93.81/95.84
        97.74/94.36/96.02 98.10/94.03/96.02 98.91/96.65/97.77""",
    "oxford_pets": """91.17/97.26/94.12 93.67/95.29/94.47 95.20/97.69/96.43
        95.43/97.76/96.58 95.33/97.30/96.30 96.30/98.01/97.15""",
    "stanford_cars": """63.37/74.89/68.65 78.12/60.40/68.13 70.49/73.59/72.01
        72.94/74.00/73.47 78.27/74.97/76.58 82.80/83.37/83.13""",
    "oxford_flowers": """72.08/77.80/74.83 97.60/59.67/74.06 94.87/71.75/81.71
        95.92/72.46/82.56 98.07/76.50/85.95 99.42/82.62/90.24""",
    "food101": """90.10/91.22/90.66 88.33/82.26/85.19 90.70/91.29/90.99
        90.71/92.05/91.38 90.67/91.53/91.10 92.43/93.68/93.05""",
    "fgvc_aircraft": """27.19/36.29/31.09 40.44/22.30/28.75 33.41/23.71/27.74
        37.44/35.61/36.50 42.73/37.87/40.15 49.12/41.81/45.17""",
    "sun397": """69.36/75.35/72.23 80.60/65.89/72.51 79.74/76.86/78.27
        80.82/78.70/79.75 82.67/78.47/80.52 83.69/81.54/82.60""",
    "dtd": """53.24/59.90/56.37 79.44/41.18/54.24 77.01/56.00/64.85
        80.36/59.18/68.16 83.37/62.97/71.75 85.84/71.37/77.94""",
    "eurosat": """56.48/64.05/60.03 92.19/54.74/68.69 87.49/60.04/71.21
        94.07/73.23/82.35 92.90/73.90/82.32 97.54/82.08/89.14""",
    "ucf101": """70.53/77.50/73.85 84.69/56.05/67.46 82.33/73.45/77.64
        83.00/78.66/80.77 87.10/78.80/82.74 89.71/82.27/86.10""",
}
_COLUMNS = ("zeroshot", "coop", "cocoop", "maple", "promptsrc", "promptkd")

# PromptSRC on ViT-L/14, PromptKD's teacher.
_L14_BASE_TO_NEW = """83.24/76.83/79.91 98.71/98.03/98.37 96.86/98.82/97.83 84.53/84.25/84.39
    99.05/82.60/90.08 94.56/95.15/94.85 54.44/43.07/48.09 84.97/81.09/82.98 85.76/70.65/77.48
    94.79/83.15/88.59 89.50/82.26/85.73"""

# Caltech101 to UCF101, and their average.
_CROSS = {
    "coop": "93.70 89.14 64.51 68.71 85.30 18.47 64.15 41.92 46.39 66.55 63.88",
    "cocoop": "94.43 90.14 65.32 71.88 86.06 22.94 67.36 45.73 45.37 68.21 65.74",
    "maple": "93.53 90.49 65.57 72.23 86.20 24.74 67.01 46.49 48.06 68.69 66.30",
    "promptsrc": "93.60 90.25 65.70 70.25 86.15 23.90 67.10 46.87 45.50 68.75 65.81",
    "promptkd": "93.61 91.59 73.93 75.33 88.84 26.24 68.57 55.08 63.74 76.39 71.33",
}
_L14_CROSS = "95.61 94.19 77.70 77.54 91.59 31.29 70.86 56.32 47.55 76.20 71.89"

# ImageNetV2, -Sketch, -A, -R, and their average.
_DOMAINS = {
    "zeroshot": "60.83 46.15 47.77 73.96 57.18",
    "coop": "64.20 47.99 49.71 75.21 59.28",
    "cocoop": "64.07 48.75 50.63 76.18 59.91",
    "maple": "64.07 49.15 50.90 76.98 60.27",
    "promptsrc": "64.35 49.55 50.90 77.80 60.65",
    "promptkd": "69.77 58.72 70.36 87.01 71.47",
}

# KDPL's: ImageNet first. The class-agnostic rows are from the poster.
_KDPL_DOMAINS = {
    RN50: {
        "zeroshot": "58.20 51.50 33.30 21.70 56.00 40.63",
        "coop": "62.40 55.17 33.70 23.13 56.20 42.05",
        "kdpl": "62.73 55.37 35.20 23.27 57.77 42.90",
        "kdpl-ca": "61.83 54.27 35.20 23.50 59.10 43.02",
        "cocoop": "63.07 55.53 34.77 23.73 59.47 43.38",
        "kdpl-conditional": "62.70 55.60 35.30 23.43 57.90 43.06",
        "kdpl-ca-conditional": "61.43 54.53 35.33 23.77 59.10 43.18",
    },
    B32: {
        "zeroshot": "62.00 54.70 40.80 29.60 66.00 47.78",
        "coop": "66.33 58.30 41.40 31.47 65.87 49.26",
        "kdpl": "65.97 58.10 42.50 31.63 67.37 49.90",
        "kdpl-ca": "64.73 56.93 42.27 31.47 67.83 49.63",
        "vpt": "64.97 56.73 41.27 27.00 66.50 47.88",
        "kdpl-visual": "65.10 57.37 41.67 27.77 67.47 48.57",
        "kdpl-ca-visual": "63.73 55.83 41.10 27.33 67.30 47.89",
        "maple": "66.80 58.53 42.23 30.13 66.40 49.32",
        "kdpl-coupled": "66.50 58.47 42.77 29.87 67.70 49.70",
        "kdpl-ca-coupled": "65.23 57.43 42.07 30.00 67.63 49.28",
        "promptsrc": "66.33 58.70 42.97 32.07 68.93 50.67",
        "promptsrc-teacher+self_regulation": "66.27 58.60 43.07 31.70 68.83 50.55",
    },
    H14: {"zeroshot": "82.80 76.60 71.10 71.10 91.30 77.53"},
}

# KDPL's poster prints no backbone for these; ("average" is that of the ten targets).
_KDPL_CROSS = {
    "zeroshot": "oxford_pets 83.70 oxford_flowers 61.00 eurosat 24.20 sun397 58.50 "
    "fgvc_aircraft 15.60 caltech101 86.00 stanford_cars 55.60 average 55.81",
    "coop": "oxford_pets 84.60 oxford_flowers 61.63 eurosat 22.33 fgvc_aircraft 13.77 dtd 36.83 "
    "ucf101 57.73 caltech101 87.67 food101 75.03 stanford_cars 54.20 average 55.28",
    "kdpl": "oxford_pets 87.33 oxford_flowers 62.83 sun397 60.30 dtd 39.27 caltech101 88.57 "
    "food101 77.27 stanford_cars 56.60",
    "kdpl-ca": "oxford_pets 86.37 oxford_flowers 63.47 eurosat 30.33 sun397 61.60 "
    "fgvc_aircraft 14.80 dtd 40.23 ucf101 59.03 average 57.69",
}

# New classes alone, the average of the eleven.
_KDPL_NEW = {
    RN50: {"coop": 60.82, "kdpl": 63.80, "cocoop": 64.39, "kdpl-conditional": 66.80},
    B32: {
        "coop": 64.52,
        "kdpl": 66.35,
        "vpt": 68.02,
        "kdpl-visual": 68.76,
        "maple": 69.79,
        "kdpl-coupled": 71.41,
    },
}


def _base_to_new() -> list[Published]:
    per_dataset: dict[str, dict[str, Values]] = {name: {} for name in _COLUMNS}
    for dataset, text in _BASE_TO_NEW.items():
        for method, triple in zip(_COLUMNS, text.split(), strict=True):
            per_dataset[method][dataset] = _triple(triple)
    of_teacher = dict(zip(ELEVEN, map(_triple, _L14_BASE_TO_NEW.split()), strict=True))

    def row(
        method: str, average: str, source: str, averages_alone: bool = False, **more: str
    ) -> Published:
        values = {} if averages_alone else per_dataset.get(method, {})
        if values and source != PROMPTKD:
            source = f"{source}; datasets: {PROMPTKD}"
        return Published("base-to-new", method, B16, source, values, _triple(average), **more)

    rows = [
        row("zeroshot", "69.34/74.22/71.70", MAPLE),
        row("coop", "82.69/63.22/71.66", MAPLE, variant="200 epochs"),
        row("coop", "82.63/67.99/74.60", KGCOOP, averages_alone=True, variant="KgCoOp's rerun"),
        row("cocoop", "80.47/71.69/75.83", MAPLE),
        row("prograd", "82.48/70.75/76.16", KGCOOP),
        row("kgcoop", "80.73/73.60/77.00", KGCOOP),
        row("vpt", "80.24/73.43/76.68", MAPLE, variant="5 epochs"),
        row("ivlp", "82.15/74.07/77.90", MAPLE, variant="2+2 tokens, 5 epochs"),
        row("ivlp", "84.21/71.79/77.51", PROMPTSRC, variant="4+4 tokens, 20 epochs"),
        row("maple", "82.28/75.14/78.55", MAPLE),
        row("promptsrc", "84.26/76.10/79.97", PROMPTSRC),
        row(
            "promptkd",
            "86.96/80.73/83.73",
            PROMPTKD,
            about="a ViT-L/14 teacher, unlabelled training images of all classes, and the epoch "
            "that is best on the base test images; the HM printed for StanfordCars and UCF101 is "
            "not that of the base and new beside it",
        ),
    ]
    rows.append(
        Published("base-to-new", "mopd", B16, MOPD, {}, (None, None, 77.90), about="HM alone")
    )
    source = PROMPTKD_TABLE.format(10)
    rows.append(Published("base-to-new", "promptsrc", L14, source, of_teacher))
    for backbone, news in _KDPL_NEW.items():
        for method, new in news.items():
            average = (None, new, None)
            about = "new classes alone; from a bar chart"
            if method == "coop":
                about += "; 50 epochs"
            rows.append(
                Published("base-to-new", method, backbone, KDPL_POSTER, {}, average, about=about)
            )
    return rows


def _cross_dataset() -> list[Published]:
    targets = ELEVEN[1:]

    def row(method: str, backbone: str, numbers: str, source: str, **more: str) -> Published:
        *values, average = _numbers(numbers)
        by_target = {target: (x,) for target, x in zip(targets, values, strict=True)}
        if backbone == L14:
            by_target["imagenet"] = (78.12,)
        return Published("cross-dataset", method, backbone, source, by_target, (average,), **more)

    rows = [
        row(
            method,
            B16,
            numbers,
            PROMPTKD_CROSS,
            about=_TRANSDUCTIVE if method == "promptkd" else "",
        )
        for method, numbers in _CROSS.items()
    ]
    rows.append(row("promptsrc", L14, _L14_CROSS, PROMPTKD_TABLE.format(11)))
    for method, text in _KDPL_CROSS.items():
        words = text.split()
        pairs = dict(zip(words[::2], map(float, words[1::2]), strict=True))
        average = pairs.pop("average", None)
        rows.append(
            Published(
                "cross-dataset",
                method,
                None,
                KDPL_POSTER,
                {target: (x,) for target, x in pairs.items()},
                None if average is None else (average,),
                about="from a radar plot; its backbone is not printed",
            )
        )
    return rows


def _domain_generalization() -> list[Published]:
    rows = []
    for method, numbers in _DOMAINS.items():
        *values, average = _numbers(numbers)
        by_target = {t: (x,) for t, x in zip(IMAGENET_DOMAINS, values, strict=True)}
        rows.append(
            Published(
                "domain-generalization",
                method,
                B16,
                PROMPTKD_TABLE.format(9),
                by_target,
                (average,),
                about=_TRANSDUCTIVE if method == "promptkd" else "",
            )
        )
    for backbone, methods in _KDPL_DOMAINS.items():
        for method, numbers in methods.items():
            *values, average = _numbers(numbers)
            names = ("imagenet", *IMAGENET_DOMAINS)
            rows.append(
                Published(
                    "domain-generalization",
                    method,
                    backbone,
                    KDPL_POSTER if method.startswith("kdpl-ca") else KDPL_SLIDES,
                    {name: (x,) for name, x in zip(names, values, strict=True)},
                    (average,),
                    about="50 epochs" if method == "coop" else "",
                )
            )
    return rows


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def _triple(text: str) -> Values:
    base, new, harmonic = (float(word) for word in text.split("/"))
    return base, new, harmonic


PUBLISHED: tuple[Published, ...] = (
    *_base_to_new(),
    *_cross_dataset(),
    *_domain_generalization(),
)
