"""JSON schemas as rules of Gemma 4's form of values: what llguidance knows only for JSON itself.

Keys come in alphabetical order, as the model's template writes them. What a schema leaves free beyond its
named properties stays away: every value that these rules take obeys the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from sfumato.errors import NotSupported, RequestError
from sfumato.serve.gemma_values import CLOSE, OPEN, QUOTE

_NOTES = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id",
    "$comment", "$defs", "definitions", "nullable",
}  # fmt: skip
_KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "boolean": set(),
    "null": set(),
}
_DAY = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {
    "date": _DAY,
    "time": _TIME,
    "date-time": f"{_DAY}T{_TIME}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "email": r"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+",
    "ipv4": r"((25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])",
}
_ANY = ("string", "number", "boolean", "null", "object", "array")
_TEXT = r"(.|\n)*"
# A key that a schema does not name.
_KEY = "/[A-Za-z_][A-Za-z0-9_]*/"


def calls_of(functions: Sequence[tuple[str, dict[str, Any] | None]]) -> str:
    """Return the rule `call` of functions with these schemas, and all that it needs.

    Raises NotSupported for a keyword that has no form here, RequestError for a schema that is none.
    """
    rules = _Rules()
    calls = []
    for name, parameters in functions:
        schema = {"type": "object"} if parameters is None else parameters
        if _types(schema) != ("object",) and "$ref" not in schema:
            raise RequestError(f"tools: the parameters of {name!r} are no object", field="tools")
        calls.append(f"{OPEN} {_literal(f'call:{name}')} {rules.value(schema, schema)} {CLOSE}")
    rules.put("call", " | ".join(calls))
    return rules.text()


class _Rules:
    """Rules by name; the same schema is written out once."""

    def __init__(self) -> None:
        self._bodies: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def put(self, name: str, body: str) -> str:
        """Add a rule and return its name."""
        self._bodies[name] = body
        return name

    def text(self) -> str:
        """Return all rules."""
        return "".join(f"{name}: {body}\n" for name, body in self._bodies.items())

    def value(self, schema: Any, root: dict[str, Any]) -> str:
        """Return the name of the rule of a schema; root: where its references point to."""
        key = json.dumps([schema, root], sort_keys=True)
        if key not in self._names:
            # Named before it is written, so that a schema may hold itself.
            name = self._names[key] = f"v{len(self._names)}"
            self.put(name, self._body(schema, root))
        return self._names[key]

    def _body(self, schema: Any, root: dict[str, Any]) -> str:
        if schema is True or schema is None:
            schema = {}
        if not isinstance(schema, dict):
            raise RequestError(f"tools: {schema!r} is no schema that has values", field="tools")
        if "$ref" in schema:
            return self.value(_referred(str(schema["$ref"]), root), root)
        for name in ("const", "enum"):
            if name in schema:
                values = [schema[name]] if name == "const" else schema[name]
                return " | ".join(_written(value) for value in values)
        for name in ("anyOf", "oneOf"):
            if name in schema:
                _check(schema, {name})
                return " | ".join(self.value(option, root) for option in schema[name])
        types = _types(schema)
        _check(schema, set().union({"type"}, *(_keywords(each) for each in types)))
        if schema.get("nullable") and "null" not in types:
            types = (*types, "null")
        return " | ".join(self._of_type(each, schema, root) for each in types)

    def _of_type(self, kind: str, schema: dict[str, Any], root: dict[str, Any]) -> str:
        match kind:
            case "object":
                return self._object(schema, root)
            case "array":
                return self._array(schema, root)
            case "string":
                return self._string(schema)
            case "boolean":
                return '"true" | "false"'
            case "null":
                return '"null"'
        own = {name: schema[name] for name in _keywords(kind) if name in schema}
        return self.put(f"n{len(self._bodies)}", f"%json {json.dumps({'type': kind, **own})}")

    def _string(self, schema: dict[str, Any]) -> str:
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        patterns = [_pattern(schema["pattern"])] if "pattern" in schema else []
        if "format" in schema:
            if schema["format"] not in _FORMATS:
                raise NotSupported(f"tools: the string format {schema['format']!r}", field="tools")
            patterns.append(_FORMATS[schema["format"]])
        lengths = f"(.|\\n){{{least},{'' if most is None else most}}}"
        if least or most is not None or not patterns:
            patterns.append(lengths)
        name = self.put(f"S{len(self._bodies)}", " & ".join(f"/{each}/" for each in patterns))
        # An empty text has no token that a lexeme could match.
        return f"{QUOTE} {name}? {QUOTE}" if all(map(_takes_empty, patterns)) else f"{QUOTE} {name} {QUOTE}"

    def _array(self, schema: dict[str, Any], root: dict[str, Any]) -> str:
        item = self.value(schema.get("items", {}), root)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[" "]"'
        more = f'("," {item}){{{max(0, least - 1)},{"" if most is None else most - 1}}}'
        filled = f"{item} {more}" if most != 1 else item
        return f'"[" {filled} "]"' if least else f'"[" ({filled})? "]"'

    def _object(self, schema: dict[str, Any], root: dict[str, Any]) -> str:
        properties = schema.get("properties") or {}
        required = set(schema.get("required") or ())
        unknown = sorted(required - properties.keys())
        if unknown:
            raise NotSupported(f"tools: {unknown[0]!r} is required and is no property", field="tools")
        extra = schema.get("additionalProperties", True)
        if not properties:
            if extra is False:
                return '"{" "}"'
            key = self.put(f"K{len(self._bodies)}", _KEY)
            pair = f'{key} ":" {self.value(extra, root)}'
            return f'"{{" ({pair} ("," {pair})*)? "}}"'
        return f'"{{" {self._pairs(sorted(properties), properties, required, root, has_any=False)} "}}"'

    def _pairs(
        self, names: list[str], properties: dict[str, Any], required: set[str], root: Any, *, has_any: bool
    ) -> str:
        """Return what stands for the properties from the first of `names` on; has_any: behind another one."""
        if not names:
            return ""
        first, rest = names[0], names[1:]
        comma = '"," ' if has_any else ""
        with_first = f"{comma}{_literal(f'{first}:')} {self.value(properties[first], root)}"
        behind = self._pairs(rest, properties, required, root, has_any=True)
        if first in required:
            return f"{with_first} {behind}"
        without = self._pairs(rest, properties, required, root, has_any=has_any)
        if has_any:
            # Whether it is there changes nothing for those behind it.
            return f"({with_first})? {behind}"
        return f"({with_first} {behind} | {without})" if without else f"({with_first})?"


def _keywords(kind: str) -> set[str]:
    if kind not in _KEYWORDS:
        raise RequestError(f"tools: {kind!r} is no type of a JSON schema", field="tools")
    return _KEYWORDS[kind]


def _types(schema: Any) -> tuple[str, ...]:
    """Return the types that a schema allows."""
    if not isinstance(schema, dict):
        return _ANY
    said = schema.get("type")
    if isinstance(said, str):
        return (said,)
    if said:
        return tuple(said)
    guessed = [kind for kind in _ANY if _KEYWORDS[kind] & schema.keys()]
    return tuple(guessed[:1]) or _ANY


def _check(schema: dict[str, Any], known: set[str]) -> None:
    for keyword in schema:
        if keyword not in known | _NOTES:
            raise NotSupported(
                f"tools: the schema keyword {keyword!r} is not supported", field="tools", value=keyword
            )


def _referred(reference: str, root: dict[str, Any]) -> Any:
    found: Any = root
    if not reference.startswith("#"):
        raise NotSupported(f"tools: the reference {reference!r} leads out of the schema", field="tools")
    for part in reference.lstrip("#").strip("/").split("/") if reference != "#" else ():
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or name not in found:
            raise RequestError(f"tools: the reference {reference!r} leads nowhere", field="tools")
        found = found[name]
    return found


def _pattern(pattern: str) -> str:
    """Return a pattern for whole texts; a schema's own may match anywhere."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[int(begins) : len(pattern) - int(ends)]
    whole = ("" if begins else _TEXT) + f"({inner})" + ("" if ends else _TEXT)
    return re.sub(r"(?<!\\)/", r"\\/", whole)


def _takes_empty(pattern: str) -> bool:
    try:
        return re.fullmatch(pattern, "") is not None
    except re.error:
        # The automaton says what is wrong with it.
        return False


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _written(value: Any) -> str:
    """Return what stands for one value."""
    match value:
        case str():
            return f"{QUOTE} {_literal(value)} {QUOTE}" if value else f"{QUOTE} {QUOTE}"
        case dict():
            pairs = [f"{_literal(f'{key}:')} {_written(value[key])}" for key in sorted(value)]
            return " ".join(('"{"', ' "," '.join(pairs), '"}"'))
        case list():
            return " ".join(('"["', ' "," '.join(map(_written, value)), '"]"'))
    return _literal(json.dumps(value))
