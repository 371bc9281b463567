"""docs/api.md from the OpenAPI description and the table of roles: `python -m controller.api.reference [--check]`.

Deterministic, so that a check can compare: no version and no date stand in it.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from fastapi import APIRouter

from controller.access.model import OperatorRole
from controller.access.service import Access
from controller.api.access_rules import need
from controller.api.http_app import TrustFaces, create_operator_app
from controller.api.identity_rest import Destination
from controller.audit.service import Audit
from controller.fleet.service import Fleet
from controller.identity.service import Identity
from controller.records.service import Records
from controller.registry.service import Registry
from controller.samples.service import SamplePulls
from controller.signing.service import Catalogue
from controller.traces.service import Traces
from core.clock import Clock

TARGET = Path("docs/api.md")
_METHODS = ("get", "head", "post", "put", "patch", "delete")
_HEAD = """\
# Operator's REST

Made from the OpenAPI description by `make api`; not to be edited. A running controller serves that description at
`GET /api/openapi.json`; [operations.md](operations.md) says how to reach it. Every request but the open ones carries
`Authorization: Bearer SECRET`. What is refused is answered as problem details (RFC 9457, `ProblemView`): `detail` says
what was expected, what came and what to do, `code` is the word for programs.

Times are ISO 8601 in UTC. With `wait_s` a request waits for a change (long poll).
"""


def document() -> Mapping[str, Any]:
    """Return the OpenAPI description; nothing is asked of the features behind it."""
    nobody = TrustFaces(
        cast("Access", None),
        cast("Audit", None),
        cast("Identity", None),
        cast("Catalogue", None),
        cast("Destination", None),
    )
    app = create_operator_app(
        registry=cast("Registry", None),
        fleet=cast("Fleet", None),
        traces=cast("Traces", None),
        records=cast("Records", None),
        pulls=cast("SamplePulls", None),
        trust=nobody,
        pages=APIRouter(),
        clock=cast("Clock", None),
        server_version="0",
    )
    return app.openapi()


def render(described: Mapping[str, Any]) -> str:
    """Return the whole page."""
    by_tag: dict[str, list[str]] = {}
    for path, methods in described["paths"].items():
        for method in _METHODS:
            if method in methods:
                tag = (methods[method].get("tags") or ["other"])[0]
                by_tag.setdefault(tag, []).append("\n".join(_operation(method.upper(), path, methods[method])))
    parts = [_HEAD]
    for tag in sorted(by_tag):
        parts += [f"## {tag}\n", *by_tag[tag]]
    parts.append("## Shapes\n")
    schemas = described["components"]["schemas"]
    parts += ["\n".join(_shape(name, schemas[name])) for name in sorted(schemas)]
    return "\n".join(parts)


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {method} {path}\n"
    yield f"{operation.get('summary', '')}. {_role(method, path)}"
    if text := operation.get("description"):
        yield f"\n{_line(text)}"
    for parameter in operation.get("parameters", ()):
        needed = "" if parameter.get("required") else ", optional"
        about = _line(parameter.get("description") or parameter["schema"].get("description") or "")
        yield f"\n- `{parameter['name']}` ({parameter['in']}, {_type(parameter['schema'])}{needed}) {about}".rstrip()
    if body := operation.get("requestBody"):
        yield f"\n- body: {_content(body)}"
    for status, answer in operation["responses"].items():
        if status != "default" and "problem" not in str(answer.get("content")):
            yield f"\n- {status}: {_content(answer) or 'no body'}"
    yield ""


def _role(method: str, path: str) -> str:
    needed = need(method, path.replace("{", "").replace("}", ""))
    return f"Needs the role *{needed.value}*." if isinstance(needed, OperatorRole) else "Open to anybody."


def _shape(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    if text := schema.get("description"):
        yield f"{_line(text)}\n"
    required = set(schema.get("required", ()))
    for field, of_field in schema.get("properties", {}).items():
        optional = "" if field in required else ", optional"
        yield f"- `{field}`: {_type(of_field)}{optional}. {_line(of_field.get('description', ''))}".rstrip()
    yield ""


def _content(holder: Mapping[str, Any]) -> str:
    content = holder.get("content", {})
    return ", ".join(f"{_type(of.get('schema', {}))} as `{kind}`" for kind, of in content.items())


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("format") or schema.get("type") or "anything")


def _line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m controller.api.reference", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the file is not fresh")
    options = parser.parse_args()
    text = render(document())
    if not options.check:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        sys.exit(f"{TARGET} is not what the REST says: run `make api`")


if __name__ == "__main__":
    main()
