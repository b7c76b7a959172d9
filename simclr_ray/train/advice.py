"""What is likely wrong with a run, each in a sentence that ends in what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from simclr_ray.config.wording import MIB, counted
from simclr_ray.distributed.machine import machine_memory
from simclr_ray.distributed.ray_address import names_cluster
from simclr_ray.evaluation.scores import PIXELS, TRAINED, Score
from simclr_ray.nn.build import build_loss
from simclr_ray.train.resolve import ResolvedExperiment

FEW_STEPS = 200  # the demo needs 800; at 200 its encoder is hardly better than untrained
SHORT_WARMUP = 5  # steps; LARS at a peak rate above 1 diverges or collapses without
USUAL_TEMPERATURES = (0.05, 1.0)  # that the paper tried
NEAR_CHANCE = 0.9  # of the loss without learning


def advise_before_start(resolved: ResolvedExperiment) -> list[str]:
    """Return what is likely to go wrong, by the config alone."""
    config, total, warmup = resolved.config, resolved.total_steps, resolved.warmup_steps
    advice = []
    if total < FEW_STEPS and not config.init.freeze:  # which takes one step
        advice.append(f"{_few(total)}: raise epochs, or lower batch_size")
    peak = config.peak_learning_rate()
    if peak >= 1 and warmup < SHORT_WARMUP and total > 2 * SHORT_WARMUP:
        advice.append(
            f"warm-up of {counted(warmup, 'step')} to a rate of {peak:g} is abrupt: "
            f"schedule.warmup_steps={max(SHORT_WARMUP, total // 10)}, or a lower learning_rate"
        )
    if warmup >= total:
        advice.append("warm-up is as long as the run: the rate never reaches its peak")
    low, high = USUAL_TEMPERATURES
    temperature = config.loss.fixed_temperature
    if temperature and not low <= temperature <= high:
        advice.append(
            f"loss.temperature={temperature:g} is outside {low:g} to {high:g}, where normalised "
            "embeddings learn (Table 5): 0.1 to 0.5 is usual"
        )
    if resolved.source.image_root and resolved.source.num_rows == config.data.limit:
        advice.append(
            f"data.limit={config.data.limit} takes the first images by name, and of folders that "
            "are classes the first ones: `prepare` shuffles them"
        )
    every, saved = config.checkpoint.every_steps, config.checkpoint.every_epochs
    if every >= total or (saved > config.epochs and not every):
        key = f"every_steps={every}" if every >= total else f"every_epochs={saved}"
        advice.append(f"checkpoint.{key} is longer than the run: a kill loses all that is trained")
    return advice


def _few(total: int) -> str:
    return f"{counted(total, 'step')} {'is' if total == 1 else 'are'} few to learn from"


def advise_after_scores(
    resolved: ResolvedExperiment, scores: Sequence[Score], metrics: Mapping[str, float]
) -> str:
    """Return why the encoder is no better than raw pixels, and what to change; else nothing.

    Args:
        resolved: The run.
        scores: Its score table.
        metrics: The last value of each metric that it has logged.
    """
    rows = {score.name: score for score in scores}
    trained, pixels = rows.get(TRAINED), rows.get(PIXELS)
    if trained is None or pixels is None:
        return ""
    shared = [m for m in trained.accuracies if m in pixels.accuracies]
    if not shared or any(trained.accuracies[m] > pixels.accuracies[m] for m in shared):
        return ""
    return f"the encoder is no better than raw pixels: {'; '.join(_reasons(resolved, metrics))}"


def _reasons(resolved: ResolvedExperiment, metrics: Mapping[str, float]) -> list[str]:
    config, total = resolved.config, resolved.total_steps
    reasons = []
    if total < FEW_STEPS:
        reasons.append(f"{_few(total)} (raise epochs)")
    if resolved.warmup_steps > total // 2:
        reasons.append(
            f"{resolved.warmup_steps} of {counted(total, 'step')} were warm-up "
            "(lower schedule.warmup_epochs)"
        )
    head = config.classifier
    level = build_loss(config).chance_level(config.batch_size, head.num_classes if head else 0)
    loss = metrics.get("train/mean_loss")
    if level is not None and loss is not None and loss > NEAR_CHANCE * level.value:
        reasons.append(
            f"the loss, {loss:.2f}, is near {level.value:.2f}, that of no learning "
            "(raise epochs or schedule.learning_rate, or lower loss.temperature)"
        )
    return reasons or [
        "the loss has fallen, so its task may be too easy (stronger augment, larger batch_size) "
        "or too far from the labels"
    ]


def memory_advice(resolved: ResolvedExperiment, per_image: int, fixed: int) -> str:
    """Return how a step fits into memory, where it does not; else nothing.

    Args:
        resolved: The run.
        per_image: Bytes kept for the backward pass, of an image on the largest worker.
        fixed: Bytes that do not shrink with the group.
    """
    config = resolved.config
    workers = config.scaling.max_workers
    if config.scaling.gpus_per_worker:
        if not torch.cuda.is_available():
            return ""  # that of another machine
        here, where = torch.cuda.get_device_properties(0).total_memory, "the GPU"
        sharing = min(workers, max(1, int(1 / config.scaling.gpus_per_worker)))  # of one GPU
    elif names_cluster():
        return ""
    else:
        here, where, sharing = machine_memory(), "this machine", workers
    fewest = config.scaling.min_workers if config.scaling.gpus_per_worker else workers
    largest = -(-config.batch_size // fewest)
    needed = sharing * (fixed + per_image * -(-largest // config.num_groups))
    if needed <= here:
        return ""
    room = here - sharing * fixed
    for groups in range(config.num_groups + 1, config.batch_size + 1):
        size = config.batch_size // groups
        on_rank = -(-largest // groups)
        if config.batch_size % groups == 0 and sharing * per_image * on_rank <= room:
            fits = f"batch_norm.group_size={size} fits"
            break
    else:
        fits = "no group fits: a smaller encoder or augment.size is needed"
    return f"a step takes {needed / MIB:,.0f} MiB and {where} has {here / MIB:,.0f}: {fits}"
