"""Checkpoints: what is kept, what is gone on from, and that nothing damaged passes for whole."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml

import train
from mixlora import checkpoint, run_folder
from mixlora.checkpoint import FILES, OPTIMIZER_FILE, STATE_FILE
from mixlora.errors import InputError
from mixlora.files import TensorFile, write_json, write_tensors
from mixlora.report import code_commit
from mixlora.run_folder import open_run_folder
from mixlora.train_config import LoopConfig, ModelConfig, RunConfig, TrainConfig
from mixlora.whole_folder import MANIFEST, publish, verify
from tests.runs import metrics, run
from tests.trained import Trained, flip

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(tmp_path)


def error_of(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- saving, keeping, going on ---------------------------------------------------------------------


def test_what_is_saved_is_restored(trained: Trained) -> None:
    assert trained.resume() == 0
    for step in (3, 7, 1_000_000):
        trained.save(step)
        assert trained.resume() == step
    assert trained.names() == ["step-000007", "step-1000000"]
    assert {path.name for path in (trained.folder / "step-000007").iterdir()} == {*FILES, MANIFEST}
    state = json.loads((trained.folder / "step-000007" / STATE_FILE).read_text())
    assert state == {"version": "0.1.0", "adapter": "default", "seed": 0, "step": 7, "loss": 1.0}


def test_a_checkpoint_of_format_1_stays_readable(trained: Trained) -> None:
    """That in the repository was written when the format was new."""
    shutil.copytree(ROOT / "tests/golden/checkpoints", trained.folder)
    assert trained.resume() == 5


def test_parameters_without_moments_have_none_afterwards(trained: Trained, tmp_path: Path) -> None:
    trained.at(4).optimizer.state.clear()
    trained.checkpoints.save(4, {})
    other = Trained(tmp_path)
    assert other.checkpoints.resume()["step"] == 4
    assert not other.optimizer.state


@pytest.mark.parametrize(
    "kept, expected",
    [
        ({"keep_last": 1}, [6]),
        ({"keep_last": 3}, [4, 5, 6]),
        ({"keep_last": 1, "keep_best": 1}, [2, 6]),
        ({"keep_last": 2, "keep_best": 2}, [2, 4, 5, 6]),
        ({"keep_last": 1, "keep_best": 9}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_retention(kept: dict, expected: list[int], tmp_path: Path) -> None:
    trained = Trained(tmp_path, **kept)
    for step, loss in enumerate([4.0, 1.0, 3.0, 2.0, 5.0, float("nan")], 1):
        trained.save(step, loss)
    assert trained.names() == [f"step-{step:06d}" for step in expected]


def test_what_is_left_of_other_processes_is_swept(trained: Trained) -> None:
    trained.save(1)
    for name in (".step-000002.77.tmp", ".step-000001.78.tmp", ".rehearsal.0.tmp"):
        (trained.folder / name / "below").mkdir(parents=True)
    assert trained.resume() == 1
    trained.save(2)
    assert trained.names() == ["step-000001", "step-000002"]


def test_saving_the_same_step_again_changes_nothing(trained: Trained) -> None:
    trained.save(1)
    before = (trained.folder / "step-000001").stat().st_ino
    trained.save(1)
    assert (trained.folder / "step-000001").stat().st_ino == before


def test_the_newest_intact_one_is_gone_on_from(trained: Trained, capsys) -> None:
    """Damaged ones are told about with the reason; none is deleted, also when their names are
    needed again or newer ones come."""
    for step in (1, 2, 3):
        trained.checkpoints.config.keep_last = 9
        trained.save(step)
    flip(trained.folder / "step-000003" / OPTIMIZER_FILE, 9000)
    (trained.folder / "step-000002" / STATE_FILE).unlink()
    assert trained.resume() == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert f"step-000003/{OPTIMIZER_FILE}: is not what was written: its sha256 differs" in told[0]
    assert f"step-000002/{STATE_FILE}: no such file" in told[1]
    trained.checkpoints.config.keep_last = 1
    trained.save(2)
    trained.save(4)
    aside = "step-000002.aside-1"
    assert f"step-000002 is not intact or of another training, and is now {aside}" in (
        capsys.readouterr().err
    )
    assert trained.names() == [aside, "step-000003", "step-000004"]


def test_none_intact(trained: Trained, capsys) -> None:
    for step in (1, 2):
        trained.save(step)
        (trained.folder / f"step-{step:06d}" / MANIFEST).unlink()
    said = error_of(trained.resume)
    assert said.startswith(f"{trained.folder}: none of its 2 checkpoints is intact and of this")
    assert "step-000002/MANIFEST.json: no such file" in said
    assert trained.names() == ["step-000001", "step-000002"]


def test_checkpoints_of_another_training(trained: Trained, tmp_path: Path, capsys) -> None:
    trained.save(5)
    cases = {
        "adapter must be 'other', got 'default'": Trained(tmp_path, name="other"),
        "seed must be 1, got 0": Trained(tmp_path, seed=1),
        "misshaped: ": Trained(tmp_path, r=3),
    }
    for words, other in cases.items():
        before = {name: x.clone() for name, x in other.at(0).parameters.items()}
        assert words in error_of(other.checkpoints.resume)
        assert all(torch.equal(x, before[name]) for name, x in other.parameters.items())
    shutil.copytree(trained.folder / "step-000005", trained.folder / "step-000009")
    assert trained.resume() == 5
    assert "step must be 9, got 5" in capsys.readouterr().err


# -- what a checkpoint holds -----------------------------------------------------------------------


def forge(folder: Path, **files: bytes) -> None:
    """Replace files, and let the manifest say that they are right."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}
    contents |= {name.replace("__", "."): content for name, content in files.items()}
    shutil.rmtree(folder)
    publish(folder, lambda new: [(new / x).write_bytes(y) for x, y in contents.items()])


STATES = {
    "no object": b"[]",
    "no JSON": b"{",
    "no step": b'{"adapter": "default", "seed": 0}',
    "text": b'{"adapter": "default", "seed": 0, "step": "5"}',
    "true": b'{"adapter": "default", "seed": 0, "step": true}',
    "a false seed": b'{"adapter": "default", "seed": false, "step": 5}',
    "infinite": b'{"adapter": "default", "seed": 0, "step": Infinity}',
    "deep": b'{"a": ' * 9999,
}


@pytest.mark.parametrize("name", STATES)
def test_wrong_states(name: str, trained: Trained) -> None:
    trained.save(5)
    forge(trained.folder / "step-000005", state__json=STATES[name])
    assert STATE_FILE in error_of(trained.resume)


def a_moment(tensors: dict[str, torch.Tensor]) -> str:
    return next(key for key in tensors if key.endswith("exp_avg"))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: x.update({a_moment(x): torch.ones(9)}), "exp_avg must be "),
        (lambda x: x.update(more=torch.ones(1)), "unexpected: more"),
        (lambda x: x.pop(a_moment(x)), "1 missing"),
    ],
)
def test_wrong_optimizer_files(change, words: str, trained: Trained, tmp_path: Path) -> None:
    trained.save(5)
    path = trained.folder / "step-000005" / OPTIMIZER_FILE
    file = TensorFile(path)
    tensors = {key: file[key] for key in file.shapes}
    change(tensors)
    write_tensors(tmp_path / "x", tensors)
    forge(path.parent, optimizer__safetensors=(tmp_path / "x").read_bytes())
    said = error_of(trained.checkpoints.resume)
    assert OPTIMIZER_FILE in said and words in said
    assert all((x == 5).all() for x in trained.parameters.values())


def outside(files: dict) -> dict:
    return {**files, "../secret": files["state.json"]}


MANIFESTS = {
    "a file outside": lambda m: {**m, "files": outside(m["files"])},
    "a file outside for one inside": lambda m: {
        **m,
        "files": {
            ("/etc/passwd" if key == STATE_FILE else key): x for key, x in m["files"].items()
        },
    },
    "a file less": lambda m: {**m, "files": {CONFIG: m["files"][CONFIG] for CONFIG in FILES[:3]}},
    "no files": lambda m: {"format": 1},
    "a list": lambda m: {**m, "files": [*m["files"]]},
    "no numbers": lambda m: {**m, "files": dict.fromkeys(FILES)},
    "another format": lambda m: {**m, "format": 2},
    "another size": lambda m: {
        **m,
        "files": {key: {**x, "bytes": x["bytes"] + 1} for key, x in m["files"].items()},
    },
    "no hash": lambda m: {
        **m,
        "files": {key: {"bytes": x["bytes"]} for key, x in m["files"].items()},
    },
    "another key": lambda m: {**m, "more": 1},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_wrong_manifests(name: str, trained: Trained, opened: list[str]) -> None:
    trained.save(5)
    path = trained.folder / "step-000005" / MANIFEST
    write_json(path, MANIFESTS[name](json.loads(path.read_text())))
    opened.clear()
    assert "step-000005/" in error_of(trained.resume)
    assert [x for x in opened if not x.startswith(str(trained.folder))] == []


@pytest.fixture
def opened() -> list[str]:
    """The paths of all files that Python opens from here on."""
    paths: list[str] = []
    RECORDERS.append(paths)
    yield paths
    RECORDERS.remove(paths)


RECORDERS: list[list[str]] = []


def _record(event: str, arguments: tuple) -> None:
    if RECORDERS and event == "open" and isinstance(arguments[0], str):
        for paths in RECORDERS:
            paths.append(arguments[0])


sys.addaudithook(_record)


def test_links_and_pipes_are_no_files_of_a_checkpoint(trained: Trained, tmp_path: Path) -> None:
    trained.save(5)
    path = trained.folder / "step-000005" / STATE_FILE
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "must be a file of" in error_of(trained.resume)
    path.unlink()
    os.mkfifo(path)  # opening one waits for ever
    assert "must be a file of" in error_of(trained.resume)


def few_or(default: int, whole: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("n", [default, pytest.param(whole, marks=pytest.mark.slow)])


@few_or(13, 1)
def test_every_truncation_is_found(n: int, trained: Trained) -> None:
    """Every n-th, that is."""
    trained.save(5)
    folder, count = trained.folder / "step-000005", 0
    for name in (*FILES, MANIFEST):
        content = (folder / name).read_bytes()
        for length in range(len(content) - 1, -1, -n):
            os.truncate(folder / name, length)
            with pytest.raises(InputError, match=name):
                verify(folder, FILES)
            count += 1
        (folder / name).write_bytes(content)
    assert count > 3000 // n
    assert trained.resume() == 5


@few_or(500, 10_000)
def test_bit_flips_are_found(n: int, trained: Trained) -> None:
    trained.save(5)
    folder, rng = trained.folder / "step-000005", random.Random(0)
    sizes = {name: (folder / name).stat().st_size for name in (*FILES, MANIFEST)}
    weight = [size if name != OPTIMIZER_FILE else 2000 for name, size in sizes.items()]
    for _ in range(n):
        (name,) = rng.choices([*sizes], weight)
        bit = rng.randrange(8 * sizes[name])
        flip(folder / name, bit)
        with pytest.raises(InputError, match="step-000005"):
            verify(folder, FILES)
        flip(folder / name, bit)
    assert trained.resume() == 5


@few_or(13, 1)
def test_every_bit_of_the_manifest_counts(n: int, trained: Trained) -> None:
    trained.save(5)
    path = trained.folder / "step-000005" / MANIFEST
    for bit in range(0, 8 * path.stat().st_size, n):
        flip(path, bit)
        with pytest.raises(InputError, match=str(path.parent)):
            verify(path.parent, FILES)
        flip(path, bit)


# -- before the first step -------------------------------------------------------------------------


def test_the_rehearsal_leaves_nothing(trained: Trained, tmp_path: Path) -> None:
    trained.at(3).checkpoints.rehearse()
    assert trained.names() == []
    fresh = Trained(tmp_path)
    fresh.checkpoints.rehearse()  # before AdamW has any state
    assert not fresh.optimizer.state


def test_no_room_for_the_checkpoints(tmp_path: Path, monkeypatch) -> None:
    trained = Trained(tmp_path, keep_last=3, keep_best=1)
    size = trained.checkpoints._size()
    Usage = namedtuple("Usage", "total used free")
    free = [5 * size - 1]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage(0, 0, free[0]))
    said = error_of(trained.checkpoints.rehearse)
    assert str(trained.folder) in said
    assert "5 checkpoints" in said and f"{5 * size} bytes, {free[0]} are free" in said
    free[0] += 1
    trained.checkpoints.rehearse()
    trained.save(1)
    free[0] -= size
    trained.checkpoints.rehearse()
    assert trained.names() == ["step-000001"]


def test_the_size_of_a_checkpoint_is_known_beforehand(trained: Trained) -> None:
    trained.save(1)
    files = [path.stat().st_size for path in (trained.folder / "step-000001").iterdir()]
    size = trained.checkpoints._size()
    assert sum(files) <= size <= sum(files) + checkpoint.BESIDE_TENSORS


def test_what_is_read_back_is_compared(trained: Trained, monkeypatch) -> None:
    """A disk that keeps something else than what was written."""
    real = checkpoint.write_tensors

    def lossy(path: Path, tensors: dict) -> None:
        real(
            path, {key: x.float().half().to(x.dtype) + (x.dim() > 1) for key, x in tensors.items()}
        )

    monkeypatch.setattr(checkpoint, "write_tensors", lossy)
    assert "is read back otherwise" in error_of(trained.checkpoints.rehearse)
    assert trained.names() == []


# -- the folder of a run ---------------------------------------------------------------------------


def config_in(folder: Path, **run) -> TrainConfig:
    run = RunConfig(str(folder / "run"), **run)
    return TrainConfig(ModelConfig("base"), run, LoopConfig(steps=1))


HOLDER = """
import sys, time
from pathlib import Path
from tests.test_checkpoint import config_in
from mixlora.run_folder import open_run_folder
open_run_folder(config_in(Path(sys.argv[1])), {}, {}, False, False)
print("here", flush=True)
time.sleep(100)
"""


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    """The second is refused whatever it asks for, until the first is dead, however it died."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "here\n"
        files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        for resume, options in ((True, {}), (False, {"overwrite": True})):
            said = error_of(open_run_folder, config_in(tmp_path, **options), {}, {}, resume, False)
            assert said.startswith(f"run.dir {tmp_path / 'run'} is in use by pid {first.pid} on ")
        assert files == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert open_run_folder(config_in(tmp_path), {}, {}, True, False) == tmp_path / "run"


def test_one_process_opens_its_folder_again(tmp_path: Path) -> None:
    for _ in range(3):
        open_run_folder(config_in(tmp_path, overwrite=True), {}, {}, False, False)
        open_run_folder(config_in(tmp_path), {}, {}, True, False)
    links = Path("/proc/self/fd").iterdir()
    held = [link for link in links if os.path.realpath(link).startswith(str(tmp_path))]
    assert len(held) == 1


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch, capsys) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    assert open_run_folder(config_in(tmp_path), {}, {}, False, False).is_dir()
    assert "cannot be locked against other runs: [Errno" in capsys.readouterr().err


def test_what_a_crash_leaves_of_a_beginning_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text("pid 1 on somewhere")
    (tmp_path / "run/.config.yaml.12.tmp").write_text("mod")
    for name in ("data.json", "base.json", ".base.json.12.tmp"):
        (tmp_path / "run" / name).write_text("{")
    open_run_folder(config_in(tmp_path), {}, {}, False, False)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == [".lock", "base.json", "config.yaml", "data.json"]


# -- a run -----------------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_newest_intact_checkpoint(
    settings: dict, tmp_path: Path, capsys
) -> None:
    settings["run"] |= {"save_every_steps": 2, "keep_last": 2, "keep_best": 1}
    folder = run(settings, tmp_path)
    expected, saved = metrics(folder), folder / "default" / "checkpoints"
    best = min((2, 4, 6), key=lambda n: sum(x["loss"] for x in expected[n - 2 : n]))
    kept = sorted({best, 4, 6})
    assert sorted(path.name for path in saved.iterdir()) == [f"step-{n:06d}" for n in kept]
    state = json.loads((saved / "step-000004" / STATE_FILE).read_text())
    config = state.pop("config")
    assert config["model"]["base"] == settings["model"]["base"] and config["run"]["keep_best"] == 1
    assert config["name"] == "default" and config["train"]["batch_size"] == 7
    mean = sum(x["loss"] for x in expected[2:4]) / 2
    assert state == {
        **{"version": "0.1.0", "adapter": "default", "seed": 0, "step": 4},
        **{"epoch": 1, "position": 0, "lr": expected[3]["lr"], "loss": mean},
        **{"processes": 1, "code_commit": code_commit(Path(train.__file__))},
    }
    flip(saved / "step-000006" / OPTIMIZER_FILE, 4000)
    capsys.readouterr()
    assert metrics(run(settings, tmp_path, "--resume")) == expected
    assert "step-000006/optimizer.safetensors: is not what was written" in capsys.readouterr().err
    assert (saved / "step-000006.aside-1").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged(settings: dict, tmp_path: Path, capsys) -> None:
    folder = run(settings, tmp_path)
    path = folder / "default/checkpoints/step-000006"
    flip(path / STATE_FILE, 0)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train.main(["--config", str(folder / "config.yaml"), "--resume"]) == 2
    told, said = capsys.readouterr().err.splitlines()[-2:]
    assert told.startswith(f"warning: a checkpoint is passed over: {path / STATE_FILE}")
    assert said.startswith(f"error: {path.parent}: none of its 1 checkpoints is intact")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("config.yaml", "status.json"):  # run.dir as it is given; that it failed
        del before[folder / name], after[folder / name]
    assert before == after


def test_the_disk_is_full_before_the_first_step(
    settings: dict,
    tmp_path: Path,
    capsys,
    monkeypatch,
) -> None:
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage(0, 0, 99))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert train.main(["--config", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "default/checkpoints: 3 checkpoints" in said and "99 are free" in said
