"""Torch's own tools read our folders, we read theirs, and the commands tell the truth."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from pretrain_trainer.checkpoint import digest, verify
from pretrain_trainer.checkpoint.errors import CheckpointConfigError


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "checkpoint"


def test_dcp_to_torch_reads_our_folder(manager, state, same, root, tmp_path):
    manager().save(10, state(10))
    dcp_to_torch_save(root / "step-10", tmp_path / "out.pt")
    assert same(torch.load(tmp_path / "out.pt", weights_only=True), state(10))


def test_dcp_load_reads_our_folder(manager, state, same, root):
    manager().save(10, state(10))
    target = {"model": state(0)["model"]}
    reader = dcp.FileSystemReader(root / "step-10")
    dcp.load(target, storage_reader=reader, no_dist=True)
    assert same(target["model"], state(10)["model"])


def test_bare_weights_have_no_prefix(manager, state, root, tmp_path):
    manager(last_save_model_only=True).save(10, state(10), last=True)
    dcp_to_torch_save(root / "step-10", tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(found) == {"a"} or set(found) == {"a.weight", "a.bias"}


@pytest.mark.parametrize("prefix", [True, False], ids=["whole state", "bare weights"])
def test_a_start_from_another_trainers_checkpoint(manager, state, same, tmp_path, caplog, prefix):
    theirs = state(7) if prefix else state(7)["model"]
    dcp.save(theirs, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    target = state(0)
    report = manager(initial_load_path=str(tmp_path / "dcp")).load(target)
    assert (report.step, report.initial) == (None, tmp_path / "dcp")
    assert same(target["model"], state(7)["model"])
    assert same(target["optimizer"], state(0)["optimizer"])
    assert "can't be verified" in caplog.text


def test_a_start_from_another_jobs_checkpoint(manager, manager_at, state, same, tmp_path, root):
    manager_at(tmp_path / "other")(uid="job-0").save(7, state(7))
    config = {"initial_load_path": str(tmp_path / "other/step-7"), "initial_load_model_only": False}
    target = {key: value for key, value in state(0).items() if key != "ledger"}
    first = manager(**config)
    assert first.load(target).initial == tmp_path / "other/step-7"
    assert same(target, {key: state(7)[key] for key in target})

    first.save(8, state(8))
    assert manager(generation=2, **config).load(target).step == 8, "own checkpoints come first"


@pytest.mark.parametrize("recovering", [False, True])
def test_exclusions_hold_until_the_run_has_a_checkpoint_of_its_own(
    manager, manager_at, state, same, tmp_path, recovering
):
    manager_at(tmp_path / "other")(uid="job-0").save(7, state(7))
    options = {
        "initial_load_path": str(tmp_path / "other/step-7"),
        "initial_load_model_only": False,
        "exclude_from_loading": ("optimizer", "ledger"),
    }
    target = state(0)
    again = manager(recovering=recovering, **options)
    again.load(target)
    assert same(target["model"], state(7)["model"])
    assert same(target["optimizer"], state(0)["optimizer"])

    again.save(8, state(8))
    target = state(8) | {"optimizer": state(0)["optimizer"]}
    manager(generation=2, recovering=True, **options).load(target)
    assert same(target["optimizer"], state(8)["optimizer"]), "a recovery goes on with all of it"


def test_a_run_over_older_steps_begins_again_until_it_has_saved(manager, state, same):
    """By hand: generation 7 starts from generation 1's step, and fails before and after a save."""
    manager().save(10, state(10))

    def recovered(attempt: int):
        options = {"exclude_from_loading": ("optimizer",), "load_step": 10}
        return manager(generation=7, attempt=attempt, recovering=True, began=7, **options)

    target = state(10) | {"optimizer": state(0)["optimizer"]}
    before = recovered(1)
    assert before.load(target).step == 10
    assert same(target["optimizer"], state(0)["optimizer"]), "as its first start had it"

    before.save(11, state(11))
    target = state(11) | {"optimizer": state(0)["optimizer"]}
    assert recovered(2).load(target).step == 11
    assert same(target["optimizer"], state(11)["optimizer"]), "its own step, as a whole"


def test_a_recovery_goes_on_from_the_newest_step(manager, state):
    saver = manager()
    for step in (10, 11):
        saver.save(step, {"model": state(step)["model"]})
    target = {"model": state(0)["model"]}
    assert manager(generation=2, recovering=True, load_step=10).load(target).step == 11


def test_a_start_from_exported_weights(manager, manager_at, state, same, tmp_path):
    other = manager_at(tmp_path / "other")(last_save_model_only=True)
    other.save(7, state(7), last=True)
    target = state(0)
    manager(initial_load_path=str(tmp_path / "other/step-7")).load(target)
    assert same(target["model"], state(7)["model"])


def test_a_damaged_checkpoint_to_start_from_is_refused(manager, manager_at, state, tmp_path):
    manager_at(tmp_path / "other")().save(7, state(7))
    file = tmp_path / "other/step-7/__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[700] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointConfigError, match=r"initial_load_path .* is damaged between"):
        manager(initial_load_path=str(tmp_path / "other/step-7")).load(state(0))


def test_a_missing_checkpoint_to_start_from_is_refused(manager, state, tmp_path):
    with pytest.raises(CheckpointConfigError, match="nowhere can't be opened: No such file"):
        manager(initial_load_path=str(tmp_path / "nowhere")).load(state(0))


def test_the_ledger_is_digested_as_its_bytes(manager, state, root):
    manager().save(10, state(10))
    expected = hashlib.sha256(state(10)["ledger"].numpy().tobytes()).hexdigest()
    assert digest.digests(root / "step-10")["ledger"] == expected


def test_digests_tell_states_apart_section_by_section(manager, state, root):
    changed = state(10)
    changed["optimizer"]["a.weight"]["exp_avg"][0, 0] += 1e-6
    saver = manager()
    saver.save(10, state(10))
    saver.save(11, changed)
    one, other = digest.digests(root / "step-10"), digest.digests(root / "step-11")
    assert {name for name in one if one[name] != other[name]} == {"optimizer"}


def test_exported_weights_have_the_digest_of_the_model(manager, manager_at, tmp_path):
    model = {"model": {"w": torch.arange(10.0)}, "ledger": torch.arange(3)}
    manager_at(tmp_path / "a")().save(1, model)
    manager_at(tmp_path / "b")().save(1, model, last=True)
    one, other = digest.digests(tmp_path / "a/step-1"), digest.digests(tmp_path / "b/step-1")
    assert other == {"model": one["model"]}


def test_the_digest_command(manager, state, root, capsys):
    saver = manager()
    saver.save(10, state(10))
    saver.save(20, state(20))
    assert digest.main([str(root), "--section", "model"]) == 0
    newest = capsys.readouterr().out.strip()
    assert digest.main([str(root / "step-20")]) == 0
    assert f"model {newest}" in capsys.readouterr().out.splitlines()

    shutil.rmtree(root / "step-20")
    (root / "step-20").mkdir()
    assert digest.main([str(root), "--section", "model"]) == 0
    assert capsys.readouterr().out.strip() == digest.digests(root / "step-10")["model"] != newest

    assert digest.main([str(root), "--section", "nothing"]) == 1
    assert "has no section nothing" in capsys.readouterr().err
    assert digest.main([str(root / "nowhere")]) == 1
    assert "has no good checkpoint" in capsys.readouterr().err


def test_the_verify_command(manager, state, root, capsys):
    saver = manager()
    saver.save(10, state(10))
    saver.save(20, state(20))
    assert verify.main([str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "newest good: step-20"

    (root / "step-20" / ".metadata").unlink()
    assert verify.main([str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step-20: bad: .metadata is missing"
    assert lines[1].startswith("step-10: good: ")
    assert lines[2] == "newest good: step-10"

    assert verify.main([str(root / "step-20")]) == 1
    assert verify.main([str(root / "nowhere")]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "newest good: none"
