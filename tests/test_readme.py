"""README.md says what the records hold, cell by cell, and its commands have flags that there are."""

import importlib
import json
import re
import shlex

import pytest
from conftest import ROOT, SCRIPTS

import evaluate

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDS = ROOT / "tests" / "records"


def tables():
    """The tables of README.md: [[cells of a line]], without the line under the header."""
    found = re.findall(r"(?:^\|.*\|\n)+", README, re.MULTILINE)
    lines = [[line.strip("|\n").split("|") for line in table.splitlines(True)] for table in found]
    return [[[cell.strip() for cell in line] for line in table if "---" not in line[0]] for table in lines]


def cells_of(name, row):
    """README's line of a row: cosine and R@1 in each column, with the range of the seeds where there are several."""
    cells = [name]
    bounds = {"white_box_similarity": row["not_converged"], "white_box_recall_i2t@1": row["recall_not_converged"]}
    for kind in ("clean", "transfer", "white_box"):
        for figure, form in ((f"{kind}_similarity", "{:.3f}"), (f"{kind}_recall_i2t@1", "{:.0%}")):
            cell = "<= " * bounds.get(figure, False) + form.format(row[figure])
            seeds = [seed[figure] for seed in row["per_seed"].values()]
            if kind == "white_box" and seeds:
                cell += f" ({form.format(min(seeds))} to {form.format(max(seeds))})"
            cells.append(cell)
    return cells


def test_the_reports_figures_are_those_beside_ours():
    expected = [["defence", "clean", "transfer", "improvement"]]
    for name, (clean, adversarial, gain) in evaluate.REPORT.items():
        name = evaluate.REPORT_NAMES.get(name, name)
        expected.append([name, f"{clean:.4f}", f"{adversarial:.4f}", evaluate.percent(gain)])
    assert tables()[0] == expected


@pytest.mark.parametrize(("position", "file"), [(1, "table.json"), (3, "fronts.json")])
def test_a_table_is_its_record(position, file):
    record = json.loads((RECORDS / file).read_text(encoding="utf-8"))
    expected = [cells_of(name, row) for name, row in record["rows"].items()]
    if file == "fronts.json":  # has the same defences in front of MAT, too
        expected = [cells for cells in expected if not cells[0].lower().startswith("mat")]
    assert tables()[position][1:] == expected
    assert f"commit `{record['commit']}`" in README and f"n = {record['n']}" in README


def test_every_record_is_named_with_its_commit_and_command():
    text = (RECORDS / "README.md").read_text(encoding="utf-8")
    assert not [file.name for file in RECORDS.glob("*.json") if file.name not in text]


def test_every_command_has_flags_that_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").touch()
    text = re.sub(r"\$\(cat (\S+)\)", lambda match: " ".join((ROOT / match[1]).read_text().split()), README)
    commands = re.findall(r"^ {4}python (\w+)\.py(.*)$", text.replace("\\\n", " "), re.MULTILINE)
    assert {script for script, _ in commands} == {*SCRIPTS}
    for script, words in commands:
        importlib.import_module(script).parse_args(shlex.split(words))
