"""What users of neighbouring projects met, each kind with the test that tries it here; the last ones are in this file.

What they met with networks of their own (frozen, unused, tied and emptied layers) is tried in the chapters of part 2.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_nb.networks.training import Recipe
from sparse_nb.runs.attempts import lease
from sparse_nb.runs.store import Store
from sparse_nb.study.experiments import Clean, Experiment
from sparse_nb.sweep import sweep

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
