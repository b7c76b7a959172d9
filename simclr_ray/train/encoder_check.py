"""What is asked of an encoder whose code is not ours, on two images before Ray starts."""

from __future__ import annotations

import torch

from simclr_ray.config.experiment import Experiment
from simclr_ray.errors import ConfigError, one_line
from simclr_ray.nn.build import build_encoder
from simclr_ray.nn.encoders import set_recompute
from simclr_ray.nn.stochastic import check_draws

IMAGES = 2


def check_encoder(experiment: Experiment) -> None:
    """Build the encoder, and have it encode images of each size that it will see.

    Raises:
        ConfigError: There is no such encoder, it takes no images of a size, has nothing to train,
            or draws random numbers that would depend on the number of workers.
    """
    size, channels = experiment.augment.size, experiment.data.channels
    encoder = build_encoder(experiment.encoder, size=size, channels=channels)
    set_recompute(encoder, recompute=experiment.scaling.recompute_activations)
    if not any(p.requires_grad for p in encoder.parameters()):
        raise ConfigError.of("encoder", "has no parameter to train")
    others = {experiment.evaluation_size, experiment.augment.start_size or size} - {size}
    encoder.eval()
    for side in sorted(others):
        try:
            with torch.no_grad():
                encoder(torch.zeros(IMAGES, channels, side, side))
        except Exception as error:
            cause = one_line(error)[:200]
            problem = (
                f"is built for augment.size={size} and takes no images of {side} px "
                f"(augment.start_size or evaluation.size): {cause}; timm's ViTs do with "
                "encoder.options.dynamic_img_size=true"
            )
            raise ConfigError.of("encoder", problem) from error
    generator = torch.Generator().manual_seed(0)
    try:
        check_draws(encoder, torch.rand(IMAGES, channels, size, size, generator=generator))
    except RuntimeError as error:  # torch's own, of shapes that do not fit
        name = getattr(experiment.encoder, "model", experiment.encoder.name)
        problem = f"{name} takes no views of {size} px: {one_line(error)}"
        raise ConfigError.of("augment.size", problem) from error
