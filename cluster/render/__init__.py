"""One config to the files that bring its cluster up: Kubernetes (KubeRay), `ray up`, Slurm."""
