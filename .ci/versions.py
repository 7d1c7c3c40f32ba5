"""What `make versions` runs: did code that shapes numbers change, and did the numbers change with it?

The golden cases are computed. Where they agree with the golden ones, the lock of the versions is renewed for the code
as it stands; where they do not, the
version to raise is named. Where a version was raised, its cases are computed and kept as the new golden ones.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/golden"))

import cases  # noqa: E402
from sparse_nb.study import versions  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--unwatched", metavar="REASON", help="renew what cannot be run here (CUDA), and keep the reason in the lock"
    )
    parser.add_argument(
        "--add-machine",
        action="store_true",
        help="list the bits of this machine, whose losses agree, beside those of others",
    )
    options = parser.parse_args()
    lock_file = versions.lock_file()
    lock, golden = json.loads(lock_file.read_text(encoding="utf-8")), cases.listed()
    raised = {key for key, version in versions.versions_now().items() if lock.get(key, {}).get("version") != version}
    wrong, bits = {}, 0
    for name in cases.NAMES:
        found = cases.compute(name)
        key = found["version"]
        if key in raised or name not in golden:
            golden[name] = {"version": key, "losses": found["losses"], "bits": {cases.kind_for(name): found["bits"]}}
        elif difference := cases.compare(name, found, golden):
            wrong.setdefault(key, []).append(difference)
        elif cases.kind_for(name) in golden[name]["bits"]:
            bits += 1
        elif options.add_machine:
            golden[name]["bits"][cases.kind_for(name)] = found["bits"]
    if wrong:
        for key, differences in wrong.items():
            print(*differences, sep="\n")
            constant = "versions.TRAINING" if key == "training" else f"versions.MEASURES[{key!r}]"
            now = versions.versions_now()[key]
            print(f"The numbers of {key} have changed. Undo that, or raise {constant} from {now!r} and run this again.")
        return 1
    try:
        renewed = versions.renewed_lock(lock, options.unwatched)
    except ValueError as error:
        sys.exit(f"make versions: {error}")
    if renewed != lock:
        lock_file.write_text(json.dumps(renewed, indent=1) + "\n", encoding="utf-8")
    cases.BITS.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    checked = (
        f"{bits} of {len(cases.NAMES)} golden cases agree bit for bit"
        if bits
        else f"losses of {len(cases.NAMES)} golden cases agree to {cases.TOLERANCE:g}"
    )
    renamed = f"; made again for raised versions: {', '.join(sorted(raised))}" if raised else ""
    print(f"{checked} ({cases.machine()}){renamed}; the lock was {'renewed' if renewed != lock else 'in step'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
