"""The published numbers are those of the papers, and agree with each other as the papers say."""

from __future__ import annotations

import pytest

from vlfast.data.coop.layouts import ELEVEN, IMAGENET_DOMAINS
from vlfast.report.published import PUBLISHED, backbone_of, published_for


def one(protocol, method, model="ViT-B-16", variant=""):
    (found,) = [p for p in published_for(protocol, method, model) if variant in p.variant]
    return found


def test_spot_checks():
    assert one("base-to-new", "zeroshot").average == (69.34, 74.22, 71.70)
    assert one("base-to-new", "coop", variant="200").average == (82.69, 63.22, 71.66)
    assert one("base-to-new", "coop", variant="rerun").average == (82.63, 67.99, 74.60)
    assert one("base-to-new", "promptkd").average[2] == 83.73
    assert one("base-to-new", "mopd").average == (None, None, 77.90)
    assert one("base-to-new", "maple").values["dtd"] == (80.36, 59.18, 68.16)
    assert one("base-to-new", "promptsrc", "ViT-L-14").values["eurosat"] == (94.79, 83.15, 88.59)
    assert one("base-to-new", "kdpl-coupled", "ViT-B-32").average == (None, 71.41, None)
    assert one("cross-dataset", "promptkd").average == (71.33,)
    assert one("cross-dataset", "cocoop").values["eurosat"] == (45.37,)
    assert one("cross-dataset", "promptsrc", "ViT-L-14").values["imagenet"] == (78.12,)
    assert one("domain-generalization", "maple").values["imagenet_a"] == (50.90,)
    kdpl = one("domain-generalization", "kdpl-ca", "RN50")
    assert kdpl.values["imagenet"] == (61.83,)
    assert kdpl.average == (43.02,)
    of_src = one("domain-generalization", "promptsrc-teacher+self_regulation", "ViT-B-32")
    assert of_src.values["imagenet_r"] == (68.83,)


# As printed; the harmonic means of the two beside them are 83.08 and 85.83.
PRINTED_OTHERWISE = {
    ("promptkd", "stanford_cars"): (82.80, 83.37, 83.13),
    ("promptkd", "ucf101"): (89.71, 82.27, 86.10),
}


def test_harmonic_means_are_of_their_base_and_new():
    seen = 0
    for published in PUBLISHED:
        if published.protocol != "base-to-new":
            continue
        for dataset, values in [*published.values.items(), ("average", published.average)]:
            if values is None or None in values:
                continue
            if (published.method, dataset) in PRINTED_OTHERWISE:
                assert values == PRINTED_OTHERWISE[published.method, dataset]
                continue
            base, new, printed = values
            # Each of the three is rounded to two decimals.
            assert printed == pytest.approx(2 / (1 / base + 1 / new), abs=0.0151)
            seen += 1
    assert seen > 80


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: f"{p.protocol}-{p.method}")
def test_averages_are_of_the_datasets(published):
    """Where all of an average's datasets were printed."""
    names = {
        "base-to-new": ELEVEN,
        "cross-dataset": ELEVEN[1:],
        "domain-generalization": IMAGENET_DOMAINS,
    }[published.protocol]
    assert published.source
    assert set(published.values) <= {*ELEVEN, *IMAGENET_DOMAINS}
    if published.average is None or any(name not in published.values for name in names):
        return
    for place, average in enumerate(published.average[:2]):
        mean = sum(published.values[name][place] for name in names) / len(names)
        assert average == pytest.approx(mean, abs=0.0101)


@pytest.mark.parametrize(
    ("model", "backbone"),
    [
        ("ViT-B-16", "ViT-B/16"),
        ("ViT-B-16-quickgelu (openai)", "ViT-B/16"),
        ("RN50 (openai)", "RN50"),
        ("glyphs-student", None),
        ("ViT-B-16-plus-240", None),
    ],
)
def test_backbones(model, backbone):
    assert backbone_of(model) == backbone


def test_the_models_own_backbone_comes_first():
    assert [p.backbone for p in published_for("domain-generalization", "coop", "RN50")] == ["RN50"]
    other = published_for("domain-generalization", "coop", "glyphs-student")
    assert [p.backbone for p in other] == ["ViT-B/16"]
    assert [p.backbone for p in published_for("cross-dataset", "kdpl", "ViT-B-16")] == [None]
    assert published_for("few-shot", "coop", "ViT-B-16") == []
    # A model without a known backbone is not one whose backbone was not printed.
    other = published_for("cross-dataset", "coop", "glyphs-student")
    assert [p.backbone for p in other] == ["ViT-B/16"]
