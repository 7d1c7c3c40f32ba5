"""The studies of the package plan what they always planned, and the files of other studies are read or refused."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_nb
from sparse_nb.cli.main import main
from sparse_nb.study import checks, reading, studies
from sparse_nb.study.figures import shown_families
from sparse_nb.study.plans import measurements, plan
from sparse_nb.study.versions import canonical

ROOT = Path(__file__).parent.parent.parent
PLANNED = json.loads((Path(__file__).parent / "planned.json").read_text())
MINE = """
datasets = ["digits"]
rules = ["erk", "water_filling"]
seeds = 1
figures = ["fig01"]

[families.mlp]
base = 8
widths = [8, 16]
recipe = {epochs = 1}

[weight_noise]
sigmas = [0, 0.5]
draws = 1
"""


def settings_of(description):
    """The settings of an experiment or an evaluation that are not at their defaults."""
    fields = dataclasses.fields(description)
    found = {field.name: getattr(description, field.name) for field in fields}
    found = {field.name: found[field.name] for field in fields if found[field.name] != field.default}
    return {name: value for name, value in found.items() if name != "origins"}  # those are of the machine


def planned(study, figure):
    """A digest of all points of seed 0, in order."""
    points = plan(figure, studies.narrow(study, seeds=1)) if shown_families(figure, studies.load(study)) else ()
    told = [
        [p.growth, p.rule, settings_of(p.experiment), p.evaluation.measure, settings_of(p.evaluation)] for p in points
    ]
    return f"{len(points)} {hashlib.sha256(canonical(told).encode()).hexdigest()[:16]}"


@pytest.mark.parametrize("study", studies.STUDIES)
def test_a_study_of_the_package_plans_the_networks_that_it_planned_before_it_was_a_file(study):
    """planned.json was compared with every point of every seed that the studies had when they were Python; figures 14
    and later came afterwards."""
    assert {figure: planned(study, figure) for figure in PLANNED[study]} == PLANNED[study]


@pytest.mark.parametrize("study", studies.STUDIES)
def test_networks_of_the_package_hold_their_budgets(study):
    checks.check_budgets(studies.load(study))


def test_every_file_of_the_package_is_a_study_and_is_in_what_is_installed():
    files = {path.stem for path in Path(sparse_nb.__path__[0], "study").glob("*.toml")}
    assert files == {*studies.STUDIES, "template"}
    assert '"*.toml"' in (ROOT / "setup.py").read_text()


def write(folder, text=MINE, name="mine.toml"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_the_template_is_a_study_and_so_are_its_examples(tmp_path):
    main(["study", "new", str(tmp_path / "new.toml")])
    made = studies.load(tmp_path / "new.toml")
    assert made.name == "new" and list(made.families) == ["mlp"] and shown_families("fig01", made) == ("mlp",)
    text = (tmp_path / "new.toml").read_text()
    for line in text.splitlines():
        if re.match("# [^ ]", line) and " = " in line:  # an example; what is further in explains
            example = line[2:]
            before = (
                "" if example.startswith(("extends", "without")) else text.split("recipe =")[0].split("[families")[1]
            )
            if not before or example.startswith(("test_images", "draws")):
                continue
            changed = text.replace(line, example)
            assert studies.load(write(tmp_path, changed, "changed.toml")) != dataclasses.replace(
                made, name="changed"
            ), line
    with pytest.raises(SystemExit):
        main(["study", "new", str(tmp_path / "new.toml")])
    assert (tmp_path / "new.toml").read_text() == text


def test_a_file_stands_where_a_preset_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    main(["sweep", "mine.toml", "--rules", "erk"])
    assert "2 networks: 2 made now" in capsys.readouterr().out
    main(["sweep", "--preset", "mine.toml"])
    assert "3 networks: 1 made now, 2 already there" in capsys.readouterr().out
    main(["status", "mine.toml"])
    assert "3 of 3" in capsys.readouterr().out
    main(["export", "mine.toml"])
    assert {path.parent.name for path in (tmp_path / "results/mine").rglob("runs.tar.xz")} == {"digits-mlp-seed0"}
    main(["explore", "mine.toml", "--static", "curves.html"])
    page = Path("curves.html").read_text()
    assert "Preset mine" in page and str(tmp_path) not in page


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sweep", "mine.toml", "--families", "vgg"], "family is 'vgg'; accepted: mlp"),
        (["sweep", "mine.toml", "fig02"], "figure is 'fig02'; study mine has the figures fig01"),
        (["status", "absent.toml"], "there is no study absent.toml; `sparse-nb study new absent.toml` writes one"),
        (["claims", "mine.toml", "--preset", "laptop"], "studies are laptop, mine.toml; accepted: one"),
        (["explore", "mine"], "preset is 'mine'; accepted: smoke, laptop, laptop2, paper, or the path of a .toml file"),
        (["study", "check", "labtop"], "preset is 'labtop'; accepted: smoke"),
    ],
)
def test_bad_commands(tmp_path, monkeypatch, capsys, command, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1 and words in capsys.readouterr().err


def test_an_extended_file_says_in_which_file_the_mistake_is(tmp_path):
    write(tmp_path, MINE.replace("widths = [8, 16]", "widths = [8, 4]"), "under.toml")
    over = write(tmp_path, 'extends = "under.toml"\nseeds = 2\nfamilies.mlp.base = 4\n')
    assert studies.load(over).families["mlp"].base == 4 and studies.load(over).seeds == 2
    (tmp_path / "mine.toml").write_text('extends = "under.toml"\nseeds = 2\n')
    with pytest.raises(ValueError, match=r"under.toml, line 9: families.mlp.widths: the network of width 4"):
        studies.load(over)
    (tmp_path / "mine.toml").write_text('extends = "under.toml"\nwithout = ["vgg"]\n')
    with pytest.raises(ValueError, match=r"mine.toml, line 2: without has 'vgg'; under.toml has the families mlp"):
        studies.load(over)


def test_a_study_is_of_the_versions_of_now_whatever_it_extends(tmp_path):
    made = studies.load(write(tmp_path, 'extends = "laptop"\n'))
    assert made.versions == () and made.name == "mine" and studies.load("laptop").versions
    assert made.families == studies.load("laptop").families


def test_tables_of_a_study_say_everything(tmp_path):
    for name in studies.STUDIES:
        text = reading.toml_text(studies.study_table(studies.load(name)))
        again = studies.load(write(tmp_path, text.replace(f'name = "{name}"', 'name = "other"'), "other.toml"))
        assert dataclasses.replace(again, name=name) == studies.load(name)


def test_reading_a_study_does_not_import_what_trains_or_draws():
    code = "import sys; import sparse_nb.study.studies; print([m for m in sys.modules if m in ('plotly', 'papermill')])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert ran.stdout.strip() == "[]"


def test_what_is_measured_beside_the_figures(tmp_path):
    made = studies.load(write(tmp_path, MINE.replace("seeds = 1", 'seeds = 1\nbeside = ["calibration"]')))
    wanted = measurements(plan("fig01", made), made)
    assert {evaluation.measure for of in wanted.values() for evaluation in of} == {"weight_noise", "calibration"}


def test_the_control_has_measures_of_its_own():
    laptop, points = studies.PRESETS["laptop2"], plan("fig12", studies.PRESETS["laptop2"])
    wanted, control = measurements(points, laptop), {p.experiment for p in points if p.growth == "larger_dense"}
    measures = {tuple(e.measure for e in wanted[one]) for one in control}
    assert measures == {("weight_noise", "class_recall", "corruption")}
    by_width = {p.evaluation for p in plan("fig02", laptop) if p.experiment.dataset == "mnist"}
    of_mnist = {e for one in control if one.dataset == "mnist" for e in wanted[one] if e.measure == "corruption"}
    assert of_mnist == by_width  # so that a base of both is measured once
