"""Rules about imports that import-linter cannot state: parts of torch, and single modules of ours.

The layers between our packages are contracts in pyproject.toml; `make lint` runs them.
"""

import ast
import subprocess
import sys
from pathlib import Path

# Composing parallelisms is the hard part of the trainer. It stays in one folder; checkpoints may
# look at DTensors, and everybody may use plain process groups.
PARALLEL_APIS = (
    "torch.distributed.fsdp",
    "torch.distributed._composable",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.distributed.tensor.experimental",
)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_only_parallel_uses_the_parallel_apis_of_torch(repository: Path) -> None:
    trainer = repository / "trainer"
    offenders = [
        f"{path.relative_to(trainer)}: {name}"
        for path in sorted(trainer.rglob("*.py"))
        if path.parent.name != "parallel"
        for name in sorted(imported(path))
        if name.startswith(PARALLEL_APIS)
    ]
    assert offenders == []


def test_the_supervisor_of_a_worker_loads_no_torch() -> None:
    # PID 1 must start in a blink, answer while the ranks import, and survive their memory needs.
    code = (
        "import sys, pretrain_agent.supervisor; heavy = {'torch', 'numpy', 'kubernetes', 'kopf'}; "
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
