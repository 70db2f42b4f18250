"""What we import is declared, and what we use of others' insides is named, with what of ours breaks when it moves."""

import ast
import importlib.util
import re
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from kit import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along

OURS = ("roclip", "ingest", "cluster")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
DECLARED = {
    canonicalize_name(requirement.name): requirement
    for group in (
        PROJECT["dependencies"],
        PROJECT["optional-dependencies"]["hf"],
        PROJECT["optional-dependencies"]["s3"],
    )
    for requirement in map(Requirement, group)
}
PRIVATE = [
    # file of the package, name in it, what of ours breaks without it
    ("ray/_private/state.py", "get_max_resources_from_cluster_config", "queueing.grows: an autoscaler is not noticed"),
    (
        "ray/_private/ray_constants.py",
        "RAY_GCS_SERVER_PORT",
        "connect.start_local_ray: the port is not known beforehand",
    ),
    ("ray/_private/worker.py", "_node_ip_address", "connect.start_local_ray: a Ray of our own is not on loopback"),
    ("ray/_common/constants.py", "HEAD_NODE_RESOURCE_NAME", "doctor.actors: the head is not told apart"),
    ("ray/dashboard/modules/dashboard_sdk.py", "_do_request", "jobs._Client: a request may wait for ever"),
    (
        "ray/train/v2/_internal/constants.py",
        "WORKER_GROUP_START_TIMEOUT_S_ENV_VAR",
        "train.job: late after a lost node",
    ),
    ("ray/train/v2/_internal/execution/callback.py", "ControllerCallback", "restarts.WaitLimit is never called"),
    (
        "ray/train/v2/_internal/execution/callback.py",
        "after_controller_state_update",
        "restarts.WaitLimit is never called",
    ),
    ("ray/train/v2/_internal/execution/controller/state.py", "_state_type", "restarts.WaitLimit cannot tell the state"),
    (
        "ray/train/v2/_internal/execution/controller/state.py",
        "RESCHEDULING",
        "restarts.WaitLimit cannot tell the state",
    ),
    ("ray/train/v2/_internal/execution/worker_group/worker_group.py", "get_latest_poll_status", "restarts._Backend"),
    ("ray/train/v2/_internal/exceptions.py", "health_check_failure", "restarts.Restarts names no rank that died"),
    ("ray/train/backend.py", "backend_cls", "restarts.SigtermTorchConfig: SIGTERM is not heard in a worker"),
    ("deepspeed/ops/__init__.py", "__compatible_ops__", "training.engine: a compiler runs at the first step on a CPU"),
    ("deepspeed/runtime/engine.py", "allreduce_gradients", "training.engine._mean_gradients is never called"),
    (
        "deepspeed/runtime/zero/stage_1_and_2.py",
        "_hp_optimizer_states_linked",
        "engine_state: no moments of ZeRO 1 and 2",
    ),
    ("deepspeed/runtime/zero/stage_1_and_2.py", "_lazy_init_hp_params_optimizer_state", "engine_state: as above"),
    ("deepspeed/runtime/zero/stage_1_and_2.py", "averaged_gradients", "engine.gradients: no norm under ZeRO 1 and 2"),
    ("deepspeed/runtime/zero/stage_1_and_2.py", "_hp_mapping", "engine.clamp_logit_scale misses the fp32 copy"),
    ("deepspeed/utils/tensor_fragment.py", "get_hp_fragment", "engine.clamp_logit_scale misses the fp32 copy"),
    (
        "deepspeed/runtime/bf16_optimizer.py",
        "fp32_groups_gradients_flat",
        "engine.gradients: no norm of ZeRO 1 in bf16",
    ),
    ("deepspeed/runtime/zero/stage3.py", "averaged_gradients", "engine.gradients: no norm under ZeRO 3"),
    ("deepspeed/runtime/zero/stage3.py", "fp32_partitioned_groups_flat", "engine_state: ZeRO 3 does not resume"),
    (
        "deepspeed/runtime/zero/stage3.py",
        "grad_partitions_flat_buffer",
        "engine.step: old gradients are used once more",
    ),
    ("deepspeed/runtime/zero/partition_parameters.py", "ds_tensor", "engine_state, engine.clamp_logit_scale: ZeRO 3"),
    ("deepspeed/runtime/zero/partition_parameters.py", "ds_numel", "topology.gradient_bytes: wrong under ZeRO 3"),
    ("deepspeed/runtime/zero/partition_parameters.py", "ds_id", "engine_state and towers: ZeRO 3 is not noticed"),
]


def imports() -> dict[str, set[str]]:
    """The modules of others that our packages import, each with the files that do."""
    found: dict[str, set[str]] = {}
    for path in (path for package in OURS for path in (REPOSITORY / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                if name.split(".")[0] not in {*OURS, *sys.stdlib_module_names}:
                    found.setdefault(name, set()).add(str(path.relative_to(REPOSITORY)))
    return found


def test_every_import_is_declared():
    providers = packages_distributions()
    undeclared = {
        name: sorted(files)
        for name, files in imports().items()
        if not {canonicalize_name(provider) for provider in providers.get(name.split(".")[0], [])} & set(DECLARED)
    }
    assert undeclared == {}


@pytest.mark.parametrize("package", ["ray", "deepspeed"])
def test_package_whose_insides_we_use_is_bounded(package: str):
    specifier = DECLARED[package].specifier
    assert any(part.operator == "<" for part in specifier), f"{package}{specifier}: expected an upper bound"
    assert version(package) in specifier


@pytest.mark.parametrize(("file", "name", "breaks"), PRIVATE, ids=[f"{file}:{name}" for file, name, _ in PRIVATE])
def test_private_name_is_where_we_use_it(file: str, name: str, breaks: str):
    package = file.split("/")[0]
    spec = importlib.util.find_spec(package)  # finds it without importing it
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(next(iter(spec.submodule_search_locations))).parent / file
    text = path.read_text() if path.is_file() else ""
    assert re.search(rf"\b{name}\b", text), f"{package} {version(package)} has no {name} in {file}. Breaks: {breaks}"


def test_every_private_import_is_named_above():
    known = {file.removesuffix(".py").replace("/", ".") for file, _, _ in PRIVATE}
    private = {name for name in imports() if any(part.startswith("_") for part in name.split("."))}
    assert private - known == set()
