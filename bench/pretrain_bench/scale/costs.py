"""What a process has cost: memory and processor time from /proc, requests from the API server."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pretrain_bench.client import Client

COUNTER = re.compile(
    r'^apiserver_flowcontrol_dispatched_requests_total\{[^}]*flow_schema="of-(?P<user>[^"]+)"'
    r"[^}]*\} (?P<count>\S+)$",
    re.M,
)


@dataclass(frozen=True)
class Usage:
    """Of a process since it was started."""

    peak_mib: float
    cpu_seconds: float

    @classmethod
    def of(cls, pid: int) -> Self:
        """Raises OSError if there is no such process."""
        process = Path(f"/proc/{pid}")
        [peak] = re.findall(r"^VmHWM:\s+(\d+) kB$", (process / "status").read_text(), re.M)
        after_name = (process / "stat").read_text().rpartition(")")[2].split()
        ticks = int(after_name[11]) + int(after_name[12])  # utime and stime, see proc(5)
        return cls(int(peak) / 1024, ticks / os.sysconf("SC_CLK_TCK"))


def count_requests_of(client: Client, user: str) -> None:
    """Have the API server count a user's requests apart from now on, without holding them back.

    Not those of a member of system:masters: these are taken first, by the schema 'exempt'.
    """
    subject = {"kind": "User", "user": {"name": user}}
    everything = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"],
                  "clusterScope": True}  # fmt: skip
    body = {
        "apiVersion": "flowcontrol.apiserver.k8s.io/v1",
        "kind": "FlowSchema",
        "metadata": {"name": f"of-{user}"},  # some users have one of their name already
        "spec": {
            "matchingPrecedence": 2,  # 1 is for 'exempt' alone
            "priorityLevelConfiguration": {"name": "exempt"},
            "rules": [{"subjects": [subject], "resourceRules": [everything]}],
        },
    }
    client.request("POST", "/apis/flowcontrol.apiserver.k8s.io/v1/flowschemas", body)


def requests(metrics: str, user: str) -> int:
    """How many a user's requests were, by the text of the API server's metrics."""
    found = COUNTER.finditer(metrics)
    return sum(int(float(match["count"])) for match in found if match["user"] == user)
