"""What users of neighbouring projects met, each kind with the test that tries it here; the last ones are in this file.

What they met with networks of their own (frozen, unused, tied and emptied layers) is tried in the chapters of part 2.
"""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from sparse_nb import data
from sparse_nb.networks import masks, sparse_layers
from sparse_nb.networks.training import Recipe
from sparse_nb.robustness import (
    attacks,
    calibration,
    class_recall,
    curvature,
    evaluation,
    quantisation,
    report,
    weight_noise,
)
from sparse_nb.runs.attempts import lease
from sparse_nb.runs.schema import check_experiment
from sparse_nb.runs.store import Store
from sparse_nb.study.experiments import Clean, Experiment, WeightNoise, experiment_identity
from sparse_nb.study.reading import Wrong
from sparse_nb.study.studies import study_of
from sparse_nb.sweep import costs, sweep

TESTS = Path(__file__).parent
ROOT = TESTS.parent
LIST = """
code changes under a live process
    study/test_versions.py test_code_edited_under_a_live_process_never_gets_its_name
no cache folder in a container
    networks/test_portable.py test_code_works_where_nothing_can_be_written
a user without a name and a home
    test_outside_cases.py test_a_user_without_a_name_and_a_home
an integer beyond SQLite
    runs/test_files.py test_an_odd_description_is_refused
threads and cores
    sweep/test_survival.py test_workers_take_the_cores_that_they_may_use
foreign files in a store
    runs/test_index.py test_foreign_files_are_passed_over
papermill's types
    results/test_figures.py test_finished_false_on_papermills_command_line_is_false
papermill in another folder
    results/test_figures.py test_papermill_in_a_folder_without_figures_writes_nothing_into_the_parent
a kernel that is not there
    results/test_figures.py test_a_kernel_that_is_not_installed_is_noticed_before_training
a filesystem without locks
    runs/test_attempts.py test_a_filesystem_without_locks_is_named_with_a_remedy
a store on a read-only disk
    test_outside_cases.py test_commands_that_look_work_on_a_read_only_disk
a holder that is stopped
    test_outside_cases.py test_a_sweep_that_waits_names_the_stopped_holder
MNIST without .gz
    data/test_data.py test_decompressed_files_alone_are_read_without_a_network
few classes
    robustness/test_evaluate.py test_autoattack_by_the_number_of_classes
types of networks
    robustness/test_evaluate.py test_every_measure_takes_networks_of_every_type
an empty set
    robustness/test_evaluate.py test_an_empty_set_is_refused
arrays as options
    robustness/test_evaluate.py test_arrays_and_tensors_as_options
an odd record
    runs/test_files.py test_mutated_files_are_sane_or_refused_by_name
a flipped bit in the index
    runs/test_index.py test_no_flipped_bit_of_the_index_changes_a_table
another processor
    sweep/test_machines.py test_a_state_of_another_processor
a published run, measured again
    runs/test_archive.py test_a_network_without_its_checkpoint_is_made_again_to_be_measured
HTML in a run
    explorer/test_explorer.py test_hostile_texts_stay_texts
a hostile figure
    results/test_trace.py test_hostile_files_are_refused_at_once
SIGTERM of the explorer
    explorer/test_explorer.py test_the_server_ends_with_its_command
a visit from another page
    explorer/test_explorer.py test_another_page_starts_no_kernel
a visit without the token
    explorer/test_explorer.py test_on_a_public_address_a_kernel_needs_the_token
closing JupyterLab
    explorer/test_explorer.py test_closing_the_kernel_interrupts_a_training_and_fails_nothing
the interval of one seed
    results/test_figures.py test_hover_of_one_seed_has_no_interval
another default type
    robustness/test_default_type.py test_measures
a seed that is text
    robustness/test_default_type.py test_a_seed_that_is_text_is_refused
a half-copied run
    test_outside_cases.py test_what_is_in_the_way_of_a_run_is_found_before_training
a file named like the index
    test_outside_cases.py test_a_damaged_index_takes_no_other_file_with_it
a run of unknown code
    test_outside_cases.py test_runs_that_cannot_be_built_here_do_not_stop_an_estimate
closed output
    test_outside_cases.py test_closed_output_goes_nowhere
a narrow terminal
    test_outside_cases.py test_help_ends_on_a_narrow_terminal
a study of other kinds
    test_outside_cases.py test_a_study_of_other_kinds_is_refused_by_name
a run of other kinds
    test_outside_cases.py test_an_experiment_of_other_kinds_is_refused_by_name
a network that changes its images
    test_outside_cases.py test_curvature_of_networks_that_change_their_images_or_leave_weights_unused
a network in half precision
    test_outside_cases.py test_a_sparse_layer_in_half_precision
"""
CASES = dict(re.findall(r"^(\S.*)\n +(.*)$", LIST, re.MULTILINE))
NET = Experiment("digits", "mlp", 32, 1, 25_408, 0, Recipe(epochs=1))
COMMAND = [sys.executable, "-c", "import sys; from sparse_nb.cli.main import main; main(sys.argv[1:])"]


@pytest.mark.parametrize("case", CASES)
def test_the_list_names_tests(case):
    file, name = CASES[case].split()
    assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("outside") / "runs")
    sweep.run([NET], [Clean()], store=store, device="cpu", show=False)
    store.runs()
    return store


def contents(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


NOBODY = 54_321
READS_ONLY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
READS_ONLY += [f"--{kind}-caps=-all,+dac_read_search" for kind in ("inh", "ambient")]
LOOKING = (["--help"], ["verify"], ["failures"], ["status", "fig01", "--families", "mlp"])


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_a_user_without_a_name_and_a_home(store):
    """The user has no line in /etc/passwd, and may read everything and write nothing but /tmp."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")
    }
    before = contents(store.root)
    for words in LOOKING:
        runs = [] if words == ["--help"] else ["--runs", str(store.root)]
        environment = kept | {"PYTHONPATH": str(ROOT)}
        found = subprocess.run(
            [*READS_ONLY, *COMMAND, *words, *runs], env=environment, cwd="/", capture_output=True, text=True
        )
        assert found.returncode == 0 and "Traceback" not in found.stderr, found.stderr
    assert contents(store.root) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount")
def test_commands_that_look_work_on_a_read_only_disk(store, tmp_path):
    place, before = tmp_path / "mounted", contents(store.root)
    place.mkdir()
    read_only = [["mount", "--bind", store.root, place], ["mount", "-o", "remount,ro,bind", place]]
    if any(subprocess.run(command, capture_output=True).returncode for command in read_only):
        pytest.skip("no right to mount")
    try:
        with pytest.raises(OSError):
            (place / "new").touch()
        for words in LOOKING[1:]:
            command = [*COMMAND, *words, "--runs", str(place)]
            found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert found.returncode == 0 and "Traceback" not in found.stderr, found.stderr
        command = [*COMMAND, "sweep", "fig01", "--families", "mlp", "--runs", str(place)]
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert refused.returncode == 1 and f"{place} cannot be written" in refused.stderr
    finally:
        subprocess.run(["umount", place], check=True)
    assert contents(store.root) == before


HOLD = """
import os, signal, sys
from sparse_nb.networks.training import Recipe
from sparse_nb.runs.attempts import lease
from sparse_nb.runs.store import Store
from sparse_nb.study.experiments import Experiment
with lease(Store(sys.argv[1]), eval(sys.argv[2])) as alone:
    print(alone, flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_sweep_that_waits_names_the_stopped_holder(tmp_path, monkeypatch):
    """As after Ctrl-Z in a terminal that was forgotten; the sweep ends when the holder is killed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", HOLD, str(tmp_path), repr(NET)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    said = []

    class Watched(sweep._Progress):
        def show(self, shares):
            said.extend(words for _, words in shares.values() if "waiting" in words)
            if said and "stopped" in said[-1]:
                holder.kill()
                holder.wait()
            super().show(shares)

    monkeypatch.setattr(sweep, "_Progress", Watched)
    try:
        assert holder.stdout.readline() == "True\n"
        done = sweep.run([NET], [], store=Store(tmp_path), device="cpu", show=False)
    finally:
        holder.kill()
        holder.wait()
    assert done.made == 1 and said[-1].startswith(f"waiting for process {holder.pid}, which is stopped")
    with lease(Store(tmp_path), NET) as alone:
        assert alone


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_in_the_way_of_a_run_is_found_before_training(tmp_path, kind):
    store = Store(tmp_path / "runs")
    if kind == "folder":
        store.folder(NET).mkdir()
        (store.folder(NET) / "experiment.json").write_text("x")
    else:
        store.folder(NET).write_text("x")
    summary = sweep.run([NET], [Clean()], store=store, device="cpu", show=False)
    assert [("is in the way" in reason) for _, reason in summary.failed] == [True]
    assert not list(store.root.glob(".writing-*")) and store.root.is_dir()


def test_a_damaged_index_takes_no_other_file_with_it(store, tmp_path):
    copy = shutil.copytree(store.root, tmp_path / "runs")
    (copy / "index.sqlite").write_text("damaged")
    (copy / "index.sqlite.mybackup").write_text("precious")
    assert len(Store(copy).table()) == len(store.table())
    assert (copy / "index.sqlite.mybackup").read_text() == "precious"


@pytest.mark.parametrize("odd", [{"dataset": "foo"}, {"family": "nets:build@1"}, {"epochs": 0}, {"density": 0.0}])
def test_runs_that_cannot_be_built_here_do_not_stop_an_estimate(store, odd):
    runs = store.runs()
    assert costs.costs_of(runs, torch.device("cpu")).rates
    both = pd.concat([runs, runs.assign(**odd)], ignore_index=True)
    known = costs.costs_of(both, torch.device("cpu")).rates.of(NET, torch.device("cpu"))
    assert known == costs.costs_of(runs, torch.device("cpu")).rates.of(NET, torch.device("cpu"))
    assert not costs.costs_of(runs.assign(**odd), torch.device("cpu")).rates


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_output_goes_nowhere(store, tmp_path, closed):
    before = contents(store.root)
    command = f'"$0" -m sparse_nb verify --runs "$1" {closed}'
    ran = subprocess.run(["sh", "-c", command, sys.executable, store.root], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and "Traceback" not in ran.stderr
    assert contents(store.root) == before


def test_help_ends_on_a_narrow_terminal():
    narrow = os.environ | {"COLUMNS": "1"}
    ran = subprocess.run([*COMMAND, "sweep", "--help"], cwd=ROOT, env=narrow, capture_output=True, timeout=120)
    assert ran.returncode == 0 and b"--preset" in ran.stdout.replace(b"\n", b"")


@pytest.mark.parametrize(
    "table",
    [
        dict(datasets=5),
        dict(datasets=[[1, 2]]),
        dict(families=[]),
        dict(families="mlp"),
        dict(families={"mlp": {"base": 32, "widths": [32], "depth_width": 32, "depths": [10**12]}}),
        dict(families={"mlp": {"base": 32, "widths": [32], "depth_width": 10**12, "depths": [1]}}),
        dict(weight_noise={"seed": 2**63}),
        dict(families={"mlp": {"base": 32, "widths": [32], "recipe": {"batch_size": 2**63}}}),
    ],
)
def test_a_study_of_other_kinds_is_refused_by_name(table):
    whole = dict(datasets=["digits"], rules=["erk"], seeds=1)
    whole["families"] = {"mlp": {"base": 32, "widths": [32], "depth_width": 32, "depths": [1]}}
    with pytest.raises((Wrong, ValueError)) as refused:
        study_of(whole | table, "mine")
    (key,) = table
    assert "Traceback" not in str(refused.value) and refused.type is not KeyError
    assert any(word in str(refused.value) for word in (key, "seed", "batch_size", "depth"))


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 10**9},
        {"width": 10**18},
        {"recipe": None},
        {"recipe": []},
        {"recipe": {"epochs": [1]}},
        {"dataset": ""},
        {"repeat": None},
        {"recipe": ...},
        {"repeat": ...},
        {"pruning": ...},
        {"initial_scale": ...},
        {"schedule": ...},
    ],
    ids=str,
)
def test_an_experiment_of_other_kinds_is_refused_by_name(change):
    settings = experiment_identity(NET)["experiment"]
    check_experiment(settings)
    ((name, value),) = change.items()
    wrong = {key: of for key, of in settings.items() if key != name} | ({} if value is ... else change)
    with pytest.raises(ValueError, match=name if value != {"epochs": [1]} else "epochs"):
        check_experiment(wrong)


def test_numbers_that_no_database_holds_are_refused_before_training():
    for wrong in (lambda: WeightNoise(seed=2**63), lambda: Recipe(epochs=10**30), lambda: Recipe(batch_size=2**63)):
        with pytest.raises(ValueError, match="below 2\\^63"):
            wrong()


class Changing(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.in_place, self.body, self.unused = in_place, nn.Linear(784, 10), nn.Linear(4, 4)

    def forward(self, x):
        x = x.mul_(2).sub_(1) if self.in_place else x * 2 - 1
        return self.body(x.flatten(1))


def test_curvature_of_networks_that_change_their_images_or_leave_weights_unused():
    images = evaluation.sample(data.load_images("digits", "test"), 50)
    found = []
    for in_place in (False, True):
        model = Changing(in_place)
        masks.initialise(model, None, seed=0)
        found.append(curvature.evaluate(model, images, iterations=5))
    assert found[0] == found[1]


def test_outputs_that_are_no_tensor_or_have_no_gradient_are_named():
    images = evaluation.sample(data.load_images("digits", "test"), 5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    class Pair(nn.Module):
        def forward(self, x):
            return model(x), x

    class Silent(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return model(x)

    with pytest.raises(TypeError, match="gives a tuple; accepted: a tensor"):
        class_recall.evaluate(Pair(), images)
    with pytest.raises(ValueError, match="no gradient with respect to the images"):
        attacks.evaluate(Silent(), images, attacks=("fgsm",), epsilons=(0.1,))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_sparse_layer_in_half_precision(kind):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    kept = masks.random_masks(model, 1000, seed=0)
    masks.initialise(model, kept, seed=0)
    images = evaluation.sample(data.load_images("digits", "test"), 20)
    sparse = sparse_layers.sparse_network(model, kept)
    exact, rough = evaluation.logits(sparse, images), evaluation.logits(sparse.to(kind), images)
    assert rough.dtype == kind and (rough.float() - exact).abs().max() < 0.05


def shared_layer(act=None):
    """A network that uses one layer, or one activation, at two places."""
    middle, act = nn.Linear(32, 32), act or nn.ReLU()
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), act, middle, act, middle, act, nn.Linear(32, 10))


def test_an_activation_at_two_places_stays_at_both():
    act = nn.ReLU()
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), act, nn.Linear(64, 64), act, nn.Linear(64, 10))
    kept = masks.random_masks(model, 9000, seed=0)
    masks.initialise(model, kept, seed=0)
    images = evaluation.sample(data.load_images("digits", "test"), 50)
    expected = evaluation.logits(model, images)
    sparse = sparse_layers.sparse_network(copy.deepcopy(model), kept)
    assert [name for name, _ in sparse.named_modules(remove_duplicate=False)][1:] == list("012345")
    torch.testing.assert_close(evaluation.logits(sparse, images), expected)
    dense, found = sparse_layers.dense_network(sparse)
    torch.testing.assert_close(evaluation.logits(dense, images), expected)
    assert all(torch.equal(found[name], mask) for name, mask in kept.items())
    with pytest.raises(ValueError, match="layers share"):
        sparse_layers.sparse_network(shared_layer(), masks.random_masks(shared_layer(), 5000, seed=0))


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_measures_leave_a_layer_at_two_places_as_it_was(kind):
    model, images = shared_layer(), evaluation.sample(data.load_images("digits", "test"), 40)
    masks.initialise(model, None, seed=0)
    model.to(kind)
    before = copy.deepcopy(model.state_dict())
    for measure in (weight_noise, quantisation, attacks, curvature, calibration, class_recall):
        settings = dict(attacks=("fgsm",), epsilons=(0.1,)) if measure is attacks else {}
        measure.evaluate(model, images, **settings)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items()) and model[3] is model[5]
    assert isinstance(model[3].weight, nn.Parameter)


def test_noise_reaches_a_shared_layer_at_both_places():
    model, images = shared_layer(), evaluation.sample(data.load_images("digits", "test"), 20)
    masks.initialise(model, None, seed=0)
    apart = copy.deepcopy(model)
    apart[5] = copy.deepcopy(apart[3])
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    found = evaluation.logits(model, images, parameters={"3.weight": noise})
    expected = evaluation.logits(apart, images, parameters={"3.weight": noise, "5.weight": noise})
    torch.testing.assert_close(found, expected)


def test_autocast_around_a_measure_has_no_effect_and_inference_mode_is_named():
    model, images = shared_layer(), evaluation.sample(data.load_images("digits", "test"), 40)
    masks.initialise(model, None, seed=0)

    def numbers():
        found = [*weight_noise.evaluate(model, images, sigmas=(0.3,), draws=1), *curvature.evaluate(model, images)]
        return found + attacks.evaluate(model, images, attacks=("fgsm", "apgd"), epsilons=(0.1,))

    expected = numbers()
    with torch.autocast("cpu", torch.bfloat16):
        assert numbers() == expected
    for measure in (attacks, calibration, curvature):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="torch.inference_mode is on"):
            measure.evaluate(model, images)
    with pytest.raises(ValueError, match="give its .module"):
        evaluation.evaluate(nn.DataParallel(model), images)


def test_a_report_names_a_network_that_returns_a_tuple_or_refuses_images():
    class Wrapped(nn.Module):
        def __init__(self, forward):
            super().__init__()
            self.layer, self.answer = nn.Linear(784, 10), forward

        def forward(self, images):
            return self.answer(self.layer(images.flatten(1)))

    images = evaluation.sample(data.load_images("digits", "test"), 30)
    for answer in (lambda y: (y,), lambda y: [y], lambda y: {"logits": y}):
        with pytest.raises(ValueError, match="network 'odd' answers 2 images with"):
            report.report({"odd": Wrapped(answer)}, images, quick=True)
