"""Small parts: learning rate, parameter groups, random states, models, command line."""

import itertools
import json
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pypar import rng
from pypar.cli import main as pypar_main
from pypar.hybrid import Plan
from pypar.trainer import args, launch, model
from pypar.trainer.config import TrainConfig
from pypar.trainer.errors import TrainError
from pypar.trainer.optimizer import groups_of, learning_rate
from pypar.trainer.presets import PRESETS
from pypar.trainer.sample import generate


def test_learning_rate_warms_up_and_ends_low():
    config = TrainConfig(lr=1.0, steps=100, warmup=10, min_lr_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, rel=0.02)
    assert learning_rate(0, TrainConfig(lr=1.0, steps=1, warmup=10)) == 1.0


def test_no_weight_decay_on_norms_and_biases():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    groups = groups_of(list(module.named_parameters()), TrainConfig(weight_decay=0.5))
    decayed = {group["weight_decay"]: len(group["params"]) for group in groups}
    assert decayed == {0.5: 1, 0.0: 3}


def test_random_states_survive_json():
    device = torch.device("cpu")
    rng.seed_everything(1, 2)
    state = json.loads(json.dumps(rng.capture(device)))

    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), torch.randn(1).item()

    first = draw()
    assert draw() != first
    rng.restore(state, device)
    assert draw() == first


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = model.describe(name, 257, 256, 1500, None)
    longest = config.get("max_position_embeddings") or config["n_positions"]
    assert config["vocab_size"] == 257 and longest >= 1500
    module = model.create(config, None)
    parameters = sum(p.numel() for p in module.parameters()) / 1e6
    assert parameters < (30 if name == "llama-small" else 4)
    assert module(input_ids=torch.zeros(1, 5, dtype=torch.long)).logits.shape == (1, 5, 257)


def test_saved_model_is_loaded_with_its_weights(tmp_path):
    made = model.create(model.describe("gpt2-tiny", 257, 256, 32, None), None)
    made.save_pretrained(tmp_path / "saved")
    folder = str(tmp_path / "saved")
    assert model.weights_folder(folder) == folder
    loaded = model.create(model.describe(folder, 257, 256, 32, None), folder)
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(TrainError, match="convert them to safetensors"):
        model.weights_folder(str(tmp_path))


def test_dropout_is_set_everywhere():
    config = model.describe("gpt2-tiny", 257, 256, 32, 0.25)
    assert [config[name] for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")] == [0.25] * 3


def test_sample_forgets_what_is_older_than_the_context():
    module = model.create(model.describe("llama-tiny", 257, 256, 16, None), None)
    out = generate(module, list(range(40)), 30, 999, 16, 1.0, torch.device("cpu"), seed=1)
    assert len(out) == 30 and max(out) < 257
    assert out == generate(module, list(range(40)), 30, 999, 16, 1.0, torch.device("cpu"), seed=1)


def test_options_that_were_not_given_stay_out():
    given, resume, debug = args.parse(["--steps", "3", "--resume"])
    assert (given, resume, debug) == ({"steps": 3}, "latest", False)
    assert args.parse(["--data", "a", "b"])[0] == {"data": ("a", "b")}


def test_every_setting_has_an_option():
    with pytest.raises(SystemExit) as stopped:
        args.parse(["--help"])
    assert stopped.value.code == 0
    known = {action.dest for action in args.parser()._actions}
    assert set(TrainConfig().to_json()) - {"more_plan"} <= known


def test_a_plan_stands_for_its_options(tmp_path):
    plan = Plan(pp=2, dp=2, zero=3, schedule="zbv", micro_batches=8, order=("tp", "dp", "pp"))
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    for text in (str(plan), str(file)):
        given, _, _ = args.parse(["--plan", text])
        assert TrainConfig.from_json(given).plan() == plan
    given, _, _ = args.parse(["--plan", "dp=2 micro_batches=3", "--zero", "1"])
    assert TrainConfig.from_json(given).plan() == Plan(dp=2, zero=1, micro_batches=3)
    for text, says in (
        ("zero=4", "--plan zero=4: plan zero=4: there are 0 (none), 1, 2 and 3"),
        ("no.json", "No such file"),
        ("dp=2 zero=1 precision=bfloat16", "use --dtype bfloat16"),
        ("pp=2 split=[1,3]", "split is auto or balanced here"),
    ):
        with pytest.raises(TrainError) as error:
            args.parse(["--plan", text])
        assert says in str(error.value)


def test_command_line_of_pypar(capsys):
    assert pypar_main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pypar 0.")
    assert pypar_main([]) == 0
    assert "train" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        pypar_main(["trian"])
    assert "no subcommand 'trian'" in capsys.readouterr().err


def test_the_rank_that_was_killed_is_named_not_those_that_were_ended_for_it():
    def failure(number: signal.Signals) -> SimpleNamespace:
        return SimpleNamespace(message="", exitcode=-number, timestamp=5, signal_name=lambda: number.name)

    failures = {0: failure(signal.SIGTERM), 1: failure(signal.SIGKILL), 2: failure(signal.SIGTERM)}
    assert "rank 1 was killed by SIGKILL" in str(launch._cause(failures))
    assert "rank 0 was killed by SIGTERM" in str(launch._cause({0: failures[0]}))
