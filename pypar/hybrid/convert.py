"""pypar convert: a checkpoint of pypar.save into a Hugging Face folder (safetensors), and back. Needs no ranks."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader

from pypar.atomic import sync
from pypar.hybrid import folder
from pypar.hybrid.checkpoint import read_tensors, save
from pypar.hybrid.together import CheckpointError, reason
from pypar.zero.state import MASTER

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
USAGE = """\
examples:
  pypar convert runs/ckpt llama-trained            a checkpoint -> safetensors and config.json, for from_pretrained
  pypar convert runs/ckpt out --dtype bfloat16     the weights rounded to bfloat16
  pypar convert ./Llama-3.2-1B start               a Hugging Face folder -> a checkpoint, for pypar.load(path, model)

SOURCE is looked at: a folder with the manifest.json of pypar.save is a checkpoint, one with config.json and
*.safetensors is a Hugging Face folder. A checkpoint made from one has weights alone: load it without an optimizer.
From a checkpoint at most one file of weights is in memory at a time; from a Hugging Face folder, the model."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pypar convert",
        description="Turn a checkpoint of pypar.save into a Hugging Face folder, or a Hugging Face folder into one.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint, or a Hugging Face folder")
    parser.add_argument("target", metavar="TARGET", help="the folder to write")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="of the weights that are written; default as they are. float32 takes the masters of a bfloat16 run",
    )
    parser.add_argument(
        "--max-file-gb",
        type=float,
        default=5.0,
        metavar="GB",
        help="size of a file of weights in a Hugging Face folder; default %(default)g",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET, where it is not empty")
    args = parser.parse_args(argv)
    source, target, dtype = Path(args.source), Path(args.target), DTYPES.get(args.dtype or "")
    try:
        if not args.max_file_gb > 0:
            raise CheckpointError(f"--max-file-gb {args.max_file_gb:g} must be above 0")
        if target.exists() and (not target.is_dir() or any(target.iterdir())) and not args.overwrite:
            raise CheckpointError(f"{target} is there already; give another folder, or --overwrite")
        if target.resolve() == source.resolve():
            raise CheckpointError("SOURCE and TARGET are the same folder")
        if (source / folder.MANIFEST).is_file() or not (source / "config.json").is_file():
            to_hugging_face(source, target, dtype, int(args.max_file_gb * 1e9))
        else:
            from_hugging_face(source, target, dtype)
    except (CheckpointError, OSError, ValueError, ImportError) as error:
        print(f"pypar convert: error: {reason(error)}", file=sys.stderr)
        return 2
    return 0


def to_hugging_face(source: Path, target: Path, dtype: torch.dtype | None = None, file_bytes: int = 5 * 10**9) -> None:
    """Raises CheckpointError; then the target is as it was."""
    from safetensors.torch import save_file

    manifest = folder.read_manifest(source)
    data = source / manifest["data"]
    total = sum(each["bytes"] for each in manifest["files"].values())
    _say(f"checking {len(manifest['files'])} files of {source}, {total / 1e9:.2f} GB")
    folder.check_files(data, manifest["files"], 0, 1)
    reader = FileSystemReader(data)
    metadata = reader.read_metadata()
    stored: dict[str, Any] = dict(metadata.state_dict_metadata)
    kinds: dict[str, tuple[str, torch.Size, torch.dtype]] = {}  # name in the file: name there, shape, dtype
    for full in stored:
        if full.startswith("model."):
            name, found = full.removeprefix("model."), stored[full].properties.dtype
            wanted = dtype if dtype is not None and found.is_floating_point else found
            master = f"optimizer.state.{name}.{MASTER}"
            kinds[name] = (master if wanted == torch.float32 and master in stored else full, stored[full].size, wanted)
    files = list(_files(kinds, file_bytes))
    num_bytes = sum(_bytes(kind) for kind in kinds.values())
    aside = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        where: dict[str, str] = {}
        done = 0
        for number, names in enumerate(files, 1):
            is_one = len(files) == 1
            file = "model.safetensors" if is_one else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {name: torch.empty(kinds[name][1], dtype=kinds[name][2]) for name in names}
            read_tensors(reader, metadata, {kinds[name][0]: tensor for name, tensor in tensors.items()})
            save_file(tensors, aside / file, metadata={"format": "pt"})
            where |= {name: file for name in names}
            done += sum(_bytes(kinds[name]) for name in names)
            _say(f"{file}: {len(names)} tensors; {_progress(done, num_bytes)}")
        if len(files) > 1:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(where.items()))}
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        if (data / folder.CONFIG).is_file():
            config = json.loads((data / folder.CONFIG).read_text())
            floats = {str(kind[2]).removeprefix("torch.") for kind in kinds.values() if kind[2].is_floating_point}
            if len(floats) == 1:
                config.pop("torch_dtype", None)
                config["dtype"] = floats.pop()
            (aside / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
        else:
            _say("no config.json: the checkpoint's model had no config")
        for path in aside.iterdir():
            sync(path)
        _replace(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _say(f"wrote {target}")


def from_hugging_face(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Raises CheckpointError for a folder that lacks weights of its model."""
    import transformers

    config = json.loads((source / "config.json").read_text())
    names = [name for name in config.get("architectures") or () if hasattr(transformers, name)]
    kind: Any = getattr(transformers, names[0]) if names else transformers.AutoModelForCausalLM
    _say(f"reading {source} as {kind.__name__}")
    model, info = kind.from_pretrained(source, dtype=dtype or "auto", output_loading_info=True, local_files_only=True)
    missing = sorted(info["missing_keys"]) + sorted(str(each) for each in info["mismatched_keys"])
    if missing:
        raise CheckpointError(f"{source} has not all weights of {kind.__name__}: no '{missing[0]}'")
    parameters = list(model.parameters())
    num_bytes = sum(p.numel() * p.itemsize for p in parameters)
    _say(f"writing {len(parameters)} parameters, {num_bytes / 1e9:.2f} GB")
    save(target, model)
    _say(f"wrote {target}")


def _files(kinds: dict[str, tuple[str, torch.Size, torch.dtype]], most_bytes: int) -> Iterator[list[str]]:
    """Names, file by file."""
    mine: list[str] = []
    size = 0
    for name, kind in sorted(kinds.items()):
        if mine and size + _bytes(kind) > most_bytes:
            yield mine
            mine, size = [], 0
        mine.append(name)
        size += _bytes(kind)
    if mine:
        yield mine


def _bytes(kind: tuple[str, torch.Size, torch.dtype]) -> int:
    return kind[1].numel() * kind[2].itemsize


def _replace(aside: Path, target: Path) -> None:
    old = target.with_name(f".old-{target.name}-{os.getpid()}")
    if target.exists():
        target.rename(old)
    aside.rename(target)
    sync(target.parent)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)


def _progress(done: int, total: int) -> str:
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {100 * done / max(1, total):.0f} %"


def _say(text: str) -> None:
    print(text, flush=True)
