"""The launchers print exactly what they would run; mistakes are reported; manifests are consistent."""

import itertools
import math
import os
import pathlib
import shlex
import subprocess

import pytest
import yaml

from tests.launching import (
    ALL,
    AWKWARD,
    DELETE,
    DESCRIBE,
    LAUNCH,
    LOCAL,
    LOCATION,
    QUEUED,
    SLURM,
    SRUN,
    TPU,
    XPK,
    Box,
    ask,
    needs_launchers,
    shell_words,
)

pytestmark = needs_launchers


@pytest.fixture
def box(tmp_path) -> Box:
    return Box(tmp_path)


ONCE = {
    LOCAL: ["--processes", "1"],
    SLURM: [],
    TPU: ["run", "--name", "n", "--zone", "z"],
    XPK: ["create", "--name", "n", "--cluster", "c", "--zone", "z", "--type", "v5litepod-16", "--image", "i"],
}
every_script = pytest.mark.parametrize("script", ONCE, ids=lambda p: p.name)


@every_script
def test_parses(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)


@every_script
def test_help_names_every_flag(box, script):
    done = box.run(script, "--help")
    assert done.returncode == 0
    flags = [word for word in script.read_text().split() if word.startswith("--") and word.endswith(")")]
    flags = {flag.rstrip(")") for flag in flags} - {"--", "--*=*", "--module=*"}
    assert flags >= {"--help", "--dry_run"}
    assert all(flag in done.stdout for flag in flags)


def innermost(words: list[str], script: pathlib.Path) -> list[str]:
    """Returns the arguments of `python`; command lines that a cluster runs in a shell are split as a shell does."""
    if script == TPU:
        line = words[-1].partition("nohup ")[2].partition(" >>log")[0]
        words = ["env", *shell_words(line)]
    elif script == XPK:
        words = shell_words(words[-1])
    return words[words.index("-m") + 1 :]


@every_script
@pytest.mark.parametrize("module", ["avjax.train", "avjax.extract"])
def test_arguments_survive(box, script, module):
    done = box.run(script, *ONCE[script], "--module", module, "--dry_run", "--", *AWKWARD)
    words = shell_words(done.stdout.partition("\nscontrol")[0])
    assert innermost(words, script) == [module, *AWKWARD]
    assert box.calls() == []


MISTAKES = [
    (LOCAL, ["--proceses", "2", "--", "a"], "got '--proceses'; expected flags, then --"),
    (LOCAL, ["--processes", "2"], "got no arguments for avjax.train; expected them after --"),
    (LOCAL, ["--", "a"], "got no --processes; expected --processes N"),
    (LOCAL, ["--processes"], "got --processes without a value"),
    (LOCAL, ["--processes", "two", "--", "a"], "--processes is 'two'; expected a whole number"),
    (LOCAL, ["--processes=0", "--", "a"], "--processes is 0; expected 1 or more"),
    (LOCAL, ["--processes=1", "--devices_per_process=0", "--", "a"], "--devices_per_process is 0"),
    (LOCAL, ["--processes=1", "--grace=1s", "--", "a"], "--grace is '1s'"),
    (LOCAL, ["--processes=1", "--port=x", "--", "a"], "--port is 'x'"),
    (SLURM, ["--nodes", "2", "--", "a"], "got '--nodes'; expected flags, then --"),
    (SLURM, [], "got no arguments for avjax.train"),
    (SLURM, ["--", "a"], "this is no Slurm job; submit it: sbatch slurm.sbatch"),
    (TPU, ["--name", "n"], "got no action; expected create, setup"),
    (TPU, ["make", "--name", "n"], "got 'make'; expected an action"),
    (TPU, ["create", "run"], "got create and run; expected one action"),
    (TPU, ["create", "--name", "n"], "got --name 'n' and --zone ''; expected both"),
    (TPU, ["create", "--name", "n", "--zone", "z"], "got no --type"),
    (TPU, ["create", "--name", "n", "--zone", "z", "--type", "t", "--slices", "0"], "--slices is '0'"),
    (TPU, ["run", "--name", "n", "--zone", "z"], "got no arguments for avjax.train"),
    (TPU, ["logs", "--name", "n", "--zone", "z", "--", "a"], "expected them with run and resume alone"),
    (XPK, ["--name", "n"], "got no action; expected create, status, logs or delete"),
    (XPK, ["create", "--name", "n"], "got --name 'n', --cluster '' and --zone ''; expected all three"),
    (XPK, ["create", "--name=n", "--cluster=c", "--zone=z", "--", "a"], "got --type '' and --image ''; expected both"),
    (XPK, ["delete", "--name=n", "--cluster=c", "--zone=z", "--", "a"], "expected them with create alone"),
    (XPK, ["--nam=n"], "got '--nam'; expected an action"),
]


@pytest.mark.parametrize(("script", "arguments", "message"), MISTAKES)
def test_mistakes_are_one_line(box, script, arguments, message):
    done = box.run(script, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert box.calls() == []


@pytest.mark.parametrize(
    ("script", "tool", "more"),
    [(SLURM, "srun", {"SLURM_JOB_ID": "7"}), (TPU, "gcloud", {}), (XPK, "xpk", {}), (LOCAL, "python", {})],
)
def test_missing_tools_are_named(box, script, tool, more):
    (box.path / tool).unlink()
    done = box.run(script, *ONCE[script], "--", "a", **more)
    assert done.returncode == 2
    assert tool in done.stderr
    assert "expected" in done.stderr
    assert box.run(script, *ONCE[script], "--dry_run", "--", "a", **more).returncode == 0


def readme_commands() -> list[str]:
    lines = (LAUNCH / "README.md").read_text().splitlines() if LAUNCH.is_dir() else []
    return [line for line in lines if line.startswith(("launch/", "bash launch/", "sbatch "))]


@pytest.mark.parametrize("line", readme_commands())
def test_the_commands_of_the_readme_are_understood(box, line):
    words = shlex.split(line)
    if words[0] == "sbatch":  # Slurm reads the options of sbatch
        words = ["launch/slurm.sbatch", *itertools.dropwhile(lambda w: not w.endswith("sbatch"), words[1:])][1:]
    words = words[1:] if words[0] == "bash" else words
    at = words.index("--") if "--" in words else len(words)
    box.printed(LAUNCH.parent / words[0], *words[1:at], "--dry_run", *words[at:])


# ---- Dry runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "more", "expected"),
    [
        (["--processes", "2"], {}, [["JAX_PLATFORMS=cpu"]] * 2),
        (
            ["--processes=2", "--devices_per_process=4"],
            {"XLA_FLAGS": "--a --b"},
            [["JAX_PLATFORMS=cpu", "XLA_FLAGS=--a --b --xla_force_host_platform_device_count=4"]] * 2,
        ),
        (
            ["--processes=2", "--gpus"],
            {},
            [[f"CUDA_VISIBLE_DEVICES={i}", "JAX_LOCAL_DEVICE_IDS=0"] for i in range(2)],
        ),
        (
            ["--processes=2", "--gpus", "--devices_per_process=2"],
            {"CUDA_VISIBLE_DEVICES": "3,5,6,7"},
            [[f"CUDA_VISIBLE_DEVICES={gpus}", "JAX_LOCAL_DEVICE_IDS=0,1"] for gpus in ("3,5", "6,7")],
        ),
    ],
)
def test_local_dry_run(box, flags, more, expected):
    printed = box.printed(LOCAL, *flags, "--port=4321", "--dry_run", "--", "--config", "c.py", **more)
    for i, (words, own) in enumerate(zip(printed, expected, strict=True)):
        shared = ["env", "AVJAX_COORDINATOR=127.0.0.1:4321", "AVJAX_PROCESSES=2", f"AVJAX_PROCESS={i}"]
        assert words == [*shared, *own, "python", "-m", "avjax.train", "--config", "c.py"]


def test_local_wants_a_gpu_for_every_process(box):
    done = box.run(LOCAL, "--processes=3", "--gpus", "--dry_run", "--", "a", CUDA_VISIBLE_DEVICES="0,1")
    assert done.returncode == 2
    assert "3 processes of 1 GPUs, and CUDA_VISIBLE_DEVICES is 0,1; expected enough of them" in done.stderr


REQUEUE = ["scontrol", "requeue", "$SLURM_JOB_ID"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, ["python"]),
        ({"SLURM_CPUS_PER_TASK": "8"}, ["--cpus-per-task=8", "python"]),
        ({"AVJAX_VENV": "/a b"}, ["/a b/bin/python"]),
        ({"AVJAX_CONTAINER": "/x.sif"}, ["apptainer", "exec", "--nv", "/x.sif", "python"]),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}, ["python"]),
        ({"SLURM_GPUS_ON_NODE": "4", "AVJAX_PYTHON": "p"}, ["env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3", "p"]),
    ],
)
def test_slurm_dry_run(box, more, expected):
    printed = box.printed(SLURM, "--dry_run", "--", "--config", "c.py", **more)
    assert printed == [[*SRUN, *expected, "-m", "avjax.train", "--config", "c.py"], REQUEUE]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "4"}, "2 tasks and 4 GPUs a node; expected"),
        ({"AVJAX_VENV": "v", "AVJAX_CONTAINER": "c"}, "expected one of them"),
    ],
)
def test_slurm_set_ups_that_cannot_work(box, more, message):
    done = box.run(SLURM, "--dry_run", "--", "a", **more)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("flags", "created"),
    [
        (["--type=v5litepod-16"], ask()),
        (["--type=v6e-8", "--spot"], ask("--spot", type="v6e-8", version="v2-alpha-tpuv6e")),
        (["--type=v5p-8"], ask(type="v5p-8", version="v2-alpha-tpuv5")),
        (["--type=v4-8"], ask(type="v4-8", version="tpu-ubuntu2204-base")),
        (["--type=v4-8", "--version=mine"], ask(type="v4-8", version="mine")),
        (["--type=v5litepod-16", "--slices=3"], ask("--node-count=3", "--node-prefix=n")),
    ],
)
def test_tpu_create_dry_run(box, flags, created):
    printed = box.printed(TPU, "create", "--name=n", "--zone=z", *flags, "--dry_run")
    assert printed == [DESCRIBE, DELETE, created, DESCRIBE]


def test_tpu_setup_installs_the_wheel_on_all_workers(box):
    built, copied, installed = box.printed(TPU, "setup", "--name=n", "--zone=z", "--dry_run")
    assert built[:3] == ["python", "-m", "pip"]
    wheel = copied[4 + 1]
    assert pathlib.Path(wheel).name.startswith("avjax-0")
    assert copied == [*QUEUED, "scp", wheel, "n:", "--zone=z", *ALL]
    assert installed[:-1] == [*QUEUED, "ssh", *LOCATION, *ALL]
    last = shell_words(installed[-1].rpartition("&& ")[2])
    assert last[-1] == f"./{pathlib.Path(wheel).name}[tpu,gcs]"
    given = box.printed(
        TPU, "setup", "--name=n", "--zone=z", "--wheel=/a b/avjax.whl", "--extras=tpu", "--python=3.11", "--dry_run"
    )
    assert given[0][5] == "/a b/avjax.whl"
    assert "--python 3.11" in given[1][-1]
    assert shell_words(given[1][-1].rpartition("&& ")[2])[-1] == "./avjax.whl[tpu]"


def test_tpu_other_dry_runs(box):
    def printed(*arguments):
        return box.printed(TPU, *arguments, "--name=n", "--zone=z", "--project=p", "--dry_run")

    location = [*LOCATION, "--project=p"]
    tail = "--command=tail -n 100 -F avjax_run/log"
    assert printed("logs") == [[*QUEUED, "ssh", *location, "--node=0", "--worker=0", tail]]
    assert printed("logs", "--worker=3", "--node=1") == [[*QUEUED, "ssh", *location, "--node=1", "--worker=3", tail]]
    assert printed("delete") == [[*QUEUED, "delete", *location, "--force", "--quiet"]]
    state, workers = printed("status")
    assert state == [*QUEUED, "describe", *location, "--format=value(state.state)"]
    assert workers[:-1] == [*QUEUED, "ssh", *location, *ALL]


def test_tpu_resume_dry_run(box):
    line = ["--name=n", "--zone=z", "--type=v5litepod-16", "--spot", "--dry_run"]
    printed = box.printed(TPU, "resume", *line, "--", "--config", "c.py")
    created = box.printed(TPU, "create", *line)
    installed = box.printed(TPU, "setup", *line)
    started = box.printed(TPU, "run", *line, "--", "--config", "c.py")
    assert printed == [*created, *installed, *started]


XPK_LINE = ["--name=n", "--cluster=c", "--zone=z", "--dry_run"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [
                "create",
                "--type=v5litepod-16",
                "--image=i",
                "--slices=2",
                "--project=p",
                "--spot",
                "--restarts=3",
                *XPK_LINE,
            ],
            "xpk workload create --cluster c --zone z --project p --workload n --tpu-type v5litepod-16 --num-slices 2 "
            "--docker-image i --max-restarts 3 --spot --termination-grace-period-seconds 120 --command "
            "'exec python -m avjax.train --config c.py'",
        ),
        (["status", *XPK_LINE], "xpk workload list --cluster c --zone z --filter-by-job n"),
        (["delete", *XPK_LINE], "xpk workload delete --cluster c --zone z --workload n"),
        (
            ["logs", "--worker=3", "--slice=1", *XPK_LINE],
            "kubectl logs --follow --tail=100 --selector=jobset.sigs.k8s.io/jobset-name=n,"
            "jobset.sigs.k8s.io/job-index=1,batch.kubernetes.io/job-completion-index=3",
        ),
    ],
)
def test_xpk_dry_run(box, arguments, expected):
    after = ["--", "--config", "c.py"] if arguments[0] == "create" else []
    assert box.printed(XPK, *arguments, *after) == [shlex.split(expected)]


def test_xpk_runs_what_it_prints(box):
    line = ["status", "--name=n", "--cluster=c", "--zone=z"]
    (printed,) = box.printed(XPK, *line, "--dry_run")
    assert box.run(XPK, *line).returncode == 1  # the status of its replacement
    assert box.calls() == [printed]


# ---- Kubernetes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobsets() -> dict[str, dict]:
    documents = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
    return {document["metadata"]["labels"]["accelerator"]: document for document in documents}


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_jobset(jobsets, kind):
    jobset = jobsets[kind]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (job,) = jobset["spec"]["replicatedJobs"]
    inner = job["template"]["spec"]
    assert (inner["completionMode"], inner["backoffLimit"]) == ("Indexed", 0)
    assert inner["parallelism"] == inner["completions"]
    (container,) = inner["template"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "avjax.train"]
    assert inner["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_jobset_of_a_tpu_has_its_hosts(jobsets):
    (job,) = jobsets["tpu"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"].startswith("tpu-")
    assert (
        chips == job["template"]["spec"]["parallelism"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    )
    topology = jobsets["tpu"]["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert topology == "cloud.google.com/gke-nodepool"


def test_jobset_of_gpus_says_where_process_0_is(jobsets):
    jobset = jobsets["gpu"]
    (job,) = jobset["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable for variable in container["env"]}
    name, (port,) = jobset["metadata"]["name"], container["ports"]
    assert variables["AVJAX_COORDINATOR"]["value"] == f"{name}-{job['name']}-0-0.{name}:{port['containerPort']}"
    assert variables["AVJAX_PROCESSES"]["value"] == str(job["template"]["spec"]["completions"])
    index = variables["AVJAX_PROCESS"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
