"""``none`` as the value of a flag, as recipes and the help have it; tyro alone takes ``None`` only."""

from __future__ import annotations

import tyro

from doratune.train.option_types import NOTHING

registry = tyro.constructors.ConstructorRegistry()
"""Within ``with registry:`` flags that may be without a value take ``none``, and ``None`` as well."""


@registry.primitive_rule
def _nothing(type_info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[None] | None:
    if type_info.type is not type(None):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + NOTHING + "}",
        choices=(NOTHING, str(None)),
        instance_from_str=lambda words: None,
        is_instance=lambda value: value is None,
        str_from_instance=lambda value: [NOTHING],
    )
