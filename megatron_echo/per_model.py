"""Objects of which a model has one, shared by all of its layers."""

from typing import Any, Self


class PerModel:
    """Kept on the model's configuration, which every layer has: :meth:`of` finds or makes it."""

    @classmethod
    def of(cls, config: Any, *args: Any) -> Self:
        """The object of a model.

        Args:
            config: its ``TransformerConfig``.
            args: what the class takes, if it has to be made.
        """
        name = f"_megatron_echo_{cls.__name__}"
        if getattr(config, name, None) is None:
            setattr(config, name, cls(*args))
        return getattr(config, name)

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # Megatron copies configurations for some layers; the model stays one
