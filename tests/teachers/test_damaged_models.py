"""Diffusion models with an entry, a weight or a file changed: they open, or one line says why not.

Some hundreds of seeded changes in every family. Alone: python -m pytest
tests/teachers/test_damaged_models.py
"""

import json
import random
import shutil
import warnings

import pytest
import safetensors.torch
import torch
from data_helper import INTERNAL
from diffusers_helper import tiny_ddpm, tiny_dit
from edm_helper import EDM_CONFIGS, random_edm
from flow_helper import jit_tensors, sit_tensors, tiny_vae

from common import UserError
from teachers import jit, sit
from teachers.load import load_diffusion

VALUES = [
    None, True, -1, 0, 1, 2, 3, 7, 64, 10**6, 10**12, 0.5, -0.5, 1e30, float("nan"), float("inf"),
    "", "x", "8", "silu\nx", "y" * 500, [], [8], [8, 8], [8, 16], [16, 8, 4], ["x"], [None], [[8]],
    {}, {"a": 1},
]  # fmt: skip
ADDED = ["quantization_config", "_class_name", "kind", "dtype", "torch_dtype", "unknown", "init"]


def converted_edm(folder):
    folder.mkdir()
    tensors = random_edm("vp", torch.float32).state_dict()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(EDM_CONFIGS["vp"]))


def converted_flows(folder):
    tiny_vae(folder / "vae")
    torch.save(sit_tensors(depth=1), folder / "SiT.pt")
    torch.save(jit_tensors(), folder / "JiT.pth")
    sit.convert(str(folder / "SiT.pt"), str(folder / "vae"), str(folder / "sit"))
    jit.convert(str(folder / "JiT.pth"), str(folder / "jit"))


@pytest.fixture(scope="module")
def models(tmp_path_factory, diffusion_dir):
    folder = tmp_path_factory.mktemp("models")
    tiny_ddpm(folder / "ddpm", variance_type="learned_range")
    tiny_dit(folder / "dit")
    converted_edm(folder / "nvlabs")
    converted_flows(folder)
    (folder / "edm").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(f"{diffusion_dir}/{name}", folder / "edm")
    return folder


def change_settings(path, rng):
    config = json.loads(path.read_text())
    entries = config
    if isinstance(config.get("init"), dict) and rng.random() < 0.7:
        entries = config["init"]
    names = sorted(entries)
    for _ in range(rng.choice([1, 1, 1, 2])):
        name = rng.choice([*names, rng.choice(ADDED)])
        action = rng.random()
        if action < 0.15:
            entries.pop(name, None)
        elif action < 0.3 and isinstance(entries.get(name), list):
            entries[name] = rng.choice([entries[name][:-1], entries[name] * 2, entries[name][::-1]])
        elif action < 0.4 and type(entries.get(name)) in (int, float):
            entries[name] = rng.choice([entries[name] * 2, entries[name] + 1, -entries[name]])
        else:
            entries[name] = rng.choice(VALUES)
    path.write_text(json.dumps(config))
    return str(entries)


def change_weights(path, rng):
    tensors = safetensors.torch.load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    action = rng.choice(["drop", "add", "rows", "flat", "dtype", "cut", "text", "bin", "none"])
    if action == "drop":
        del tensors[name]
    if action == "add":
        tensors["line\nbreak" * rng.choice([1, 100])] = tensor.clone()
    if action == "rows":
        tensors[name] = torch.cat([tensor, tensor])
    if action == "flat":
        tensors[name] = tensor.flatten()[:1].reshape(())
    if action == "dtype":
        kinds = [torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e4m3fn]
        tensors[name] = tensor.to(rng.choice(kinds))
    safetensors.torch.save_file(tensors, path)
    if action == "cut":
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    if action == "text":
        path.write_text(rng.choice(["", "version https://git-lfs.github.com/spec/v1\n", "{}"]))
    if action == "bin":
        path.unlink()
        made = rng.choice([{"state_dict": tensors}, list(tensors), {1: tensor}, 3, {name: "x"}])
        torch.save(made, path.with_suffix(".bin"))
    if action == "none":
        path.unlink()
    return f"{action} {name}"


def opened(folder):
    """The line that a model is refused with, None where it opens."""
    try:
        with warnings.catch_warnings(action="ignore"):
            load_diffusion(str(folder), "cpu")
    except UserError as error:
        return str(error).replace(str(folder), "")
    return None


@pytest.mark.parametrize("family", ["ddpm", "dit", "nvlabs", "edm", "sit", "jit"])
def test_changed_models_open_or_are_one_line(family, models, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(models / family, folder)
    assert opened(folder) is None
    rng = random.Random(0)
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors"))
    lines = []
    bad = []
    for _ in range(75):
        path = rng.choice(paths)
        whole = path.read_bytes()
        change = (change_settings if path.suffix == ".json" else change_weights)(path, rng)
        line = opened(folder)
        lines.append(line)
        if line and ("\n" in line or len(line) > 300 or INTERNAL.search(line)):
            bad.append((change[:200], line))
        path.with_suffix(".bin").unlink(missing_ok=True)
        path.write_bytes(whole)
    assert not bad, bad[:5]
    refused = sum(line is not None for line in lines)
    assert 15 < refused < 75  # changes of every kind: some do no harm
    assert opened(folder) is None
