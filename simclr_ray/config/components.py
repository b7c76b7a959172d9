"""How a config class names the component that it configures, and how that is built.

A loss, an encoder, an op or an optimizer is two files: the component, and its config class, which
names it by `component` and joins the union of its family in `sections`. The name is text, so that
reading a config imports neither torch nor any component that a run does not use. `name: import`
(`imports`) takes the same way to code from outside the package.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar, TypeVar

from simclr_ray.config.schema import Config, configs_in, name_of
from simclr_ray.errors import ConfigError, one_line

T = TypeVar("T")


class ComponentConfig(Config):
    """Base of config classes that have a component.

    Attributes:
        component: Its import path, `package.module:attribute`; it is called with `arguments()`
            and with what its family adds (see `build`).
    """

    component: ClassVar[str] = ""

    def arguments(self) -> dict[str, Any]:
        """Return what the component is called with: every field but `name`, by its own name."""
        return {key: getattr(self, key) for key in type(self).model_fields if key != "name"}

    def load(self) -> Any:
        """Return the component: a class or function."""
        module, _, attribute = self.component.partition(":")
        return getattr(import_module(module), attribute)


def variants(union: Any) -> dict[str, type[ComponentConfig]]:
    """Return the config classes of a family's union, such as `AnyLossConfig`, by their names."""
    configs = [c for c in configs_in(union) if issubclass(c, ComponentConfig)]
    return {name_of(c): c for c in configs}


def build(config: ComponentConfig, kind: type[T], *args: Any, **context: Any) -> T:
    """Return the component of `config`, called with its arguments and with what the family adds.

    Args:
        config: Any component's.
        kind: What comes out is an instance of it.
        args: What the family adds by position, before all else.
        context: What the family adds by name, such as `global_batch_size` of a loss.

    Raises:
        ConfigError: The call fails, or gives something else. Of a component of this package that
            would be a defect; of imported code the line says what was called and expected.
    """
    component, arguments = config.load(), {**config.arguments(), **context}
    shown = f"{config.component or getattr(config, 'path', '')}({', '.join(arguments)})"
    try:
        made = component(*args, **arguments)
    except ConfigError:
        raise
    except Exception as error:
        if config.component:
            raise
        problem = f"{shown} raised {type(error).__name__}: {one_line(error)}"
        raise ConfigError.of("", problem) from error
    if not isinstance(made, kind):
        expected = f"{kind.__module__}.{kind.__qualname__}"
        problem = f"{shown} returned {type(made).__name__}; expected an instance of {expected}"
        raise ConfigError.of("", problem)
    return made
