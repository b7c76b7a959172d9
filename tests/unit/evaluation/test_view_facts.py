"""What a sample's views show before training: counted by definition on images made for it."""

from __future__ import annotations

import torch

from simclr_ray.evaluation.label_free import pair_scores
from simclr_ray.evaluation.online import project, weight_norm
from simclr_ray.evaluation.view_facts import view_facts, view_marks
from simclr_ray.nn.batchnorm import GlobalBatchNorm


def drawn(num: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, 6, 6), dtype=torch.uint8, generator=generator)


def test_equal_and_blank_views_are_counted_by_image() -> None:
    images, a, b = drawn(8), drawn(8, 1), drawn(8, 2)
    b[:3] = a[:3]
    a[5:], b[5:] = 7, 9  # of one color each, and not the same
    facts = view_facts(view_marks(images, (a, b)), 4)
    assert facts.equal_views == 3 / 8
    assert facts.blank_views == 3 / 8
    assert facts.copied_images == 0
    assert view_marks(images[:0], (a[:0], b[:0])).shape == (0, 3)


def test_an_image_is_copied_where_a_batch_is_to_hold_another_of_it() -> None:
    """Of 101 images ten are equal: nine of the hundred others, so one in a batch of 13, not 12."""
    images = drawn(101)
    images[:10] = images[0]
    marks = view_marks(images, (drawn(101, 1), drawn(101, 2)))
    assert view_facts(marks, 13).copied_images == 10 / 101
    assert view_facts(marks, 12).copied_images == 0
    parts = torch.cat(
        [view_marks(images[r], (images[r], images[r])) for r in (slice(40), slice(40, None))]
    )
    assert torch.equal(parts[:, 0], marks[:, 0])  # ranks mark their own


def test_margin_and_top1_are_those_of_all_pairs_written_out() -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(10, 5, generator=generator)
    b = a + torch.randn(10, 5, generator=generator)
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    own = cosines.diagonal()
    others = cosines[~torch.eye(10, dtype=torch.bool)]
    scores = pair_scores(a, b, 4)
    assert abs(scores.margin - (own.mean() - others.mean()).item()) < 1e-6
    groups = [slice(0, 4), slice(4, 8), slice(8, 10)]
    hits = sum(
        int((cosines[g, g].argmax(1) == torch.arange(len(cosines[g]))).sum()) for g in groups
    )
    assert scores.top1 == hits / 10


def test_views_that_are_all_equal_find_no_partner() -> None:
    assert pair_scores(torch.ones(6, 3), torch.ones(6, 3), 6) == (0.0, 0.0)


def test_a_head_projects_by_running_statistics_and_is_left_as_it_was() -> None:
    dense = torch.nn.Linear(4, 3)
    head = torch.nn.Sequential(dense, GlobalBatchNorm(3)).double().train()
    h = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([project(head, row[None]) for row in h])
    assert torch.allclose(project(head, h), alone)
    assert all(module.training for module in head.modules())
    assert weight_norm(head) == dense.weight.detach().square().sum().sqrt().item()
