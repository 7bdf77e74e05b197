"""The roads of `python -m launch` in dry runs: what would be run, and what is refused before anything is.

After a wanted change, write the golden files anew and read the difference:

    UPDATE_LAUNCH_GOLDEN=1 python -m pytest tests/test_launch_roads.py
"""

import json
import os
import re
import shlex
import string
import tempfile
from pathlib import Path

import hypothesis
import pytest
from cloud_references import mistakes
from hypothesis import strategies as st
from launched import SETTINGS, TRAIN, commands, dry_run, launch, manifest, settings_file

from launch.__main__ import ROADS, main
from launch.command import check_training
from launch.settings import ROOT, Settings

GOLDEN = Path(__file__).parent / "launch_golden"
PRIVATE = {"private": True, "network": "my-net", "subnetwork": "my-subnet", "service_account": "a@p.iam.example.com"}
RESERVED = {"capacity": "reservation", "reservation": "my-reservation"}
CALENDAR = {"capacity": "calendar", "reservation": "my-reservation"}
FLEX = {"capacity": "flex-start", "hours": 24}
SPOT = {"capacity": "spot"}
V5E = {"topology": "v5e-16", "zone": "us-west4-a"}
V6E = {"topology": "v6e-256", "zone": "us-east5-b"}
V7X = {"topology": "tpu7x-128", "zone": "us-central1-c"}
CASES = {
    "queued_v5e_spot": ("queued", {**V5E, **SPOT}),
    "queued_v5p_flex_private": ("queued", {**FLEX, **PRIVATE}),
    "queued_v6e_4_slices_reserved": ("queued", {**V6E, **RESERVED, "slices": 4, "libtpu_init_args": "recommended"}),
    "queued_v5p_shape_calendar": ("queued", {**CALENDAR, "topology": "v5p:4x4x16", "system_image": "my-image"}),
    "instances_v5p_flex": ("instances", {**FLEX}),
    "instances_v6e_spot_private": ("instances", {**V6E, **SPOT, **PRIVATE}),
    "instances_tpu7x_calendar": ("instances", {**V7X, **CALENDAR, "libtpu_init_args": "recommended"}),
    "instances_one_host": ("instances", {"topology": "v5p-8"}),
    "jobset_v5e_spot": ("jobset", {**V5E, **SPOT}),
    "jobset_v5p_private": ("jobset", {**PRIVATE, "cluster_location": "us-east5-a"}),
    "jobset_tpu7x_2_slices_flex": ("jobset", {**V7X, **FLEX, "slices": 2}),
    "xpk_v6e_4_slices_reserved": ("xpk", {**V6E, **RESERVED, "slices": 4}),
    "gcluster_v5p_shape": ("gcluster", {**SPOT, "topology": "v5p:4x4x16"}),
    "gcluster_tpu7x_2_slices": ("gcluster", {**V7X, "slices": 2}),
}


def dry_runs(road: str, changes: dict, folder: Path) -> str:
    """What every action of a road shows."""
    parts = []
    for action in ROADS[road].actions:
        command = TRAIN if action in ROADS[road].takes_command else ()
        done = dry_run(folder, road, action, *command, **changes)
        assert (done.status, done.err) == (0, "")
        shown = done.out.replace(str(ROOT), "ROOT").replace(tempfile.gettempdir(), "TMP")
        parts.append(f"# {road} {action}\n{shown}")
    return "\n".join(parts)


@pytest.mark.parametrize("case", CASES)
def test_dry_runs_are_the_golden_ones(case, tmp_path):
    found = dry_runs(*CASES[case], tmp_path)
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("UPDATE_LAUNCH_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()


@pytest.mark.parametrize("case", CASES)
def test_every_command_is_in_the_reference_of_its_program(case, tmp_path):
    road, changes = CASES[case]
    wrong = []
    for action in ROADS[road].actions:
        command = TRAIN if action in ROADS[road].takes_command else ()
        shown = commands(dry_run(tmp_path, road, action, *command, **changes).out)
        assert shown or action == "manifest"
        wrong += [mistake for words in shown for mistake in mistakes(words)]
    assert wrong == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "gcloud compute tpus queued-resources create x --provisioning-model=flex-start",
            "no flag --provisioning-model",
        ),
        ("gcloud compute tpus queued-resources create x --zone=a", "needs --runtime-version"),
        ("gcloud compute tpus fly", "no such command"),
        ("xpk workload create --cluster=a --restart=1", "no flag --restart"),
    ],
)
def test_a_command_that_its_program_would_refuse_is_found(command, said):
    assert any(said in mistake for mistake in mistakes(command.split()))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("xpk", "jobset"))])
def test_xpk_itself_reads_its_commands(case, tmp_path):
    parsers = pytest.importorskip("xpk.parser.core")
    import argparse

    parser = argparse.ArgumentParser()
    parsers.set_parser(parser)
    road, changes = CASES[case]
    read = 0
    for action in ("cluster", "submit", "delete"):
        command = TRAIN if action in ROADS[road].takes_command else ()
        for words in commands(dry_run(tmp_path, road, action, *command, **changes).out):
            if words[0] == "xpk":
                assert parser.parse_args(words[1:]).cluster == "my-cluster"
                read += 1
    assert read >= 2


def pods(folder, *command, **changes):
    """The pods' specification of a JobSet, and the job's."""
    done = dry_run(folder, "jobset", "manifest", *command, **changes)
    assert done.status == 0, done.err
    spec = manifest(done.out)["spec"]
    (job,) = spec["replicatedJobs"]
    return spec, job, job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("changes", "chips"),
    [({}, 64), ({**V6E, "slices": 4}, 1024), ({**V7X, "slices": 2}, 128), ({**V5E, "topology": "v5e-8"}, 8)],
)
def test_the_job_set_asks_for_all_chips(changes, chips, tmp_path):
    _, job, pod = pods(tmp_path, *TRAIN, **changes)
    (container,) = pod["containers"]
    hosts = job["template"]["spec"]["completions"]
    assert job["replicas"] * hosts * container["resources"]["limits"]["google.com/tpu"] == chips


def test_a_mistake_ends_the_job_and_what_is_taken_away_does_not_count(tmp_path):
    """As Kubernetes says which rule of a job has ended it, and JobSet matches that."""
    spec, job, pod = pods(tmp_path, *TRAIN)
    rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
    statuses = {index: rule["onExitCodes"]["values"] for index, rule in enumerate(rules) if "onExitCodes" in rule}
    assert statuses == {0: [2], 2: [143]}
    assert rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]

    def action(index):
        message = f"Container train for pod default/x failed with exit code 9 matching FailJob rule at index {index}"
        for rule in spec["failurePolicy"]["rules"]:
            if any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]):
                return rule["action"]
        return "RestartJobSet"

    taken = "RestartJobSetAndIgnoreMaxRestarts"
    assert [action(index) for index in (0, 1, 2, "x")] == ["FailJobSet", taken, taken, "RestartJobSet"]
    assert spec["failurePolicy"]["maxRestarts"] < 50
    assert spec["ttlSecondsAfterFinished"] > 0
    assert pod["terminationGracePeriodSeconds"] == 300


@pytest.mark.parametrize(
    ("road", "flag"), [("xpk", "--restart-on-exit-codes"), ("gcluster", "--restart-on-exit-codes")]
)
def test_launchers_restart_after_exceptions_and_signals_and_not_after_mistakes(road, flag, tmp_path):
    (words,) = [w for w in commands(dry_run(tmp_path, road, "submit", *TRAIN).out) if w[0] == road]
    codes = {int(code) for word in words if word.startswith(flag) for code in word.partition("=")[2].split(",")}
    restarted = codes | ({42, *range(127, 256)} if road == "xpk" else set())
    assert {1, 137, 143} <= restarted
    assert 2 not in restarted


def expanded(word: str) -> str:
    """What Kubernetes makes of a word of a command where no variable is defined."""
    return re.sub(r"\$\$|\$\(\w+\)", lambda found: "$" if found[0] == "$$" else found[0], word)


WORDS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), min_size=1)


@hypothesis.given(WORDS)
@hypothesis.settings(deadline=None, max_examples=40)
def test_words_of_a_command_arrive_as_they_are(words):
    hypothesis.assume("=" not in words[0])
    with tempfile.TemporaryDirectory() as folder:
        _, _, pod = pods(Path(folder), "--", *words)
        given = [expanded(word) for word in pod["containers"][0]["command"]]
        assert given[2:-1] == words
        started = shlex.split(dry_run(Path(folder), "queued", "run", "--", *words).out)
        (command,) = [word.partition("=")[2] for word in started if word.startswith("--command=")]
        assert shlex.split(command)[5:-1] == words


@pytest.mark.parametrize("word", ["a\nb", "tab\t", "bell\a", "\x85"])
def test_launchers_refuse_what_would_not_arrive(word, tmp_path):
    for road in ("xpk", "gcluster"):
        done = dry_run(tmp_path, road, "submit", "--", "echo", word)
        assert done.status == 2
        assert done.err.endswith("control characters and line breaks are lost here; take the road jobset\n")


def test_dollars_survive_the_launchers(tmp_path):
    words = ["echo", "$(HOME) $$ ${x} it's"]
    (shown,) = [w for w in commands(dry_run(tmp_path, "xpk", "submit", "--", *words).out) if w[0] == "xpk"]
    (command,) = [word.partition("=")[2] for word in shown if word.startswith("--command=")]
    assert shlex.split(expanded(command))[2:-1] == words


@pytest.mark.parametrize("given", [("--config.workdir=gs://other/run",), ("--config.workdir", "gs://other/run")])
def test_a_workdir_that_is_given_is_kept(given, tmp_path):
    words = pods(tmp_path, *TRAIN, *given)[2]["containers"][0]["command"]
    assert [word for word in words if "gs://my-bucket/navil" in word] == []


def test_flags_of_the_compiler_are_those_of_the_generation(tmp_path):
    def flags(**changes):
        words = pods(tmp_path, *TRAIN, **changes)[2]["containers"][0]["command"]
        return [word.partition("=")[2] for word in words if word.startswith("LIBTPU_INIT_ARGS=")]

    assert flags() == []
    assert flags(libtpu_init_args=" --xla_a=1  --xla_b=2") == ["--xla_a=1 --xla_b=2"]
    (one,), (two,) = flags(libtpu_init_args="recommended"), flags(libtpu_init_args="recommended", slices=2)
    assert "--xla_tpu_scoped_vmem_limit_kib=98304" in one
    assert "data_parallel" not in one and "data_parallel" in two
    (ironwood,) = flags(**V7X, libtpu_init_args="recommended")
    assert "--xla_tpu_bf16_emission_mode=NATIVE_EMISSION" in ironwood


# What is refused.

MISTAKES = [
    ("queued", "create", {"project": "", "zone": ""}, ": not filled in: project, zone"),
    ("jobset", "submit", {"cluster": "", "image": "", "bucket": ""}, ": not filled in: bucket, cluster, image"),
    (
        "jobset",
        "cluster",
        {"capacity": "reservation"},
        'reservation: is empty; capacity = "reservation" needs its name',
    ),
    ("queued", "create", {"reservation": "r"}, 'reservation: is not used with capacity = "on-demand"'),
    ("queued", "create", {"hours": 3}, 'hours: is not used with capacity = "on-demand"'),
    ("queued", "create", {"capacity": "flex-start"}, "hours: 0 is not from 1 to 168, which flex-start gives"),
    ("queued", "create", {"capacity": "flex-start", "hours": 169}, "hours: 169 is not from 1 to 168"),
    ("queued", "create", {"capacity": "cheap"}, "capacity: 'cheap' is none of spot, on-demand, flex-start"),
    ("queued", "create", {"subnetwork": "s"}, "network: is empty; a subnetwork needs its network"),
    ("queued", "create", {"topology": "v5p-100"}, "no TPU slice 'v5p-100', the nearest one is v5p-128"),
    ("queued", "create", {"topology": "v4-9", "zone": "us-central2-b"}, "no TPU slice 'v4-9', the nearest one is v4-8"),
    ("queued", "create", {"topology": "a100-8"}, "no TPU slice 'a100-8'"),
    ("queued", "create", {"topology": "v5p"}, "no TPU slice 'v5p'"),
    ("queued", "create", {**V5E, "topology": "v5e-4"}, "topology: v5e-4: Google Cloud has no such slice"),
    ("queued", "create", {"topology": "v5p-2"}, "v5p-2: Google Cloud has no such slice, they go from v5p-8 to"),
    ("queued", "create", {"topology": "2xv5p-8"}, "'2xv5p-8' says how many slices; use the setting slices"),
    ("queued", "create", {**V7X}, "the Cloud TPU API has no tpu7x; take the road instances or jobset"),
    ("instances", "create", {**V5E}, "instance groups have no v5e; take the road queued or jobset"),
    ("instances", "create", {"slices": 2}, "slices: an instance group is one slice"),
    ("queued", "create", {"slices": 0}, "slices: 0 is not a number from 1"),
    ("queued", "create", {"slices": "2"}, "slices: must be a whole number, not '2'"),
    ("queued", "create", {"slices": True}, "slices: must be a whole number, not True"),
    ("queued", "create", {"name": 123}, "name: must be text in quotes, not 123"),
    ("queued", "create", {"name": "123"}, "name: '123' is not a name of at most 40 lower-case letters"),
    ("queued", "create", {"name": "Navil"}, "name: 'Navil' is not a name"),
    ("queued", "create", {"name": "a" * 41}, "is not a name of at most 40"),
    ("queued", "create", {"private": "yes"}, "private: must be true or false, not 'yes'"),
    ("queued", "create", {"zone": "us-east5"}, "zone: 'us-east5' is not a zone, such as us-east5-a"),
    ("queued", "create", {"zone": "us-west4-a"}, "zone: us-west4-a has v5e, and v5p is in us-central1-a, us-east5-a"),
    ("queued", "create", {"zone": "mars-west1-a"}, "zone: mars-west1-a has no TPUs, and v5p is in"),
    ("queued", "create", {"bucket": "my-bucket"}, "bucket: 'my-bucket' is not an address such as gs://my-bucket"),
    ("queued", "create", {"bucket": "gs://"}, "bucket: 'gs://' is not an address"),
    ("queued", "create", {"bucket": "gs://My-Bucket"}, "bucket: 'gs://My-Bucket' is not an address"),
    ("queued", "create", {"bucket": "gs://bbb/../x"}, "bucket: 'gs://bbb/../x' is not an address"),
    ("queued", "create", {"bucket": "gs://b..b"}, "bucket: 'gs://b..b' is not an address"),
    (
        "queued",
        "create",
        {"network": "net works"},
        "network: 'net works' is not a network's name, or of another project",
    ),
    ("queued", "create", {"bucket": "gs://goog-b"}, "bucket: 'gs://goog-b' is not an address"),
    ("queued", "create", {"bucket": "gs://192.168.5.4/x"}, "bucket: 'gs://192.168.5.4/x' is not an address"),
    ("queued", "create", {"bucket": "gs://b/"}, "bucket: 'gs://b/' is not an address"),
    ("queued", "create", {"project": "My Project"}, "project: 'My Project' is not a project's id"),
    ("queued", "create", {"libtpu_init_args": "xla_a"}, "libtpu_init_args: xla_a: is no flag; they begin with --"),
    (
        "queued",
        "create",
        {**V5E, "libtpu_init_args": "recommended"},
        "no flags are recommended for v5e; leave it empty",
    ),
    (
        "jobset",
        "submit",
        {"image": "us-docker.pkg.dev/p/i/navil"},
        "image: 'us-docker.pkg.dev/p/i/navil' is not a conta",
    ),
    ("jobset", "submit", {"image": "a.dev/p/navil:latest"}, "image: the tag latest is other code tomorrow"),
    ("jobset", "image", {"image": f"a.dev/p/navil@sha256:{'0' * 64}"}, "image: names a digest, which is known after"),
    ("queued", "create", {"colour": "red"}, "colour: there is no such setting; there are project, zone"),
]


@pytest.mark.parametrize(("road", "action", "changes", "message"), MISTAKES)
def test_wrong_settings_are_one_line_before_anything_is_shown(road, action, changes, message, tmp_path):
    command = TRAIN if action == "submit" else ()
    done = dry_run(tmp_path, road, action, *command, **changes)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"error: {tmp_path / 'settings.toml'}: ")
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("queued", "run"), "error: the command is missing; it comes after --"),
        (("jobset", "manifest"), "error: the command is missing; it comes after --"),
        (("queued",), "the following arguments are required: ACTION"),
        (("queued", "creat"), "error: creat: queued has no such action; there are create, wait, setup"),
        (("xpk", "manifest"), "error: manifest: xpk has no such action"),
        (("walk", "up"), "invalid choice: 'walk'"),
        (("jobset", "logs", "--zone"), "unrecognized arguments: --zone"),
        (("jobset", "submit", "python"), "unrecognized arguments: python"),
        (("queued", "stop", "--", "python"), "error: stop: takes no command, which python begins; run, up, keep do"),
        (
            ("queued", "up", "--", "FOO=1", "python"),
            "error: FOO=1: is no program; set variables with env: -- env FOO=1",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, tmp_path):
    done = launch("--dry-run", "--settings", settings_file(tmp_path), *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1


SHARED = {
    "capacity": "calendar",
    "reservation": "projects/host/reservations/r",
    "network": "projects/host/global/networks/n",
    "subnetwork": "projects/host/regions/us-east5/subnetworks/s",
}


@pytest.mark.parametrize(
    ("road", "action", "flags"),
    [
        ("queued", "create", ["--reservation=projects/host/locations/us-east5-a/reservations/r"]),
        ("instances", "create", ["--reservation=projects/host/reservations/r", f"--subnet={SHARED['subnetwork']}"]),
        ("xpk", "cluster", ["--reservation=projects/host/reservations/r"]),
    ],
)
def test_reservations_and_networks_may_be_of_another_project(road, action, flags, tmp_path):
    shown = [word for words in commands(dry_run(tmp_path, road, action, **SHARED).out) for word in words]
    assert [flag for flag in flags if flag not in shown] == []
    assert any(SHARED["network"] in word for word in shown)


def test_an_action_needs_no_more_settings_than_it_uses(tmp_path):
    assert dry_run(tmp_path, "jobset", "image", project="", zone="", bucket="").status == 0
    assert dry_run(tmp_path, "xpk", "logs", image="").status == 0
    assert dry_run(tmp_path, "xpk", "submit", *TRAIN, image="").status == 2


def test_no_settings_file(tmp_path):
    done = launch("--settings", str(tmp_path / "none.toml"), "queued", "create")
    assert done.status == 2
    assert "none.toml: no such file; copy launch/settings.example.toml to launch/settings.toml" in done.err
    for content in (b"project = my-project\n", b"\xff\xfe"):
        (tmp_path / "none.toml").write_bytes(content)
        done = launch("--settings", str(tmp_path / "none.toml"), "queued", "create")
        assert done.status == 2
        assert "none.toml: is no TOML: " in done.err and done.err.count("\n") == 1


NAMES = st.text(string.ascii_letters + string.digits + "-_./: $\n", min_size=1, max_size=50)


@hypothesis.given(st.sampled_from(["name", "bucket", "project", "zone", "cluster", "image"]), NAMES)
@hypothesis.settings(deadline=None, max_examples=100)
def test_any_name_is_taken_or_refused_in_a_line(key, value):
    with tempfile.TemporaryDirectory() as folder:
        done = dry_run(Path(folder), "jobset", "manifest", *TRAIN, **{key: value})
    if done.status:
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
        assert f": {key}: " in done.err
    else:
        assert re.fullmatch(r"[a-zA-Z0-9._/:@-]+", value)


def test_the_example_names_every_setting_and_is_refused_until_it_is_filled_in():
    example = ROOT / "launch" / "settings.example.toml"
    names = re.findall(r"^(\w+) =", example.read_text(), re.MULTILINE)
    assert names == [name for name in Settings.__dataclass_fields__ if name != "file"]
    assert set(SETTINGS) <= set(names)
    done = launch("--settings", str(example), "queued", "up", *TRAIN)
    assert done.err.endswith("not filled in: project, zone, bucket\n")


def test_the_documented_commands_are_understood(tmp_path):
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    lines = [line for page in pages for line in page.read_text().replace("\\\n", " ").splitlines()]
    given = [shlex.split(line, comments=True) for line in lines if line.startswith("python -m launch ")]
    assert {words[3] for words in given} >= set(ROADS) - {"instances"}
    settings = ("--dry-run", "--settings", settings_file(tmp_path))
    for words in given:
        done = launch(*settings, *[word for word in words[3:] if word != "--dry-run"])
        assert (done.status, done.err) == (0, ""), words


def test_help_names_every_road_and_action():
    text = launch("--help").out
    assert [road for road in ROADS if f"\n  {road} " not in text] == []
    assert [action for road in ROADS.values() for action in road.actions if f"\n  {action} " not in text] == []


def test_what_is_shown_can_be_read_back_as_a_manifest(tmp_path):
    done = dry_run(tmp_path, "jobset", "manifest", *TRAIN)
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(done.out) == json.loads(done.out)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--config", "configs/none.py"], "configs/none.py: no such config file"),
        (["--config", "configs/demo.py", "--config.stepz=3"], "config.stepz: no such key"),
        (["--config", "configs/demo.py", "--config.data.rows=x"], "config.data.rows: "),
        (["--config", "configs/demo.py", "--fast"], "--fast"),
        ([], "--config"),
        (["--config", "RECIPE"], "is outside of"),
    ],
)
def test_a_mistake_in_the_training_command_costs_no_slice(given, message, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "mine.py"
    recipe.write_text("from navil_jax.config import Config\n\n\ndef get_config():\n    return Config()\n")
    monkeypatch.chdir(tmp_path)
    words = [word.replace("RECIPE", str(recipe)) for word in given]
    settings = settings_file(tmp_path)
    command = ["--dry-run", "--settings", settings, "queued", "up", "--", "python", "-m", "navil_jax.train", *words]
    assert main(command) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_command_that_trains_nothing_and_a_good_recipe_are_not_refused():
    check_training(["ls"])
    check_training(["python", "-m", "navil_jax.train", "--config", "configs/demo.py", "--config.steps=2"])
    check_training(["env", "A=b", "python", "-m", "navil_jax.train", "--help"])
