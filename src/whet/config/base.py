"""The base of every configuration model: frozen, strict about unknown keys, documented in place."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen group of settings. The string below each field is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class Plugin(BaseModel):
    """Something chosen by name or by dotted path (`package.module:attribute`), with options of its own.

    The options are checked against the chosen thing's own parameters before a model is loaded.
    """

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True, allow_inf_nan=False)

    use: str
    """A built-in name, or `package.module:attribute` of your own."""

    @property
    def options(self) -> dict:
        """The keys beside `use`."""
        return dict(self.__pydantic_extra__ or {})
