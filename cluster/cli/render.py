"""The command `roclip render`."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.cli.options import ConfigPath, Overrides, examples, resolve
from roclip.config import load_deploy
from roclip.errors import ConfigError

RENDER_EXAMPLES = examples(
    "render k8s configs/laion.yaml --deploy configs/deploy/laion.yaml --out cluster",
    "render ray configs/laion.yaml --provider gcp deploy.gcp.project=mine deploy.gcp.nfs=10.1.2.3:/runs",
    "render slurm configs/laion.yaml --deploy configs/deploy/laion.yaml deploy.slurm.partition=gpu --out cluster",
)


def render(
    target: Annotated[Literal["k8s", "ray", "slurm"], typer.Argument(metavar="k8s|ray|slurm", help="Kind of cluster.")],
    config: ConfigPath,
    overrides: Overrides = None,
    provider: Annotated[
        Literal["aws", "gcp", "on-premise"], typer.Option(help="With ray: who owns the machines.")
    ] = "aws",
    deploy: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Description of the cluster (YAML); `roclip config deploy` shows its keys."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write to; without it the files are printed.")
    ] = None,
) -> int:
    """Write the files that start a cluster for a run: manifests for KubeRay, a YAML for `ray up`, or a script for `sbatch`.

    The run's section `cluster` says how many ranks there are; the file of --deploy, and overrides such as
    deploy.ingest_nodes=4, say what the nodes are.
    """
    mine = [override for override in overrides or () if not override.startswith("deploy.")]
    settings = resolve(config, mine)
    described = load_deploy(deploy, [override for override in overrides or () if override.startswith("deploy.")])
    from cluster.render.render import render_k8s, render_ray, render_slurm
    from roclip.storage import write_atomic

    path = config / "config.yaml" if config.is_dir() else config
    words = ["roclip", "render", target, str(config), *(overrides or ())]
    words += [*(["--deploy", str(deploy)] if deploy else []), *(["--provider", provider] if target == "ray" else [])]
    header = f"# Made by: {shlex.join(words)}"
    if "\n" in header:
        raise ConfigError("render: expected overrides of one line each, got a line break. Put it into the preset.")
    if target == "k8s":
        files = render_k8s(settings, described, path, mine, header)
    elif target == "ray":
        files = render_ray(settings, described, provider, header)
    else:
        files = render_slurm(settings, described, path, mine, header)
    for name, text in files.items():
        if out is None:
            typer.echo((f"---\n# {name}\n" if len(files) > 1 else "") + text, nl=False)
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(out / name, text)
            typer.echo(f"wrote    {out / name}")
    return 0
