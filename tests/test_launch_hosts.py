"""Roads by ssh against stand-ins for gcloud, systemd and the metadata server: what happens, and what host.sh does."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from launched import launch, settings_file

from launch import hosts
from launch.settings import ROOT

HOST = ROOT / "launch" / "host.sh"

# Google Cloud in small: one host, whose home is a folder; answers to questions come from the file `states`.
GCLOUD = """#!/usr/bin/env bash
[ "$1" = storage ] && exec cp "$4" "{home}/uploaded-$(basename "$5")"
cd {home} || exit
export HOME={home}
for last; do :; done
case "$*" in
  *" describe "* | *" list-instances "*)
    echo describe >>calls
    line=$(head -n 1 states)
    [ "$(wc -l <states)" = 1 ] || sed -i 1d states
    case $* in *"value(NAME)"*) echo host-a; exit ;; esac
    case $line in "!"*) echo "${{line#!}}" >&2; exit 1 ;; esac
    printf '%b\\n' "$line" ;;
  *" scp "*)
    echo scp >>calls
    rm lost 2>/dev/null && exit 1
    for word; do case $word in /*.tar.gz) cp "$word" code.tar.gz ;; esac; done ;;
  *" ssh "*) echo ssh >>calls; exec bash -c "${{last#--command=}}" ;;
  *" create "*) echo create >>calls ;;
  *" delete "*)
    echo delete >>calls
    [ ! -f service.pid ] || kill -KILL "$(cat service.pid)" 2>/dev/null
    rm -f service.state ;;
esac
"""
SYSTEMCTL = """#!{python}
# systemd in small: one service, started anew as its file says.
import os, re, signal, subprocess, sys, time
home = "{home}"
unit, pid, note = (os.path.join(home, name) for name in ("navil.service", "service.pid", "service.state"))
def state():
    return open(note).read() if os.path.exists(note) else "inactive"
def write(text):
    open(note, "w").write(text)
words = [word for word in sys.argv[1:] if not word.startswith("-")]
if words[0] == "is-active":
    if "--quiet" not in sys.argv:
        print(state())
    sys.exit(state() != "active")
if words[0] == "disable":
    os.kill(int(open(pid).read()), signal.SIGUSR1)
    while state() == "active":
        time.sleep(0.02)
if words[0] == "enable" and os.path.exists(note):
    os.remove(note)
if words[0] == "enable" and os.fork() == 0:
    os.setsid()
    text = open(unit).read()
    def value(key):
        return re.search(f"^{{key}}=(.*)$", text, re.MULTILINE)[1]
    log = open(value("StandardOutput").removeprefix("append:"), "ab")
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    stopping = []
    def stop(*_):
        stopping.append(1)
        main.send_signal(signal.SIGTERM)
    signal.signal(signal.SIGUSR1, stop)
    open(pid, "w").write(str(os.getpid()))
    while True:
        main = subprocess.Popen(value("ExecStart").split(), cwd=value("WorkingDirectory"), start_new_session=True)
        write("active")
        status = main.wait()
        try:
            os.killpg(main.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        subprocess.run(value("ExecStopPost").removeprefix("-").split(), cwd=value("WorkingDirectory"))
        if stopping or status == 0 or status == int(value("RestartPreventExitStatus")):
            write("failed" if status == int(value("RestartPreventExitStatus")) else "inactive")
            os._exit(0)
if words[0] == "enable":
    while not os.path.exists(note):
        time.sleep(0.02)
"""
SUDO = """#!/usr/bin/env bash
[ "$1" = tee ] && exec cat >{home}/navil.service
exec "$@"
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home folder of a host, with stand-ins in the path of this machine and of the host."""
    folder, programs = tmp_path / "home", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    uv = folder / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    texts = {
        programs / "gcloud": GCLOUD,
        programs / "sudo": SUDO,
        programs / "systemctl": SYSTEMCTL,
        programs / "curl": "#!/bin/sh\nexit 1\n",
        uv: '#!/bin/sh\necho "$@" >>{home}/uv\n',
    }
    for path, text in texts.items():
        path.write_text(text.format(home=folder, python=sys.executable) if "{home}" in text else text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(hosts, "POLL_SECONDS", 0.01)
    yield folder
    if (pid := folder / "service.pid").exists():
        subprocess.run(["pkill", "-KILL", "-g", pid.read_text()], check=False)


UNTIL_ONE_STATE = 'while [ "$(wc -l <../states)" -gt 1 ]; do sleep 0.02; done'


def states(home, *lines):
    (home / "states").write_text("".join(f"{line}\n" for line in lines))


def calls(home):
    return (home / "calls").read_text().split()


def said(text):
    """What waiting has told, without the time."""
    return [line.partition(" ")[2] for line in text.splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)]


@pytest.fixture
def light(home, monkeypatch):
    """Nothing but host.sh and the lock is copied to the host, and nothing is downloaded."""
    copy = home.parent / "repository"
    (copy / "launch").mkdir(parents=True)
    shutil.copy(HOST, copy / "launch")
    monkeypatch.setattr(hosts, "ROOT", copy)
    curl = home.parent / "bin" / "curl"
    curl.write_text("#!/bin/sh\ncase $* in *astral*) echo true ;; *) exit 1 ;; esac\n")
    return copy


@pytest.mark.usefixtures("light")
def test_up_goes_on_after_the_slices_were_taken_away(home, tmp_path):
    states(
        home, "SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "!UNAVAILABLE: try again", "PROVISIONING", "ACTIVE"
    )
    settings = ("--settings", settings_file(tmp_path))
    script = 'trap "echo saved; exit 143" TERM; echo "$0"; while :; do sleep 0.05; done'
    done = launch(*settings, "queued", "up", "--", "bash", "-c", script, "one  $two")
    assert done.status == 0, done
    assert [call for call in calls(home) if call != "describe"] == ["delete", "create", "scp", "ssh", "ssh"]
    told = said(done.out)
    assert [told[i] for i in (0, 1, 2, 4, 5)] == [
        *("SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"),
    ]
    assert "UNAVAILABLE: try again" in told[3]
    assert "pip sync --quiet --python=.venv --require-hashes launch/lock.txt" in (home / "uv").read_text()

    assert "a command is still running" in launch_error(*settings, "queued", "run", "--", "echo")
    log = home / "navil_jax" / "train.log"
    wait_for(lambda: log.exists() and "one" in log.read_text())
    assert host(home, "status") == ["active", "one  $two"]
    began = time.monotonic()
    assert launch(*settings, "queued", "stop").status == 0
    assert time.monotonic() - began < 10
    assert log.read_text() == "one  $two\nsaved\n"
    assert host(home, "status") == ["inactive", "saved"]
    (uploaded,) = home.glob("**/uploaded-*.log")
    assert uploaded.read_text() == log.read_text()


def launch_error(*arguments):
    """What a launch that fails over there says: the host's line comes to the terminal itself."""
    command = [sys.executable, "-m", "launch", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    return done.stderr


def host(home, *arguments):
    done = subprocess.run([home / "navil_jax" / "launch" / "host.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def wait_for(true):
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.usefixtures("light")
def test_a_crash_is_started_anew_with_the_log_kept_and_a_mistake_is_not(home, tmp_path):
    states(home, "ACTIVE")
    settings = ("--settings", settings_file(tmp_path))
    script = "echo try; [ -f tried ] && exit 2; touch tried; exit 1"
    assert launch(*settings, "queued", "setup").status == 0
    assert launch(*settings, "queued", "run", "--", "bash", "-c", script).status == 0
    wait_for(lambda: (home / "service.state").read_text() == "failed")
    assert (home / "navil_jax" / "train.log").read_text() == "try\ntry\n"


@pytest.mark.usefixtures("light")
def test_keep_asks_anew_when_slices_are_lost_and_ends_with_the_command(home, tmp_path):
    states(home, "!NOT_FOUND: no", "!NOT_FOUND: no", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE")
    done = launch(
        "--settings", settings_file(tmp_path), "queued", "keep", "--", "bash", "-c", f"{UNTIL_ONE_STATE}; echo done"
    )
    assert done.status == 0, done
    assert [call for call in calls(home) if call in ("create", "delete")] == ["create", "delete", "create"]
    assert "the command has ended: done; the slices cost money until `delete`" in done.out


@pytest.mark.usefixtures("light")
def test_keep_goes_on_beside_a_command_that_runs(home, tmp_path):
    states(home, *["ACTIVE"] * 5)
    settings = ("--settings", settings_file(tmp_path))
    assert launch(*settings, "queued", "up", "--", "bash", "-c", f"echo first; {UNTIL_ONE_STATE}").status == 0
    done = launch(*settings, "queued", "keep", "--", "echo", "second")
    assert done.status == 0, done
    assert (home / "navil_jax" / "train.log").read_text() == "first\n"


@pytest.mark.usefixtures("light")
def test_keep_tries_again_when_slices_go_while_they_are_set_up_and_says_a_failure(home, tmp_path):
    states(home, "ACTIVE")
    (home / "lost").touch()  # the first copy fails
    done = launch("--settings", settings_file(tmp_path), "queued", "keep", "--", "bash", "-c", "echo oh; exit 2")
    assert done.status == 2
    assert "queued-resources: failed with status 1; what it said stands above" in done.out
    assert done.err == "error: navil: the command failed: oh; its log says why, and the slices still cost money\n"


@pytest.mark.usefixtures("light")
def test_code_is_not_changed_under_a_command_that_runs(home, tmp_path):
    states(home, "ACTIVE")
    settings = ("--settings", settings_file(tmp_path))
    assert launch(*settings, "queued", "up", "--", "sleep", "20").status == 0
    (home / "uv").unlink()
    assert "error: a command is still running, stop it first" in launch_error(*settings, "queued", "setup")
    assert not (home / "uv").exists()


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_request_that_failed_is_not_waited_for(state, home, tmp_path):
    states(home, state)
    done = launch("--settings", settings_file(tmp_path), "queued", "wait")
    assert done.status == 2
    assert done.err == "error: navil: will not become active (lost); `up` deletes it and asks anew\n"


def test_one_question_that_fails_does_not_end_the_waiting_and_many_do(home, tmp_path):
    states(home, "!ERROR: (gcloud) UNAVAILABLE", "WAITING_FOR_RESOURCES", "!ERROR: 503", "ACTIVE")
    settings = settings_file(tmp_path)
    done = launch("--settings", settings, "queued", "wait")
    assert (done.status, said(done.out)[-1]) == (0, "ACTIVE")
    states(home, "!ERROR: (gcloud) PERMISSION_DENIED")
    done = launch("--settings", settings, "queued", "wait")
    assert done.status == 2
    assert done.err.endswith("PERMISSION_DENIED; this was asked 20 times\n")
    assert "create" not in calls(home)


def test_an_error_is_not_taken_for_an_absent_request(home, tmp_path):
    states(home, "!ERROR: 503", "ACTIVE")
    done = launch("--settings", settings_file(tmp_path), "queued", "wait")
    assert done.status == 0
    states(home, "!ERROR: NOT_FOUND: Resource 'navil' was not found")
    done = launch("--settings", settings_file(tmp_path), "queued", "wait")
    assert done.err == "error: navil: will not become active (absent); `up` deletes it and asks anew\n"


@pytest.mark.usefixtures("light")
def test_a_group_that_was_taken_away_is_made_anew(home, tmp_path):
    settings = settings_file(tmp_path, topology="v6e-4", zone="us-east5-b", capacity="spot")
    states(home, "TERMINATED", "PROVISIONING", "RUNNING")
    done = launch("--settings", settings, "instances", "up", "--", "true")
    assert done.status == 0, done
    made = [call for call in calls(home) if call in ("create", "delete")]
    assert made == ["delete", "delete", "create", "create"]
    assert launch("--settings", settings, "instances", "delete").status == 0
    assert said(done.out) == ["0 of 1 hosts run, others are TERMINATED", "0 of 1 hosts run", "1 of 1 hosts run"]


TWO_HOSTS = """#!/bin/sh
echo "$@" >>{calls}
case $* in
  *list-instances*) printf 'navil-x\\nnavil-b\\n' ;;
  *ssh*navil-x*number*) echo 0 ;;
  *ssh*navil-b*number*) echo 1 ;;
esac
"""


def test_all_hosts_of_a_group_are_reached_and_the_first_is_the_one_that_tells(home, tmp_path):
    calls_file = tmp_path / "all"
    (home.parent / "bin" / "gcloud").write_text(TWO_HOSTS.format(calls=calls_file))
    settings = ("--settings", settings_file(tmp_path, topology="v5p-16", private=True))
    assert launch(*settings, "instances", "logs").status == 0
    assert re.search(
        r"compute ssh navil-x .*--tunnel-through-iap --command=navil_jax/launch/host.sh log$",
        calls_file.read_text().splitlines()[-1],
    )
    calls_file.unlink()
    assert launch(*settings, "instances", "stop").status == 0
    stopped = [line for line in calls_file.read_text().splitlines() if line.endswith("host.sh stop")]
    assert sorted(line.split()[2] for line in stopped) == ["navil-b", "navil-x"]


def test_what_is_half_there_can_be_deleted(home, tmp_path, monkeypatch):
    gcloud = home.parent / "bin" / "gcloud"
    gcloud.write_text(
        "#!/bin/sh\necho \"$@\" >>calls\ncase $* in *groups*) echo 'x was not found' >&2; exit 1 ;; esac\n"
    )
    monkeypatch.chdir(home)
    done = launch("--settings", settings_file(tmp_path), "instances", "delete")
    assert done.status == 0, done
    assert len((home / "calls").read_text().splitlines()) == 3
    gcloud.write_text("#!/bin/sh\necho PERMISSION_DENIED >&2; exit 1\n")
    done = launch("--settings", settings_file(tmp_path), "instances", "delete")
    assert done.err == "error: gcloud compute instance-groups managed: PERMISSION_DENIED\n"


def test_a_program_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = launch("--settings", settings_file(tmp_path), "queued", "create")
    assert done.status == 2
    assert done.err == "error: gcloud: is not installed; docs/pods.md says what a road needs\n"


# host.sh by itself.

METADATA = """#!/usr/bin/env bash
for last; do :; done
file={folder}/${{last##*/}}
[ -f "$file" ] && cat "$file"
"""


@pytest.mark.parametrize(
    ("attributes", "joined"),
    [
        ({"worker-id": "2", "worker-network-endpoints": "a:1:10.0.0.5,b:1:10.0.0.6,c:1:10.0.0.7"}, "10.0.0.5:8476 3 2"),
        ({"worker-id": "0", "worker-network-endpoints": "10.0.0.5,10.0.0.6"}, "10.0.0.5:8476 2 0"),
        ({"worker-id": "0", "worker-network-endpoints": "a:1:10.0.0.5"}, "  "),
        ({"agent-worker-number": "0", "worker-network-endpoints": "a:1:10.0.0.5,b:1:10.0.0.6"}, "  "),
        ({}, "  "),
    ],
)
def test_hosts_of_an_instance_group_are_told_of_one_another(attributes, joined, home, tmp_path):
    repository = home / "navil_jax"
    (repository / "launch").mkdir(parents=True)
    shutil.copy(HOST, repository / "launch")
    for name, value in attributes.items():
        (tmp_path / name).write_text(value)
    (tmp_path / "bin" / "curl").write_text(METADATA.format(folder=tmp_path))
    (repository / "train.logs").write_text("gs://b/logs/x.log")
    show = "echo $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"
    (repository / "train.command").write_bytes(b"bash\0-c\0" + show.encode() + b"\0")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [repository / "launch" / "host.sh", "serve"], env=environment, stdout=subprocess.PIPE, text=True, timeout=20
    )
    assert done.stdout.split() == joined.split()


def test_systemd_itself_finds_nothing_wrong_with_the_service(home, tmp_path):
    repository = home / "navil_jax"
    (repository / "launch").mkdir(parents=True)
    shutil.copy(HOST, repository / "launch")
    subprocess.run([repository / "launch" / "host.sh", "start", "gs://b/logs", "true"], check=True, timeout=20)
    text = (home / "navil.service").read_text()
    assert "\nRestartPreventExitStatus=2\n" in text and "\nTimeoutStopSec=300\n" in text
    if shutil.which("systemd-analyze"):
        unit = tmp_path / "navil.service"
        unit.write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
        assert "navil.service" not in done.stderr


def test_an_unknown_word_prints_the_usage():
    done = subprocess.run([HOST, "fly"], capture_output=True, text=True)
    assert (done.returncode, done.stderr[:15]) == (2, "usage: host.sh ")


def test_shellcheck_is_content():
    command = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([command, str(HOST)], capture_output=True, text=True, check=False)
    assert done.stdout == ""
