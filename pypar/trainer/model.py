"""From --model to a module with weights. Nothing is ever downloaded."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pypar.hybrid.plan import Plan
from pypar.trainer.errors import TrainError, reason
from pypar.trainer.presets import PRESETS

EXTRA = ("transformers", "tokenizers", "safetensors", "tensorboard", "matplotlib", "tqdm")
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
# Written by transformers about the file, not about the model.
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache")


# What pypar.tensor_parallel's errors advise, in the words of the command line.
_AS_OPTIONS = {
    "use tp = ": "use --tp ",
    "; give a plan: {pattern: style}": ": use --dp in place of --tp",
    "sequence_parallel=False": "--no-sequence-parallel",
    "sequence_parallel=True": "--sequence-parallel",
}


def require_extra() -> None:
    """Raises TrainError when the packages of pypar[train] are not installed."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise TrainError(f"{', '.join(missing)} not installed: pip install pypar[train]")


def _transformers() -> Any:
    """The module, quiet and offline."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def weights_folder(model: str) -> str | None:
    """The folder whose saved weights --model names, or None: random initial weights."""
    folder = Path(model)
    if model in PRESETS or not folder.is_dir():
        return None
    if any(folder.glob("*.safetensors")):
        return str(folder)
    if any(folder.glob("pytorch_model*.bin")):
        raise TrainError(
            f"--model {model}: weights are pickled (.bin), which can run code: convert them to safetensors"
        )
    return None


def own_tokenizer(model: str) -> str | None:
    """The tokenizer.json beside a saved model, if there is one."""
    path = Path(model) / "tokenizer.json"
    return str(path) if model not in PRESETS and path.is_file() else None


def describe(model: str, vocab_size: int, end: int, seq_len: int, dropout: float | None) -> dict[str, Any]:
    """The full configuration of --model as JSON values. Raises TrainError when it does not fit the data.

    vocab_size, end: of the tokens. A preset takes them over; a given config must be large enough.
    """
    transformers = _transformers()
    if model in PRESETS:
        values: dict[str, Any] = dict(PRESETS[model])
        context = next(name for name in CONTEXT_NAMES if name in values)
        values[context] = max(values[context], seq_len)
        values |= {"vocab_size": vocab_size, "bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
        config = transformers.AutoConfig.for_model(**values)
    else:
        config = _read_config(transformers, model)
    found = config.to_dict()
    if found.get("vocab_size", vocab_size) < vocab_size:
        raise TrainError(
            f"--model {model} has a vocabulary of {found['vocab_size']}, the tokens need {vocab_size}: "
            "give the model's own --tokenizer, or raise vocab_size in its config"
        )
    longest = next((found[name] for name in CONTEXT_NAMES if isinstance(found.get(name), int)), seq_len)
    if longest < seq_len:
        raise TrainError(f"--seq-len {seq_len} is longer than the {longest} positions of --model {model}")
    if dropout is not None:
        names = [name for name in found if name.endswith(("_pdrop", "dropout", "dropout_rate", "dropout_prob"))]
        if not names:
            raise TrainError(f"--model {model} has no dropout to set: leave out --dropout")
        found |= dict.fromkeys(names, dropout)
    return found


def same_model(one: dict[str, Any], other: dict[str, Any]) -> str:
    """ "" when both configurations are the same model, else the first difference: `hidden_size 192, not 256`."""
    for name in ["model_type", *sorted(one.keys() | other.keys())]:
        if name not in _NOT_THE_MODEL and one.get(name) != other.get(name):
            return f"{name} {one.get(name)}, not {other.get(name)}"
    return ""


def create(config: dict[str, Any], weights: str | None) -> nn.Module:
    """The module, on CPU, in float32. weights: a folder of safetensors, or None for random ones from torch's RNG."""
    transformers = _transformers()
    made = transformers.AutoConfig.for_model(**config)
    made.use_cache = False
    try:
        if weights is None:
            return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        return transformers.AutoModelForCausalLM.from_pretrained(
            weights, config=made, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except ValueError as error:
        raise TrainError(
            f"--model of type {config.get('model_type')} is no causal language model: {reason(error)}"
        ) from error
    except (OSError, RuntimeError) as error:
        raise TrainError(f"cannot load the weights in {weights}: {reason(error)}") from error


def check_tensor_parallel(name: str, config: dict[str, Any], plan: Plan) -> None:
    """Raises TrainError when the model can't be cut for plan.tp ranks. name: --model."""
    if plan.tp == 1:
        return
    from pypar.tensor_parallel import check_plan

    with torch.device("meta"):
        module = create(config, None)
    try:
        check_plan(module, plan.tp, plan.tp_plan, sequence_parallel=plan.sequence_parallel)
    except ValueError as error:
        why = reason(error, with_type=False)
        for said, option in _AS_OPTIONS.items():
            why = why.replace(said, option)
        raise TrainError(f"--tp {plan.tp} does not fit --model {name}: {why}") from error


def cuts_loss(config: dict[str, Any], plan: Plan) -> bool:
    """Whether tensor parallel can leave the logits cut for the loss."""
    if plan.tp == 1:
        return False
    from pypar.tensor_parallel import check_plan

    with torch.device("meta"):
        module = create(config, None)
    try:
        check_plan(module, plan.tp, plan.tp_plan, loss_parallel=True)
    except ValueError:
        return False
    return True


def _read_config(transformers: Any, model: str) -> Any:
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        near = difflib.get_close_matches(model, PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        if path.is_dir():
            raise TrainError(f"--model {model}: the folder has no config.json, so it is no saved model")
        raise TrainError(
            f"no model {model!r}: {hint}there are {', '.join(PRESETS)}, or the path of a config.json or a saved model"
        )
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict) or "model_type" not in values:
            raise ValueError("no model_type in it")
        return transformers.AutoConfig.for_model(**values)
    except Exception as error:
        raise TrainError(
            f"--model {model}: {file.name} is no config of a causal language model: {reason(error)}"
        ) from error
