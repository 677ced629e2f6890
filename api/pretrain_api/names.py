"""Every name that more than one component must spell the same way.

Kubernetes objects refer to each other by strings: labels, annotations, condition types, ports,
paths inside the worker pod. A string that two components spell is written here once; a string only
one component uses stays in that component.
"""

from typing import Final

GROUP: Final = "pretrain.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = "pretrain.dev/v1alpha1"
KIND: Final = "PretrainJob"
PLURAL: Final = "pretrainjobs"
SINGULAR: Final = "pretrainjob"
SHORT_NAMES: Final = ("ptj",)
CATEGORIES: Final = ("all", "ml")
MAX_JOB_NAME: Final = 48  # characters; what children append must fit into the 63 of a label

# Labels on every child object. The job's name is for people and selectors, its UID for ownership:
# a job deleted and created again under the same name must never adopt its predecessor's children.
LABEL_JOB: Final = f"{GROUP}/job-name"
LABEL_JOB_UID: Final = f"{GROUP}/job-uid"
LABEL_WORKER: Final = f"{GROUP}/worker-index"
LABEL_GENERATION: Final = f"{GROUP}/created-in-generation"
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGED_BY: Final = "pretrain-operator"

# Kueue's: on a job or its pods, the queue that admits its workers, all together.
LABEL_QUEUE: Final = "kueue.x-k8s.io/queue-name"

# The operator's word to a worker: JSON of wire.Assignment, projected into the pod as a file.
ANNOTATION_ASSIGNMENT: Final = f"{GROUP}/assignment"
# When the operator last had the kubelet look at it again.
ANNOTATION_REMINDED: Final = f"{GROUP}/reminded"

# Condition types of a PretrainJob, in the vocabulary of batch/v1 Job.
SUSPENDED: Final = "Suspended"
RUNNING: Final = "Running"
RESTARTING: Final = "Restarting"
COMPLETE: Final = "Complete"
FAILED: Final = "Failed"

# Container, ports and paths inside a worker pod.
CONTAINER: Final = "trainer"
HTTP_PORT: Final = 8476  # /status, /metrics, /healthz of the supervisor
MEETING_PORT: Final = 8477  # where agents of one generation meet, at the leader
CONFIG_DIR: Final = "/etc/pretrain/config"
CONFIG_FILE: Final = "run.json"
PODINFO_DIR: Final = "/etc/pretrain/podinfo"
ASSIGNMENT_FILE: Final = "assignment"
OUTPUT_DIR: Final = "/var/pretrain/output"  # the checkpoint volume; becomes job.dump_folder
SCRATCH_DIR: Final = "/var/pretrain/scratch"  # HOME, TMPDIR and caches
SAMPLE_DIR: Final = "/opt/pretrain/sample"  # text and tokenizer that come with the image
USER_ID: Final = 10001  # numeric user and group of both images

# Environment of the supervisor (set by the operator or by `pretrain run`).
ENV_CONFIG: Final = "PRETRAIN_CONFIG"  # path of the RunConfig JSON
ENV_ASSIGNMENT: Final = "PRETRAIN_ASSIGNMENT"  # path of the Assignment JSON
ENV_PROCESSES: Final = "PRETRAIN_PROCESSES_PER_WORKER"
ENV_HTTP_PORT: Final = "PRETRAIN_HTTP_PORT"
ENV_MEETING_PORT: Final = "PRETRAIN_MEETING_PORT"
ENV_TERMINATION_LOG: Final = "PRETRAIN_TERMINATION_LOG"
ENV_GRACE_SECONDS: Final = "PRETRAIN_GRACE_SECONDS"
ENV_HOST: Final = "PRETRAIN_HOST"  # address under which other workers reach this one
ENV_JOB_NAME: Final = "PRETRAIN_JOB_NAME"
ENV_JOB_UID: Final = "PRETRAIN_JOB_UID"
ENV_NAMESPACE: Final = "PRETRAIN_NAMESPACE"
ENV_POD_NAME: Final = "PRETRAIN_POD_NAME"

# Environment of a rank, beside torchrun's RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
ENV_BOARD: Final = "PRETRAIN_BOARD"  # path of the shared-memory board
ENV_GENERATION: Final = "PRETRAIN_GENERATION"
ENV_ROUND: Final = "PRETRAIN_ROUND"
ENV_NONCE: Final = "PRETRAIN_NONCE"
ENV_SAVED_STEP: Final = "PRETRAIN_SAVED_STEP"  # of a checkpoint that must be there; absent: none
ENV_TERMINAL: Final = "PRETRAIN_TERMINAL"  # "1" when a person watches the supervisor's output
