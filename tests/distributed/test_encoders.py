"""Encoders of timm and torchvision: two processes train what one does, with dropout and drop path.

Narrow ones; the whole ones of the README are in `tests/long/test_whole_encoders.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_ray.config.experiment import Experiment
from simclr_ray.distributed.spawn import spawn
from simclr_ray.nn.build import build_model
from simclr_ray.nn.stochastic import keyed_layers
from simclr_ray.storage import checkpoint
from simclr_ray.train.encoder_check import check_encoder
from tests.distributed.encoder_ranks import (
    STEPS,
    distances,
    experiment,
    go_on,
    prepared,
    state_of,
    train_steps,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TOLERANCE = 1e-9  # float64 rounding over the depth of the network; what is measured is 1e-12
DROPS = {"drop_rate": 0.1, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.4}
VIT = {
    "name": "timm",
    "model": "vit_small_patch16_224",
    "options": {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, **DROPS},
    "freeze_patch_embedding": True,
}
CASES: dict[str, dict[str, Any]] = {
    "resnet50 of timm": {
        "name": "timm",
        "model": "resnet50",
        "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
    },
    "mobilenet of timm": {  # batch norm with its activation in one layer
        "name": "timm",
        "model": "mobilenetv3_small_050",
        "options": {"drop_path_rate": 0.3},
    },
    "resnet50 of torchvision": {
        "name": "torchvision",
        "model": "resnet50",
        "options": {"width_per_group": 4},
    },
    "vit": VIT,
    "vit in groups": VIT,
    "convnext": {
        "name": "timm",
        "model": "convnext_tiny",
        "options": {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16], "drop_path_rate": 0.4},
    },
    "swin": {  # attention in windows: several rows an image
        "name": "timm",
        "model": "swin_tiny_patch4_window7_224",
        "options": {
            **{"embed_dim": 12, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 2]},
            **{"img_size": 32, "window_size": 4, **DROPS},
        },
    },
}


def case(name: str) -> Experiment:
    groups = {"batch_norm": {"group_size": 5}} if name == "vit in groups" else {}
    return experiment(CASES[name], 32, 10, **groups)


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, str]]:
    """Return how far two processes are from one; one spawn for all."""
    folder = tmp_path_factory.mktemp("reference")
    cases: dict[str, tuple[Experiment, str]] = {}
    for name in CASES:
        path = folder / f"{len(cases)}.pt"
        torch.save(state_of(*train_steps(0, case(name))[:2]), path)
        cases[name] = (case(name), str(path))
    ranks = spawn(distances, 2, cases)
    return {name: max(rank[name] for rank in ranks) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(
    name: str, differences: dict[str, tuple[float, str]]
) -> None:
    assert differences[name][0] < TOLERANCE, differences[name]


def test_the_check_sees_what_is_dropped() -> None:
    for name in CASES:
        check_encoder(case(name))  # which refuses what draws otherwise
    for name in ("vit", "convnext", "swin", "mobilenet of timm"):
        assert keyed_layers(build_model(case(name))), name
    tree = CASES["vit"]
    still = {**tree, "options": {**tree["options"], **dict.fromkeys(DROPS, 0.0)}}
    first = train_steps(0, experiment(still, 32, 10))[0]
    assert first[0] != train_steps(0, case("vit"))[0][0]


def test_groups_without_joint_statistics_train_what_one_pass_does() -> None:
    plain = {"head": {"name": "linear", "dim": 8, "batch_norm": False}}
    one = state_of(*train_steps(0, experiment(VIT, 32, 10, **plain))[:2])
    cached = experiment(VIT, 32, 10, **plain, batch_norm={"group_size": 5})
    for name, tensor in state_of(*train_steps(0, cached)[:2]).items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-9, atol=1e-12)


def test_a_run_that_goes_on_from_a_checkpoint_is_the_one_that_was_not_interrupted(
    tmp_path: Path,
) -> None:
    run = case("vit")
    _, whole, _ = train_steps(0, run)
    model, optimizer = prepared(run)
    patches = {k: v.clone() for k, v in model.state_dict().items() if "patch_embed" in k}
    go_on(0, run, model, optimizer, range(1))
    checkpoint.write(tmp_path / checkpoint.new_name(1), 1, checkpoint.pack(model, optimizer), {})
    (folder,) = tmp_path.iterdir()
    again, fresh = prepared(run)
    checkpoint.unpack(checkpoint.read(folder).tensors, again, fresh)
    go_on(0, run, again, fresh, range(1, STEPS))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    assert patches  # frozen, and in the checkpoint all the same
    for name, tensor in patches.items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
