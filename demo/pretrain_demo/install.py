"""From nothing to a cluster that runs the operator: cluster, images, chart.

Every step finds what an earlier run left and does only what is missing, so that the second run
takes seconds.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Mapping

from pretrain_demo.console import Console
from pretrain_demo.target import DemoError, Target, repository
from pretrain_devcluster import Cluster, DevclusterError

SYSTEM_NAMESPACE = "pretrain-system"
RELEASE = "pretrain-operator"
IMAGES = ("operator", "trainer")
ENGINES = ("docker", "podman", "buildah")  # the first one found builds images for other clusters


def install(target: Target, console: Console) -> None:
    """Bring up cluster, images and operator. Raises DemoError with what is missing."""
    try:
        if target.own:
            console.heading("A Kubernetes cluster on this machine")
            cluster = Cluster.up()
            console.heading("Images of operator and trainer")
            references = cluster.build(repository(), IMAGES)
        else:
            console.heading(f"Your cluster: {target.describe()}")
            references = build_elsewhere(target, console)
    except DevclusterError as error:
        raise DemoError(str(error)) from error
    console.heading("The operator, from its Helm chart")
    install_chart(target, references)
    console.say(f"{RELEASE} runs in {SYSTEM_NAMESPACE}")


def install_chart(target: Target, references: Mapping[str, str]) -> None:
    """Install or upgrade the release, and wait until the operator is ready.

    Args:
        target: where to.
        references: full references of both images, by their names in IMAGES.
    """
    ensure_namespace(target, SYSTEM_NAMESPACE)
    values = {
        "image": image_values(references["operator"]),
        "trainerImage": image_values(references["trainer"]),
        "log": {"format": "text"},
    }
    target.helm(
        "upgrade", "--install", RELEASE, str(repository() / "charts" / RELEASE),
        f"--namespace={SYSTEM_NAMESPACE}", "--wait", "--timeout=5m", *set_flags(values),
    )  # fmt: skip


def image_values(reference: str) -> dict[str, str]:
    """Chart values for an image reference.

    >>> image_values("10.0.0.1:5000/a/trainer@sha256:1")
    {'registry': '10.0.0.1:5000/a', 'repository': 'trainer', 'digest': 'sha256:1'}
    >>> image_values("registry.example/trainer:v1")
    {'registry': 'registry.example', 'repository': 'trainer', 'tag': 'v1'}
    """
    path, _, last = reference.rpartition("/")
    if "@" in last:
        name, _, digest = last.partition("@")
        return {"registry": path, "repository": name.partition(":")[0], "digest": digest}
    name, _, tag = last.partition(":")
    return {"registry": path, "repository": name, "tag": tag or "latest"}


def set_flags(values: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Helm flags for values two levels deep; JSON, so that nothing is read as a number."""
    return [f"--set-json={key}={json.dumps(value)}" for key, value in values.items()]


def ensure_namespace(target: Target, name: str) -> None:
    """Make a namespace that admits restricted pods only, as careful clusters do."""
    body = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    }
    target.kubectl("apply", "-f", "-", text=json.dumps(body))


def build_elsewhere(target: Target, console: Console) -> dict[str, str]:
    """Build both images with the engine at hand and push them to the user's registry."""
    engine = next((name for name in ENGINES if shutil.which(name)), None)
    if engine is None:
        raise DemoError(f"none of {', '.join(ENGINES)} is on PATH; install one to build images")
    tag = time.strftime("demo-%Y%m%d-%H%M%S")
    references: dict[str, str] = {}
    for name in IMAGES:
        reference = f"{target.registry}/pretrain-{name}:{tag}"
        console.say(f"building and pushing {reference}")
        for argv in (
            [engine, "build", "--target", name, "--tag", reference, str(repository())],
            [engine, "push", reference],
        ):
            if subprocess.run(argv, check=False).returncode != 0:
                raise DemoError(f"`{' '.join(argv)}` failed; its own words are above")
        references[name] = reference
    return references
