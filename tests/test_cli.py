"""The command line: output, exit codes, and one line an error."""

import json
import warnings

import pytest
import yaml

from vlfast import cli
from vlfast.cli import recipes


def run(capsys, *argv):
    """Exit code, standard output, standard error of one command."""
    try:
        code = cli.main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_usage_names_every_command(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    for command in cli.COMMANDS:
        assert command in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and "usage: vlfast" in out


def test_version(capsys):
    from vlfast import __version__

    assert run(capsys, "--version") == (0, f"vlfast {__version__}\n", "")


def test_print_config_is_the_resolved_config(capsys):
    code, out, _ = run(
        capsys,
        *("train", "--recipe", "plpp", "--data", "glyphs/places", "--data.classes=base"),
        *("--recipe.epochs", "3", "--prompts.init", "a photo", "--print_config"),
    )
    config = yaml.safe_load(out)
    assert code == 0
    assert config["recipe"]["name"] == "plpp" and config["recipe"]["epochs"] == 3
    assert config["data"]["name"] == "glyphs/places" and config["data"]["classes"] == "base"
    assert config["prompts"]["init"] == "a photo"
    assert [o["kind"] for o in config["objectives"]] == ["labels", "perplexity"]


def test_config_file_and_options_over_it(capsys, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("recipe: {name: coop, epochs: 7, lr: 0.1}\nprompts: {n_ctx: 2}\n")
    short = tmp_path / "short.yaml"
    short.write_text("recipe: plpp\ndata: glyphs/places\n")
    _, out, _ = run(capsys, "train", "--config", short, "--print_config")
    assert yaml.safe_load(out)["recipe"]["name"] == "plpp"
    _, out, _ = run(
        capsys, "train", "--config", file, "--recipe.epochs", 9, "--add", "perplexity",
        "--print_config",
    )  # fmt: skip
    config = yaml.safe_load(out)
    assert (config["recipe"]["epochs"], config["recipe"]["lr"]) == (9, 0.1)
    assert config["prompts"]["n_ctx"] == 2 and len(config["objectives"]) == 2


def test_printed_config_gives_itself(capsys, tmp_path):
    _, out, _ = run(capsys, "train", "--recipe", "plpp", "--print_config")
    file = tmp_path / "run.yaml"
    file.write_text(out)
    assert run(capsys, "train", "--config", file, "--print_config")[1] == out


def test_objectives_with_options(capsys):
    _, out, _ = run(
        capsys, "train", "--add", "{kind: perplexity, weight: 0.3, top_k: 5}", "--print_config"
    )
    added = yaml.safe_load(out)["objectives"][1]
    assert (added["weight"], added["top_k"]) == (0.3, 5)


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'"),
        (["train", "--recipe", "copo"], "unknown recipe 'copo'; did you mean 'coop'"),
        (["train", "--recipe.epoch", "3"], "did you mean '--recipe.epochs'"),
        (["train", "--recipe.epochs", "x"], "recipe.epochs"),
        (["train", "--data", "glyphs/toolz"], "did you mean 'glyphs/tools'"),
        (["train", "--model", "glyphs-studnet"], "did you mean 'glyphs-student'"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        (["train", "--resume", "nowhere"], "not a run's folder"),
        (["train", "--resume", "x", "--seed", "2"], "no other options (seed)"),
        (["train", "--config", __file__], "is not valid YAML"),
        (["evaluate"], "the following arguments are required: run; see `vlfast evaluate --help`"),
        (["evaluate", "nowhere"], "nowhere is not a run's folder"),
        (["predict", "nowhere", "x.png"], "nowhere is not a run's folder"),
    ],
)
def test_errors_are_one_line(capsys, argv, match):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == ""
    assert err.startswith("vlfast: ") and err.count("\n") == 1 and match in err


def test_debug_shows_the_trace(capsys):
    code, _, err = run(capsys, "train", "--recipe", "copo", "--debug")
    assert code == 2 and "Traceback" in err


def test_recipes_are_listed(capsys):
    code, out, _ = run(capsys, "recipes")
    assert code == 0
    for name, paper in (("zeroshot", "2103.00020"), ("coop", "2109.01134"), ("plpp", "2412.15277")):
        assert name in out and paper in out


def test_doctor_tells_what_serves_each_op(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in ("vlfast", "torch", "perplexity", "symmetric_kl", "gated_mixture", "threads"):
        assert word in out


def test_interrupt_is_no_error_trace(capsys, monkeypatch):
    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "main", stop)
    assert run(capsys, "recipes") == (130, "", "vlfast: stopped\n")


def test_a_warning_is_one_line(monkeypatch, capsys):
    def warn(argv):
        print(warnings.formatwarning("data: something odd", UserWarning, "some.py", 3), end="")

    before = warnings.formatwarning
    monkeypatch.setattr(recipes, "main", warn)
    assert run(capsys, "recipes") == (0, "vlfast: data: something odd\n", "")
    assert warnings.formatwarning is before


GLYPHS = (
    *("train", "--recipe", "coop", "--data", "glyphs/tools", "--data.classes", "base"),
    *("--data.shots", 4, "--recipe.epochs", 3, "--recipe.batch_size", 16),
)


def test_train_evaluate_predict(capsys, tmp_path):
    code, out, err = run(capsys, *GLYPHS, "--output", tmp_path / "run")
    assert code == 0, err
    assert "harmonic mean" in out and str(tmp_path / "run") in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())

    code, out, _ = run(capsys, "evaluate", tmp_path / "run", "--json")
    assert code == 0 and json.loads(out) == result["accuracy"]

    from vlfast import load_dataset

    test = load_dataset("glyphs/tools").restrict("base").test
    test.image(0).save(tmp_path / "icon.png")
    code, out, _ = run(capsys, "predict", tmp_path / "run", tmp_path / "icon.png", "--json")
    classes = json.loads(out)["classes"]
    assert code == 0 and len(classes) == 3 and 0 < classes[0]["p"] <= 1
    code, out, _ = run(
        capsys, "predict", tmp_path / "run", tmp_path / "icon.png", "--classnames", "hammer, key"
    )
    assert code == 0 and "hammer" in out and "key" in out
    code, _, err = run(capsys, "predict", tmp_path / "run", tmp_path / "gone.png")
    assert code == 2 and "there is no file" in err


def test_ctrl_c_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    from vlfast.trainers import fit

    monkeypatch.chdir(tmp_path)
    whole = fit._train_epoch

    def interrupted(*args, **kwargs):
        if args[4] == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(fit, "_train_epoch", interrupted)
    code, _, err = run(capsys, *GLYPHS)
    folder = "runs/glyphs-tools/glyphs-student/coop-base-4shots-seed1"
    assert code == 130
    assert f"stopped after 1 finished epochs; go on with `vlfast train --resume {folder}`" in err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "train", "--resume", folder)
    assert code == 0, err
    assert "3 epochs" in out
