"""The papers' datasets from CoOp's folders: classes and their order, splits, halves, templates, and
what is said of a folder that is not as it should be."""

import json
import os
import shutil

import pytest
from PIL import Image

from tests.data.coop.folders import (
    CLASSNAMES,
    WNIDS,
    make_coop_folder,
    make_coop_root,
    write_image,
)
from vlfast.clip.tokens import tokenize_names
from vlfast.data.catalog import load_dataset
from vlfast.data.coop.layouts import ELEVEN, IMAGENET_DOMAINS, LAYOUTS
from vlfast.errors import VlfastError

# [CoOp] DATASETS.md and trainers/zsclip.py:13-29, written down again.
FACTS = {
    "imagenet": ("imagenet", "a photo of a {}."),
    "caltech101": ("caltech-101", "a photo of a {}."),
    "oxford_pets": ("oxford_pets", "a photo of a {}, a type of pet."),
    "stanford_cars": ("stanford_cars", "a photo of a {}."),
    "oxford_flowers": ("oxford_flowers", "a photo of a {}, a type of flower."),
    "food101": ("food-101", "a photo of {}, a type of food."),
    "fgvc_aircraft": ("fgvc_aircraft", "a photo of a {}, a type of aircraft."),
    "sun397": ("sun397", "a photo of a {}."),
    "dtd": ("dtd", "{} texture."),
    "eurosat": ("eurosat", "a centered satellite photo of {}."),
    "ucf101": ("ucf101", "a photo of a person doing {}."),
    "imagenetv2": ("imagenetv2", "a photo of a {}."),
    "imagenet_sketch": ("imagenet-sketch", "a photo of a {}."),
    "imagenet_a": ("imagenet-adversarial", "a photo of a {}."),
    "imagenet_r": ("imagenet-rendition", "a photo of a {}."),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_coop_root(tmp_path_factory.mktemp("coop"))


@pytest.fixture
def pets(tmp_path):
    """A folder of pets that a test may break."""
    return make_coop_folder(tmp_path, "oxford_pets")


def refused(root, name="oxford_pets"):
    with pytest.raises(VlfastError) as error:
        load_dataset(name, str(root))
    message = str(error.value)
    assert message.startswith("data.root: ") and "\n" not in message
    return message


@pytest.mark.parametrize("name", LAYOUTS)
def test_classes_template_and_splits(root, name):
    data = load_dataset(name, str(root))
    folder, template = FACTS[name]
    assert LAYOUTS[name].folder == folder and (root / folder).is_dir()
    assert (data.name, data.template, data.classnames) == (name, template, CLASSNAMES[name])
    assert data.context_init == "a photo of a"
    classes = len(CLASSNAMES[name])
    sizes = {part: len(split) for part, split in data.splits().items()}
    train = 0 if name in IMAGENET_DOMAINS else 5 * classes
    val = 0 if name in ("imagenet", *IMAGENET_DOMAINS) else 2 * classes
    assert sizes == {"train": train, "val": val, "test": 3 * classes}
    assert set(data.test.labels.tolist()) == set(range(classes))
    image = data.test.image(0)
    assert image.mode == "RGB" and image.size == (24, 20)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("OxfordPets", "oxford_pets"),
        ("DescribableTextures", "dtd"),
        ("DTD", "dtd"),
        ("FGVCAircraft", "fgvc_aircraft"),
        ("ImageNetA", "imagenet_a"),
    ],
)
def test_titles_are_names_too(root, written, name):
    assert load_dataset(written, str(root)).name == name


@pytest.mark.parametrize("name", sorted(set(ELEVEN) - {"imagenet", "fgvc_aircraft"}))
def test_images_stand_in_the_split_files_order(root, name):
    layout = LAYOUTS[name]
    split = json.loads((root / layout.folder / layout.split_file).read_text())
    data = load_dataset(name, str(root))
    for part, rows in split.items():
        found = data.splits()[part]
        images = f"{layout.images}/" if layout.images else ""
        assert found.image_keys() == [images + path for path, _, _ in rows]
        assert found.labels.tolist() == [label for _, label, _ in rows]
        assert [data.classnames[label] for label in found.labels] == [row[2] for row in rows]


def test_halves_are_the_first_and_the_last_classes(root):
    data = load_dataset("ucf101", str(root))
    base, new = data.restrict("base"), data.restrict("new")
    assert base.classnames == ("Apply_Eye_Makeup", "Apply_Lipstick", "Archery")
    assert new.classnames == ("Baby_Crawling", "Yo_Yo")
    assert set(new.test.labels.tolist()) == {0, 1}
    assert all("Baby_Crawling" in name or "Yo_Yo" in name for name in new.test.image_keys())


def test_underscores_stay_in_names_and_are_spaces_in_prompts(root, tiny_clip):
    names = load_dataset("food101", str(root)).classnames
    assert names[0] == "apple_pie"
    tokenize = tiny_clip.tokenizer
    kept = tokenize_names(tokenize, names[:1], "a photo of a {name}.")
    spaced = tokenize_names(tokenize, ["apple pie"], "a photo of a {name}.")
    assert kept.suffix.tolist() == spaced.suffix.tolist()


def test_aircraft_names_keep_their_signs(root):
    data = load_dataset("fgvc_aircraft", str(root))
    lines = (root / "fgvc_aircraft/images_variant_val.txt").read_text().splitlines()
    image, _, variant = lines[3].partition(" ")
    assert variant == "F/A-18"
    assert data.val.image_keys()[3] == f"images/{image}.jpg"
    assert data.classnames[data.val.labels[3]] == variant


def test_imagenets_validation_images_are_the_test_split(root):
    data = load_dataset("imagenet", str(root))
    assert data.classnames[4:] == ("sunglasses", "sunglasses")
    assert data.test.image_keys()[0] == "images/val/n01440764/ILSVRC2012_val_00000001.JPEG"
    assert all(name.startswith("images/train/n") for name in data.train.image_keys())
    assert data.train.image_keys() == sorted(data.train.image_keys())


def test_labels_of_a_and_r_are_places_among_the_folders_present(root):
    data = load_dataset("imagenet_a", str(root))
    assert data.classnames == ("stingray", "sunglasses")
    by_label = {
        label: name for name, label in zip(data.test.image_keys(), data.test.labels, strict=True)
    }
    assert "/n01498041/" in by_label[0] and "/n04355933/" in by_label[1]


def test_folders_of_v2_are_numbers(tmp_path):
    """Folder 10 is the eleventh class, not the third."""
    folder = tmp_path / "imagenetv2"
    lines = "".join(f"n{i:08d} class {i}\n" for i in range(12))
    for i in range(12):
        write_image(folder / f"imagenetv2-matched-frequency-format-val/{i}/ab{i}.jpeg")
    (folder / "classnames.txt").write_text(lines)
    data = load_dataset("imagenetv2", str(tmp_path))
    assert data.classnames == tuple(f"class {i}" for i in range(12))
    assert data.test.image_keys()[10].endswith("/10/ab10.jpeg") and data.test.labels[10] == 10
    shutil.rmtree(folder / "imagenetv2-matched-frequency-format-val/7")
    assert "no folder 7; expected 0 to 11" in refused(tmp_path, "imagenetv2")


def test_hidden_and_other_files_are_no_images(tmp_path):
    folder = make_coop_folder(tmp_path, "imagenet") / "images/train/n01440764"
    (folder / ".DS_Store").write_text("")
    (folder / "._n01440764_0.JPEG").write_text("")
    (folder / "notes.txt").write_text("")
    (folder.parent / ".cache").mkdir()
    assert len(load_dataset("imagenet", str(tmp_path)).train) == 30


def test_imagenets_index_is_never_read(tmp_path):
    folder = make_coop_folder(tmp_path, "imagenet")
    (folder / "preprocessed.pkl").write_bytes(b"not a pickle")
    assert len(load_dataset("imagenet", str(tmp_path)).test) == 18


def test_a_home_folder_is_found(tmp_path, pets, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_dataset("oxford_pets", "~").num_classes == 5


def test_a_folder_may_be_a_link(tmp_path, pets):
    (tmp_path / "links").mkdir()
    (tmp_path / "links/oxford_pets").symlink_to(pets)
    assert load_dataset("oxford_pets", str(tmp_path / "links")).num_classes == 5


def test_no_root():
    with pytest.raises(VlfastError, match="data.root: .*needs the folder that holds caltech-101"):
        load_dataset("Caltech101")


def test_no_such_folder(tmp_path):
    message = refused(tmp_path)
    assert f"{tmp_path}/oxford_pets, which is no folder" in message
    assert "data.root is the folder that holds the datasets' folders" in message
    assert f"there is no folder {tmp_path}/nowhere either" in refused(tmp_path / "nowhere")


def test_a_root_one_level_too_deep_or_too_high(tmp_path, pets):
    assert f"data.root is the folder that holds oxford_pets: {tmp_path}" in refused(pets)
    deep = make_coop_folder(tmp_path / "up/data", "dtd").parent
    assert refused(tmp_path / "up", "dtd").endswith(f"holds dtd: {deep}")
    renamed = pets.rename(tmp_path / "animals")
    assert f"{renamed} itself seems to be the dataset: name it oxford_pets" in refused(renamed)


@pytest.mark.parametrize("called", ["caltech101", "Caltech101", "caltech_101"])
def test_a_folder_of_another_name(tmp_path, called):
    (tmp_path / called).mkdir()
    message = refused(tmp_path, "caltech101")
    assert f"rename {tmp_path}/{called} to caltech-101" in message


@pytest.mark.parametrize(
    ("name", "file", "remedy"),
    [
        ("oxford_pets", "split_zhou_OxfordPets.json", "DATASETS.md, section OxfordPets"),
        ("dtd", "split_zhou_DescribableTextures.json", "DATASETS.md, section DTD"),
        ("imagenet", "classnames.txt", "DATASETS.md, section ImageNet"),
        ("imagenet_a", "classnames.txt", "it is a copy of imagenet/classnames.txt"),
        ("fgvc_aircraft", "images_variant_val.txt", "fgvc-aircraft-2013b.tar.gz"),
    ],
)
def test_a_missing_file_is_named_with_where_to_get_it(tmp_path, name, file, remedy):
    missing = make_coop_folder(tmp_path, name) / file
    missing.unlink()
    message = refused(tmp_path, name)
    assert f"there is no file {missing}" in message and remedy in message
    assert not missing.exists()


def test_missing_images_are_named_with_what_is_there(tmp_path):
    folder = make_coop_folder(tmp_path, "imagenet_sketch")
    (folder / "images").rename(folder / "sketch")
    message = refused(tmp_path, "imagenet_sketch")
    assert f"no folder {folder}/images" in message and "holds classnames.txt, sketch" in message
    make_coop_folder(tmp_path, "imagenet")
    shutil.rmtree(tmp_path / "imagenet/images/train")
    assert f"no folder {tmp_path}/imagenet/images/train" in refused(tmp_path, "imagenet")


def test_imagenets_validation_images_in_one_folder(tmp_path):
    """As the archive has them."""
    val = make_coop_folder(tmp_path, "imagenet") / "images/val"
    shutil.rmtree(val)
    for i in range(3):
        write_image(val / f"ILSVRC2012_val_0000000{i}.JPEG")
    assert f"{val} has 3 images, not sorted into class folders" in refused(tmp_path, "imagenet")


def test_imagenets_folders_differ(tmp_path):
    folder = make_coop_folder(tmp_path, "imagenet")
    shutil.rmtree(folder / "images/val/n01498041")
    message = refused(tmp_path, "imagenet")
    assert f"{folder}/images/train has n01498041, {folder}/images/val has not" in message


def test_no_images_at_all(tmp_path):
    images = make_coop_folder(tmp_path, "imagenet_r", test=0) / "imagenet-r"
    assert f"{images} has no class folders" in refused(tmp_path, "imagenet_r")
    (images / "n01443537").mkdir()
    assert f"no images under {images}" in refused(tmp_path, "imagenet_r")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("n01440764\n", "line 1 of .*expected a folder's name and a class name"),
        ("n01440764 tench\n\nn01440764 fish\n", "line 3 of .*n01440764 is there twice"),
        ("n01440764 tench\n", "has no line for the class folder n01443537"),
        ("\n", "classnames.txt is empty"),
    ],
)
def test_class_names_that_do_not_fit(tmp_path, text, why):
    folder = make_coop_folder(tmp_path, "imagenet_r")
    (folder / "classnames.txt").write_text(text)
    with pytest.raises(VlfastError, match=why):
        load_dataset("imagenet_r", str(tmp_path))


def test_windows_line_ends_and_a_mark_do_not_matter(tmp_path):
    folder = make_coop_folder(tmp_path, "imagenet_r")
    text = "".join(f"{wnid} {name}\r\n" for wnid, name in WNIDS.items())
    (folder / "classnames.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_dataset("imagenet_r", str(tmp_path)).classnames == CLASSNAMES["imagenet_r"]


def test_an_aircraft_of_no_class(tmp_path):
    file = make_coop_folder(tmp_path, "fgvc_aircraft") / "images_variant_test.txt"
    file.write_text("1234567 Spitfire\n")
    assert f"line 1 of {file}" in refused(tmp_path, "fgvc_aircraft")


def test_an_unreadable_folder(tmp_path, pets, monkeypatch):
    scandir = os.scandir

    def deny(path="."):
        if str(path) == str(pets):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    assert refused(tmp_path) == f"data.root: can't read {pets} (Permission denied)"


def test_an_unreadable_split_file(tmp_path, pets, monkeypatch):
    def deny(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_text", deny)
    assert "split_zhou_OxfordPets.json (Permission denied)" in refused(tmp_path)


def test_a_missing_image_in_the_middle_of_the_split(tmp_path, pets):
    """One image of every class and split is looked for."""
    split = json.loads((pets / "split_zhou_OxfordPets.json").read_text())
    gone = next(path for path, label, _ in split["test"] if label == 4)
    (pets / "images" / gone).unlink()
    message = refused(tmp_path)
    assert f"of test that is not there: {pets}/images/{gone}" in message
    assert f"relative to {pets}/images" in message


def change_paths(pets, change):
    file = pets / "split_zhou_OxfordPets.json"
    split = json.loads(file.read_text())
    rows = {p: [[change(path), label, name] for path, label, name in split[p]] for p in split}
    file.write_text(json.dumps(rows))


def test_paths_with_a_prefix_too_many(tmp_path, pets):
    change_paths(pets, lambda path: f"images/{path}")
    message = refused(tmp_path)
    assert "it is there without images/" in message
    assert f"relative to {pets}/images" in message


def test_images_one_folder_too_deep(tmp_path, pets):
    inner = pets / "images/images"
    (pets / "images").rename(pets / "inner")
    (pets / "images").mkdir()
    (pets / "inner").rename(inner)
    assert f"move the images in {inner} to {pets}/images" in refused(tmp_path)


def test_backslashes(tmp_path):
    folder = make_coop_folder(tmp_path, "dtd")
    file = folder / "split_zhou_DescribableTextures.json"
    file.write_text(file.read_text().replace("/", "\\\\"))
    assert "paths have / between folders" in refused(tmp_path, "dtd")


def test_a_corrupt_image_is_named_when_it_is_opened(tmp_path, pets):
    data = load_dataset("oxford_pets", str(tmp_path))
    broken = pets / data.test.image_keys()[0]
    broken.write_bytes(b"no image")
    with pytest.raises(VlfastError, match=f"{broken} can't be read"):
        data.test.image(0)


def test_grey_images_are_rgb(tmp_path, pets):
    data = load_dataset("oxford_pets", str(tmp_path))
    Image.new("L", (9, 9)).save(pets / data.test.image_keys()[0], "JPEG")
    assert data.test.image(0).mode == "RGB"


@pytest.mark.parametrize("name", IMAGENET_DOMAINS)
def test_nothing_trains_on_a_test_set(root, name):
    with pytest.raises(VlfastError, match=f"{name} has no training images"):
        load_dataset(name, str(root)).few_shot(16, 1)
