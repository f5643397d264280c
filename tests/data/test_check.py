"""What `vlfast data check` finds: complete folders, missing files, wrong counts, broken images."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests.data.coop.folders import make_coop_folder, make_coop_root
from tests.data.image_files import cut_short, write_image
from vlfast.cli.commands import main
from vlfast.data.check import check_dataset, check_layout, fault_of, missing_images, names_to_check
from vlfast.data.coop.layouts import IMAGENET_DOMAINS, LAYOUTS, Counts
from vlfast.errors import UnknownNameError


def small(name):
    """The layout with the counts of tests' copies: 5 training, 2 validation and 3 test images a
    class, 6 classes of ImageNet, 5 of others."""
    if name in IMAGENET_DOMAINS:
        classes = {"imagenet_a": 2, "imagenet_r": 3}.get(name, 6)
        counts = Counts(classes, None, None, 3 * classes)
    elif name == "imagenet":
        counts = Counts(6, 30, None, 18, 9, 9)
    else:
        counts = Counts(5, 25, 10, 15, 9, 6)
    return dataclasses.replace(LAYOUTS[name], counts=counts)


@pytest.mark.parametrize("name", LAYOUTS)
def test_complete(name, tmp_path):
    make_coop_root(tmp_path, [name])
    report = check_layout(small(name), tmp_path)
    assert report.problems == [] and report.corrupt == {}
    assert report.state == "complete"
    assert report.found() == report.expected
    assert report.decoded == sum(report.images.values())
    assert check_layout(small(name), tmp_path, decode=False).decoded == 0


def test_counts_that_are_not_the_papers(tmp_path):
    make_coop_root(tmp_path, ["eurosat"])
    report = check_dataset("EuroSAT", tmp_path, decode=False)
    assert report.state == "incomplete"
    (problem,) = report.problems
    assert "5 classes instead of 10, 25 training images instead of 13,500" in problem
    assert "9 test images of base classes instead of 4,200" in problem


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_there(name, tmp_path):
    report = check_dataset(name, tmp_path)
    layout = LAYOUTS[name]
    assert report.state == "missing"
    assert str(tmp_path / layout.folder) in report.problems[0]
    by_hand = {"imagenet", "stanford_cars", "ucf101", *IMAGENET_DOMAINS}
    assert (f"`vlfast data prepare {name} --root" in report.problems[1]) == (name not in by_hand)
    assert str(tmp_path / layout.folder / layout.images) in report.problems[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_missing_file_is_named_with_its_place(name, tmp_path):
    folder, layout = make_coop_folder(tmp_path, name), small(name)
    files = [*([layout.split_file] if layout.split_file else []), *layout.needs]
    for file in files:
        (folder / file).unlink()
    report = check_layout(layout, tmp_path)
    assert report.state == "incomplete"
    assert len(report.problems) == len(files)
    for file, problem in zip(files, report.problems, strict=True):
        assert f"put {file} at {folder / file}" in problem


def test_no_images_folder(tmp_path):
    folder = make_coop_folder(tmp_path, "dtd")
    (folder / "images").rename(folder / "dtd-images")
    (problem,) = check_layout(small("dtd"), tmp_path).problems
    assert f"there is no folder {folder / 'images'}" in problem and "dtd-r1.0.1.tar.gz" in problem


def test_missing_and_corrupt_images_are_all_found(tmp_path):
    folder = make_coop_folder(tmp_path, "food101")
    split = json.loads((folder / "split_zhou_Food101.json").read_text())
    gone, empty, cut = (split[part][3][0] for part in ("train", "val", "test"))
    other = split["test"][5][0]
    (folder / "images" / gone).unlink()
    (folder / "images" / empty).write_bytes(b"")
    cut_short(folder / "images" / cut)
    (folder / "images" / other).write_text("<html>404 not found</html>")
    seen = []
    report = check_layout(small("food101"), tmp_path, on_images=lambda *done: seen.append(done))
    assert report.state == "damaged"
    (problem,) = report.problems
    assert "1 of 25 train images are not there" in problem and gone in problem
    assert set(report.corrupt) == {f"images/{name}" for name in (empty, cut, other)}
    assert report.corrupt[f"images/{other}"] == "no image"
    assert report.decoded == 49 and seen[-1] == (49, 49)
    assert check_layout(small("food101"), tmp_path, decode=False).state == "incomplete"


def test_a_damaged_split_file_stops_no_other_dataset(tmp_path, capsys):
    make_coop_root(tmp_path, ["dtd", "eurosat"])
    (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").write_text("{")
    with pytest.raises(SystemExit, match="1"):
        main(["data", "check", "--root", str(tmp_path), "--quick", "--json"])
    found = {d["name"]: d for d in json.loads(capsys.readouterr().out)["datasets"]}
    assert list(found) == list(LAYOUTS)
    assert "is not JSON" in found["dtd"]["problems"][0]
    assert found["eurosat"]["images"] == {"train": 25, "val": 10, "test": 15}
    assert found["imagenet"]["state"] == "missing"


def test_stored_subsets(tmp_path):
    folder = make_coop_folder(tmp_path, "dtd") / "split_fewshot"
    folder.mkdir()
    for name in ("shot_1-seed_2.pkl", "shot_16-seed_1.json", ".shot_1-seed_1.json.tmp", "notes"):
        (folder / name).touch()
    report = check_layout(small("dtd"), tmp_path, decode=False)
    assert report.few_shot == ["shot_1-seed_2.pkl", "shot_16-seed_1.json"]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".bmp", ".tif"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_images_cut_short(tmp_path, suffix, share):
    file = tmp_path / f"image{suffix}"
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    assert fault_of(file) is None
    cut_short(file, share)
    assert fault_of(file)


def test_several_processes_find_what_one_finds(tmp_path):
    for i in range(260):
        write_image(tmp_path / "list" / f"{i}.jpg", seed=i)
    cut_short(tmp_path / "list" / "7.jpg")
    cut_short(tmp_path / "list" / "259.jpg")
    one, two = (check_dataset("unlabelled", tmp_path / "list", jobs=jobs) for jobs in (1, 2))
    assert one == two
    assert set(one.corrupt) == {"7.jpg", "259.jpg"} and one.decoded == 260


def test_missing_images(tmp_path):
    write_image(tmp_path / "a b" / "ü.png")
    outside = write_image(tmp_path / "c.png")
    names = ["a b/ü.png", "a b/x.png", "gone/x.png", "c.png", str(outside), "/nowhere/c.png"]
    assert missing_images(tmp_path, names) == ["a b/x.png", "gone/x.png", "/nowhere/c.png"]


def test_ones_own_images(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog", "eel"):
            write_image(tmp_path / part / name / "0.png")
    cut_short(tmp_path / "test" / "dog" / "0.png")
    report = check_dataset("folder", tmp_path)
    assert report.state == "damaged" and list(report.corrupt) == ["test/dog/0.png"]
    assert report.found() == {"classes": 3, "train": 3, "test": 3, "base_test": 2, "new_test": 1}
    rows = "train,cat,train/cat/0.png\ntest,cat,gone/1.png\ntest,cat,gone/2.png\n"
    (tmp_path / "all.csv").write_text(f"split,label,path\n{rows}")
    report = check_dataset("csv", tmp_path / "all.csv")
    assert "2 of 2 test images are not there" in report.problems[0]
    assert report.decoded == 1
    report = check_dataset("csv", tmp_path / "gone.csv")
    assert report.state == "incomplete" and "there is no folder or .csv" in report.problems[0]


def test_names(tmp_path):
    assert names_to_check([]) == list(LAYOUTS)
    assert names_to_check(["DTD", "OxfordPets", "dtd", "csv"]) == ["dtd", "oxford_pets", "csv"]
    with pytest.raises(UnknownNameError, match="did you mean 'eurosat'"):
        names_to_check(["eurosats"])


def test_the_command(tmp_path, capsys):
    make_coop_root(tmp_path, ["dtd"])
    with pytest.raises(SystemExit, match="1"):
        main(["data", "check", "--root", str(tmp_path)])
    out = capsys.readouterr().out
    assert "dtd      incomplete" in out and "5/47" in out and "25/2,820" in out
    assert "not there: ImageNet (imagenet), Caltech101 (caltech-101)" in out
    with pytest.raises(SystemExit, match="1"):
        main(["data", "check", "ucf101", "--root", str(tmp_path)])
    assert "UCF-101-midframes.zip" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(["data", "check", "--root", str(tmp_path / "empty")]) == 0
    capsys.readouterr()
    assert main(["data", "check", "--root", str(tmp_path / "gone")]) == 2
    assert "--root: there is no folder" in capsys.readouterr().err
    assert main(["data", "check", "--root", str(tmp_path), "--jobs", "0"]) == 2
    assert "--jobs: expected at least 1" in capsys.readouterr().err


def test_class_names_for_what_has_its_own(tmp_path, capsys):
    for name in ("folder", "dtd"):
        given = ["--root", str(tmp_path), "--classnames", "names.txt"]
        assert main(["data", "check", name, *given]) == 2
        assert f"--classnames: {name} has class names of its own" in capsys.readouterr().err


def test_list(tmp_path, capsys):
    make_coop_root(tmp_path, ["dtd"])
    assert main(["data", "list", "--root", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (dtd,) = (line for line in lines if line.startswith("│ dtd"))
    assert "47" in dtd and "{} texture." in dtd and "yes" in dtd
    assert any("no folder caltech-101" in line for line in lines)
    assert main(["data", "list"]) == 0
    assert main(["data"]) == 2


def test_split(tmp_path, capsys):
    for name in ("cat", "dog"):
        for i in range(5):
            write_image(tmp_path / name / f"{i}.png")
    assert main(["data", "split", str(tmp_path), "--seed", "3"]) == 0
    # A tenth of 5 images rounds to none.
    assert "(8 train, 0 val, 2 test images)" in capsys.readouterr().out
    assert main(["data", "check", "folder", "--root", str(tmp_path)]) == 0
    assert main(["data", "split", str(tmp_path)]) == 2
    assert "--overwrite draws anew" in capsys.readouterr().err
