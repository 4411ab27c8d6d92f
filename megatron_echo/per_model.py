"""Objects of which a model has one, shared by all of its layers."""

from typing import Any, Self


class PerModel:
    """Kept on the model's configuration, which every layer has: :meth:`of` finds or makes it."""

    @classmethod
    def of(cls, config: Any, *args: Any) -> Self:
        """The object of the model with this ``TransformerConfig``, made of ``args`` if need be."""
        found = cls.find(config)
        if found is None:
            found = cls(*args)
            setattr(config, cls._name(), found)
        return found

    @classmethod
    def find(cls, config: Any) -> Self | None:
        """The object of a model, None if it has not been made."""
        return getattr(config, cls._name(), None)

    @classmethod
    def _name(cls) -> str:
        return f"_megatron_echo_{cls.__name__}"

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # Megatron copies configurations for some layers; the model stays one
