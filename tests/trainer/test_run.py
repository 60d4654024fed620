"""A whole run on one rank, in this process."""

import json

import pytest
import torch

from pypar.trainer.main import main

from .helpers import curve, rows


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_writes_everything_it_promises(options, tmp_path, capsys):
    assert main([*options, "--prompt", "line 1 of"]) == 0
    run = tmp_path / "runs" / "config"
    train = [row for row in rows(run) if row["split"] == "train"]
    val = [row for row in rows(run) if row["split"] == "val"]
    assert [row["step"] for row in train] == list(range(1, 11)) and [row["step"] for row in val] == [0, 5, 10]
    assert val[-1]["loss"] < val[0]["loss"] and train[-1]["tokens"] == 10 * 6 * 32
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000005", "step-00000010"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    assert (run / "sample.txt").read_text().startswith("line 1 of")
    out = capsys.readouterr()
    assert "step 10/10  loss" in out.out and "validation loss" in out.out and not out.err


def test_a_second_run_gets_a_folder_of_its_own(options, tmp_path):
    quick = [*options, "--steps", "1", "--sample-tokens", "0"]
    assert main(quick) == main(quick) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["config", "config-2"]
    assert curve(tmp_path / "runs" / "config") == curve(tmp_path / "runs" / "config-2"), "same seed, same run"


def test_checkpoint_is_a_saved_model(options, tmp_path):
    from transformers import AutoModelForCausalLM

    assert main([*options, "--out", "run"]) == 0
    folder = tmp_path / "run" / "checkpoints" / "step-00000010"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.transformer.wte.weight.shape == (257, 32)
    # The loss of a new run that starts from it goes on where the first one ended.
    assert main([*options, "--model", str(folder), "--out", "second", "--steps", "1"]) == 0
    assert rows(tmp_path / "second")[0]["loss"] == pytest.approx(rows(tmp_path / "run")[-1]["loss"], rel=1e-5)


def test_bfloat16_keeps_float32_weights(options, tmp_path):
    from safetensors.torch import load_file

    assert main([*options, "--dtype", "bfloat16", "--out", "run", "--steps", "4"]) == 0
    assert main([*options, "--dtype", "float32", "--out", "exact", "--steps", "4"]) == 0
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    losses = [rows(tmp_path / name)[-1]["loss"] for name in ("run", "exact")]
    # bfloat16 has 8 bits of mantissa; the loss is a mean over hundreds of tokens.
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_resume_on_other_data_times_still_works(options, tmp_path, text):
    assert main([*options, "--out", "run"]) == 0
    for path in text.iterdir():
        path.touch()
    assert main(["--resume", "run", "--steps", "12"]) == 0
    assert [row["step"] for row in rows(tmp_path / "run") if row["split"] == "val"] == [0, 5, 10, 12]


def test_resume_continues_the_newest_run_of_the_folder(options, tmp_path):
    assert main(options) == 0
    assert main(["--resume", "--steps", "11"]) == 0
    state = json.loads((tmp_path / "runs/config/checkpoints/step-00000011/state.json").read_text())
    assert state["step"] == 11 and state["position"] == 66
