"""What processes and tasks are given by the launchers of sweeps, without any training."""

import os
import sys

import pytest

from accounting.errors import InputError
from experiments.sweep import gpus, launchers, tpus


def test_processes_on_one_machine_see_gpus_of_their_own(tmp_path, monkeypatch):
    """Without a GPU: what jax is told by the environment, in real processes. Names need not be numbers."""
    monkeypatch.setattr(gpus, "usable", lambda *_: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab, 5,1")
    show = (
        "import os, sys; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'] + ' ' +"
        " os.environ.get('{}', ''))"
    )
    show = show.format("XLA_PYTHON_CLIENT_PREALLOCATE")
    for slots, devices, expected, default in [
        (None, 1, {"3 ", "GPU-ab ", "5 ", "1 "}, 4),
        (None, 2, {"3,GPU-ab ", "5,1 "}, 2),
        (None, 3, {"3,GPU-ab,5 "}, 1),
        (5, 2, {"3,GPU-ab false", "5,1 false"}, 5),
    ]:
        pool = launchers.LocalPool(slots, devices)
        assert pool.slots == default
        files = [tmp_path / f"{slots}_{devices}_{i}" for i in range(pool.slots)]
        outcomes = list(pool.run([[sys.executable, "-c", show, str(file)] for file in files]))
        assert {code for _, code, _ in outcomes} == {0} and {file.read_text() for file in files} == expected
    with pytest.raises(InputError, match="there are 4 GPUs here"):
        launchers.LocalPool(None, 5)


@pytest.mark.parametrize(
    "platforms, visible, names",
    [
        ("cpu", "0", []), ("", "", []), ("", "-1", []), ("", "0,-1,1", ["0"]), ("cuda,cpu", "1, 0", ["1", "0"]),
        ("", None, None),
    ],
)  # fmt: skip
def test_gpus_are_those_that_jax_would_use(platforms, visible, names, monkeypatch):
    def installed(name):
        return "jax_cuda13" in name or None

    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices = [path for path in os.listdir("/dev") if path[:6] == "nvidia" and path[6:].isdecimal()]
    found = gpus.here(installed)
    assert found == names if names is not None else len(found) == len(devices)


def test_tpu_chips_are_those_that_the_system_shows(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv(tpus.VISIBLE, raising=False)

    def installed(name):
        return name == "libtpu" or None

    assert tpus.here(installed, tmp_path) == [] == tpus.here(lambda name: None, tmp_path)
    (tmp_path / "vfio").mkdir()
    for name in ("vfio/vfio", "vfio/0", "vfio/1", "vfio/2", "vfio/3"):
        (tmp_path / name).touch()
    assert tpus.here(installed, tmp_path) == ["0", "1", "2", "3"]
    (tmp_path / "accel0").touch()
    assert tpus.here(installed, tmp_path) == ["0"]
    monkeypatch.setenv(tpus.VISIBLE, "2, 3")
    assert tpus.here(installed, tmp_path) == ["2", "3"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert tpus.here(installed, tmp_path) == []


def test_no_two_processes_are_given_one_tpu_chip():
    chips = [str(number) for number in range(8)]
    for each, slots in ((1, 8), (2, 4), (4, 2), (8, 1), (2, 3)):
        given = [set(told[tpus.VISIBLE].split(",")) for told in tpus.divided(chips, each, slots)]
        assert all(len(own) == each for own in given) and len(set().union(*given)) == each * slots
    assert tpus.divided(chips, 4, 2)[1] == {
        "TPU_VISIBLE_CHIPS": "4,5,6,7", "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1", "TPU_PROCESS_BOUNDS": "1,1,1",
    }  # fmt: skip
    for each, slots, said in ((3, 1, "takes 1, 2, 4, 8"), (16, 1, "takes 1, 2, 4, 8"), (4, 3, "2 at most")):
        with pytest.raises(InputError, match=said):
            tpus.divided(chips, each, slots)


def test_parameters_of_slurm():
    parsed = launchers.parse_parameters("partition=gpu,gres=gpu:1,timeout_min=60,mem_gb=1.5")
    assert parsed == {"partition": "gpu", "gres": "gpu:1", "timeout_min": 60, "mem_gb": 1.5}


@pytest.mark.slow
def test_a_task_of_ray_asks_for_a_gpu_where_the_cluster_has_some(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(gpus, "usable", lambda *_: True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 2, "include_dashboard": False})
    try:
        launcher = launchers.Ray(address=cluster.address)
        assert launcher.slots == 2
        show = "import os, sys, time; time.sleep(1); open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
        files = [tmp_path / str(i) for i in range(4)]
        outcomes = list(launcher.run([[sys.executable, "-c", show, str(file)] for file in files]))
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert {code for _, code, _ in outcomes} == {0} and {file.read_text() for file in files} == {"0", "1"}
