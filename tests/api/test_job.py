"""PretrainJob refuses what can't work, with one clear sentence per mistake."""

from typing import Any

import pytest
from pydantic import ValidationError

from pretrain_api import names
from pretrain_api.job import JobSpec, PretrainJob

VOLUME = {"checkpoint": {"claimTemplate": {"storage": "10Gi"}}}


def spec(**parts: Any) -> dict[str, Any]:
    training = {"dataset": "text", "datasetPath": "/data", **parts.pop("training", {})}
    return {"training": training, **parts}


def messages(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(data)
    return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in caught.value.errors()]


def workers(**parts: Any) -> dict[str, Any]:
    return spec(workers=parts)


def pod(**parts: Any) -> dict[str, Any]:
    return workers(podTemplate=parts)


def volume(**parts: Any) -> dict[str, Any]:
    return spec(volumes={"checkpoint": parts})


def test_twenty_lines_are_enough() -> None:
    job = JobSpec.model_validate(spec(checkpoint={"enable": True}, volumes=VOLUME))
    assert job.world_size == 1
    assert job.volumes.checkpoint is not None
    assert job.volumes.checkpoint.retention == "Retain"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        # volumes
        (
            spec(checkpoint={"enable": True}),
            "volumes.checkpoint: is missing but checkpoint.enable is on; add a claimTemplate with "
            "a storage size, or the claimName of a claim that exists",
        ),
        (volume(), "volumes.checkpoint: needs exactly one of claimTemplate, claimName"),
        (
            volume(claimName="a", claimTemplate={"storage": "1Gi"}),
            "volumes.checkpoint: needs exactly one of claimTemplate, claimName",
        ),
        *(
            (
                volume(claimName="a", subPath=path),
                "volumes.checkpoint.subPath: must be a relative path without . or .. or //",
            )
            for path in ("/root", "..", "a/../..", "a//b", "./a")
        ),
        (
            volume(claimName="a", retention="Delete"),
            "volumes.checkpoint.retention: Delete is for a claim the job creates; a claim named by "
            "claimName is kept",
        ),
        *(
            (
                volume(claimTemplate={"storage": size}),
                "volumes.checkpoint.claimTemplate.storage: must be more than nothing, such as "
                "100Gi",
            )
            for size in ("0", "0Gi", 0)
        ),
        (
            spec(
                workers={"replicas": 2},
                volumes={
                    "checkpoint": {
                        "claimTemplate": {"storage": "1Gi", "accessModes": ["ReadWriteOnce"]}
                    }
                },
            ),
            "volumes.checkpoint.claimTemplate.accessModes: several workers write to the volume; "
            "add ReadWriteMany or use 1 worker with more processes",
        ),
        # arithmetic
        (
            spec(
                workers={"replicas": 2, "processesPerWorker": 4},
                parallelism={"dataParallelShardDegree": 4},
            ),
            "parallelism.dataParallelShardDegree: 4 doesn't fill 8 ranks; use -1 or 8",
        ),
        (
            spec(workers={"replicas": 4}, parallelism={"dataParallelReplicateDegree": 3}),
            "parallelism.dataParallelReplicateDegree: 3 doesn't divide 4 ranks; use one of 1, 2, 4",
        ),
        (
            spec(
                workers={"replicas": 3},
                training={"localBatchSize": 2, "globalBatchSize": 8},
            ),
            "training.globalBatchSize: 8 is no multiple of local_batch_size 2 x data-parallel "
            "degree 3; use -1 or 6 or 12",
        ),
        (
            spec(
                workers={"replicas": 2},
                checkpoint={"enable": True, "createSeedCheckpoint": True},
                volumes=VOLUME,
            ),
            "checkpoint.createSeedCheckpoint: needs exactly one process: 1 worker and "
            "workers.processesPerWorker 1",
        ),
        # keys that only make sense elsewhere
        (
            spec(job={"dumpFolder": "/data/out"}),
            "job.dumpFolder: is where the operator mounts the checkpoint volume; remove it, and "
            "use volumes.checkpoint.subPath for a folder within the volume",
        ),
        # workers
        (
            workers(replicas=2, minReplicas=4),
            "workers.minReplicas: must not be more than replicas",
        ),
        (
            workers(replicas=4, maxReplicas=2),
            "workers.maxReplicas: must not be less than replicas",
        ),
        *(
            (
                workers(
                    replicas=2,
                    podTemplate={"labels": {"kueue.x-k8s.io/queue-name": "team"}},
                    **bounds,
                ),
                "workers.podTemplate.labels: kueue.x-k8s.io/queue-name puts the pods into a group "
                "that can't change its size; remove minReplicas and maxReplicas, or the label",
            )
            for bounds in ({"minReplicas": 1}, {"maxReplicas": 4})
        ),
        (
            workers(replicas=5, maxReplicas=12),
            "workers.replicas: 5 workers can't share the batch and the degrees of 12; use one of "
            "1, 2, 3, 4, 6, 12",
        ),
        (
            workers(replicas=4, minReplicas=3),
            "workers.minReplicas: 3 workers can't share the batch and the degrees of 4; use one of "
            "1, 2, 4",
        ),
        (
            spec(
                workers={"replicas": 4, "minReplicas": 1},
                parallelism={"dataParallelReplicateDegree": 2},
            ),
            "workers.minReplicas: 1 worker can't share the batch and the degrees of 4; use one of "
            "2, 4",
        ),
        (
            spec(
                workers={"replicas": 1, "maxReplicas": 2},
                volumes={
                    "checkpoint": {
                        "claimTemplate": {"storage": "1Gi", "accessModes": ["ReadWriteOnce"]}
                    }
                },
            ),
            "volumes.checkpoint.claimTemplate.accessModes: several workers write to the volume; "
            "add ReadWriteMany or use 1 worker with more processes",
        ),
        *(
            (
                workers(processesPerWorker=8, resources={"limits": {"nvidia.com/gpu": gpus}}),
                "workers.processesPerWorker: every process needs a GPU of its own; nvidia.com/gpu "
                "in resources.limits must be a whole number that is not less",
            )
            for gpus in (4, "4", "8k", "0")
        ),
        (
            spec(recovery={"backoffSeconds": 60, "maxBackoffSeconds": 30}),
            "recovery.maxBackoffSeconds: must not be less than backoffSeconds",
        ),
        # pods
        *(
            (
                pod(env=[{"name": name, "value": "1"}]),
                f"workers.podTemplate.env.0.name: {name} is set by the operator or changes which "
                "code runs; remove it",
            )
            for name in (
                "RANK", "WORLD_SIZE", "MASTER_ADDR", "PET_NNODES", "PRETRAIN_CONFIG",
                "TORCHELASTIC_RUN_ID", "LD_PRELOAD", "PYTHONPATH", "HOME",
            )
        ),
        (
            pod(env=[{"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}]),
            "workers.podTemplate.env.0: set value or valueFrom, not both",
        ),
        (
            pod(env=[{"name": "A", "valueFrom": {}}]),
            "workers.podTemplate.env.0.valueFrom: needs exactly one of secretKeyRef, "
            "configMapKeyRef, fieldRef",
        ),
        (
            pod(env=[{"name": "A"}, {"name": "A"}]),
            "workers.podTemplate.env: Value error, A is there more than once; names must differ",
        ),
        *(
            (
                pod(**{field: {key: "x"}}),
                f"workers.podTemplate.{field}: {key} is reserved for the operator or for "
                "Kubernetes; remove it",
            )
            for field in ("labels", "annotations")
            for key in (
                "pretrain.dev/assignment", "pretrain.dev/job-uid", "app.kubernetes.io/managed-by",
                "kueue.x-k8s.io/pod-group-name", "kueue.x-k8s.io/pod-group-total-count",
                "kueue.x-k8s.io/retriable-in-group",
            )
        ),
        (
            pod(tolerations=[{"effect": "NoSchedule"}]),
            "workers.podTemplate.tolerations.0.key: is missing; only operator Exists can do "
            "without",
        ),
        (
            pod(tolerations=[{"operator": "Exists", "value": "x"}]),
            "workers.podTemplate.tolerations.0.value: has no meaning with operator Exists; remove "
            "it",
        ),
        (
            pod(tolerations=[{"key": "x", "tolerationSeconds": 3}]),
            "workers.podTemplate.tolerations.0.tolerationSeconds: has a meaning with effect "
            "NoExecute only; remove it",
        ),
        (
            pod(volumes=[{"name": "v"}]),
            "workers.podTemplate.volumes.0: needs exactly one of configMap, secret, emptyDir, "
            "persistentVolumeClaim, downwardAPI",
        ),
        (
            pod(volumes=[{"name": "pretrain-output", "emptyDir": {}}]),
            "workers.podTemplate.volumes.0.name: names that begin with pretrain- are the "
            "operator's; choose another",
        ),
        (
            pod(volumeMounts=[{"name": "data", "mountPath": "/data"}]),
            "workers.podTemplate.volumeMounts: every volumeMount must name one of "
            "podTemplate.volumes",
        ),
        *(
            (
                pod(
                    volumes=[{"name": "v", "emptyDir": {}}],
                    volumeMounts=[{"name": "v", "mountPath": path}],
                ),
                "workers.podTemplate.volumeMounts.0.mountPath: would cover what a worker needs; "
                "choose a folder such as /data",
            )
            for path in (
                "/", "/etc", "/var/", "/etc/pretrain", "/var/pretrain/output", "/opt/pretrain/x",
                "/dev/shm", "/proc", "/sys/fs", "/tmp",
            )
        ),
        *(
            (
                pod(
                    volumes=[{"name": "v", "emptyDir": {}}],
                    volumeMounts=[{"name": "v", "mountPath": path}],
                ),
                "workers.podTemplate.volumeMounts.0.mountPath: must be an absolute path without "
                ". or .. or //",
            )
            for path in ("data", "/data/../x", "/./data", "/data//x")
        ),
    ],
)  # fmt: skip
def test_sentences(data: dict[str, Any], sentence: str) -> None:
    assert messages(data) == [sentence]


@pytest.mark.parametrize(
    ("data", "key"),
    [
        (pod(hostNetwork=True), "hostNetwork"),
        (pod(hostPID=True), "hostPID"),
        (pod(securityContext={"runAsUser": 0}), "securityContext"),
        (pod(serviceAccountName="admin"), "serviceAccountName"),
        (pod(containers=[]), "containers"),
        (pod(initContainers=[]), "initContainers"),
        (pod(volumes=[{"name": "v", "hostPath": {"path": "/"}}]), "hostPath"),
        (pod(volumes=[{"name": "v", "projected": {}}]), "projected"),
        (pod(volumes=[{"name": "v", "csi": {}}]), "csi"),
        (pod(env=[{"name": "A", "valueFrom": {"secretKeyRef": {"namespace": "x"}}}]), "namespace"),
    ],
)
def test_what_could_raise_privilege_is_not_in_the_schema(data: dict[str, Any], key: str) -> None:
    assert any(key in message and "Extra inputs" in message for message in messages(data))


@pytest.mark.parametrize(
    "data",
    [
        workers(replicas=0),
        workers(replicas=-1),
        workers(replicas=100_000),
        workers(replicas="2"),
        workers(processesPerWorker=0),
        workers(resources={"limits": {"memory": "-1Gi"}}),
        workers(resources={"limits": {"memory": "1 Gi"}}),
        workers(resources={"limits": {"memory": -1}}),
        workers(resources={"limits": {"memory": "lots"}}),
        workers(image=""),
        volume(claimName="Not_A_Name"),
        volume(claimTemplate={}),
        spec(activeDeadlineSeconds=0),
        spec(ttlSecondsAfterFinished=-1),
        spec(recovery={"maxRestarts": -1}),
        spec(recovery={"windowSeconds": 0}),
        spec(suspend="yes"),
        spec(managedBy="me"),
        pod(terminationGracePeriodSeconds=0),
        pod(labels={"not a key": "x"}),
        pod(labels={"key": "not a value"}),
        pod(env=[{"name": "1A"}]),
        pod(env=[{"name": f"A{i}"} for i in range(200)]),
    ],
)
def test_impossible_values_are_refused(data: dict[str, Any]) -> None:
    assert messages(data)


@pytest.mark.parametrize(
    "data",
    [
        pod(labels={"kueue.x-k8s.io/queue-name": "team"}, annotations={"example.com/x": "y"}),
        pod(env=[{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]),
        pod(env=[{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}]),
        pod(tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists"}]),
        pod(affinity={"nodeAffinity": {"anything": [{"goes": 1}]}}),
        pod(
            volumes=[{"name": "data", "persistentVolumeClaim": {"claimName": "c"}}],
            volumeMounts=[{"name": "data", "mountPath": "/data", "readOnly": True}],
        ),
        pod(volumes=[{"name": "d", "downwardAPI": {"items": []}}]),
        workers(processesPerWorker=8, resources={"limits": {"nvidia.com/gpu": 8, "cpu": "1.5"}}),
        workers(replicas=2, minReplicas=2, maxReplicas=2),
        workers(replicas=2, minReplicas=1, maxReplicas=4),
        spec(managedBy="kueue.x-k8s.io/multikueue"),
        volume(claimName="shared", subPath="team/run-1"),
    ],
)
def test_what_people_need_is_allowed(data: dict[str, Any]) -> None:
    JobSpec.model_validate(data)


def job(**parts: Any) -> PretrainJob:
    return PretrainJob.model_validate(
        {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": "demo", "uid": "u", "managedFields": []},
            "spec": spec(**parts),
        }
    )


def test_run_config_is_complete_and_knows_the_volume() -> None:
    config = job(workers={"replicas": 2, "processesPerWorker": 2}).run_config()
    assert config.job.dump_folder == names.OUTPUT_DIR
    assert config.model.hf_assets_path == f"{names.SAMPLE_DIR}/tokenizer"
    assert config.schema_version == 1


def test_run_config_keeps_a_tokenizer_of_ones_own() -> None:
    config = job(model={"hfAssetsPath": "/data/tokenizer"}).run_config()
    assert config.model.hf_assets_path == "/data/tokenizer"


def test_batch_and_streams_are_fixed_at_the_full_size() -> None:
    config = job(workers={"replicas": 4}, training={"localBatchSize": 2}).run_config()
    assert config.training.global_batch_size == 8
    assert config.training.data_streams == 8


def test_batch_and_streams_do_not_depend_on_the_present_size() -> None:
    configs = [
        job(
            workers={"replicas": replicas, "minReplicas": 1, "maxReplicas": 8},
            training={"localBatchSize": 2},
        ).run_config()
        for replicas in (1, 4, 8)
    ]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].training.global_batch_size == 16


def test_the_queue_is_that_of_the_job_or_of_its_pods() -> None:
    def in_queue(labels: dict[str, str], **workers: Any) -> PretrainJob:
        metadata = {"name": "demo", "labels": labels}
        return PretrainJob.model_validate({"metadata": metadata, "spec": spec(workers=workers)})

    inner = {"podTemplate": {"labels": {names.LABEL_QUEUE: "pods"}}}
    assert in_queue({}).queue is None
    assert in_queue({names.LABEL_QUEUE: "team"}, replicas=2, maxReplicas=2).queue == "team"
    assert in_queue({names.LABEL_QUEUE: "team"}, **inner).queue == "pods"
    with pytest.raises(ValidationError, match="a group that can't change its size"):
        in_queue({names.LABEL_QUEUE: "team"}, replicas=2, minReplicas=1)


def test_status_of_another_release_is_read() -> None:
    body = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": "demo"},
        "spec": spec(),
        "status": {"phase": "Running", "fromTheFuture": 1, "progress": {"step": 3, "new": 2}},
    }
    status = PretrainJob.model_validate(body).status
    assert status.progress is not None
    assert status.progress.step == 3
    assert status.to_dict()["phase"] == "Running"
    assert "completionTime" not in status.to_dict()


@pytest.mark.parametrize("name", ["", "Demo", "a.b", "-a", "a" * 49, "a\n"])
def test_names_that_children_could_not_carry_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        PretrainJob.model_validate({"metadata": {"name": name}, "spec": spec()})
