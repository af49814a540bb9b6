#!/usr/bin/env python3
"""Compare our OpenAPI document with the published one of TES: compare_openapi.py REFERENCE.yaml

Prints each difference in operations (parameters, bodies, answers) and schemas (properties, types, formats, enums,
defaults, required, readOnly) and exits with 1 if there is any beyond those that ALLOWED explains. Texts and examples
are ours and not compared; what we describe on top (error answers, bounds of numbers) is not a difference.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI

from tesp_api.api.openapi import openapi

Node = dict[str, Any]

ALLOWED = (
    (r".*\.format$", "'boolean'", "`format: boolean` beside `type: boolean` is no format of OpenAPI and says nothing"),
    (r"GET /tasks query page_size\.schema\.default$", "None -> 256", "the standard says so in words"),
)
"""Differences that are meant: where (a pattern), what (a part of the text), why."""

SERVICE_INFO = "https://raw.githubusercontent.com/ga4gh-discovery/ga4gh-service-info/v1.0.0/service-info.yaml#"
STRING = {"type": "string"}
EXTERNAL = {
    f"{SERVICE_INFO}/components/schemas/ServiceType": {
        "type": "object",
        "required": ["group", "artifact", "version"],
        "properties": {"group": STRING, "artifact": STRING, "version": STRING},
    },
    f"{SERVICE_INFO}/components/schemas/Service": {
        "type": "object",
        "required": ["id", "name", "type", "organization", "version"],
        "properties": {
            "id": STRING,
            "name": STRING,
            "type": {"$ref": "#/components/schemas/ServiceType"},
            "description": STRING,
            "organization": {"$ref": "#/components/schemas/Organization"},
            "contactUrl": STRING,
            "documentationUrl": STRING,
            "createdAt": STRING,
            "updatedAt": STRING,
            "environment": STRING,
            "version": STRING,
        },
    },
}
"""What the published document takes from elsewhere (GA4GH service-info 1.0.0), which cannot be fetched here. Its
formats (uri, date-time) are left out: we promise texts."""

FACETS = ("type", "format", "enum", "default", "readOnly")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    published = yaml.safe_load(Path(arguments[0]).read_text(encoding="utf-8"))
    ours = openapi(FastAPI(title="TES", version="1.1.0"))
    found = [text for where, text in differences(published, ours) if not allowed(where, text)]
    for text in found:
        print(text)
    print(f"{len(found)} differences" if found else "no differences", file=sys.stderr)
    return 1 if found else 0


def allowed(where: str, text: str) -> bool:
    return any(re.fullmatch(pattern, where) and part in text for pattern, part, _ in ALLOWED)


def differences(published: Node, ours: Node) -> Iterator[tuple[str, str]]:
    if published["servers"][0] != ours["servers"][0]:
        yield difference("servers[0]", published["servers"][0], ours["servers"][0])
    left, right = operations(published), operations(ours)
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            yield difference(name, name in left, name in right)
        else:
            yield from compare_operations(name, left[name], right[name], published, ours)
    left, right = published["components"]["schemas"], ours["components"]["schemas"]
    for name in sorted(left):
        if name not in right:
            yield difference(name, "present", "absent")
        else:
            yield from compare_schemas(name, flat(left[name], published), flat(right[name], ours), published, ours)


def operations(document: Node) -> dict[str, Node]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method in ("get", "put", "post", "delete", "patch", "head", "options")
    }


def compare_operations(name: str, left: Node, right: Node, published: Node, ours: Node) -> Iterator[tuple[str, str]]:
    if left["operationId"] != right["operationId"]:
        yield difference(f"{name} operationId", left["operationId"], right["operationId"])
    first, second = parameters(left, published), parameters(right, ours)
    for key in sorted(first.keys() | second.keys()):
        where = f"{name} {key}"
        if key not in first or key not in second:
            yield difference(where, key in first, key in second)
            continue
        if first[key].get("required", False) != second[key].get("required", False):
            yield difference(f"{where}.required", first[key].get("required"), second[key].get("required"))
        yield from compare_schemas(f"{where}.schema", first[key]["schema"], second[key]["schema"], published, ours)
    for part in ("requestBody", "responses"):
        yield from compare_contents(f"{name} {part}", left.get(part), right.get(part), published, ours)


def parameters(operation: Node, document: Node) -> dict[str, Node]:
    resolved = [resolve(item, document) for item in operation.get("parameters", [])]
    return {f"{item['in']} {item['name']}": item for item in resolved}


def compare_contents(
    where: str, left: Node | None, right: Node | None, published: Node, ours: Node
) -> Iterator[tuple[str, str]]:
    if left is None or right is None:
        if left is not right:
            yield difference(where, left, right)
        return
    if where.endswith("responses"):
        left, right = ({str(key): value for key, value in item.items()}["200"] for item in (left, right))
    if left.get("required") != right.get("required"):
        yield difference(f"{where}.required", left.get("required"), right.get("required"))
    if left["content"].keys() != right["content"].keys():
        yield difference(f"{where} content types", sorted(left["content"]), sorted(right["content"]))
        return
    for kind in left["content"]:
        first, second = left["content"][kind]["schema"], right["content"][kind]["schema"]
        yield from compare_schemas(f"{where} {kind}", first, second, published, ours)


def compare_schemas(where: str, left: Node, right: Node, published: Node, ours: Node) -> Iterator[tuple[str, str]]:
    if left.get("$ref") != right.get("$ref"):
        yield difference(f"{where}.$ref", left.get("$ref"), right.get("$ref"))
        return
    for facet in FACETS:
        if left.get(facet) != right.get(facet):
            yield difference(f"{where}.{facet}", left.get(facet), right.get(facet))
    if sorted(left.get("required", ())) != sorted(right.get("required", ())):
        yield difference(f"{where}.required", sorted(left.get("required", ())), sorted(right.get("required", ())))
    first, second = left.get("properties", {}), right.get("properties", {})
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second:
            yield difference(f"{where}.{name}", name in first, name in second)
        else:
            yield from compare_schemas(f"{where}.{name}", first[name], second[name], published, ours)
    for inner in ("items", "additionalProperties"):
        if inner in left or inner in right:
            yield from compare_schemas(f"{where}.{inner}", left.get(inner, {}), right.get(inner, {}), published, ours)


def resolve(node: Node, document: Node) -> Node:
    reference = node.get("$ref")
    if reference is None:
        return node
    if reference in EXTERNAL:
        return EXTERNAL[reference]
    target: Any = document
    for part in reference.removeprefix("#/").split("/"):
        target = target[part]
    return dict(target)


def flat(schema: Node, document: Node) -> Node:
    """A schema with its `allOf` merged."""
    if "allOf" not in schema:
        return schema
    merged: Node = {"properties": {}, "required": []}
    for part in schema["allOf"]:
        resolved = flat(resolve(part, document), document)
        merged["properties"] |= resolved.get("properties", {})
        merged["required"] = sorted({*merged["required"], *resolved.get("required", ())})
        merged["type"] = resolved.get("type", "object")
    return merged


def difference(where: str, left: object, right: object) -> tuple[str, str]:
    return where, f"{where}: {left!r} -> {right!r}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
