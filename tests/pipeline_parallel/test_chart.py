"""pypar chart, and the table in the docs."""

import json
import re
from pathlib import Path

import pytest

from pypar.cli import main
from pypar.pipeline_parallel.chart import table
from pypar.pipeline_parallel.generators import make_schedule
from pypar.pipeline_parallel.simulate import Costs

DOCS = Path(__file__).parent.parent.parent / "docs" / "pipeline_parallel.md"


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures(tmp_path, capsys, ending):
    out = tmp_path / f"x.{ending}"
    command = ["chart", "--schedule", "zbv", "--pp", "4", "--micro-batches", "8", "--out", str(out)]
    assert main(command) == 0
    assert out.stat().st_size > 10_000
    assert "zbv: 4 ranks, 8 stages, 8 micro-batches; bubble 5.9 %, activations held up to 8" in capsys.readouterr().out


def test_a_rank_says_what_it_idles_and_holds(tmp_path, capsys):
    out = tmp_path / "x.svg"
    assert main(["chart", "--schedule", "1f1b", "--pp", "2", "--micro-batches", "2", "--out", str(out)]) == 0
    labels = re.findall(r"<!-- (rank .*?) -->", out.read_text())
    assert labels == ["rank 0: idle 33 %, holds 2", "rank 1: idle 33 %, holds 1"]
    assert main(["chart", "--schedule", "gpipe", "--pp", "2", "--micro-batches", "70", "--out", str(out)]) == 0


def test_traces_hold_every_action(tmp_path):
    out = tmp_path / "x.json"
    assert main(["chart", "--schedule", "interleaved", "--virtual-stages", "3", "--pp", "2", "--out", str(out)]) == 0
    events = [e for e in json.loads(out.read_text())["traceEvents"] if e["ph"] == "X"]
    schedule = make_schedule("interleaved", 2, 8, 6)
    assert sorted(e["name"] for e in events) == sorted(str(a) for row in schedule.actions for a in row)


def test_csv_out_and_in(tmp_path, capsys):
    assert main(["chart", "--schedule", "vhalf", "--pp", "2", "--csv"]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "mine.csv"
    path.write_text(text)
    assert main(["chart", "--from-csv", str(path), "--out", str(tmp_path / "mine.png")]) == 0
    path.write_text(text.replace("F", "G", 1))
    assert main(["chart", "--from-csv", str(path)]) == 2
    assert "line 1, column 1: '0G0' is no action" in capsys.readouterr().err


def test_wrong_input(capsys):
    assert main(["chart", "--schedule", "zbx"]) == 2
    assert "schedule 'zbx' is unknown; there are gpipe" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["chart", "--costs", "a"])
    for costs in ("1,nan", "0,0,0", "-1", "1,1,1,1,1"):
        with pytest.raises(SystemExit):
            main(["chart", f"--costs={costs}"])
        assert "give up to four times" in capsys.readouterr().err
    assert main(["chart", "--out", "/nowhere/x.png"]) == 2


@pytest.mark.parametrize(("p", "m"), [(4, 8), (4, 32)])
def test_the_docs_hold_the_table(p, m):
    assert table(p, m, Costs()) in DOCS.read_text()
