"""KubeRay's published schemas, to check manifests against.

`tests/golden/kuberay-1.7.0.json.xz` holds `openAPIV3Schema` of version v1 of RayCluster and RayJob, whole but for descriptions,
from github.com/ray-project/kuberay, tag v1.7.0 (9c13e71), helm-chart/kuberay-operator/crds. Made by
`python tests/support/kuberay.py KUBERAY/helm-chart/kuberay-operator/crds`.
"""

import json
import lzma
import sys
from pathlib import Path
from typing import Any

import jsonschema
import yaml

SCHEMAS = Path(__file__).parents[1] / "golden" / "kuberay-1.7.0.json.xz"


def refused(schemas: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """What the schema of its kind does not take of a manifest."""
    validator = jsonschema.Draft202012Validator(schemas[document["kind"]])  # whose own check takes seconds
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def schemas() -> dict[str, Any]:
    """JSON schemas by kind, which refuse fields that they do not name, as the API server does under strict validation.

    `NetworkPolicy` is put together from Kubernetes' own types, which a RayCluster contains.
    """
    kinds = json.loads(lzma.decompress(SCHEMAS.read_bytes()))
    for schema in kinds.values():
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    cluster = kinds["RayCluster"]["properties"]["spec"]["properties"]
    rules = cluster["networkPolicy"]["properties"]["worker"]["properties"]
    egress, ingress = rules["egressRules"], rules["ingressRules"]
    spec = {
        "type": "object",
        "required": ["podSelector"],
        "properties": {
            "podSelector": ingress["items"]["properties"]["from"]["items"]["properties"]["podSelector"],
            "policyTypes": {"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
            "egress": egress,
            "ingress": ingress,
        },
    }
    text = {"type": "string"}
    kinds["NetworkPolicy"] = {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": "networking.k8s.io/v1"},
            "kind": text,
            "metadata": {"type": "object"},
            "spec": spec,
        },
    }
    volumes = cluster["headGroupSpec"]["properties"]["template"]["properties"]["spec"]["properties"]["volumes"]
    claim = volumes["items"]["properties"]["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]
    kinds["PersistentVolumeClaim"] = {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {"apiVersion": {"const": "v1"}, "kind": text, "metadata": {"type": "object"}, "spec": claim},
    }
    return {kind: _closed(schema) for kind, schema in kinds.items()}


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        closed["properties"] = {name: _closed(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    return closed


def _bare(schema: Any) -> Any:
    """Without descriptions, but with fields that are called so."""
    if isinstance(schema, list):
        return [_bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key != "description"}
    return {
        key: {name: _bare(field) for name, field in value.items()} if key == "properties" else _bare(value)
        for key, value in kept.items()
    }


def main(folder: Path) -> None:
    """Make the file of schemas from KubeRay's CRDs."""
    kinds = {}
    for name in ("rayclusters", "rayjobs"):
        crd = yaml.safe_load((folder / f"ray.io_{name}.yaml").read_text())["spec"]
        version = next(version for version in crd["versions"] if version["name"] == "v1")
        kinds[crd["names"]["kind"]] = _bare(version["schema"]["openAPIV3Schema"])
    text = json.dumps(kinds, separators=(",", ":"), sort_keys=True)
    SCHEMAS.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
