"""The command `roclip render`."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.cli.options import ConfigPath, Overrides, examples, resolve
from roclip.errors import ConfigError

RENDER_EXAMPLES = examples(
    "render k8s configs/laion.yaml --out deploy",
    "render ray configs/laion.yaml --provider gcp deploy.gcp.project=mine deploy.gcp.nfs=10.1.2.3:/runs",
    "render slurm configs/laion.yaml deploy.slurm.partition=gpu --out deploy",
)


def render(
    target: Annotated[Literal["k8s", "ray", "slurm"], typer.Argument(metavar="k8s|ray|slurm", help="For what.")],
    config: ConfigPath,
    overrides: Overrides = None,
    provider: Annotated[
        Literal["aws", "gcp", "on-premise"], typer.Option(help="With ray: whose machines they are.")
    ] = "aws",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write to; else the files are printed.")
    ] = None,
) -> int:
    """Write what brings the cluster of a config up, from its sections `cluster` and `deploy`: manifests for KubeRay, a
    YAML for `ray up`, or a script for `sbatch`.
    """
    settings = resolve(config, overrides)
    from cluster.render.render import render_k8s, render_ray, render_slurm
    from roclip.storage import write_atomic

    path = config / "config.yaml" if config.is_dir() else config
    given = list(overrides or ())
    words = ["roclip", "render", target, str(config), *given, *(["--provider", provider] if target == "ray" else [])]
    header = f"# Made by: {shlex.join(words)}"
    if "\n" in header:
        raise ConfigError("render: expected overrides of one line each, got a line break. Put it into the preset.")
    if target == "k8s":
        files = render_k8s(settings, path, given, header)
    elif target == "ray":
        files = render_ray(settings, provider, header)
    else:
        files = render_slurm(settings, path, given, header)
    for name, text in files.items():
        if out is None:
            typer.echo((f"---\n# {name}\n" if len(files) > 1 else "") + text, nl=False)
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(out / name, text)
            typer.echo(f"wrote    {out / name}")
    return 0
