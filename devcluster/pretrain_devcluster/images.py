"""Container images: a base made from Debian packages, builds of the repository, the registry.

Three things make the layer with torch cheap, which is gigabytes large and rarely changes. The
package caches of the machine are mounted into builds, for Dockerfiles that use them. Layers are
pushed with the fastest compression, a third of the usual one's processor time: the registry is a
namespace away. Build storage, registry and nodes keep what they have, so only changed layers move,
and to the nodes they move as links (see `seeding`).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pretrain_devcluster import control, preflight
from pretrain_devcluster.binaries import Binaries
from pretrain_devcluster.layout import REGISTRY_ENDPOINT, Layout
from pretrain_devcluster.node import pause_image
from pretrain_devcluster.shell import Progress, run, stream, succeeds

TARGETS = ("operator", "trainer")
_BUILD_DISK = {"operator": 3 * preflight.GIB, "trainer": 25 * preflight.GIB}
_STEP = re.compile(r"(\[\d+/\d+\] )?STEP \d+/\d+")
_SUITE = "bookworm"
# What the public slim Python images offer to a Dockerfile, headers for compiled code included.
_BASE_PACKAGES = "ca-certificates,python-is-python3,python3-dev,python3-pip,python3-venv"


def buildah(layout: Layout, *words: str | Path) -> list[str]:
    """Composes a buildah command whose images stay in the cluster's own folders."""
    storage = ["--root", str(layout.buildah / "images"), "--runroot", str(layout.buildah / "run")]
    # Else it would mount the storage onto itself, and files can't be linked out of a mount.
    options = ["--storage-driver", "overlay", "--storage-opt", "overlay.skip_mount_home=true"]
    return ["buildah", *storage, *options, *map(str, words)]


def build_command(layout: Layout) -> list[str]:
    """Composes the start of a build, which goes on as one of docker's does."""
    options = ["--layers", "--isolation", "chroot", "--network", "host", *_mounts()]
    return buildah(layout, "build", *options, "--build-arg", f"BASE_IMAGE={base_image()}")


def push_command(layout: Layout) -> list[str]:
    """Composes the start of a push, which goes on as one of docker's does."""
    fast = ["--compression-format", "zstd", "--compression-level", "1"]
    return buildah(layout, "push", "--tls-verify=false", *fast)


def push(layout: Layout, image: str) -> str:
    """Pushes an image and returns its reference by digest."""
    with tempfile.NamedTemporaryFile("r") as digest:
        run(*push_command(layout), "--digestfile", digest.name, image, f"docker://{image}")
        repository = image.rpartition(":")[0]
        return f"{repository}@{digest.read().strip()}"


def ensure_pause(layout: Layout, binaries: Binaries) -> None:
    """Puts the pause image into the registry unless it is there."""
    image = pause_image(binaries)
    repository, _, tag = image.removeprefix(f"{REGISTRY_ENDPOINT}/").partition(":")
    if control.registry_has(repository, tag):
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(binaries.hyperkube / "pause", folder)
        dockerfile = 'FROM scratch\nCOPY pause /pause\nUSER 65535\nENTRYPOINT ["/pause"]\n'
        (Path(folder) / "Dockerfile").write_text(dockerfile)
        run(*buildah(layout, "build", "--isolation", "chroot", "--tag", image, folder))
    push(layout, image)


def base_image() -> str:
    """Reference of the base image in the build storage, named by its recipe."""
    recipe = hashlib.sha256(f"{_SUITE} {_BASE_PACKAGES} {_base_dockerfile()}".encode()).hexdigest()
    return f"localhost/pretrain-base:{_SUITE}-{recipe[:12]}"


def _base_dockerfile() -> str:
    """Debian forbids pip outside a virtual environment; in a container image it has no point."""
    return (
        "FROM scratch\n"
        "ADD root.tar /\n"
        "RUN rm -f /usr/lib/python3*/EXTERNALLY-MANAGED\n"
        'CMD ["python3"]\n'
    )


def ensure_base(layout: Layout, progress: Progress) -> str:
    """Makes the base image from Debian packages, once, and returns its reference."""
    image = base_image()
    if succeeds(*buildah(layout, "inspect", "--type", "image", image)):
        return image
    progress.say(f"making the base image from Debian {_SUITE} (about 1 minute, once)")
    preflight.require_disk(layout, 2 * preflight.GIB, "the base image")
    with tempfile.TemporaryDirectory(dir=layout.state) as folder:
        run("debootstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", _SUITE,
            Path(folder) / "root", *_mirror())  # fmt: skip
        # Package archives are in the way of nothing but size.
        run("chroot", Path(folder) / "root", "apt-get", "clean")
        run("tar", "-C", Path(folder) / "root", "-cf", Path(folder) / "root.tar", ".")
        shutil.rmtree(Path(folder) / "root")
        (Path(folder) / "Dockerfile").write_text(_base_dockerfile())
        run(*buildah(layout, "build", "--isolation", "chroot", "--tag", image, folder))
    return image


def _mirror() -> list[str]:
    """The machine's own Debian mirror, where it is of the same suite; else debootstrap's choice."""
    lines = run("apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)")
    for line in lines.splitlines():
        codename, component, address = line.split(" ", 2)
        if (codename, component) == (_SUITE, "main"):
            return [address]
    return []


def built_image(target: str) -> str:
    """Reference of a built target in the build storage and, as a moving tag, in the registry."""
    return f"{REGISTRY_ENDPOINT}/pretrain-{target}:dev"


def build(
    layout: Layout, source: Path, targets: Sequence[str], progress: Progress
) -> dict[str, str]:
    """Builds targets of the repository's Dockerfile and pushes them.

    Args:
        layout: where build storage is.
        source: the repository; its Dockerfile takes `BASE_IMAGE` as a build argument.
        targets: some of `TARGETS`.
        progress: gets one line per step of the Dockerfile.

    Returns:
        References by digest, by target.
    """
    ensure_base(layout, progress)
    references = {}
    for target in targets:
        image = built_image(target)
        if not succeeds(*buildah(layout, "inspect", "--type", "image", image)):
            preflight.require_disk(layout, _BUILD_DISK[target], f"the image of the {target}")
        progress.say(f"building the image of the {target}")
        stream(
            [*build_command(layout), "--target", target, "--tag", image, str(source)],
            lambda line: progress.say(line) if _STEP.match(line) else None,
        )
        progress.say(f"pushing the image of the {target}")
        references[target] = push(layout, image)
    return references


def _mounts() -> list[str]:
    """Mounts the machine's package caches and its trust into builds; neither gets into an image."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    options = []
    for name in ("pip", "uv"):
        (cache / name).mkdir(parents=True, exist_ok=True)
        options += ["--volume", f"{cache / name}:/root/.cache/{name}:rw"]
    for file in (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/pip.conf")):
        if file.exists():
            options += ["--volume", f"{file}:{file}:ro"]
    return options


def publish(layout: Layout, image: str, repository: str) -> str:
    """Pushes an image of the build storage as `repository` and returns its reference by digest."""
    tag = image.rpartition(":")[2]
    reference = f"{REGISTRY_ENDPOINT}/{repository}:{tag}"
    run(*buildah(layout, "tag", image, reference))
    return push(layout, reference)


def remove_storage(layout: Layout) -> None:
    """Removes the build storage; buildah must do it where it left an overlay mounted."""
    if layout.buildah.exists():
        run(*buildah(layout, "rm", "--all"))
        for line in Path("/proc/mounts").read_text().splitlines():
            target = line.split()[1]
            if Path(target).is_relative_to(layout.buildah):
                run("umount", target)
