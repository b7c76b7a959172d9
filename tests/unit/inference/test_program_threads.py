"""Programs are read by several threads at once, as when two promotions meet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from simclr_ray.inference.export_formats import program_weights, write_program


def test_threads_that_read_programs_at_once_all_get_the_weights(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    path = tmp_path / "program.pt2"
    write_program(path, network, torch.zeros(2, 3, 8, 8))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(program_weights, [path] * 24))
    for weights in read:
        assert all(torch.equal(weights[name], t) for name, t in network.state_dict().items())
