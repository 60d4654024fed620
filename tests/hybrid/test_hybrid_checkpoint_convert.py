"""pypar convert: from a plan's checkpoint to what transformers loads, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hybrid.hybrid_common import make_batches, make_model

import pypar
from pypar.cli import main
from pypar.testing import run_ranks

transformers = pytest.importorskip("transformers")


def _save(rank: int, world: int, path: str, plan: str) -> dict[str, torch.Tensor]:
    model, optimizer = pypar.parallelize(make_model("llama", layers=2, tied=True), plan, torch.optim.AdamW, lr=1e-2)
    model.train_step(model.local_batch(make_batches(1, 4)[0]))
    optimizer.step()
    pypar.save(path, model, optimizer)
    found = pypar.gather_state(model)
    if "bfloat16" in plan:
        states = pypar.gather_optimizer_state(model, optimizer)
        found |= {f"{name} master": each["master"] for name, each in states.items() if "master" in each}
    return {name: value.clone() for name, value in found.items()}


def _load(rank: int, world: int, path: str) -> dict[str, torch.Tensor]:
    model, _ = pypar.parallelize(make_model("llama", layers=2, tied=True), "pp=2 micro_batches=2", torch.optim.AdamW)
    pypar.load(path, model)
    return pypar.gather_state(model)


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # 2 heads of keys and values on 4 ranks: copies
    wanted = run_ranks(_save, 4, str(tmp_path / "ckpt"), "tp=4 micro_batches=2")[0]
    assert main(["convert", str(tmp_path / "ckpt"), str(tmp_path / "hf"), "--max-file-gb", "0.00005"]) == 0
    said = capsys.readouterr().out
    assert "checking" in said and "100 %" in said and f"wrote {tmp_path / 'hf'}" in said
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    ids = make_batches(1, 2)[0]["input_ids"]
    reference = make_model("llama", layers=2, tied=True)
    reference.load_state_dict(wanted)
    assert torch.equal(model.eval()(ids).logits, reference.eval()(ids).logits)
    model.save_pretrained(tmp_path / "theirs")  # as transformers writes it
    for source in ("hf", "theirs"):
        assert main(["convert", str(tmp_path / source), str(tmp_path / f"{source} back")]) == 0
        found = run_ranks(_load, 2, str(tmp_path / f"{source} back"))[0]
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_dtypes(tmp_path: Path):
    wanted = run_ranks(_save, 2, str(tmp_path / "ckpt"), "dp=2 zero=2 precision=bfloat16")[0]
    for dtype, name in ((torch.bfloat16, None), (torch.float32, "float32"), (torch.float16, "float16")):
        options = [] if name is None else ["--dtype", name]
        assert main(["convert", str(tmp_path / "ckpt"), str(tmp_path / "hf"), "--overwrite", *options]) == 0
        assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        for key, value in model.named_parameters():
            source = wanted[f"{key} master"] if dtype == torch.float32 else wanted[key]
            assert torch.equal(value, source.to(dtype)), (dtype, key)
    assert not list(tmp_path.glob(".*"))


def test_a_model_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = torch.nn.Linear(3, 2)
    pypar.save(tmp_path / "ckpt", model)
    assert main(["convert", str(tmp_path / "ckpt"), str(tmp_path / "out")]) == 0
    assert "no config.json" in capsys.readouterr().out
    from safetensors.torch import load_file

    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["weight"], model.weight) and torch.equal(found["bias"], model.bias)


def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_model("llama", layers=2).save_pretrained(tmp_path / "hf")
    pypar.save(tmp_path / "ckpt", torch.nn.Linear(3, 2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    shutil.copytree(tmp_path / "hf", tmp_path / "less")
    config = json.loads((tmp_path / "less" / "config.json").read_text())
    (tmp_path / "less" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    shutil.copytree(tmp_path / "ckpt", tmp_path / "cut")
    (tmp_path / "cut" / "data-000001" / "__0_0.distcp").write_bytes(b"")
    cases = [
        (["nothing", "out"], "there is no folder"),
        (["full", "out"], "has no manifest.json"),
        (["ckpt", "full"], "full is there already; give another folder, or --overwrite"),
        (["ckpt", "ckpt", "--overwrite"], "SOURCE and TARGET are the same folder"),
        (["ckpt", "out", "--max-file-gb", "0"], "must be above 0"),
        (["cut", "out"], "__0_0.distcp is damaged"),
        (["less", "out"], "has not all weights of LlamaForCausalLM: no 'model.layers.2."),
    ]
    for (source, target, *options), text in cases:
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), *options]) == 2
        said = capsys.readouterr().err
        assert "pypar convert: error: " in said and text in said, said
    assert not (tmp_path / "out").exists()


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    assert "Hugging Face folder" in text and "examples:" in text and "--dtype" in text
