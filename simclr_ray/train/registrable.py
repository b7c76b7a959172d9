"""What `registry` asks for is refused before a training where it could not be done after it."""

from __future__ import annotations

from simclr_ray.config.experiment import Experiment, RegistryConfig
from simclr_ray.errors import ConfigError, ConfigIssue
from simclr_ray.inference.requirement import Requirement
from simclr_ray.tracking.store import check_model
from simclr_ray.train.imports import export_problem


def check_registry(registry: RegistryConfig) -> None:
    """Raise `ConfigError` for a name, alias or rule that cannot be, or one without a model.

    Without `registry.name` nothing is registered, so that another setting would be passed over.
    """
    if registry.name:
        check_model(registry.name, registry.alias)
        Requirement.parse(registry.require)
        return
    values, usual = {"alias": registry.alias, "require": registry.require}, RegistryConfig()
    issues = [
        ConfigIssue(
            f"registry.{key}", f"got {value!r}, and registry.name, the model it is for, is empty"
        )
        for key, value in values.items()
        if value != getattr(usual, key)
    ]
    if issues:
        raise ConfigError(issues)


def check_registrable(experiment: Experiment) -> None:
    """Raise `ConfigError` for an encoder of others that is to be registered and cannot be.

    Seconds, against a training; torchvision's are not asked, whose exports are tested.
    """
    if not (experiment.registry.name and experiment.encoder.name in ("import", "timm")):
        return
    problem = export_problem(experiment)
    if problem:
        shown = f"torch.export fails, so the encoder cannot be registered: {problem}"
        raise ConfigError.of("registry.name", shown)
