"""`roclip render`: what it writes, against the schemas of those who read it."""

import dataclasses
import ipaddress
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kuberay
import pytest
import yaml
from kit import REPOSITORY, TINY_MODEL
from packaging.requirements import Requirement
from tiny import TINY_RUN

from cluster.cli.main import guarded
from cluster.render.render import PUBLIC, RAY_VERSION, cluster_name, node_groups
from ingest.http.policy import is_allowed_address
from roclip.config import DeployConfig, FetchPolicy, dump_config, identity, load_config, load_deploy
from roclip.errors import ConfigError

LAION = "configs/laion.yaml"
FOUR_TO_FETCH = ["--deploy", "configs/deploy/laion.yaml"]
DEPLOYED = REPOSITORY / "configs" / "cluster"
EXAMPLES = sorted(
    path for path in DEPLOYED.rglob("*") if path.is_file() and "# Made by: roclip render" in path.read_text()
)
GCP = [
    "deploy.gcp.project=my-project",
    "deploy.gcp.machine_image=projects/my-project/global/images/gpu",
    "deploy.gcp.nfs=10.1.2.3:/runs",
]


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    return kuberay.schemas()


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)


def rendered(out: Path, *arguments: str) -> dict[str, str]:
    """The files that the command writes, by name."""
    assert guarded(["render", *arguments, *FOUR_TO_FETCH, "--out", str(out)]) == 0
    return {path.name: path.read_text() for path in out.iterdir()}


def manifests(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


# ---- Kubernetes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["deploy.ingest_nodes=0", "cluster.gpus_per_worker=0"],
        ["deploy.kubernetes.volume_claim=lustre", "deploy.kubernetes.secret=store", "cluster.min_workers=8"],
        ["deploy.kubernetes.storage_class=nfs", "deploy.kubernetes.service_account=trainer"],
    ],
    ids=["preset", "cpu", "claim", "class"],
)
def test_manifests_fit_the_published_schemas(tmp_path: Path, schemas, overrides):
    files = rendered(tmp_path, "k8s", LAION, *overrides)
    assert set(files) == {"common.yaml", "raycluster.yaml", "rayjob.yaml"}
    seen = []
    for document in (document for text in files.values() for document in manifests(text)):
        seen.append(document["kind"])
        assert document["metadata"]["namespace"] == "roclip"
        if document["kind"] != "ConfigMap":
            assert kuberay.refused(schemas, document) == []
    claims = ["PersistentVolumeClaim"] if "deploy.kubernetes.volume_claim=lustre" not in overrides else []
    assert sorted(seen) == sorted(["ConfigMap", *claims, "NetworkPolicy", "NetworkPolicy", "RayCluster", "RayJob"])


def test_schemas_refuse_a_field_that_kuberay_does_not_know(tmp_path: Path, schemas):
    job = manifests(rendered(tmp_path, "k8s", LAION)["rayjob.yaml"])[0]
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["securityContext"]["root"] = 1
    (refused,) = kuberay.refused(schemas, job)
    assert "containers[0].securityContext" in refused
    assert "'root' was unexpected" in refused


def test_job_runs_the_config_that_was_rendered(tmp_path: Path):
    files = rendered(tmp_path / "out", "k8s", LAION, "train.lr=1e-3", "deploy.ingest_nodes=2")
    words = shlex.split(manifests(files["rayjob.yaml"])[0]["spec"]["entrypoint"])
    assert words[:2] == ["roclip", "run"]
    preset = tmp_path / Path(words[2]).name
    preset.write_text(manifests(files["common.yaml"])[0]["data"]["preset"])
    config = load_config(preset, words[3:])
    asked = load_config(LAION, ["train.lr=1e-3", "run_dir=runs/laion", "cluster.ingest_resource=ingest"])
    assert identity(config) == identity(asked)
    assert config.run_dir == "runs/laion"
    groups = {group["groupName"]: group for group in manifests(files["raycluster.yaml"])[0]["spec"]["workerGroupSpecs"]}
    assert groups["train"]["resources"] == {"CPU": "64", "GPU": "8"}
    assert groups["ingest"]["resources"] == {"CPU": "64", "ingest": "64"}
    assert groups["ingest"]["replicas"] == 2


def test_model_of_ones_own_goes_along(tmp_path: Path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.json").write_text(TINY_MODEL)
    (tmp_path / "tiny.yaml").write_text(TINY_RUN.format(folder="."))
    files = rendered(tmp_path / "out", "k8s", str(tmp_path / "tiny.yaml"))
    assert yaml.safe_load(manifests(files["common.yaml"])[0]["data"]["model"]) == yaml.safe_load(TINY_MODEL)
    pod = manifests(files["raycluster.yaml"])[0]["spec"]["headGroupSpec"]["template"]["spec"]
    items = next(volume["configMap"]["items"] for volume in pod["volumes"] if "configMap" in volume)
    assert {item["path"] for item in items} == {"tiny.yaml", "models/tiny.json"}


def test_pods_have_no_more_rights_than_they_need(tmp_path: Path):
    spec = manifests(rendered(tmp_path, "k8s", LAION, "deploy.kubernetes.secret=store")["rayjob.yaml"])[0]["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["envFrom"] == [{"secretRef": {"name": "store"}}]


def test_deletion_rules_are_ones_that_kuberay_takes(tmp_path: Path):
    """What KubeRay 1.7 checks beyond the schema (validation.go): no second way to delete, and in this order."""
    spec = manifests(rendered(tmp_path, "k8s", LAION, "deploy.kubernetes.keep_s=60")["rayjob.yaml"])[0]["spec"]
    assert not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "clusterSelector"} & set(spec)
    assert spec["backoffLimit"] == 3
    rules: dict[str, list] = {}
    for rule in spec["deletionStrategy"]["deletionRules"]:
        condition = dict(rule["condition"])
        ttl_s = condition.pop("ttlSeconds")
        ((_, status),) = condition.items()
        rules.setdefault(status, []).append((ttl_s, rule["policy"]))
    assert rules == {
        "SUCCEEDED": [(0, "DeleteWorkers"), (60, "DeleteCluster")],
        "FAILED": [(0, "DeleteWorkers"), (60, "DeleteCluster")],
        "Failed": [(60, "DeleteCluster")],
    }


def test_network_policy_opens_what_the_fetch_policy_opens(tmp_path: Path):
    policies = manifests(rendered(tmp_path, "k8s", LAION)["common.yaml"])
    fetch = next(policy for policy in policies if policy["metadata"]["name"] == "laion-fetch")["spec"]
    assert fetch["podSelector"]["matchLabels"] == {"roclip/run": "laion", "roclip/fetches": "true"}
    blocks = [
        peer["ipBlock"] for rule in fetch["egress"] if "ports" not in rule for peer in rule["to"] if "ipBlock" in peer
    ]

    networks = [
        (ipaddress.ip_network(block["cidr"]), [*map(ipaddress.ip_network, block.get("except", []))]) for block in blocks
    ]

    def open_(text: str) -> bool:
        address = ipaddress.ip_address(text)
        return any(address in whole and not any(address in part for part in without) for whole, without in networks)

    draw = random.Random(0)
    edges = [
        ipaddress.ip_address(value)
        for whole, without in PUBLIC.items()
        for network in map(ipaddress.ip_network, without)
        for value in (int(network[0]) - 1, int(network[0]), int(network[-1]), int(network[-1]) + 1)
        if 2**32 < value < 2**128 or (":" not in whole and 0 <= value < 2**32)
    ]
    v4 = [ipaddress.IPv4Address(draw.getrandbits(32)) for _ in range(2000)]
    v6 = [ipaddress.IPv6Address(draw.getrandbits(128)) for _ in range(2000)]
    v6 += [ipaddress.IPv6Address(2 << 124 | draw.getrandbits(124)) for _ in range(2000)]
    for address in map(str, (*edges, *v4, *v6, ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("::1"))):
        if ":" in address:  # forms that carry an IPv4 address are left out whole
            assert not open_(address) or is_allowed_address(FetchPolicy(), address), address
        else:
            assert open_(address) == is_allowed_address(FetchPolicy(), address), address
    assert open_("2606:4700::1111")


def test_networks_that_the_fetch_policy_opens_are_open_in_kubernetes_too(tmp_path: Path):
    arguments = ["k8s", LAION, "ingest.policy.allow_networks=[10.7.0.0/16,127.0.0.0/8]"]
    text = rendered(tmp_path, *arguments)["common.yaml"]
    assert '- ipBlock: {cidr: "10.7.0.0/16"}' in text
    assert '"127.0.0.0/8"}' not in text


# ---- ray up -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "--provider",
            "aws",
            "deploy.aws.nfs=fs.example:/",
            "deploy.aws.spot=true",
            "deploy.aws.role=arn:aws:iam::1:x",
        ],
        ["--provider", "gcp", *GCP, "deploy.gcp.spot=true", "deploy.gcp.role=trainer@my-project"],
        ["--provider", "on-premise", "deploy.on_premise.hosts=[10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4,10.0.0.5,10.0.0.6]"],
    ],
    ids=["aws", "gcp", "on-premise"],
)
def test_ray_takes_the_cluster(tmp_path: Path, arguments):
    """`ray up` begins with these two."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    ((_, text),) = rendered(tmp_path, "ray", LAION, "deploy.ingest_nodes=1", *arguments).items()
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert not any("pip install" in command for command in config["worker_setup_commands"])  # Ray's defaults are gone
    assert all("0.0.0.0" not in command for command in config["head_start_ray_commands"])
    kinds = config["available_node_types"]
    if "train" in kinds:
        assert kinds["train"]["resources"] == {"CPU": 64, "GPU": 8}
        assert (kinds["train"]["min_workers"], kinds["train"]["max_workers"]) == (4, 4)
        assert kinds["ingest"]["resources"] == {"CPU": 128, "ingest": 128}


def test_ray_refuses_a_key_that_it_does_not_know(tmp_path: Path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = rendered(tmp_path, "ray", LAION, "deploy.aws.nfs=fs.example:/")["aws.yaml"]
    config = prepare_config(yaml.safe_load(text) | {"headnode": {}})
    with pytest.raises(jsonschema.ValidationError, match="headnode"):
        validate_config(config)


@pytest.mark.parametrize(
    ("addresses", "offer"),
    [
        ("10.0.0.2", "--num-cpus=64 --num-gpus=8"),
        ("192.168.1.1 10.0.0.6 172.17.0.1", '--num-cpus=128 --num-gpus=0 --resources={"ingest":128}'),
        ("10.0.0.60", ""),
    ],
)
def test_machine_offers_what_it_is_there_for(tmp_path: Path, addresses, offer):
    hosts = "deploy.on_premise.hosts=[10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4,10.0.0.5,10.0.0.6]"
    text = rendered(tmp_path, "ray", LAION, "--provider", "on-premise", "deploy.ingest_nodes=1", hosts)[
        "on-premise.yaml"
    ]
    command = yaml.safe_load(text)["worker_start_ray_commands"][-1].replace("cd /data && ray start", "echo")
    script = f"hostname() {{ echo {addresses}; }}\nRAY_HEAD_IP=10.0.0.1\n{command}"
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"--address=10.0.0.1:6379 --disable-usage-stats {offer}".strip()


# ---- Slurm, the rest of it in test_render_slurm.py -----------------------------------------------------------


@pytest.mark.parametrize("ingest_nodes", [0, 4])
def test_script_is_bash(tmp_path: Path, ingest_nodes):
    hostile = "data.urls=lists/$(touch x) it's.parquet"
    ((name, text),) = rendered(tmp_path, "slurm", LAION, f"deploy.ingest_nodes={ingest_nodes}", hostile).items()
    assert name == "laion.sbatch"
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert shlex.quote(hostile) in text.split("roclip run")[-1]
    assert text.count("#SBATCH hetjob") == (1 if ingest_nodes else 0)


# ---- all of them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.relative_to(DEPLOYED).as_posix())
def test_example_is_what_its_command_writes(path: Path, tmp_path: Path):
    line = next(line for line in path.read_text().splitlines() if line.startswith("# Made by: "))
    words = shlex.split(line.removeprefix("# Made by: "))
    assert words[:2] == ["roclip", "render"]
    assert rendered(tmp_path, *words[2:])[path.name] == path.read_text()


def test_there_are_examples_of_all_kinds():
    assert {path.relative_to(DEPLOYED).as_posix() for path in EXAMPLES} == {
        *(f"kubernetes/{name}.yaml" for name in ("common", "raycluster", "rayjob")),
        *(f"ray/{name}.yaml" for name in ("aws", "gcp", "on-premise")),
        "slurm/laion.sbatch",
    }


def test_nodes_follow_from_the_ranks():
    def groups(*overrides: str) -> dict[str, tuple[int, int, dict[str, int]]]:
        deployed = [override for override in overrides if override.startswith("deploy.")]
        config = load_config(LAION, [override for override in overrides if override not in deployed])
        found = node_groups(config, load_deploy(Path(FOUR_TO_FETCH[1]), deployed))
        return {group.name: (group.nodes, group.fewest, group.resources) for group in found}

    assert groups() == {"train": (4, 4, {"CPU": 64, "GPU": 8}), "ingest": (4, 4, {"CPU": 32, "ingest": 32})}
    assert groups("cluster.workers=12", "cluster.min_workers=6")["train"] == (2, 1, {"CPU": 64, "GPU": 8})
    assert groups("cluster.workers=2")["train"] == (1, 1, {"CPU": 16, "GPU": 2})
    assert groups("deploy.ingest_nodes=0") == {"train": (4, 4, {"CPU": 64 + 32, "GPU": 8})}
    assert groups("data.urls=", "data.shards=s3://mine/laion") == {"train": (4, 4, {"CPU": 64, "GPU": 8})}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ray", LAION, "--provider", "gcp"], "deploy.gcp: expected nfs, project, machine_image"),
        (["ray", LAION, "--provider", "on-premise"], "addresses of the head, 4 for train, 4 for ingest; got 0"),
        (["k8s", LAION, "oracle.actors=40", "oracle.gpus_per_actor=1"], "oracle.actors: expected at most 32 GPUs"),
        (["k8s", LAION, "cluster.gpus_per_worker=0.3"], "ranks that fill whole GPUs"),
        (["k8s", LAION, "ingest.policy.allow_networks=[mine]"], "allow_networks: expected networks"),
        (["k8s", LAION, "deploy.ingest_nods=3"], "Did you mean 'deploy.ingest_nodes'"),
        (["slurm", LAION, "deploy.slurm.partition='gpu\nrm -r x'"], "deploy.slurm.partition: expected one word"),
        (["docker", LAION], "docker"),
        (["k8s", LAION, "--deploy", "configs/deploy/none.yaml"], "expected a description of a cluster"),
    ],
)
def test_what_cannot_be_rendered_is_said(tmp_path: Path, capfd, arguments, message):
    assert guarded(["render", *FOUR_TO_FETCH, *arguments, "--out", str(tmp_path / "out")]) == ConfigError.exit_code
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_are_ones_that_all_take():
    config = load_config(LAION)
    assert cluster_name(dataclasses.replace(config, name="2nd_Run.v1")) == "nd-run-v1"
    assert len(cluster_name(dataclasses.replace(config, name="a" * 90))) == 40
    with pytest.raises(ConfigError, match="expected a letter"):
        cluster_name(dataclasses.replace(config, name="2026"))


def test_config_of_a_run_does_not_describe_a_cluster():
    with pytest.raises(ConfigError, match="roclip render TARGET CONFIG --deploy FILE"):
        load_config(LAION, ["deploy.ingest_nodes=9"])
    assert "deploy" not in dump_config(load_config(LAION))


def test_description_without_a_file_is_that_of_the_defaults(tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_deploy(None) == load_deploy(tmp_path / "empty.yaml") == DeployConfig()


# ---- the image ----------------------------------------------------------------------------------------------


def test_dockerfile_passes_hadolint():
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, DEPLOYED / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_dockerfile_copies_what_is_there():
    text = (DEPLOYED / "Dockerfile").read_text()
    lines = re.findall(r"^COPY (?!--from)(.*)$", text, re.M)
    sources = [source for line in lines for source in line.split()[:-1]]
    assert {"roclip", "ingest", "cluster"} <= set(sources)
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    assert "USER 1000:1000" in text
    assert "HEALTHCHECK" in text


def test_constraints_fit_the_package():
    lines = [line for line in (DEPLOYED / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {requirement.name: requirement for requirement in map(Requirement, lines)}
    assert all(re.fullmatch(r"==[^=*]+", str(requirement.specifier)) for requirement in pins.values())
    project = pytest.importorskip("tomllib").loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = map(Requirement, (*project["dependencies"], *project["optional-dependencies"]["s3"]))
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate({"platform_machine": "x86_64"}):
            pin = pins[re.sub(r"[-_.]+", "-", requirement.name).lower()]
            assert requirement.specifier.contains(str(pin.specifier)[2:]), f"{requirement} and {pin}"
    assert str(pins["ray"].specifier) == f"=={RAY_VERSION}"


def test_healthcheck_sees_a_node_of_ray(tmp_path: Path):
    """Run as in a container, where there are no other processes than its own: in a PID namespace with its own /proc."""
    if os.geteuid():
        pytest.skip("needs root, for a PID namespace")
    text = (DEPLOYED / "Dockerfile").read_text()
    check_url = shlex.join([sys.executable, *yaml.safe_load(re.search(r"^  CMD (\[.*\])$", text, re.M)[1])[1:]])
    (tmp_path / "raylet").symlink_to("/bin/sleep")
    script = f"{check_url}; echo $?; {tmp_path}/raylet 60 & sleep 0.2; {check_url}; echo $?; kill %1"
    command = ["unshare", "--pid", "--fork", "--mount-proc", "bash", "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["1", "0"]
