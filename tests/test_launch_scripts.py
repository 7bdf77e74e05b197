"""The shell scripts of launch/: what they would run, what they refuse, and that they do as they say.

After a wanted change, write the golden files anew and read the difference:

    UPDATE_LAUNCH_GOLDEN=1 python -m pytest tests/test_launch_scripts.py
"""

import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "launch_golden"
TRAIN = ("--", "python", "-m", "navil_jax.train", "--config", "my recipe.py", '--config.data.system_message=it\'s "x"')
SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-east5-a",
    "BUCKET": "gs://my-bucket",
    "NAME": "navil",
    "TOPOLOGY": "v5p-128",
    "SLICES": "1",
    "CAPACITY": "on-demand",
    "RESERVATION": "",
    "RUNTIME_VERSION": "",
    "CLUSTER": "my-cluster",
    "IMAGE": "us-docker.pkg.dev/my-project/images/navil",
}
MULTISLICE = {"TOPOLOGY": "v6e-256", "SLICES": "4", "CAPACITY": "reserved", "RESERVATION": "my-reservation"}
CASES = {
    "tpu_vm": ("tpu_vm.sh", {"TOPOLOGY": "v5e-16", "CAPACITY": "spot"}),
    "tpu_vm_multislice": ("tpu_vm.sh", {**MULTISLICE, "RUNTIME_VERSION": "my-image"}),
    "gke": ("gke.sh", {"CAPACITY": "spot"}),
    "gke_multislice": ("gke.sh", MULTISLICE),
}
ACTIONS = {
    "tpu_vm.sh": ("create", "wait", "setup", "run", "up", "logs", "status", "stop", "delete"),
    "gke.sh": ("cluster", "connect", "image", "manifest", "submit", "xpk", "logs", "status", "stop", "delete"),
}


def launch(script, *arguments, **environment):
    command = [str(ROOT / "launch" / script), *arguments]
    environment = os.environ | {"TMPDIR": "/tmp"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def settings_file(folder, **changes):
    path = folder / "settings.sh"
    path.write_text("".join(f"{name}={value}\n" for name, value in (SETTINGS | changes).items()))
    return str(path)


@pytest.mark.parametrize("case", CASES)
def test_dry_runs_are_the_golden_ones(case, tmp_path):
    script, changes = CASES[case]
    settings = settings_file(tmp_path, **changes)
    parts = []
    for action in ACTIONS[script]:
        done = launch(script, "--dry-run", "--settings", settings, action, *TRAIN)
        assert (done.returncode, done.stderr) == (0, "")
        parts.append(f"# {script} {action}\n{done.stdout.replace(str(ROOT), 'ROOT')}")
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("UPDATE_LAUNCH_GOLDEN"):
        golden.write_text("\n".join(parts))
    assert "\n".join(parts) == golden.read_text()


@pytest.mark.parametrize("changes", [{}, MULTISLICE])
def test_the_manifest_is_yaml_that_runs_the_command(changes, tmp_path):
    yaml = pytest.importorskip("yaml")
    done = launch("gke.sh", "manifest", "--settings", settings_file(tmp_path, **changes), *TRAIN)
    (job,) = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == [*TRAIN[1:], "--config.workdir=gs://my-bucket/navil"]
    chips = job["replicas"] * spec["completions"] * container["resources"]["limits"]["google.com/tpu"]
    assert chips == (4 * 256 if changes else 64)


def test_a_workdir_that_is_given_is_kept(tmp_path):
    flags = ("manifest", "--settings", settings_file(tmp_path), *TRAIN, "--config.workdir=gs://other/run")
    assert "my-bucket" not in launch("gke.sh", *flags).stdout


@pytest.mark.parametrize(
    ("script", "arguments", "changes", "message"),
    [
        ("tpu_vm.sh", ("create",), {"PROJECT": "", "ZONE": ""}, "not set: PROJECT ZONE;"),
        ("gke.sh", ("submit",), {"CLUSTER": "", "IMAGE": "", "BUCKET": ""}, "not set: BUCKET CLUSTER IMAGE;"),
        ("gke.sh", ("cluster",), {"CAPACITY": "reserved"}, "not set: RESERVATION;"),
        ("tpu_vm.sh", ("run",), {}, "the command is missing (after --);"),
        ("gke.sh", ("manifest",), {}, "the command is missing (after --);"),
        ("tpu_vm.sh", (), {}, "no action given;"),
        ("tpu_vm.sh", ("creat",), {}, "unknown action creat;"),
        ("gke.sh", ("logs", "--zone"), {}, "unknown argument --zone;"),
        ("gke.sh", ("run", "python"), {}, "two actions given, run and python (a command to run comes after --);"),
        ("tpu_vm.sh", ("create",), {"TOPOLOGY": "v5p-100"}, "TOPOLOGY=v5p-100: no slice of 50 chips is known here;"),
        ("tpu_vm.sh", ("create",), {"TOPOLOGY": "a100-8"}, "there are v4-N, v5e-N, v5p-N, v6e-N and tpu7x-N;"),
        ("tpu_vm.sh", ("create",), {"TOPOLOGY": "v5p"}, "TOPOLOGY=v5p is no name of a slice, such as v5p-128;"),
        ("tpu_vm.sh", ("create",), {"TOPOLOGY": "tpu7x-128"}, "is on GKE alone, use launch/gke.sh;"),
        ("tpu_vm.sh", ("create",), {"SLICES": "0"}, "SLICES=0 is not a number from 1;"),
        ("tpu_vm.sh", ("create",), {"CAPACITY": "cheap"}, "CAPACITY=cheap is none of spot, on-demand, reserved;"),
        ("tpu_vm.sh", ("create",), {"BUCKET": "my-bucket"}, "BUCKET=my-bucket does not start with gs://;"),
    ],
)
def test_mistakes(script, arguments, changes, message, tmp_path):
    done = launch(script, "--dry-run", "--settings", settings_file(tmp_path, **changes), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.endswith(f"; see {script} --help\n")


def test_no_settings_file(tmp_path):
    done = launch("tpu_vm.sh", "--settings", str(tmp_path / "none.sh"), "create")
    assert done.returncode == 2
    assert "none.sh: no such file, copy launch/settings.example.sh there and fill it in" in done.stderr


def test_the_example_names_every_setting():
    names = [
        line.partition("=")[0]
        for line in (ROOT / "launch" / "settings.example.sh").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert names == list(SETTINGS)


def test_the_documented_commands_are_understood(tmp_path):
    lines = (ROOT / "docs" / "pods.md").read_text().replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("launch/")]
    assert len(commands) > 6
    settings = ("--dry-run", "--settings", settings_file(tmp_path))
    for script, *arguments in commands:
        done = launch(script.removeprefix("launch/"), *settings, *arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments


@pytest.mark.parametrize("script", ACTIONS)
def test_help_names_every_action(script):
    text = launch(script, "--help").stdout
    assert [action for action in ACTIONS[script] if f"\n  {action} " not in text] == []


def test_shellcheck_is_content():
    command = Path(sys.executable).with_name("shellcheck")
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh"))
    done = subprocess.run([command, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""


GCLOUD = """#!/usr/bin/env bash
# Google Cloud in small: one host, whose home is a folder; states come one per question.
cd {home}
echo "$4" >>calls
case $4 in
  describe) head -n 1 states; [ "$(wc -l <states)" = 1 ] || sed -i 1d states ;;
  scp) cp "$5" code.tar.gz ;;
  ssh) for last; do :; done; case $last in *uv*) mkdir -p navil_jax; tar -xzf code.tar.gz -C navil_jax ;;
    *) bash -c "${{last#--command=}}" ;; esac ;;
esac
"""


def test_up_goes_on_after_the_slices_were_taken_away(tmp_path):
    home, gcloud = tmp_path / "home", tmp_path / "bin" / "gcloud"
    home.mkdir()
    gcloud.parent.mkdir()
    gcloud.write_text(GCLOUD.format(home=home))
    gcloud.chmod(0o755)
    (home / "states").write_text("SUSPENDED\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    environment = {"PATH": f"{gcloud.parent}:{os.environ['PATH']}", "NAVIL_POLL_SECONDS": "0", "TMPDIR": str(tmp_path)}
    settings = ("--settings", settings_file(tmp_path))
    script = 'trap "echo saved; exit 143" TERM; echo "$0"; while :; do sleep 0.1; done'
    done = launch("tpu_vm.sh", *settings, "up", "--", "bash", "-c", script, "one  $two", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = [name for name, _ in itertools.groupby((home / "calls").read_text().split())]
    assert calls == ["describe", "delete", "create", "describe", "scp", "ssh"]
    assert [line.split()[1] for line in done.stdout.splitlines() if line[2] == ":"] == [
        "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"
    ]  # fmt: skip
    assert (home / "navil_jax" / "navil_jax" / "train" / "__main__.py").exists()
    assert not (home / "navil_jax" / ".git").exists()

    again = launch("tpu_vm.sh", *settings, "run", "--", "echo", **environment)
    assert "error: a command is still running, stop it first" in again.stderr
    assert launch("tpu_vm.sh", *settings, "status", **environment).stdout.splitlines()[-2:] == ["runs", "one  $two"]
    assert launch("tpu_vm.sh", *settings, "stop", **environment).returncode == 0
    assert (home / "navil_jax" / "train.log").read_text() == "one  $two\nsaved\n"
    assert "ended\nsaved\n" in launch("tpu_vm.sh", *settings, "status", **environment).stdout


def test_a_request_that_failed_is_not_waited_for(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text("#!/usr/bin/env bash\necho FAILED\n")
    gcloud.chmod(0o755)
    done = launch("tpu_vm.sh", "--settings", settings_file(tmp_path), "wait", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "error: navil will not become active; delete and create it anew" in done.stderr
