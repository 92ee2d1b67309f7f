"""What the Hub makes of the YAML at the head of a README.md: what it refuses, and which tags it derives."""

from __future__ import annotations

import re
from typing import Any

import yaml

from hub_server.messages import Call, Reply, json_reply
from hub_server.routing import Route

_BLOCK = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_RELATIONS = ("adapter", "merge", "quantized", "finetune")
_TEXTS = ("library_name", "pipeline_tag", "license_name", "license_link")
_LISTS = ("tags", "language", "metrics")


def _texts(value: Any) -> list[str]:
    """Return the texts of a value that may be one text or a list of them; [] where it is neither."""
    values = value if isinstance(value, list) else [value]
    return values if all(isinstance(one, str) for one in values) else []


def _id_errors(metadata: dict[str, Any]) -> list[str]:
    errors = []
    for key, where in (("base_model", "models"), ("datasets", "datasets")):
        if key in metadata:
            ids = _texts(metadata[key])
            errors += [] if ids else [f'"{key}" must be a string or a list of strings']
            errors += [
                f'"{key}" with value "{one}" is not valid. Use an id from https://hf.co/{where}.'
                for one in ids
                if not _REPO_ID.fullmatch(one)
            ]
    return errors


def _result_errors(index: Any) -> list[str]:
    """Return what is wrong with a `model-index`."""
    if not isinstance(index, list) or not all(isinstance(model, dict) for model in index):
        return ['"model-index" must be an array of objects']
    errors = []
    for i, model in enumerate(index):
        errors += [] if isinstance(model.get("name"), str) else [f'"model-index[{i}].name" is required']
        for j, result in enumerate(model.get("results") or []):
            where = f"model-index[{i}].results[{j}]"
            errors += [
                f'"{where}.{path}" is required'
                for path in ("task.type", "dataset.type", "dataset.name")
                if not isinstance((result.get(path.split(".")[0]) or {}).get(path.split(".")[1]), str)
            ]
            errors += [
                f'"{where}.metrics[{k}]" needs a "type" and a "value"'
                for k, metric in enumerate(result.get("metrics") or [])
                if not isinstance(metric.get("type"), str) or metric.get("value") is None
            ]
    return errors


def metadata_errors(metadata: dict[str, Any]) -> list[str]:
    """Return what the Hub would not accept."""
    errors = _id_errors(metadata)
    if "license" in metadata and not _texts(metadata["license"]):
        errors.append('"license" must be a string')
    errors += [f'"{key}" must be a string' for key in _TEXTS if not isinstance(metadata.get(key, ""), str)]
    errors += [f'"{key}" must be a list of strings' for key in _LISTS if key in metadata and not _texts(metadata[key])]
    if metadata.get("base_model_relation", "adapter") not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(_RELATIONS)}]')
    if "model-index" in metadata:
        errors += _result_errors(metadata["model-index"])
    return errors


def read_metadata(readme: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the metadata of a README.md, None where it has none, and what is wrong with it."""
    block = _BLOCK.match(readme)
    try:
        metadata = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as err:
        return None, [f"YAML: {err}"]
    if metadata is None:
        return None, []
    if not isinstance(metadata, dict):
        return None, ["YAML: the metadata must be an object"]
    return metadata, metadata_errors(metadata)


def derived_tags(metadata: dict[str, Any]) -> list[str]:
    """Return a model's tags as the Hub lists them: its own, and those made from other fields."""
    tags = [metadata["library_name"]] if metadata.get("library_name") else []
    tags += _texts(metadata.get("tags", []))
    for key, prefix in (("datasets", "dataset"), ("license", "license"), ("base_model", "base_model")):
        tags += [f"{prefix}:{value}" for value in _texts(metadata.get(key, []))]
    if relation := metadata.get("base_model_relation"):
        tags += [f"base_model:{relation}:{value}" for value in _texts(metadata.get("base_model", []))]
    return list(dict.fromkeys(tags))


def validate_yaml(call: Call) -> Reply:
    """Tell the client, before it uploads a README.md, whether it would be accepted."""
    metadata, errors = read_metadata(str(call.json().get("content", "")))
    warnings = [] if metadata or errors else ["empty or missing yaml metadata in repo card"]
    answer = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return json_reply(answer, 400 if errors else 200)


ROUTES = (Route("POST", "/api/validate-yaml", validate_yaml),)
