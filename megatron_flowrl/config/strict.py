"""How every section of the schema validates its values."""

from pydantic import ConfigDict

# Strict: 1 is not true, 2.0 is not 2, "3" is not 3. An int is still welcome where a float is meant.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
