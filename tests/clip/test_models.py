"""Loading models: names, files, and every way a file can be wrong."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tests.clip import support
from vlfast.clip.models import load_clip, model_names, wrap_clip
from vlfast.clip.words import check_vocabulary, nearest_words
from vlfast.errors import UnknownNameError, VlfastError

ARCHITECTURE = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 64,
        "heads": 1,
        "layers": 2,
    },
}


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    """A small architecture that open_clip knows by the name "test-tiny"."""
    path = tmp_path_factory.mktemp("configs") / "test-tiny.json"
    path.write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    return open_clip.model.CLIP(**ARCHITECTURE).eval()


@pytest.fixture(scope="module")
def jit_archive(tmp_path_factory):
    """A TorchScript archive with OpenAI's layout of weights, which are fp16 there."""
    torch.manual_seed(1)
    model = open_clip.model.CLIP(**ARCHITECTURE, quick_gelu=True).eval().requires_grad_(False)
    open_clip.model.convert_weights_to_fp16(model)
    model.float()
    path = tmp_path_factory.mktemp("archives") / "ViT-tiny.pt"
    inputs = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.int64))
    torch.jit.trace(model, inputs, check_trace=False).save(str(path))
    return path, model


def same_features(model, clip):
    image = torch.rand(2, 3, 32, 32)
    text = open_clip.tokenize(["a cat", "a yellow school bus"])
    torch.testing.assert_close(clip.model.encode_image(image), model.encode_image(image).detach())
    torch.testing.assert_close(clip.model.encode_text(text), model.encode_text(text).detach())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_local_weights(architecture, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    state = architecture.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    clip = load_clip("test-tiny", str(path))
    same_features(architecture, clip)
    assert not any(p.requires_grad for p in clip.model.parameters())
    assert not clip.model.training
    assert clip.pretrained == str(path.absolute())
    assert clip.image_size == 32 and bool(clip.known_tokens.all())


def test_openai_archive_by_path_and_by_name(jit_archive):
    path, model = jit_archive
    same_features(model, load_clip(str(path)))
    same_features(model, load_clip("test-tiny", str(path)))


def test_openai_archive_of_another_architecture(jit_archive):
    path, _ = jit_archive
    with pytest.raises(VlfastError, match="another architecture than ViT-B-32"):
        load_clip("ViT-B-32", str(path))


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown model 'ViT-B-33'.*'ViT-B-32'"):
        load_clip("ViT-B-33", "openai")
    with pytest.raises(UnknownNameError, match="did you mean 'glyphs-student'"):
        load_clip("glyph-student")


def test_unknown_tag_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown pretrained tag of ViT-B-32.*'openai'"):
        load_clip("ViT-B-32", "openia")


def test_weights_must_be_asked_for():
    with pytest.raises(VlfastError, match="needs weights: a tag"):
        load_clip("ViT-B-32")


def test_bundled_models_take_no_weights():
    with pytest.raises(VlfastError, match="ships with its weights"):
        load_clip("glyphs-student", "openai")


@pytest.mark.parametrize("name", ["missing.pt", "folder/missing.safetensors"])
def test_missing_file(architecture, name):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_clip("test-tiny", name)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_clip(name)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_file(architecture, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    state = architecture.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(VlfastError, match="does not hold weights of test-tiny"):
        load_clip("test-tiny", str(path))


def test_file_that_is_no_checkpoint(architecture, tmp_path):
    path = tmp_path / "notes.pt"
    path.write_text("not weights at all")
    with pytest.raises(VlfastError, match="does not hold weights"):
        load_clip("test-tiny", str(path))
    with pytest.raises(VlfastError, match="not an OpenAI CLIP archive"):
        load_clip(str(path))


class Intruder:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_pickled_objects_are_not_run(architecture, tmp_path, capsys):
    path = tmp_path / "intruder.pt"
    torch.save({"state_dict": Intruder()}, path)
    with pytest.raises(VlfastError, match="does not hold weights"):
        load_clip("test-tiny", str(path))
    assert "unpickled" not in capsys.readouterr().out


def test_wrapping_freezes_and_normalises(tiny_model):
    clip = wrap_clip(tiny_model, name="mine")
    features = clip.encode_images(torch.rand(3, 3, 32, 32))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert not features.requires_grad
    assert clip.logit_scale.shape == ()


def test_half_precision_models_take_the_same_images(tiny_model):
    import copy

    clip = wrap_clip(copy.deepcopy(tiny_model).to(torch.bfloat16))
    images = torch.rand(3, 3, 32, 32)
    ours, theirs = clip.encode_images(images), wrap_clip(tiny_model).encode_images(images)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0)


def test_another_vocabulary_is_refused():
    model = open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg=ARCHITECTURE["vision_cfg"],
        text_cfg={**ARCHITECTURE["text_cfg"], "vocab_size": 1000},
    )
    with pytest.raises(ValueError, match="1000 tokens"):
        wrap_clip(model)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """An architecture by the name "test-siglip", whose tokenizer lies in a folder."""
    folder = tmp_path_factory.mktemp("configs")
    tokenizer = support.t5_tokenizer(folder / "tokenizer")
    text = {"context_length": 24, "vocab_size": 64, "width": 64, "heads": 1, "layers": 2}
    text |= {"hf_tokenizer_name": str(folder / "tokenizer"), "proj_bias": True}
    text |= {"no_causal_mask": True, "pool_type": "last"}
    config = {**ARCHITECTURE, "text_cfg": text, "custom_text": True}
    for name, changes in {"test-siglip": {}, "test-lost": {"hf_tokenizer_name": "/lost"}}.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**config, "text_cfg": {**text, **changes}}))
        open_clip.add_model_config(path)
    torch.manual_seed(0)
    weights = folder / "weights.safetensors"
    save_file(open_clip.create_model("test-siglip").state_dict(), weights)
    return weights, tokenizer


def test_a_model_of_open_clip_comes_with_its_tokenizer(siglip):
    weights, tokenizer = siglip
    clip = load_clip("test-siglip", str(weights))
    assert clip.tokenizer.sot_token_id is None and clip.tokenizer.eot_token_id == 1
    assert clip.tokenizer.decode(clip.tokenizer.encode("a photo of a cat")) == "a photo of a cat"
    # 64 rows, but fewer tokens: the last rows were never trained.
    assert 3 < int(clip.known_tokens.sum()) == len(tokenizer.tokenizer) < 64
    assert clip.unknown_words("a cat") == []
    assert nearest_words(clip, clip.text_tower.embed_words("photo"), 1)[0][0][0] == "photo"


def test_a_tokenizer_that_is_not_there(siglip):
    with pytest.raises(VlfastError, match="could not get the tokenizer of test-lost"):
        load_clip("test-lost", str(siglip[0]))


def test_wrapping_takes_a_tokenizer(siglip):
    weights, tokenizer = siglip
    model = load_clip("test-siglip", str(weights)).model
    for given in (tokenizer, tokenizer.tokenizer):
        assert wrap_clip(model, tokenizer=given).tokenizer.eot_token_id == 1
    with pytest.raises(ValueError, match="64 tokens, but CLIP's tokenizer has 49408"):
        wrap_clip(model)
    small = support.custom_clip(vocab_size=30)
    with pytest.raises(ValueError, match="30 tokens, but this tokenizer has"):
        wrap_clip(small, tokenizer=tokenizer)
    large = support.custom_clip(vocab_size=49500)
    with pytest.raises(ValueError, match="49500 tokens, but CLIP's tokenizer has 49408"):
        wrap_clip(large)


def test_names_begin_with_ours():
    assert set(model_names()[:2]) == {"glyphs-teacher", "glyphs-student"}


def test_nearest_word_of_a_words_own_embedding(tiny_clip):
    vectors = tiny_clip.text_tower.embed_words("photo cat")
    nearest = nearest_words(tiny_clip, vectors, count=2)
    assert [words[0][0] for words in nearest] == ["photo", "cat"]
    assert nearest[0][0][1] == pytest.approx(0.0, abs=1e-4)
    assert nearest[0][1][1] > 0.01


def test_small_distances_to_words_are_exact_among_many(tiny_clip):
    """CoOp's first epochs move a context by little."""
    vectors = tiny_clip.text_tower.embed_words("photo cat").repeat(20, 1)
    moved = vectors + 1e-5
    of_own = [words[0][1] for words in nearest_words(tiny_clip, vectors, count=1)]
    of_moved = [words[0][1] for words in nearest_words(tiny_clip, moved, count=1)]
    assert of_own == [0.0] * 40
    assert of_moved == pytest.approx((moved - vectors).norm(dim=1).tolist(), rel=1e-5)


def test_unknown_words_are_warned_of(tiny_model):
    known = torch.ones(49408, dtype=torch.bool)
    clip = wrap_clip(tiny_model, name="partial", known_tokens=known)
    known[torch.tensor(clip.tokenizer.encode("zebra"))] = False
    assert clip.unknown_words("a zebra") == ["zebra"]
    with pytest.warns(UserWarning, match="partial never trained the words of 'a zebra'"):
        assert check_vocabulary(clip, ["a cat", "a zebra"], "classnames") == ["a zebra"]


def test_openais_own_class_is_wrapped():
    """Its image towers know their size, and nothing else of the images."""

    class ImageTower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.input_resolution = 32
            self.conv1 = torch.nn.Conv2d(3, 16, 32)

        def forward(self, images):
            return self.conv1(images)[:, :, 0, 0]

    model = support.OpenAIClip()
    model.visual = ImageTower()
    model.encode_image = model.visual.forward
    clip = wrap_clip(model)
    assert clip.image_size == 32 and clip.mean == open_clip.OPENAI_DATASET_MEAN
    features = clip.encode_images(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    assert clip.text_tower.explain().startswith("packed")
