"""Plant one mistake at a time in a copy of the checkout: do the tests notice it?

    python tests/bench/faults.py                             # all; each costs the time of the suite at most
    python tests/bench/faults.py --only "momentum off" "pixels truncated" --tests tests/test_attack.py

faults.json holds {name: [file, old text, new text]}. A fault whose old text does not stand in its file exactly once
cannot be planted and counts as unnoticed; one with which the tests do not end is noticed by the time limit. The copy's
tests must pass without a fault. Exit code 1 if any is unnoticed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAULTS = json.loads(Path(__file__).with_name("faults.json").read_text(encoding="utf-8"))
TIME_LIMIT = 15 * 60  # seconds for the tests of one fault
LEFT_OUT = shutil.ignore_patterns("runs", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache")


def first_failure(checkout, tests):
    """Return the first test that fails in a checkout, None if all pass; exit if pytest ran none."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}  # a stale .pyc could hold the fault before
    command = [sys.executable, "-m", "pytest", "-x", "-q", *tests]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, cwd=checkout, env=environment, **options)
    try:
        printed, _ = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return f"the time limit of {TIME_LIMIT / 60:.0f} minutes"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # pytest, its workers and what the tests have started
    failed = [line for line in printed.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if process.returncode and not failed:
        sys.exit(f"{' '.join(command)} ended with exit code {process.returncode}:\n{printed}")
    return failed[0].split(" - ")[0].split(" ", 1)[1] if process.returncode else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="NAME", help="these faults")
    parser.add_argument("--tests", nargs="+", default=[], metavar="FILE", help="test files; the whole suite without it")
    args, unnoticed = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        checkout = shutil.copytree(ROOT, Path(folder, "checkout"), symlinks=True, ignore=LEFT_OUT)
        if failure := first_failure(checkout, args.tests):
            sys.exit(f"{failure} without a fault: mend that first")
        for name in args.only:
            (file, old, new), failure = FAULTS[name], None
            text = (checkout / file).read_text(encoding="utf-8")
            verdict = f"CANNOT BE PLANTED: its text stands in {file} {text.count(old)} times"
            if text.count(old) == 1:
                (checkout / file).write_text(text.replace(old, new), encoding="utf-8")
                failure = first_failure(checkout, args.tests)
                (checkout / file).write_text(text, encoding="utf-8")
                verdict = f"noticed by {failure}" if failure else "UNNOTICED"
            unnoticed += [] if failure else [name]
            print(f"{name:50} {verdict}", flush=True)
    print(f"{len(unnoticed)} of {len(args.only)} unnoticed: {', '.join(unnoticed) or 'none'}")
    return bool(unnoticed)


if __name__ == "__main__":
    sys.exit(main())
