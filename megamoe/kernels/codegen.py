"""Static facts of a kernel as C++: a dataclass or mapping -> `struct Config { static constexpr ... };`. Knows no kernel."""

import enum
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

_INDENT = "  "


def emit_struct(name: str, config: object) -> str:
    """Write `config` as a struct of named constants, in its own order.

    num_stages=4 becomes `static constexpr unsigned kNumStages = 4;`. Integers take the smallest of unsigned, int and their 64-bit forms;
    floats become float; strings and enum members (by name) `const char*`. A tuple token_tiles=(8, 16) becomes an array kTokenTiles and its
    length kNumTokenTiles; device code may index it in constant expressions only. A dataclass or mapping inside becomes a nested struct in
    CamelCase.

    Args:
        name: of the struct.
        config: a dataclass instance, or a mapping from snake_case names to values where the kernel needs other facts than the fields.

    Returns:
        C++17 text that ends with a newline.

    Raises:
        TypeError: a value is of none of these types.
        ValueError: a NaN or infinity, an empty tuple, an integer beyond 64 bits, or two members of one name.
    """
    return "\n".join(_struct(name, config, name, "")) + "\n"


def _struct(name: str, config: object, path: str, indent: str) -> list[str]:
    lines, seen = [], set()
    for key, value in _items(config, path):
        where = f"{path}.{key}"
        for member, text in _members(key, value, where, indent + _INDENT):
            if member in seen:
                raise ValueError(f"codegen: {where} must give a new name, got {member} twice; rename the field")
            seen.add(member)
            lines.append(text)
    return [f"{indent}struct {name} {{", *lines, f"{indent}}};"]


def _items(config: object, path: str) -> list[tuple[str, object]]:
    if isinstance(config, Mapping):
        return list(config.items())
    if is_dataclass(config) and not isinstance(config, type):
        return [(field.name, getattr(config, field.name)) for field in fields(config)]
    raise TypeError(f"codegen: {path} must be a dataclass or a mapping, got {type(config).__name__}; wrap it in one")


def _members(key: str, value: object, where: str, indent: str) -> list[tuple[str, str]]:
    """(C++ name, text) of what one value becomes."""
    camel = "".join(part[:1].upper() + part[1:] for part in key.split("_"))
    if isinstance(value, Mapping) or is_dataclass(value):
        return [(camel, "\n".join(_struct(camel, value, where, indent)))]
    if not isinstance(value, tuple):
        kind, text = _constant(value, where)
        return [(f"k{camel}", f"{indent}static constexpr {kind} k{camel} = {text};")]
    if not value:
        raise ValueError(f"codegen: {where} must have at least one element, got (); C++ has no empty array")
    kinds, texts = zip(*(_constant(element, f"{where}[{i}]") for i, element in enumerate(value)))
    return [(f"kNum{camel}", f"{indent}static constexpr unsigned kNum{camel} = {len(value)};"),
            (f"k{camel}", f"{indent}static constexpr {_common(kinds, where)} k{camel}[] = {{{', '.join(texts)}}};")]


def _constant(value: object, where: str) -> tuple[str, str]:
    """(C++ type, literal) of a scalar."""
    if isinstance(value, bool):  # before int, which bool is too
        return "bool", "true" if value else "false"
    if isinstance(value, enum.Enum):
        return "const char*", f'"{value.name}"'
    if isinstance(value, int):
        return _integer(value, where)
    if isinstance(value, float):
        return "float", _float(value, where)
    if isinstance(value, str):
        return "const char*", '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    expected = "an int, bool, float, str, Enum, tuple of these, dataclass or mapping"
    raise TypeError(f"codegen: {where} must be {expected}, got {type(value).__name__}; convert it")


def _integer(value: int, where: str) -> tuple[str, str]:
    if 0 <= value < 2**32:
        return "unsigned", f"{value}u"
    if -(2**31) < value < 0:
        return "int", str(value)
    if 0 <= value < 2**64:
        return "unsigned long long", f"{value}ull"
    if -(2**63) < value < 0:
        return "long long", f"{value}ll"
    raise ValueError(f"codegen: {where} must fit 64 bits, got {value}; split it")


def _float(value: float, where: str) -> str:
    if not math.isfinite(value):  # no spelling of infinity is constant for both compilers without a header
        raise ValueError(f"codegen: {where} must be finite, got {value}; use a flag for 'none'")
    return f"{value!r}f"


def _common(kinds: tuple[str, ...], where: str) -> str:
    """The element type of an array: that of all elements, or the widest of its integers."""
    if len(set(kinds)) == 1:
        return kinds[0]
    integers = ("unsigned", "int", "unsigned long long", "long long")
    if not set(kinds) <= set(integers):
        raise TypeError(f"codegen: {where} must have elements of one type, got {', '.join(sorted(set(kinds)))}; split it")
    is_signed = "int" in kinds or "long long" in kinds
    return "long long" if is_signed else "unsigned long long"
